"""What the calls of a process are doing and have done: counted here, whoever asks."""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from blockdev import Deadline

# Upper bounds in seconds; kubelet gives a call two minutes.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# Seconds that a call may be late before it counts as hung.
_LATE = 1.0


@dataclass
class Durations:
    """Calls of one method: how many took no longer than each bound, but longer than the one before, and all seconds."""

    within: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0


class CallBook:
    """Calls by method and code, and those under way."""

    def __init__(self) -> None:
        self._done: Callable[[str, str], None] | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._codes: Counter[tuple[str, str]] = Counter()
        self._durations: dict[str, Durations] = {}
        self._under_way: dict[int, tuple[str, Deadline]] = {}

    def tell(self, done: Callable[[str, str], None]) -> None:
        """`done` is told of each call that has ended, its method and code, and holds it up; before calls come."""
        self._done = done

    def begun(self, method: str, deadline: Deadline) -> int:
        """A number that `ended` takes."""
        with self._lock:
            number = next(self._numbers)
            self._under_way[number] = method, deadline
            return number

    def ended(self, number: int, code: str, seconds: float) -> None:
        with self._lock:
            method, _deadline = self._under_way.pop(number)
            self._codes[method, code] += 1
            durations = self._durations.setdefault(method, Durations())
            durations.within[bisect.bisect_left(BOUNDS, seconds)] += 1
            durations.seconds += seconds
        if self._done is not None:
            self._done(method, code)

    def codes(self) -> Counter[tuple[str, str]]:
        """How many calls have ended, by method and gRPC code."""
        with self._lock:
            return Counter(self._codes)

    def durations(self) -> Mapping[str, Durations]:
        with self._lock:
            return {method: Durations(list(one.within), one.seconds) for method, one in self._durations.items()}

    def under_way(self) -> tuple[Counter[str], Counter[str]]:
        """Calls that have begun and not ended, by method; and those among them whose callers have gone already."""
        now = time.monotonic()
        with self._lock:
            every = list(self._under_way.values())
        late = Counter(method for method, deadline in every if now > deadline.at + _LATE)
        return Counter(method for method, _deadline in every), late
