"""Directory trees that a pod has written: removed, and walked, without believing a single name.

A pod nests directories as deep as it likes, swaps names while it is looked at, and leaves links, FIFOs and nodes. So
one descriptor goes through the tree, a component at a time: down by openat2(2), which follows no link, crosses no mount
and opens directories only; up by `..`, believed only if it leads to the inode that was come from. Nothing recurses, the
open descriptors are few at any depth, and what is neither file nor directory is only ever named.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from blockdev import syscalls
from blockdev.deadlines import Deadline
from blockdev.errors import NotRemoved

# Names of directories that are kept in mind for one level, so that a wide one need not be read anew for each of them,
# and for all levels together.
_AHEAD, _AHEAD_IN_ALL = 1000, 100_000
_MOMENT = 0.01
# Names of files that a walk holds at a time: a pod makes millions of them in one directory.
_PART = 10_000
# What a name answers that was taken away, or given to something else, since it was read.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


def remove(parent: int | str, name: str, deadline: Deadline) -> None:
    """Nothing is at `name` in the directory `parent`, a path or a descriptor, whatever it was.

    May be repeated, and goes on where an earlier call ended. NotRemoved, with the name that stays; WaitExpired.
    """
    top = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if isinstance(parent, str) else os.dup(parent)
    try:
        while not _gone(top, name, ours=False):
            deadline.check(f"removing {name}")
            with _explained(name):
                fd = _stepped_into(top, name, forced=True)
            if fd is not None:
                _empty(fd, name, deadline)
    finally:
        os.close(top)


def walk(root: int, what: str, deadline: Deadline) -> Iterator[tuple[int, list[str], list[str]]]:
    """Every directory of the tree below the directory descriptor `root`, itself first.

    A descriptor of it, which is good until the next step, the names of the directories in it, and all its other names.
    A name may mean something else already when it is used. Mounts are not entered, nor what root may not look into. A
    directory of very many files comes in parts, the one with its directories last. WaitExpired, naming `what`.
    """
    place = _Place(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root))
    try:
        fresh = True
        while True:
            deadline.check(what)
            if fresh:
                directories: list[str] = []
                for directories, others in _named(place.here):
                    yield place.here, directories, others
                place.level.ahead = directories[::-1]
            fresh = False
            while place.level.ahead and not fresh:
                fresh = _entered(place, place.level.ahead.pop())
            if not fresh and place.up() is None:
                return
    finally:
        place.close()


def _entered(place: _Place, name: str) -> bool:
    try:
        return place.down(name)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EACCES, errno.EPERM):
            return False  # a mount, or what a share does not let root look into
        raise


@dataclass
class _Level:
    """A directory on the way. `ahead`: names of directories in it that are still to be gone into."""

    name: str
    identity: tuple[int, int]
    ahead: list[str] = field(default_factory=list)


class _Place:
    """Where in a tree the one descriptor is. Takes over the descriptor of the tree's top."""

    def __init__(self, top: int) -> None:
        self._top, self.here = top, top
        self._levels = [_Level("", _identity(top))]

    @property
    def level(self) -> _Level:
        return self._levels[-1]

    def down(self, name: str, *, forced: bool = False) -> bool:
        """Into the directory `name`; False if it is none any more. EXDEV for a mount."""
        fd = _stepped_into(self.here, name, forced=forced)
        if fd is None:
            return False
        self._go(fd)
        self._levels.append(_Level(name, _identity(fd)))
        return True

    def up(self) -> str | None:
        """Out of this directory, and its name; None at the top. Where it has been moved meanwhile, to the deepest
        directory on the way that is still where it was."""
        if len(self._levels) == 1:
            return None
        left = self._levels.pop()
        if len(self._levels) == 1:
            self._go(self._top)
            return left.name
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_DIRECTORY
            fd = syscalls.openat2(self.here, "..", flags, syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_SYMLINKS)
            if _identity(fd) == self.level.identity:
                self._go(fd)
                return left.name
            os.close(fd)
        self._come_again()
        return left.name

    def _come_again(self) -> None:
        self._go(self._top)
        for number, level in enumerate(self._levels[1:], 1):
            fd = _stepped_into(self.here, level.name)
            if fd is not None and _identity(fd) == level.identity:
                self._go(fd)
                continue
            if fd is not None:
                os.close(fd)
            del self._levels[number:]
            return

    def _go(self, fd: int) -> None:
        if self.here != self._top:
            os.close(self.here)
        self.here = fd

    def close(self) -> None:
        self._go(self._top)
        os.close(self._top)


def _empty(fd: int, name: str, deadline: Deadline) -> None:
    """Nothing is in the directory `fd`, called `name`, which is closed."""
    place, ahead = _Place(fd), 0
    try:
        while True:
            deadline.check(f"removing {name}")
            if not place.level.ahead:
                place.level.ahead = _dropped(place.here, max(1, min(_AHEAD, _AHEAD_IN_ALL - ahead)), name, deadline)
                ahead += len(place.level.ahead)
            if place.level.ahead:
                ahead -= 1
                inner = place.level.ahead.pop()
                with _explained(inner):
                    place.down(inner, forced=True)
                continue
            left = place.up()
            if left is None:
                return
            if not _gone(place.here, left, ours=True):
                time.sleep(_MOMENT)  # somebody writes into it; it is found again when this directory is read once more
    finally:
        place.close()


def _dropped(directory: int, limit: int, name: str, deadline: Deadline) -> list[str]:
    """Remove what can be removed in one step; at most `limit` names of the directories that cannot."""
    left: list[str] = []
    with os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            if count % 1000 == 999:
                deadline.check(f"removing {name}")
            if not _gone(directory, entry.name, ours=True):
                left.append(entry.name)
                if len(left) >= limit:
                    break
    return left


def _gone(directory: int, name: str, *, ours: bool) -> bool:
    """Remove what is at `name`; False for a directory with something in it, which stays. `ours`: `directory` is part of
    what is to go."""
    with _explained(name):
        try:
            _unlinked(directory, name, ours=ours)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
    return True


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """OSError as NotRemoved."""
    try:
        yield
    except OSError as error:
        mounted = {errno.EBUSY: "it is in use, or a filesystem is mounted there",
                   errno.EXDEV: "a filesystem is mounted there"}  # fmt: skip
        raise NotRemoved(name, mounted.get(error.errno or 0) or str(error.strerror)) from error


def _unlinked(directory: int, name: str, *, ours: bool) -> None:
    for call in (os.unlink, os.rmdir):
        try:
            try:
                call(name, dir_fd=directory)
            except PermissionError:
                if not ours:
                    raise
                # A directory may deny its own owner, and root on a share is no more than that.
                os.fchmod(directory, stat.S_IMODE(os.fstat(directory).st_mode) | stat.S_IRWXU)
                call(name, dir_fd=directory)
            return
        except FileNotFoundError:
            return
        except IsADirectoryError:
            continue
        except NotADirectoryError:
            return  # a file by now: the next look finds it


def _stepped_into(directory: int, name: str, *, forced: bool = False) -> int | None:
    """A descriptor of the directory `name`; None if there is none, or it is something else. EXDEV for a mount.

    `forced`: one that its owner has no right to read is given it.
    """
    flags, bounds = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, _WITHIN
    while True:
        try:
            try:
                return syscalls.openat2(directory, name, flags, bounds)
            except PermissionError:
                if not forced:
                    raise
                return _allowed_into(directory, name, flags)
        except OSError as error:
            if error.errno in NOT_THERE:
                return None
            if error.errno != errno.EAGAIN:  # EAGAIN: something was renamed in that moment
                raise


_WITHIN = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV


def _allowed_into(directory: int, name: str, flags: int) -> int:
    """A directory that its owner has no right to read: the owner may give it to himself."""
    held = syscalls.openat2(directory, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, _WITHIN)
    try:
        os.chmod(f"/proc/self/fd/{held}", stat.S_IRWXU)
        return os.open(f"/proc/self/fd/{held}", flags & ~os.O_NOFOLLOW | os.O_CLOEXEC)
    finally:
        os.close(held)


def _named(directory: int) -> Iterator[tuple[list[str], list[str]]]:
    """Names of directories and of all else; of the latter so many at a time."""
    directories: list[str] = []
    others: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            (directories if entry.is_dir(follow_symlinks=False) else others).append(entry.name)
            if len(others) == _PART:
                yield [], others
                others = []
    yield directories, others


def _identity(fd: int) -> tuple[int, int]:
    facts = os.fstat(fd)
    return facts.st_dev, facts.st_ino
