"""Room that is kept for what has to work on a full disk: taking things away.

Everything that removes something writes first (a row, a record, a name), which a full disk refuses. So a few blocks are
kept by a file that is given up then, and by blocks beyond the end of a file that grows (fallocate(2) with
FALLOC_FL_KEEP_SIZE), where a pod that fills the disk cannot take them in the moment in between.
"""

from __future__ import annotations

import contextlib
import os

from blockdev import syscalls

# A disk with less free room than so many times what is kept is left alone, unless the caller says another number.
_TIMES = 16


def keep_beyond(path: str, size: int) -> None:
    """The file can grow to `size` bytes whatever else happens on its disk, where that can be kept."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            syscalls.fallocate(fd, syscalls.FALLOC_FL_KEEP_SIZE, 0, size)
        finally:
            os.close(fd)


def has_room(directory: str, size: int, times: int = _TIMES) -> bool:
    """Whether its disk has so much more free than that, that nobody misses it."""
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize >= times * size


class Reserve:
    """The file `path`, of so many bytes. Callers that have something of their own to say of a failure go on without."""

    def __init__(self, path: str, size: int, *, times: int = _TIMES) -> None:
        self._path, self._size, self._times = path, size, times

    def keep(self) -> None:
        """The file is there and has its room, if the disk has room to spare. No error: it is wanted on disks that have.
        What a killed process has begun is made whole: what is too small keeps nothing."""
        with contextlib.suppress(OSError):
            if self._is_kept() or not has_room(os.path.dirname(self._path), self._size, self._times):
                return
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._size)
            except OSError:
                os.unlink(self._path)
            finally:
                os.close(fd)

    def _is_kept(self) -> bool:
        """A file gets its size with its room, or after it."""
        try:
            return os.lstat(self._path).st_size >= self._size
        except FileNotFoundError:
            return False

    def give_up(self) -> bool:
        """What was kept is free; False where nothing was."""
        try:
            kept = os.lstat(self._path).st_blocks > 0
            os.unlink(self._path)
        except OSError:
            return False
        return kept
