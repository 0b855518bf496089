"""Work that takes longer than a call: it goes on behind, tells how far it is, and who asks again joins it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from blockdev import log_context
from blockdev.deadlines import started
from volumes.errors import VolumeUnfinished
from volumes.work import running

log = logging.getLogger("runvol.jobs")

_TELL_EVERY = 10.0
_WAITING = 12
# A failure that nobody has asked for is told for so many seconds; who comes later begins anew.
_STALE = 60.0
# Seconds that a call waits for a copy; it goes on, and the caller asks again.
PATIENCE = 8.0


@dataclass
class Progress:
    """Bytes that have been copied, and how many there are; an estimate, as files change meanwhile."""

    what: str
    total: int = 0
    done: int = 0
    # Asked between two steps; raises what ends the work.
    ask: Callable[[], None] = lambda: None
    cancelled: threading.Event = field(default_factory=threading.Event)
    _told: float = field(default_factory=time.monotonic)

    @property
    def percent(self) -> int:
        return min(99, self.done * 100 // self.total) if self.total else 0

    def add(self, count: int) -> None:
        """VolumeUnfinished where nobody wants what is made any more; what `ask` raises."""
        self.ask()
        if self.cancelled.is_set():
            raise VolumeUnfinished(f"{self.what} was ended, as it was deleted")
        self.done += count
        if time.monotonic() - self._told > _TELL_EVERY:
            self._told = time.monotonic()
            log.info("copying", extra={"what": self.what, "percent": self.percent, "bytes": self.done})


class _Places:
    """So many places, which families share; each method is for who has the lock.

    A family has `of_one` of them at most, and never more than half of what others leave it, but one that is free: of
    16, the first to come has 8 at most, the next 4, then 2, 1 and 1. So whatever four of them do for ever, a fifth
    finds a place. `of_one` 0: there are no families.
    """

    def __init__(self, count: int, of_one: int) -> None:
        self._count, self._of_one = count, of_one
        self._taken = Counter[str]()

    def are_all_taken(self) -> bool:
        return self._taken.total() >= self._count

    def has_its_share(self, family: str) -> bool:
        """Whether the family has one already, and gets no further one."""
        own = self._taken[family]
        left = self._count - (self._taken.total() - own)
        return bool(self._of_one and own and own >= min(self._of_one, (left + 1) // 2))

    def take(self, family: str) -> None:
        self._taken[family] += 1

    def give_back(self, family: str) -> None:
        self._taken[family] -= 1
        if not self._taken[family]:
            del self._taken[family]


class Jobs:
    """Long work by key: who asks again joins it instead of beginning another.

    At most `running` works go on at a time, and at most `waiting` callers wait for any; all others are told at once.
    """

    def __init__(
        self, *, running: int = 4, waiting: int = 0, of_one: int = 0, family: Callable[[str], str] = lambda _key: ""
    ) -> None:
        """`waiting` 0: twelve, or as many as work, if that is more.

        `of_one`: works of one `family` that go on at a time, at most, and no more than half of those that others leave;
        of the callers that wait, the same half. 0 for as many as of all. `family` is asked by each call, outside of any
        lock, and may answer otherwise later.
        """
        self._family = family
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._jobs: dict[str, _Job] = {}
        self._running = _Places(running, of_one)
        waiting = waiting or max(_WAITING, running)
        self._waiting = _Places(waiting, waiting if of_one else 0)

    def finished(self, key: str, what: str, work: Callable[[Progress], None], patience: float) -> None:
        """Return once `work` has ended well. Raises what it raised; VolumeUnfinished, with how far it is, if it
        takes longer than `patience` seconds, or others go first: the next call waits for it again. NoThread."""
        family = self._family(key)
        with self._lock:
            may_wait = not self._waiting.are_all_taken() and not self._waiting.has_its_share(family)
            if may_wait:
                self._waiting.take(family)
        until = time.monotonic() + (patience if may_wait else 0)
        try:
            job = self._begun(key, family, what, work, until)
            if not job.over.wait(max(0.0, until - time.monotonic())):
                log.info(
                    "still under way", extra={"what": what, "percent": job.progress.percent, "bytes": job.progress.done}
                )
                raise VolumeUnfinished(f"{what} is under way; ask again")
        finally:
            if may_wait:
                with self._lock:
                    self._waiting.give_back(family)
        with self._lock:
            if self._jobs.get(key) is job:
                del self._jobs[key]
        if job.error is not None:
            raise job.error

    def _begun(self, key: str, family: str, what: str, work: Callable[[Progress], None], until: float) -> _Job:
        """Looked at and counted under one lock, however many come at once."""
        with self._room:
            while True:
                self._drop_stale()
                if (known := self._jobs.get(key)) is not None:
                    return known
                if self._running.has_its_share(family):
                    raise VolumeUnfinished(f"{what}: others of its server go first; ask again")
                if not self._running.are_all_taken():
                    break
                left = until - time.monotonic()
                if left <= 0:
                    raise VolumeUnfinished(f"{what}: other copies go first; ask again")
                self._room.wait(left)
            job = _Job(Progress(what), work, lambda: self._ended(key, family))
            started(what, job.thread)  # it cannot end before it is counted: that takes the lock
            self._jobs[key] = job
            self._running.take(family)
            return job

    def _ended(self, key: str, family: str) -> None:
        """Room for the next; who waits has the job itself, and of one that ended well nobody else needs to hear."""
        with self._room:
            self._running.give_back(family)
            job = self._jobs.get(key)
            if job is not None and job.error is None:
                del self._jobs[key]
            self._room.notify_all()

    def _drop_stale(self) -> None:
        """Failures that nobody has asked for: their callers do not come again."""
        moment = time.monotonic() - _STALE
        for key in [key for key, job in self._jobs.items() if job.failed_before(moment)]:
            del self._jobs[key]

    def cancel(self, key: str, patience: float) -> None:
        """The work under `key` ends at its next step, and is waited for so many seconds."""
        with self._lock:
            job = self._jobs.get(key)
        if job is not None:
            job.progress.cancelled.set()
            job.over.wait(patience)
            self.forget(key)

    def forget(self, key: str) -> None:
        """How the work under `key` has ended is told to nobody."""
        with self._lock:
            job = self._jobs.get(key)
            if job is not None and job.over.is_set():
                del self._jobs[key]

    def progress(self, key: str) -> Progress | None:
        """How far the work under `key` is; None if there is none."""
        with self._lock:
            job = self._jobs.get(key)
        return job.progress if job is not None and not job.over.is_set() else None


class _Job:
    def __init__(self, progress: Progress, work: Callable[[Progress], None], let_next: Callable[[], None]) -> None:
        self.progress, self.over = progress, threading.Event()
        self.error: BaseException | None = None
        self._ended = 0.0
        self._work, self._let_next = work, let_next
        # A daemon: the next process begins the work again.
        self.thread = threading.Thread(target=log_context.inherited(self._run), name=progress.what, daemon=True)

    def _run(self) -> None:
        started = time.monotonic()
        running.add(self, self.progress)
        try:
            self._work(self.progress)
            log.info("copied", extra={"what": self.progress.what, "bytes": self.progress.done,
                                      "seconds": round(time.monotonic() - started, 1)})  # fmt: skip
        except BaseException as error:
            log.warning("not copied", extra={"what": self.progress.what, "why": str(error)})
            self.error = error
        finally:
            running.remove(self)
            self._ended = time.monotonic()
            self._let_next()
            self.over.set()

    def failed_before(self, moment: float) -> bool:
        return self.over.is_set() and self.error is not None and self._ended < moment
