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
from blockdev.errors import NotRemoved, PathTooLong, TooDeep

# Names of directories that are kept in mind for one level, so that a wide one need not be read anew for each of them,
# and for all levels together.
_AHEAD, _AHEAD_IN_ALL = 1000, 100_000
_MOMENT = 0.01
# Names that a walk holds of one directory at a time: a pod makes millions of them.
_PART = 10_000
# Levels of directories, one in another, that are gone through: each is kept in mind.
_DEEPEST = 100_000
# Of one directory at least so many at a time, however many are held of others: each part costs a look at it.
_FEWEST = 16
# Bytes of one look, and what a name takes of them.
_SMALLEST_READ, _LARGEST_READ, _PER_NAME = 1024, 32768, 48
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


def remove_content(fd: int, name: str, deadline: Deadline) -> None:
    """Nothing is in the directory `fd`, called `name` in errors; the descriptor is closed. NotRemoved; WaitExpired."""
    _empty(fd, name, deadline)


def walk(root: int, what: str, deadline: Deadline, *, longest: int = 0) -> Iterator[tuple[int, list[str], list[str]]]:
    """Every directory of the tree below the directory descriptor `root`, itself first.

    A descriptor of it, which is good until the next step, the names of the directories in it, and all its other names.
    A name may mean something else already when it is used. Mounts are not entered, nor what root may not look into. A
    directory of very many entries comes in parts, between which its directories are walked. WaitExpired, naming `what`;
    TooDeep; PathTooLong for a directory whose path from here has more than `longest` bytes, unless that is 0.
    """
    place = _Place(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root))
    try:
        while True:
            deadline.check(what)
            level = place.level
            if level.ahead:
                _entered(place, place.next())
                if place.depth > _DEEPEST:
                    raise TooDeep(what, _DEEPEST)
                if longest and place.bytes > longest:
                    raise PathTooLong(what, place.path, longest)
            elif not level.read:
                directories, others = _part(place.here, level, max(_FEWEST, min(_PART, _AHEAD_IN_ALL - place.ahead)))
                if directories or others or level.read:
                    yield place.here, directories, others
                place.keep(directories[::-1])
            elif place.up() is None:
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


@dataclass(slots=True)
class _Level:
    """A directory on the way. `ahead`: names of directories in it that are still to be gone into. `position`: how far
    it was read, `read` to its end."""

    name: str
    identity: tuple[int, int]
    ahead: list[str] = field(default_factory=list)
    position: int = 0
    read: bool = False


class _Place:
    """Where in a tree the one descriptor is. Takes over the descriptor of the tree's top."""

    def __init__(self, top: int) -> None:
        self._top, self.here = top, top
        # Names ahead in all levels together.
        self.ahead = 0
        self._levels = [_Level("", _identity(top))]

    @property
    def level(self) -> _Level:
        return self._levels[-1]

    @property
    def depth(self) -> int:
        return len(self._levels)

    @property
    def path(self) -> str:
        """From the top."""
        return "/".join(level.name for level in self._levels[1:])

    @property
    def bytes(self) -> int:
        """Of that path."""
        return sum(len(os.fsencode(level.name)) + 1 for level in self._levels[1:])

    def keep(self, names: list[str]) -> None:
        """Directories in this one that are still to be gone into, the last one first."""
        self.level.ahead = names
        self.ahead += len(names)

    def next(self) -> str:
        """The next of them."""
        self.ahead -= 1
        return self.level.ahead.pop()

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

    def raise_to_top(self) -> None:
        """Put this directory, which is deep inside, at the top of the tree, and go to the one that it was in."""
        name = self.level.name
        if self.up() == name:
            with contextlib.suppress(OSError):  # it is somewhere else by now, or stays: it is found again
                os.rename(name, f"raised-{os.urandom(16).hex()}", src_dir_fd=self.here, dst_dir_fd=self._top)

    def _come_again(self) -> None:
        self._go(self._top)
        for number, level in enumerate(self._levels[1:], 1):
            fd = _stepped_into(self.here, level.name)
            if fd is not None and _identity(fd) == level.identity:
                self._go(fd)
                continue
            if fd is not None:
                os.close(fd)
            self.ahead -= sum(len(gone.ahead) for gone in self._levels[number:])
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
    place = _Place(fd)
    try:
        while True:
            deadline.check(f"removing {name}")
            if not place.level.ahead:
                place.keep(_dropped(place.here, max(1, min(_AHEAD, _AHEAD_IN_ALL - place.ahead)), name, deadline))
            if place.level.ahead:
                inner = place.next()
                with _explained(inner):
                    if place.down(inner, forced=True) and place.depth > _DEEPEST:
                        place.raise_to_top()
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
            # A file by now. Whoever changes it all the time is waited for by nobody: what stays is found again.
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(name, dir_fd=directory)
            return


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


def _part(directory: int, level: _Level, limit: int) -> tuple[list[str], list[str]]:
    """The next names of directories, `limit` of them at most, and of all else; the level knows how far it was read."""
    directories: list[str] = []
    others: list[str] = []
    os.lseek(directory, level.position, os.SEEK_SET)
    size = min(_LARGEST_READ, max(_SMALLEST_READ, limit * _PER_NAME))
    while True:
        some = syscalls.entries(directory, size)
        if not some:
            level.read = True
            return directories, others
        for name, kind, position in some:
            level.position = position
            if name in (".", ".."):
                continue
            (directories if _is_directory(directory, name, kind) else others).append(name)
            if len(directories) == limit or len(directories) + len(others) == _PART:
                return directories, others


def _is_directory(directory: int, name: str, kind: int) -> bool:
    if kind != syscalls.DT_UNKNOWN:
        return kind == syscalls.DT_DIR
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False  # gone, or nothing that can be gone into


def _identity(fd: int) -> tuple[int, int]:
    facts = os.fstat(fd)
    return facts.st_dev, facts.st_ino
