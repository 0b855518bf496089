"""Sparse files: where their data lies, and copying no more than that."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from blockdev.ioctls import opened, size_bytes

_CHUNK = 64 << 10


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) in bytes of what a file of this size has on its disk; a block device is data all over."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        yield 0, size
        return
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def copy_written(source: str, target: str, progress: Callable[[int], object] | None = None) -> int:
    """Copy what is not zero; the bytes written. `target` reads as zeros elsewhere, and is on the disk afterwards."""
    zeros, written = bytes(_CHUNK), 0
    with opened(source) as reader, opened(target, os.O_RDWR) as writer:
        for start, end in extents(reader, size_bytes(source)):
            for at in range(start // _CHUNK * _CHUNK, end, _CHUNK):
                chunk = os.pread(reader, _CHUNK, at)
                if chunk != zeros[: len(chunk)]:
                    written += os.pwrite(writer, chunk, at)
                if progress is not None:
                    progress(at)
        os.fsync(writer)
    return written
