"""One lock a name, made when wanted and gone when free; waiting for it ends with the caller's deadline."""

from __future__ import annotations

import threading
from types import TracebackType

from blockdev import Deadline
from snapshotter.errors import TookTooLong
from snapshotter.workers import aside


class Locks:
    """Locks by name. Who waits for one for longer than `patience` seconds steps aside in its lane."""

    def __init__(self, patience: float = 0) -> None:
        self._patience = patience
        self._lock = threading.Lock()
        self._held: dict[str, tuple[threading.Lock, int]] = {}

    def held(self, *names: str, deadline: Deadline) -> Held:
        """Holds all of `names` inside; TookTooLong if another call keeps one of them for longer than there is time."""
        return Held(self, sorted(set(names)), deadline)

    def take(self, name: str, deadline: Deadline) -> None:
        with self._lock:
            lock, users = self._held.get(name) or (threading.Lock(), 0)
            self._held[name] = lock, users + 1
        if lock.acquire(blocking=False):
            return
        try:
            if self._waited_for(lock, deadline):
                return
        except BaseException:
            self._leave(name)
            raise
        self._leave(name)
        raise TookTooLong(f"{name!r}: another call uses it, and did not end within {deadline.given:.0f} s")

    def _waited_for(self, lock: threading.Lock, deadline: Deadline) -> bool:
        """Whether the lock is taken. Unavailable if too many wait already."""
        if self._patience and lock.acquire(timeout=min(self._patience, deadline.remaining())):
            return True
        with aside():
            return lock.acquire(timeout=deadline.remaining())

    def give(self, name: str) -> None:
        self._held[name][0].release()
        self._leave(name)

    def _leave(self, name: str) -> None:
        with self._lock:
            lock, users = self._held[name]
            if users == 1:
                del self._held[name]
            else:
                self._held[name] = lock, users - 1


class Held:
    """The names, held from `with` to its end."""

    def __init__(self, locks: Locks, names: list[str], deadline: Deadline) -> None:
        self._locks, self._names, self._deadline = locks, names, deadline
        self._taken: list[str] = []

    def __enter__(self) -> None:
        try:
            for name in self._names:
                self._locks.take(name, self._deadline)
                self._taken.append(name)
        except BaseException:
            self._release()
            raise

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        while self._taken:
            self._locks.give(self._taken.pop())
