"""The threads that run calls, in lanes: so many calls of a lane at once, and whoever waits steps aside.

A call that waits for another one, for a slow reader or for the kernel would use up the lane for those that wait for
nobody. So another thread takes its place for as long. A thread that hangs in device-mapper cannot be ended by anybody;
Python's own pool would count it as at work, until none is left and every new call waits.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from snapshotter.errors import Unavailable

log = logging.getLogger("runvol.snapshotter")
_Job = tuple[float, futures.Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Worker(threading.Thread):
    """A thread of a lane. `arrived` is when its call came (seconds of the monotonic clock), `refuses` says that it may
    only refuse, as all others hang."""

    def __init__(self, lane: Workers, *, refuses: bool = False) -> None:
        super().__init__(name=lane.name, daemon=True)
        self.lane, self.refuses, self.arrived = lane, refuses, 0.0
        # Odd while it works, another number with each job.
        self.turn = 0
        # Whether another thread may have its place.
        self.aside = False

    def run(self) -> None:
        self.lane.work(self)


class Workers(futures.ThreadPoolExecutor):
    """One lane: `limit` calls at once, and at the most `most` beside them that have stepped aside or hang, so that a
    dead disk cannot fill the node. gRPC takes nothing else than this base class for the lane of one method."""

    def __init__(self, limit: int, *, most: int = 240, name: str = "snapshots") -> None:
        super().__init__(max_workers=limit)
        self.name, self._limit, self._most = name, limit, most
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._all: set[Worker] = set()
        self._seen: dict[Worker, int] = {}
        # Of the threads, those that nobody has given a job; of the jobs, those that no thread is free for.
        self._free = self._waiting = self._aside = 0
        self._refusing = False

    @property
    def given_up(self) -> int:
        """Threads whose place others may have now: they wait for somebody, or hang in the kernel."""
        return self._aside

    @property
    def threads(self) -> int:
        """Threads that there are now, hanging ones included."""
        return len(self._all)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        """Never waits, and never fails for want of threads: the job is begun when there is one."""
        future: futures.Future[Any] = futures.Future()
        job = (time.monotonic(), future, fn, args, kwargs)
        with self._lock:
            self._jobs.put(job)
            if self._free:
                self._free -= 1
            else:
                self._waiting += 1
                self._fill()
        return future

    def _fill(self) -> None:
        """Begin the threads that there may be for the jobs that wait."""
        with contextlib.suppress(RuntimeError):  # the node has none now; `look` comes again
            while self._waiting and len(self._all) - self._aside < self._limit:
                self._begin()
                self._waiting -= 1

    def give_up(self, worker: Worker | None = None) -> bool:
        """One call hangs: another thread takes its place. False once too many do."""
        with self._lock:
            if worker is not None and worker.aside:
                return True
            if self._aside >= self._most:
                return False
            self._begin()
            self._aside += 1
            if worker is not None:
                worker.aside = True
            if self._waiting:
                self._waiting -= 1
            else:
                self._free += 1
            return True

    def step_aside(self, worker: Worker, *, must: bool = True) -> bool:
        """Another thread may take this one's place; whether that is new. Unavailable once too many have, if it must."""
        with self._lock:
            if worker.aside or (self._aside >= self._most and not must):
                return False
            if self._aside >= self._most:
                raise Unavailable("too many calls wait for others already; try again when some of them have ended")
            worker.aside = True
            self._aside += 1
            self._fill()
            return True

    def step_back(self, worker: Worker) -> None:
        """It works again; the thread that there is too many then ends after its job."""
        with self._lock:
            if worker.aside:
                worker.aside = False
                self._aside -= 1

    def look(self) -> None:
        """Where jobs wait, what has worked since the last look gives up its place, whatever it is that takes so long.
        For one thread only, now and then."""
        with self._lock:
            seen, self._seen = self._seen, {one: one.turn for one in self._all if one.turn % 2}
            self._fill()
            for worker, turn in seen.items():
                if not self._waiting or self._aside >= self._most:
                    break
                if worker.turn == turn and not worker.aside:
                    worker.aside = True
                    self._aside += 1
                    self._fill()
            if self._waiting and self._aside >= self._most and not self._refusing:
                log.error("too many calls hang; what comes now is refused", extra={"lane": self.name})
                with contextlib.suppress(RuntimeError):
                    Worker(self, refuses=True).start()
                    self._refusing, self._waiting = True, self._waiting - 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The threads are daemons: what hangs must not keep the process from ending."""

    def _begin(self) -> None:
        """One more thread; RuntimeError if the node has none."""
        worker = Worker(self)
        worker.start()
        self._all.add(worker)

    def work(self, worker: Worker) -> None:
        """What a thread does. Each job in the queue is somebody's: a free thread's, or the next one's that is done."""
        while True:
            job = self._jobs.get()
            worker.arrived = job[0]
            worker.turn += 1
            _do(*job[1:])
            worker.turn += 1
            del job
            with self._lock:
                if not self._goes_on(worker):
                    return

    def _goes_on(self, worker: Worker) -> bool:
        if worker.aside:
            worker.aside = False
            self._aside -= 1
        if worker.refuses:
            if not self._waiting or self._aside < self._most:
                self._refusing = False
                self._fill()
                return False
        elif len(self._all) - self._aside > self._limit:
            self._all.discard(worker)
            return False
        if self._waiting:
            self._waiting -= 1
        else:
            self._free += 1
        return True


def _do(future: futures.Future[Any], call: Callable[..., Any], arguments: tuple[Any, ...],
        keywords: dict[str, Any]) -> None:  # fmt: skip
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call(*arguments, **keywords)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def current() -> Worker | None:
    """The lane's thread that this is; None for any other."""
    thread = threading.current_thread()
    return thread if isinstance(thread, Worker) else None


@contextlib.contextmanager
def aside(*, must: bool = True) -> Iterator[None]:
    """What is done inside may wait for somebody: it does not use up the lane. If too much does already, Unavailable;
    without `must`, for what hardly ever waits, it is done in its place then.

    Threads of no lane just do it.
    """
    worker = current()
    turn = worker.turn if worker is not None else 0
    new = worker is not None and worker.lane.step_aside(worker, must=must)
    try:
        yield
    finally:
        if worker is not None and new and worker.turn == turn:
            worker.lane.step_back(worker)
