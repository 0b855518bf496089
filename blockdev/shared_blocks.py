"""Blocks of a file that other files have as well (reflinks), by FIEMAP of linux/fiemap.h, and making them its own."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from blockdev import sparse, syscalls

_FIEMAP = 0xC020660B
_HEAD, _EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")
_LAST, _SHARED = 0x1, 0x2000
_PART = 512
# A guest may cut its file into millions of pieces; what is not looked at counts as shared.
_MOST = 100_000
_CHUNK = 4 << 20
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)


def shared_bytes(path: str) -> int:
    """Bytes of the file's blocks that another file has too; none on a filesystem that shares no blocks. OSError, for
    what is no regular file as well, which is not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no regular file", path)
        return _shared(fd)
    finally:
        os.close(fd)


def _shared(fd: int) -> int:
    at = seen = shared = 0
    size = os.fstat(fd).st_size
    buffer = bytearray(_HEAD.size + _PART * _EXTENT.size)
    while seen < _MOST:
        _HEAD.pack_into(buffer, 0, at, (1 << 63) - 1 - at, 0, 0, _PART, 0)
        try:
            fcntl.ioctl(fd, _FIEMAP, buffer, True)
        except OSError as error:
            if error.errno in _CANNOT:
                return 0
            raise
        count = _HEAD.unpack_from(buffer, 0)[3]
        if count == 0:
            return shared
        for number in range(count):
            logical, _physical, length, _, _, flags, *_ = _EXTENT.unpack_from(
                buffer, _HEAD.size + number * _EXTENT.size
            )
            at = logical + length
            shared += length if flags & _SHARED else 0
            if flags & _LAST:
                return shared
        seen += count
    return shared + max(0, size - at)


def unshare(fd: int, size: int) -> None:
    """The file has `size` bytes of blocks, all its own. OSError, ENOSPC among it."""
    try:
        syscalls.fallocate(fd, syscalls.FALLOC_FL_UNSHARE_RANGE, 0, size)
        return
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    os.posix_fallocate(fd, 0, size)
    if _shared(fd) == 0:
        return
    for start, end in sparse.extents(fd, size):  # written again, they are new ones
        for at in range(start, end, _CHUNK):
            chunk = os.pread(fd, min(_CHUNK, end - at), at)
            os.pwrite(fd, chunk, at)
