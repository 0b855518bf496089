"""System calls that Python does not wrap, each with its errno raised as OSError.

Numbers are those of every architecture that Linux gained after the unified tables (mount API, 5.2).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_EMPTY_PATH, AT_RECURSIVE = 0x1000, 0x8000
AT_NO_AUTOMOUNT = 0x800
AT_SYMLINK_NOFOLLOW = 0x100
AT_STATX_DONT_SYNC = 0x4000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC, MS_NOSYMFOLLOW = 32, 64, 128, 256
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_MOVE, MS_REC = 1024, 2048, 4096, 8192, 16384
MS_PRIVATE, MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 18, 1 << 21, 1 << 24, 1 << 25

MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_OPENAT2 = 437
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16
_OPEN_TREE_CLONE = 1
_RENAME_EXCHANGE = 2
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_NOSYMFOLLOW = 0x200000  # Linux 5.14

_STATX_ATTR_MOUNT_ROOT = 0x2000
_STATX_MNT_ID = 0x1000
_STATX_BASIC = 0x7FF


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _check(result: int, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None) -> None:
    """mount(2)."""
    _check(_libc.mount(_bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data)), target)


def umount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2)."""
    _check(_libc.umount2(_bytes(target), flags), target)


def exchange(one: str, other: str) -> None:
    """Both names change places, in one step: renameat2(2) with RENAME_EXCHANGE."""
    _check(_libc.renameat2(AT_FDCWD, _bytes(one), AT_FDCWD, _bytes(other), ctypes.c_uint(_RENAME_EXCHANGE)), other)


def fsopen(fstype: str) -> int:
    """A file descriptor for a filesystem that is still to be described."""
    return _check(_libc.syscall(_FSOPEN, _bytes(fstype), ctypes.c_uint(1)), fstype)


def fsconfig_set(fd: int, key: str, value: str | None) -> None:
    """Set one option; a value of None makes it a flag."""
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    _check(_libc.syscall(_FSCONFIG, fd, command, _bytes(key), _bytes(value), 0), key)


def fsconfig_create(fd: int) -> None:
    """Read or make the superblock."""
    _check(_libc.syscall(_FSCONFIG, fd, _FSCONFIG_CMD_CREATE, None, None, 0))


def fsmount(fd: int, attributes: int) -> int:
    """A mount that hangs nowhere; it is gone when the descriptor is closed."""
    return _check(_libc.syscall(_FSMOUNT, fd, 1, ctypes.c_uint(attributes)))


def fs_messages(fd: int) -> str:
    """What the kernel said about the filesystem, for a person."""
    lines = []
    while True:
        try:
            lines.append(os.read(fd, 4096).decode("utf-8", "replace").strip())
        except OSError:
            return "; ".join(lines)


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def mount_setattr(fd: int, attributes: int, *, propagation: int = 0, recursive: bool = False) -> None:
    """Set attributes of the mount that `fd` stands for (Linux 5.12), and how mounts below it propagate: MS_PRIVATE and
    its like, 0 for as before. `recursive`: of all mounts below it, too."""
    wanted = _MountAttr(set=attributes, propagation=propagation)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(_libc.syscall(_MOUNT_SETATTR, fd, b"", flags, ctypes.byref(wanted), ctypes.sizeof(wanted)))


def open_tree_clone(source: str | int) -> int:
    """A detached bind mount of a path, or of what a descriptor stands for, as open_tree(2) makes it."""
    at, path, flags = (AT_FDCWD, source, 0) if isinstance(source, str) else (source, "", AT_EMPTY_PATH)
    return _check(_libc.syscall(_OPEN_TREE, at, _bytes(path), _OPEN_TREE_CLONE | os.O_CLOEXEC | flags), path)


def move_mount(fd: int, target: str) -> None:
    """Hang a detached mount at `target`; it appears there whole."""
    _check(_libc.syscall(_MOVE_MOUNT, fd, b"", AT_FDCWD, _bytes(target), _MOVE_MOUNT_F_EMPTY_PATH), target)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2), Linux 5.6: an existing file by a path that `resolve` bounds. EXDEV, ELOOP, or EAGAIN for a race."""
    how = _OpenHow(flags=flags | os.O_CLOEXEC, resolve=resolve)
    return _check(_libc.syscall(_OPENAT2, directory, _bytes(path), ctypes.byref(how), ctypes.sizeof(how)), path)


FALLOC_FL_KEEP_SIZE, FALLOC_FL_UNSHARE_RANGE = 0x01, 0x40
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2) with flags, which `os.posix_fallocate` has not."""
    _check(_libc.fallocate(fd, mode, offset, size), "")


DT_UNKNOWN, DT_DIR = 0, 4
_DIRENT = struct.Struct("=QqHB")
_ENTRIES = 32768


def entries(directory: int, most: int = _ENTRIES) -> list[tuple[str, int, int]]:
    """Some of a directory's entries (`most` bytes of them), from the descriptor's position on: names, types, and the
    position after each, to which lseek(2) comes back from any descriptor of the directory. Empty at the end. `.` and
    `..` are among them."""
    buffer = ctypes.create_string_buffer(most)
    _libc.getdents64.restype = ctypes.c_ssize_t
    length = _check(_libc.getdents64(directory, buffer, ctypes.c_size_t(most)))
    found, at, raw = [], 0, buffer.raw
    while at < length:
        _inode, position, size, kind = _DIRENT.unpack_from(raw, at)
        start = at + _DIRENT.size
        found.append((os.fsdecode(raw[start : raw.index(0, start)]), kind, position))
        at += size
    return found


class _Statx(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("_owner", ctypes.c_uint32 * 3),
        ("mode", ctypes.c_uint16),
        ("_pad1", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("_times", ctypes.c_uint64 * 8),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("mnt_id", ctypes.c_uint64),
        ("_spare", ctypes.c_uint64 * 13),
    ]


@dataclass(frozen=True, kw_only=True)
class PathFacts:
    """What one statx(2) tells of a path."""

    is_mount_root: bool
    mount_id: int
    device: tuple[int, int]
    inode: int
    is_link: bool


def statx(path: str) -> PathFacts:
    """One path, without following a link, waking an automount or asking a server (Linux 5.8 tells mount roots).

    Raises OSError. The cost does not grow with the number of mounts, which is why nothing on the way of
    publish reads the mount table.
    """
    buffer = _Statx()
    flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC
    _check(_libc.statx(AT_FDCWD, _bytes(path), flags, _STATX_BASIC | _STATX_MNT_ID, ctypes.byref(buffer)), path)
    return PathFacts(
        is_mount_root=bool(buffer.attributes & _STATX_ATTR_MOUNT_ROOT),
        mount_id=buffer.mnt_id,
        device=(buffer.dev_major, buffer.dev_minor),
        inode=buffer.ino,
        is_link=stat.S_ISLNK(buffer.mode),
    )
