"""Blocks of a file that other files have as well (reflinks), by FIEMAP of linux/fiemap.h, and making them its own."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from blockdev import sparse, syscalls

_FIEMAP = 0xC020660B
_HEAD, _EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")
_LAST, _SHARED = 0x1, 0x2000
# The extent has no place on the disk, or is not all of what lies there: unknown, delayed, encoded, inside a block.
_NOWHERE = 0x2 | 0x4 | 0x8 | 0x100 | 0x200
_END = 1 << 63
_PART = 512
# A guest may cut its file into millions of pieces; what is not looked at counts as shared.
_MOST = 100_000
# Pieces of a file that are told apart.
_PIECES = 2048
_CHUNK = 4 << 20
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, eq=False)
class Shared:
    """Blocks of one file that another file has too: `total` bytes of them.

    `pieces`: where they lie on the disk, the first byte of each piece and the first one behind it in turn; `rest`:
    between which two bytes all lie that are not among the pieces.
    """

    total: int = 0
    pieces: array[int] = field(default_factory=lambda: array("Q"))
    rest: tuple[int, int] = (0, 0)


def look(path: str) -> Shared:
    """What the file shares; nothing on a filesystem that shares no blocks. OSError, for what is no regular file as
    well, which is not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EUCLEAN, "it is no regular file", path)
        return _look(fd)
    finally:
        os.close(fd)


def _look(fd: int) -> Shared:
    at = seen = total = 0
    low, high, pieces = _END, 0, array("Q")
    size = os.fstat(fd).st_size
    buffer = bytearray(_HEAD.size + _PART * _EXTENT.size)
    while seen < _MOST:
        _HEAD.pack_into(buffer, 0, at, (1 << 63) - 1 - at, 0, 0, _PART, 0)
        try:
            fcntl.ioctl(fd, _FIEMAP, buffer, True)
        except OSError as error:
            if error.errno in _CANNOT:
                return Shared()
            raise
        count = flags = _HEAD.unpack_from(buffer, 0)[3]
        for logical, physical, length, _, _, flags, *_ in _extents(buffer, count):
            at = logical + length
            if not flags & _SHARED:
                continue
            total += length
            start, end = (0, _END) if flags & _NOWHERE else (physical, physical + length)
            if flags & _NOWHERE or len(pieces) >= 2 * _PIECES:
                low, high = min(low, start), max(high, end)
            else:
                pieces.extend((start, end))
        if count == 0 or flags & _LAST:
            return Shared(total, pieces, (low, max(low, high)))
        seen += count
    return Shared(total + max(0, size - at), pieces, (0, _END))


def _extents(buffer: bytearray, count: int) -> Iterator[tuple[int, ...]]:
    return _EXTENT.iter_unpack(memoryview(buffer)[_HEAD.size : _HEAD.size + count * _EXTENT.size])


def unshare(fd: int, size: int) -> None:
    """The file has `size` bytes of blocks, all its own. OSError, ENOSPC among it."""
    try:
        syscalls.fallocate(fd, syscalls.FALLOC_FL_UNSHARE_RANGE, 0, size)
        return
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    os.posix_fallocate(fd, 0, size)
    if _look(fd).total == 0:
        return
    for start, end in sparse.extents(fd, size):  # written again, they are new ones
        for at in range(start, end, _CHUNK):
            chunk = os.pread(fd, min(_CHUNK, end - at), at)
            os.pwrite(fd, chunk, at)
