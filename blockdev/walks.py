"""A walk through a tree whose names somebody may change at any moment: a pod that runs, a share's other users.

Every directory is opened by one name on its parent's descriptor, never through a link and never across a mount, and the
way back is the kernel's `..`, believed only if it is the directory that the walk came from. Two descriptors are open at
a time, however deep the tree is, and nothing is called recursively.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What a name answers that was taken away, or given to something else, since it was read.
CHANGED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


@dataclass(kw_only=True)
class _Level:
    """A directory on the way down.

    Who it is, the name it was entered by, and its directories that are still to come.
    """

    identity: tuple[int, int]
    name: str
    waiting: list[str] = field(default_factory=list)


def directories(root: int) -> Iterator[int]:
    """A descriptor of every directory below the directory descriptor `root`, itself first, open until the next is asked
    for.

    A directory that moves away while the walk is in it ends the walk's stay there; nothing outside of `root` is
    entered.
    """
    here = os.open(".", _OPEN, dir_fd=root)
    try:
        levels = [_Level(identity=_identity(here), name="")]
        device = levels[0].identity[0]
        yield here
        levels[0].waiting = _directories_in(here)
        while levels:
            if not levels[-1].waiting:
                levels.pop()
                if levels:
                    here = _back(here, root, levels)
                continue
            name = levels[-1].waiting.pop()
            below = _enter(here, name, device)
            if below is None:
                continue
            os.close(here)
            here = below
            levels.append(_Level(identity=_identity(here), name=name))
            yield here
            levels[-1].waiting = _directories_in(here)
    finally:
        os.close(here)


def _identity(fd: int) -> tuple[int, int]:
    facts = os.fstat(fd)
    return facts.st_dev, facts.st_ino


def _directories_in(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _enter(parent: int, name: str, device: int) -> int | None:
    """The directory `name`; None if it is gone, is a link by now, or lies on another filesystem."""
    try:
        fd = os.open(name, _OPEN, dir_fd=parent)
    except OSError as error:
        if error.errno in CHANGED:
            return None
        raise
    if os.fstat(fd).st_dev != device:
        os.close(fd)
        return None
    return fd


def _back(here: int, root: int, levels: list[_Level]) -> int:
    """The parent, which is `levels[-1]`.

    Or the nearest directory above it that is still where it was. Closes `here`.
    """
    with contextlib.suppress(OSError):
        fd = os.open("..", _OPEN, dir_fd=here)
        if _identity(fd) == levels[-1].identity:
            os.close(here)
            return fd
        os.close(fd)
    os.close(here)
    fd = os.open(".", _OPEN, dir_fd=root)
    for depth, level in enumerate(levels[1:], 1):
        below = _enter(fd, level.name, levels[0].identity[0])
        if below is None or _identity(below) != level.identity:
            if below is not None:
                os.close(below)
            del levels[depth:]
            return fd
        os.close(fd)
        fd = below
    return fd
