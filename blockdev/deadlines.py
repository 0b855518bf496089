"""Every wait has an end: the time that a call has left, passed from room to room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from blockdev import log_context
from blockdev.errors import BlockdevError, WaitExpired

T = TypeVar("T")
# Calls that have not come back, by what they do.
_left_behind: dict[str, set[threading.Event]] = {}
_lock = threading.Lock()


class NoThread(BlockdevError):
    """The node, or the process's cgroup, has no thread for it at this moment."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: no thread can be started; the call can be repeated once the node has tasks and memory again (the "
            "cgroup's pids.max?)"
        )


def started(what: str, thread: threading.Thread) -> None:
    """The thread runs. NoThread."""
    try:
        thread.start()
    except RuntimeError:
        raise NoThread(what) from None


@dataclass(frozen=True)
class Deadline:
    """A point of the monotonic clock, in seconds."""

    at: float
    given: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds, seconds)

    @property
    def began(self) -> float:
        """When it was given, without a look at the clock."""
        return self.at - self.given

    def remaining(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self.at - time.monotonic())

    def check(self, what: str) -> None:
        """Raise WaitExpired, naming `what`, once the time is over."""
        if self.remaining() <= 0:
            raise WaitExpired(what, self.given)

    def poll(self, what: str, ready: Callable[[], bool], *, every: float = 0.01) -> None:
        """Ask `ready` until it says yes; WaitExpired, naming `what`, if it never does."""
        while not ready():
            self.check(what)
            time.sleep(min(every, self.remaining()))


def left_behind() -> int:
    """System calls that have not come back when their caller's time was over."""
    with _lock:
        return sum(len(events) for events in _left_behind.values())


def bounded(what: str, deadline: Deadline, call: Callable[[], T], *, key: str = "") -> T:
    """Run a system call that may never return (a dead server, a broken disk) without sharing its fate.

    The call runs in a thread of its own. Past the deadline WaitExpired is raised and the thread is left
    to the kernel; a thread in an uninterruptible sleep cannot be ended by anybody. As long as it is there, `what` (or
    `key`, which tells more) is not begun again: whoever asks for it gets WaitExpired at once. NoThread.
    """
    key = key or what
    outcome: list[T] = []
    failure: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)
        finally:
            with _lock:
                ended.set()
                left = _left_behind.get(key, set())
                left.discard(ended)
                if not left:
                    _left_behind.pop(key, None)

    with _lock:
        if _left_behind.get(key):
            raise WaitExpired(what, deadline.given)
    started(what, threading.Thread(target=log_context.inherited(work), name=what, daemon=True))
    ended.wait(deadline.remaining())
    with _lock:
        if not ended.is_set():
            _left_behind.setdefault(key, set()).add(ended)
            raise WaitExpired(what, deadline.given)
    if failure:
        raise failure[0]
    return outcome[0]
