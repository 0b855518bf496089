"""Project quotas of ext4 and XFS, by ioctl and quotactl_fd(2): a directory tree that cannot hold more than its limit.

Sources: linux/fs.h (struct fsxattr), linux/quota.h (struct if_dqblk, block limits in units of 1 KiB). A directory with
the project and its inheritance bit shows the limit as the size of its filesystem.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev.errors import BlockdevError

_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_FSXATTR = struct.Struct("=IIIII8x")
_PROJINHERIT = 0x200
_QUOTACTL_FD = 443
_GETQUOTA, _SETQUOTA, _PROJECT = 0x800007, 0x800008, 2
_DQBLK = struct.Struct("=8QI4x")
_BLOCK_LIMITS = 1
_UNIT = 1024
_libc = ctypes.CDLL(None, use_errno=True)


class QuotaUnavailable(BlockdevError):
    """The filesystem keeps no project quotas."""

    def __init__(self, path: str, why: str, *, instead: str = "") -> None:
        self.why = why
        super().__init__(
            f"{path} lies on a filesystem without enforced project quotas ({why}); mount it with prjquota (ext4: "
            f"made with -O quota,project as well){instead}"
        )


@dataclass(frozen=True, kw_only=True)
class Quota:
    """Bytes; `limit` 0 is none. `files`: how many inodes count for it."""

    limit: int
    used: int
    files: int = 0


def assign(path: str, project: int) -> None:
    """The empty directory `path`, and all that will be made in it, belongs to `project`. QuotaUnavailable."""
    with _opened(path) as fd:
        buffer = bytearray(_FSXATTR.size)
        try:
            fcntl.ioctl(fd, _FSGETXATTR, buffer)
            flags, extent, extents, _project, cow = _FSXATTR.unpack(buffer)
            fcntl.ioctl(fd, _FSSETXATTR, _FSXATTR.pack(flags | _PROJINHERIT, extent, extents, project, cow))
        except OSError as error:
            raise _explained(path, error) from error


def project_of(path: str) -> int:
    """The project of a directory; 0 for none, also where the filesystem knows no projects."""
    with _opened(path) as fd:
        return project_at(fd)


def project_at(fd: int) -> int:
    """The same for an open file or directory."""
    buffer = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(fd, _FSGETXATTR, buffer)
    except OSError:
        return 0
    return int(_FSXATTR.unpack(buffer)[3])


def limit(path: str, project: int, size: int) -> None:
    """All files of `project` on the filesystem of `path` together hold `size` bytes at most; 0 lifts the limit."""
    blocks = -(-size // _UNIT)
    block = _DQBLK.pack(blocks, blocks, 0, 0, 0, 0, 0, 0, _BLOCK_LIMITS)
    with _opened(path) as fd:
        _control(path, fd, _SETQUOTA, project, bytearray(block))


def read(path: str, project: int) -> Quota:
    """The limit of a project, and what its files hold; of one that XFS has never heard of, nothing."""
    buffer = bytearray(_DQBLK.size)
    with _opened(path) as fd:
        try:
            _control(path, fd, _GETQUOTA, project, buffer)
        except FileNotFoundError:
            return Quota(limit=0, used=0)
    hard, _soft, used, _hard_files, _soft_files, files, *_rest = _DQBLK.unpack(buffer)
    return Quota(limit=hard * _UNIT, used=used, files=files)


def prove_enforced(path: str, size: int) -> None:
    """QuotaUnavailable unless the directory `path` shows its limit as its size: some kernels count and never refuse."""
    facts = os.statvfs(path)
    if facts.f_blocks * facts.f_frsize > size + 2 * facts.f_frsize:
        raise QuotaUnavailable(path, "it counts, but does not enforce")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _control(path: str, fd: int, command: int, project: int, buffer: bytearray) -> None:
    address = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    number = (command << 8) | _PROJECT
    if _libc.syscall(_QUOTACTL_FD, fd, ctypes.c_uint(number), ctypes.c_uint(project), address) < 0:
        code = ctypes.get_errno()
        raise _explained(path, OSError(code, os.strerror(code)))


def _explained(path: str, error: OSError) -> BlockdevError | OSError:
    if error.errno in (errno.ESRCH, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTBLK):
        return QuotaUnavailable(path, str(error.strerror))
    return OSError(error.errno, error.strerror, path)
