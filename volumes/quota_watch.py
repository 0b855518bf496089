"""Files that have left their volume's project quota.

The kernel lets whoever owns a file change its project (FS_IOC_FSSETXATTR), with no capability at all, unless he lives
in a user namespace of his own. What he writes then counts for nobody, or for another volume. It cannot be kept from
him; it can be seen.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev import Deadline, beneath, quotas, trees
from blockdev.errors import BlockdevError

log = logging.getLogger("runvol.volumes")

# Seconds between two looks at a volume, and for one.
_EVERY, _LONGEST = 600.0, 600.0
# Files of one look; after so many of them it makes way for others for so many seconds.
_MOST, _STRIDE, _PAUSE = 10_000_000, 200, 0.001
# In the place of a project: the file cannot be opened.
_CLOSED = -1
# What a node has too little of, which says nothing of a file.
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Characters of a name, which a pod has chosen.
_SHOWN = 80


@dataclass(frozen=True)
class Left:
    """How many files do not count for the volume's quota, and one of them."""

    count: int
    first: str

    def __str__(self) -> str:
        return (
            f"files of it do not count for its size any more (one is {self.first[:_SHOWN]!r}): a process of a pod has "
            "given them another project; its writes have no limit, or count for another volume. Give such pods a user "
            "namespace (hostUsers: false)"
        )


@dataclass(frozen=True)
class Unseen:
    """Why it is not known whether all its files count for the volume's quota."""

    why: str

    def __str__(self) -> str:
        return f"whether all its files count for its size is not known: {self.why}"


class QuotaWatch:
    """Looks at one volume after the other, behind whoever asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, Left | Unseen | None] = {}
        self._next: dict[str, float] = {}
        self._waiting: dict[str, tuple[str, int]] = {}
        self._at_work = False

    def left(self, volume_id: str, path: str, project: int) -> Left | Unseen | None:
        """What the last look has found; the next one is begun where it is time for it."""
        with self._lock:
            now = time.monotonic()
            if now > self._next.get(volume_id, 0.0):
                self._next[volume_id] = now + _EVERY
                self._waiting[volume_id] = path, project
                self._be_at_work(volume_id)
            return self._seen.get(volume_id)

    def _be_at_work(self, volume_id: str) -> None:
        """For who has the lock. Where no thread can be started, the next who asks tries it again."""
        if self._at_work:
            return
        try:
            threading.Thread(target=self._work, name="quota watch", daemon=True).start()
        except RuntimeError as error:
            self._next[volume_id] = 0.0
            self._note(volume_id, Unseen(f"no thread can be started ({error})"))
        else:
            self._at_work = True

    def _note(self, volume_id: str, found: Left | Unseen | None) -> None:
        """For who has the lock. That a look did not come to its end takes nothing back of what one has found."""
        if not (isinstance(found, Unseen) and isinstance(self._seen.get(volume_id), Left)):
            self._seen[volume_id] = found

    def forget(self, volume_id: str) -> None:
        """It was deleted."""
        with self._lock:
            for known in (self._seen, self._next, self._waiting):
                known.pop(volume_id, None)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._at_work = False
                    return
                volume_id = next(iter(self._waiting))
                path, project = self._waiting.pop(volume_id)
            found: Left | Unseen | None
            try:
                found = look(path, project)
            except (OSError, BlockdevError) as error:
                log.info("a volume's quota was not looked at", extra={"volume": volume_id, "why": str(error)})
                # A pod can see to that, to hide what it does.
                found = Unseen(error.strerror or str(error) if isinstance(error, OSError) else str(error))
            except Exception as error:
                log.exception("a volume's quota was not looked at")
                found = Unseen(f"the look ended with {type(error).__name__}; see the log")
            with self._lock:
                if volume_id in self._next:
                    self._note(volume_id, found)


def look(path: str, project: int) -> Left | Unseen | None:
    """The files below `path` that do not belong to the project; None if all do. Bounded in files and time: Unseen for
    what could not be looked at in these bounds. OSError, BlockdevError where the look ends before them, and has found
    nothing by then."""
    root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    count, first, unseen = 0, "", ""
    try:
        for number, (name, other) in enumerate(_projects(root)):
            if number >= _MOST:
                unseen = f"it has more than {_MOST} files, and no more are looked at"
                break
            if other == _CLOSED:
                unseen = "a file of it cannot be opened; a process may have a lease on it"
            elif other not in (None, project):
                count, first = count + 1, first or name
            if number % _STRIDE == 0:
                time.sleep(_PAUSE)
    except (OSError, BlockdevError):
        if not count:
            raise
    finally:
        os.close(root)
    if count:
        return Left(count, first)
    return Unseen(unseen) if unseen else None


def _projects(root: int) -> Iterator[tuple[str, int | None]]:
    """Every name, with its project if it is a directory or a regular file. Nothing else is opened; nothing is waited
    for."""
    for fd, _directories, others in trees.walk(root, "looking at a volume's quota", Deadline.after(_LONGEST)):
        yield "a directory", quotas.project_at(fd)
        for name in others:
            yield name, _of_file(fd, name)


def _of_file(directory: int, name: str) -> int | None:
    """None where there is no such file (any more); OSError where the node can open no file at all."""
    try:
        file = beneath.regular(directory, name)
    except OSError as error:
        if error.errno in _SCARCE:
            raise
        return None if error.errno in trees.NOT_THERE else _CLOSED
    if file is None:
        return None
    try:
        return quotas.project_at(file)
    finally:
        os.close(file)
