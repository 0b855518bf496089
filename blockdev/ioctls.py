"""ioctls on block nodes and mounted filesystems, one function each.

Numbers come from linux/fs.h, linux/ext4.h and xfs_fs.h and are those of x86-64 and arm64.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_BLKROGET, _BLKGETSIZE64, _BLKPG, _DEL_PARTITION = 0x125E, 0x80081272, 0x1269, 2
_EXT4_IOC_RESIZE_FS = 0x40086610
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_NOATIME_FL = 0x80086601, 0x40086602, 0x80
_XFS_IOC_FSGROWFSDATA, _XFS_IOC_FSGEOMETRY_V1 = 0x4010586E, 0x80705864


@contextmanager
def opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor that is closed with the block. Nothing is waited for: OSError (ENODEV) for a FIFO, which somebody
    has put in the place of something else."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise OSError(errno.ENODEV, "no file and no device", path)
        yield fd
    finally:
        os.close(fd)


def keep_no_access_times(directory: str) -> bool:
    """Reading what is made in the directory from now on writes nothing, so that no reader waits for a journal. Whether
    the filesystem takes it; what is there already stays as it is."""
    try:
        with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
            flags = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(4)))[0]
            if not flags & _FS_NOATIME_FL:
                fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", flags | _FS_NOATIME_FL))
    except OSError:
        return False
    return True


def is_block(path: str) -> bool:
    """Whether `path` is a block node; False where nothing is."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def same_node(one: str, other: str) -> bool:
    """Whether two paths are nodes of the same block device now."""
    try:
        first, second = os.stat(one), os.stat(other)
    except FileNotFoundError:
        return False
    return stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode) and first.st_rdev == second.st_rdev


def size_bytes(path: str) -> int:
    """Size of a block node or of a regular file, in bytes."""
    with opened(path) as fd:
        return bytes_of(fd)


def bytes_of(fd: int) -> int:
    """The same of an open descriptor."""
    facts = os.fstat(fd)
    if not stat.S_ISBLK(facts.st_mode):
        return facts.st_size
    return int(struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])


def is_read_only(path: str) -> bool:
    """Whether the kernel refuses writes to a block node (BLKROGET); both Kata shims ask this."""
    with opened(path) as fd:
        return bool(struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])


def forget_partition(fd: int, number: int) -> None:
    """The kernel forgets a partition of the disk that `fd` is open on, whatever is in its table (BLKPG). OSError EBUSY
    while it is in use."""
    partition = ctypes.create_string_buffer(struct.pack("qqi64s64s4x", 0, 0, number, b"", b""))
    argument = struct.pack("iiiP", _DEL_PARTITION, 0, len(partition.raw) - 1, ctypes.addressof(partition))
    fcntl.ioctl(fd, _BLKPG, argument)


def ext4_resize(fd: int, blocks: int) -> None:
    """Grow the mounted ext4 that `fd` lies on to `blocks` filesystem blocks (EXT4_IOC_RESIZE_FS)."""
    fcntl.ioctl(fd, _EXT4_IOC_RESIZE_FS, struct.pack("Q", blocks))


def xfs_grow(fd: int, blocks: int) -> None:
    """Grow the data section of the mounted XFS that `fd` lies on (XFS_IOC_FSGROWFSDATA).

    imaxpct must be handed back as it is (the third 32-bit word of the geometry's tail), or it changes.
    """
    geometry = fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, bytes(112))
    imaxpct = struct.unpack_from("I", geometry, 28)[0]
    fcntl.ioctl(fd, _XFS_IOC_FSGROWFSDATA, struct.pack("QI4x", blocks, imaxpct))
