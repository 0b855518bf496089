"""Opening by names that somebody else can change: no link is followed, so what is opened is where its path says.

A check of a path says nothing of what the path leads to a moment later. Here the kernel walks (openat2(2), Linux 5.6),
and what it has opened is what is then looked at, bound and attached, by its descriptor alone.
"""

from __future__ import annotations

import os
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
