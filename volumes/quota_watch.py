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
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from blockdev import Deadline, beneath, quotas, trees
from blockdev.errors import BlockdevError, WaitExpired

log = logging.getLogger("runvol.volumes")

_WHAT = "looking at a volume's quota"
# Seconds between two looks at a volume, and for one.
_EVERY, _LONGEST = 600.0, 600.0
# Seconds that one look goes on before another has its turn; and for one with the turns of others, of which there is one
# to each of its own.
_SLICE, _IN_ALL = 5.0, 4 * _LONGEST
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


Steps = Generator[None, None, Left | Unseen | None]


class _Look:
    """A look at one volume, as far as it has come. It has the volume's directory open from its first slice to its
    end."""

    def __init__(self, volume_id: str, path: str, project: int) -> None:
        self.volume_id, self.path, self.project = volume_id, path, project
        self.found: Left | Unseen | None = None
        self._steps: Steps | None = None
        self._spent = 0.0

    def has_ended(self, seconds: float) -> bool:
        """Whether it has come to its end, and `found` says what, in so many seconds more."""
        try:
            self._go_on(seconds)
        except StopIteration as end:
            self.found = end.value
        except (OSError, BlockdevError) as error:
            log.info("a volume's quota was not looked at", extra={"volume": self.volume_id, "why": str(error)})
            # A pod can see to that, to hide what it does.
            self.found = Unseen(error.strerror or str(error) if isinstance(error, OSError) else str(error))
        except Exception as error:
            log.exception("a volume's quota was not looked at")
            self.found = Unseen(f"the look ended with {type(error).__name__}; see the log")
        else:
            return False
        return True

    def _go_on(self, seconds: float) -> None:
        if self._steps is None:
            self._steps = _steps(self.path, self.project)
        began, before = time.monotonic(), self._spent
        while self._spent < before + seconds:
            if self._spent >= _LONGEST:
                self._steps.throw(WaitExpired(_WHAT, _LONGEST))
            next(self._steps)
            self._spent = before + time.monotonic() - began

    def begin_anew(self) -> None:
        """It has nothing open; the next slice is its first."""
        if self._steps is not None:
            self._steps.close()
        self._steps, self._spent = None, 0.0


class QuotaWatch:
    """Looks at volumes, behind whoever asks, in one thread.

    Each look that begins has a slice of time; what does not end in it is large. One large volume is gone on with, a
    slice after each look that begins; the others are begun anew after it. So a small volume waits for slices, however
    many files others have, and no more than one directory is kept open meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, Left | Unseen | None] = {}
        self._next: dict[str, float] = {}
        # Those that have not ended; which of them wait for their first slice, and which are large and wait.
        self._looks: dict[str, _Look] = {}
        self._waiting: deque[_Look] = deque()
        self._large: deque[_Look] = deque()
        self._at_work = False

    def left(self, volume_id: str, path: str, project: int) -> Left | Unseen | None:
        """What the last look has found; the next one is begun where it is time for it."""
        with self._lock:
            now = time.monotonic()
            if now > self._next.get(volume_id, 0.0):
                self._next[volume_id] = now + _EVERY
                if volume_id not in self._looks:
                    self._looks[volume_id] = _Look(volume_id, path, project)
                    self._waiting.append(self._looks[volume_id])
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
            self._seen.pop(volume_id, None)
            self._next.pop(volume_id, None)
            self._looks.pop(volume_id, None)

    def _work(self) -> None:
        large: _Look | None = None
        while True:
            with self._lock:
                if large is None:
                    large = self._first(self._large)
                fresh = self._first(self._waiting)
                if fresh is None and large is None:
                    self._at_work = False
                    return
            if large is not None and self._is_done(large):
                large = None
            if fresh is None or self._is_done(fresh):
                continue
            if large is None and not self._large:
                large = fresh
            else:
                fresh.begin_anew()
                with self._lock:
                    self._large.append(fresh)

    def _first(self, looks: deque[_Look]) -> _Look | None:
        """For who has the lock: the first that is wanted still."""
        while looks:
            one = looks.popleft()
            if self._looks.get(one.volume_id) is one:
                return one
        return None

    def _is_done(self, look: _Look) -> bool:
        """After one slice more, or since nobody wants it any more."""
        with self._lock:
            wanted = self._looks.get(look.volume_id) is look
        if wanted and not look.has_ended(_SLICE):
            return False
        with self._lock:
            if self._looks.get(look.volume_id) is look:
                del self._looks[look.volume_id]
                self._note(look.volume_id, look.found)
        look.begin_anew()
        return True


def _steps(path: str, project: int) -> Steps:
    """Returns the files below `path` that do not belong to the project; None if all do. Bounded in files: Unseen for
    what could not be looked at in this bound. OSError, BlockdevError, thrown in too, where the look ends before it, and
    has found nothing by then."""
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
                yield
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
    for fd, _directories, others in trees.walk(root, _WHAT, Deadline.after(_IN_ALL)):
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
