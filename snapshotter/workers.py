"""The threads that run calls: so many at once, and one more for each that the kernel does not give back.

A thread that hangs in device-mapper cannot be ended by anybody. Python's own pool would count it as at work, until none
is left and every new call waits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

_Job = tuple[futures.Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Workers(futures.Executor):
    """`limit` calls at once; `most` threads are given up at the most, so that a dead disk cannot fill the node."""

    def __init__(self, limit: int, *, most: int = 240) -> None:
        self._limit, self._most = limit, most
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._idle = self._given_up = 0

    @property
    def given_up(self) -> int:
        """Threads that hang in the kernel now."""
        return self._given_up

    @property
    def threads(self) -> int:
        """Threads that there are now, hanging ones included."""
        return self._threads

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        future: futures.Future[Any] = futures.Future()
        self._jobs.put((future, fn, args, kwargs))
        with self._lock:
            if not self._idle and self._threads < self._limit + self._given_up:
                try:
                    self._begin()
                except RuntimeError:
                    if not self._threads:
                        raise  # else one of them comes to it
        return future

    def give_up(self) -> bool:
        """One call hangs: another thread may take its place. False once too many do."""
        with self._lock:
            if self._given_up >= self._most:
                return False
            self._given_up += 1
            try:
                self._begin()
            except BaseException:
                self._given_up -= 1
                raise
            return True

    def came_back(self) -> None:
        """A call that was given up has ended after all; there is a thread too many, which ends when it is idle."""
        with self._lock:
            self._given_up -= 1
        self._jobs.put(None)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The threads are daemons: what hangs must not keep the process from ending."""

    def _begin(self) -> None:
        threading.Thread(target=self._run, name=f"snapshots-{self._threads + 1}", daemon=True).start()
        self._threads += 1

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                self._idle -= 1
                if job is None:
                    self._threads -= 1
                    return
            future, call, arguments, keywords = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call(*arguments, **keywords)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, future, call, arguments, keywords
