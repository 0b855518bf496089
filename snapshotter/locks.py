"""One lock a name, made when wanted and gone when free; waiting for it ends with the caller's deadline."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from blockdev import Deadline
from snapshotter.errors import TookTooLong


class Locks:
    """Locks by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def held(self, *names: str, deadline: Deadline) -> Iterator[None]:
        """Hold all of `names`; TookTooLong if another call keeps one of them for longer than there is time."""
        with contextlib.ExitStack() as stack:
            for name in sorted(set(names)):
                stack.enter_context(self._one(name, deadline))
            yield

    @contextlib.contextmanager
    def _one(self, name: str, deadline: Deadline) -> Iterator[None]:
        with self._lock:
            lock, users = self._held.get(name) or (threading.Lock(), 0)
            self._held[name] = lock, users + 1
        try:
            if not lock.acquire(timeout=deadline.remaining()):
                raise TookTooLong(f"{name!r}: another call uses it, and did not end within {deadline.given:.0f} s")
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                lock, users = self._held[name]
                if users == 1:
                    del self._held[name]
                else:
                    self._held[name] = lock, users - 1
