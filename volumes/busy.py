"""A recovery never meets a creation, a deletion or a copy that is under way, also not one of another process; and it
keeps none waiting but that of the volume which it puts right."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator

from blockdev import durable, flocks
from volumes.errors import StoreFailed, VolumeUnfinished

# Seconds.
_PATIENCE = 5.0
_STEP = 0.005


def of_volume(name: str) -> str:
    """Under which somebody is at work on the volume of that name."""
    return f"volume {name}"


class Busy:
    """One file, of which every name has a byte to lock: whoever is at work on it has the byte.

    Open file description locks (fcntl(2)), so that threads exclude each other as processes do, and no disk need have
    room for a file a lock.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @contextlib.contextmanager
    def __call__(self, what: str, *, seconds: float = _PATIENCE) -> Iterator[None]:
        """Alone at work on `what`. VolumeUnfinished where somebody else is for so many seconds; StoreFailed where
        nothing can be written."""
        try:
            durable.make_directories(os.path.dirname(self._path), 0o700)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreFailed(f"{self._path} cannot be locked: {error.strerror}") from error
        at = int.from_bytes(hashlib.blake2b(os.fsencode(what), digest_size=7).digest(), "big")
        try:
            until = time.monotonic() + seconds
            while not flocks.byte(fd, at, fcntl.F_WRLCK):
                if time.monotonic() >= until:
                    raise VolumeUnfinished(f"another call, or another process, is at work on {what}; ask again")
                time.sleep(_STEP)
            yield
        finally:
            # Said, not left to close(2): a child between fork and exec has a copy of the descriptor.
            flocks.byte(fd, at, fcntl.F_UNLCK)
            os.close(fd)
