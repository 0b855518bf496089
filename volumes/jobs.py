"""Work that takes longer than a call: it goes on behind, tells how far it is, and who asks again joins it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from volumes.errors import VolumeUnfinished

log = logging.getLogger("runvol.jobs")

_TELL_EVERY = 10.0
# Seconds that a call waits for a copy; it goes on, and the caller asks again.
PATIENCE = 8.0


@dataclass
class Progress:
    """Bytes that have been copied, and how many there are; an estimate, as files change meanwhile."""

    what: str
    total: int = 0
    done: int = 0
    _told: float = field(default_factory=time.monotonic)

    @property
    def percent(self) -> int:
        return min(99, self.done * 100 // self.total) if self.total else 0

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self._told > _TELL_EVERY:
            self._told = time.monotonic()
            log.info("copying", extra={"what": self.what, "percent": self.percent, "bytes": self.done})


class Jobs:
    """Long work by key: who asks again joins it instead of beginning another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}

    def finished(self, key: str, what: str, work: Callable[[Progress], None], patience: float) -> None:
        """Return once `work` has ended well. Raises what it raised; VolumeUnfinished, with how far it is, if it
        takes longer than `patience` seconds: it goes on, and the next call waits for it again."""
        with self._lock:
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = _Job(Progress(what), work)
                job.thread.start()
        if not job.over.wait(patience):
            raise VolumeUnfinished(f"{what}: {job.progress.percent}% ({job.progress.done} bytes) done; ask again")
        with self._lock:
            if self._jobs.get(key) is job:
                del self._jobs[key]
        if job.error is not None:
            raise job.error

    def progress(self, key: str) -> Progress | None:
        """How far the work under `key` is; None if there is none."""
        with self._lock:
            job = self._jobs.get(key)
        return job.progress if job is not None and not job.over.is_set() else None


class _Job:
    def __init__(self, progress: Progress, work: Callable[[Progress], None]) -> None:
        self.progress, self.over = progress, threading.Event()
        self.error: BaseException | None = None
        self._work = work
        # A daemon: the next process begins the work again.
        self.thread = threading.Thread(target=self._run, name=progress.what, daemon=True)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._work(self.progress)
            log.info("copied", extra={"what": self.progress.what, "bytes": self.progress.done,
                                      "seconds": round(time.monotonic() - started, 1)})  # fmt: skip
        except BaseException as error:
            log.warning("not copied", extra={"what": self.progress.what, "why": str(error)})
            self.error = error
        finally:
            self.over.set()
