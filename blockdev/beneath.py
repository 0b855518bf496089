"""Opening by names that somebody else can change: no link is followed, so what is opened is where its path says.

A check of a path says nothing of what the path leads to a moment later. Here the kernel walks (openat2(2), Linux 5.6),
and what it has opened is what is then looked at, bound and attached, by its descriptor alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from blockdev import syscalls

_NO_LINKS = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS


@contextmanager
def opened(path: str, flags: int = os.O_PATH, *, root: str = "/") -> Iterator[int]:
    """A descriptor of the absolute `path`, reached from the directory `root` through mounts, but through no link.

    `root` itself is opened as it is named. OSError: ELOOP for a link on the way or at the end, EXDEV for a path that
    leaves `root`. O_PATH opens nothing of what it finds, so that a FIFO or a device can be looked at.
    """
    within = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = syscalls.openat2(within, os.path.relpath(path, root), flags | os.O_CLOEXEC, _NO_LINKS)
    finally:
        os.close(within)
    try:
        yield fd
    finally:
        os.close(fd)


def same(one: int, other: int) -> bool:
    """Whether two descriptors stand for one inode."""
    return os.path.samestat(os.fstat(one), os.fstat(other))


def regular(directory: int, name: str, access: int = os.O_RDONLY) -> int | None:
    """A descriptor of the file `name` of a directory; None for anything but a regular file, which is not
    opened: a FIFO would be waited for, a device would do something, a link leads elsewhere. OSError where it is not
    there, or another's lease is on it."""
    held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(held).st_mode):
            return None
        return os.open(f"/proc/self/fd/{held}", access | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(held)
