"""What runs behind the calls survives whatever happens to it: logged, counted, and told for as long as it lasts."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from blockdev.errors import BlockdevError
from snapshotter.errors import SnapshotterError

log = logging.getLogger("runvol.snapshotter")


class Background:
    """The threads behind the calls, and what went wrong in them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: dict[str, threading.Thread] = {}
        self._failing: dict[str, str] = {}
        self._failures: dict[str, int] = {}

    def started(self, thread: threading.Thread) -> None:
        """This thread runs until the process ends: should it end before, that is told."""
        with self._lock:
            self._threads[thread.name] = thread

    @contextlib.contextmanager
    def survived(self, what: str) -> Iterator[None]:
        """Nothing that is raised inside gets out; until `what` has ended well once, it fails."""
        try:
            yield
        except Exception as error:
            self._note(what, error)
        else:
            with self._lock:
                self._failing.pop(what, None)

    def _note(self, what: str, error: Exception) -> None:
        ours = isinstance(error, SnapshotterError | BlockdevError | OSError)
        why = str(error) if ours else f"{type(error).__name__}: {error}"
        with self._lock:
            self._failures[what] = self._failures.get(what, 0) + 1
            before, self._failing[what] = self._failing.get(what), why
        # The same trouble each second needs no line each second.
        if before != why:
            log.error("behind the calls something failed; it is tried again", extra={"what": what, "why": why},
                      exc_info=None if ours else error)  # fmt: skip

    def fails(self, what: str) -> str:
        """Why it fails now; empty if it does not."""
        return self._failing.get(what, "")

    def failures(self) -> dict[str, int]:
        """How often each thing failed since the start."""
        with self._lock:
            return dict(self._failures)

    def troubles(self) -> list[str]:
        """What fails now and which threads have ended, as sentences; empty if all is well."""
        with self._lock:
            dead = [f"the thread {name} has ended" for name, thread in self._threads.items() if not thread.is_alive()]
            return dead + [f"{what}: {why}" for what, why in self._failing.items()]
