"""A filesystem that never answers: of FUSE, and nobody reads what it is asked."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
_DETACH = 2


@contextlib.contextmanager
def dead(place: Path) -> Iterator[Path]:
    """Mounted there until the block ends; whoever waits for it then gets an error."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("this kernel has no FUSE")
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    if _libc.mount(b"dead", bytes(place), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))
    try:
        yield place
    finally:
        _libc.umount2(bytes(place), _DETACH)
        os.close(fd)
