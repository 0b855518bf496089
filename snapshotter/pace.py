"""How what runs behind the calls gives way to them.

It waits for a moment without calls, but not for ever: under endless load it works for a part of the time, a larger one
the more there is to do, so that what it has to do does not grow without end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Seconds without a call that are a quiet moment, seconds that are waited for one at the beginning, and seconds after
# which a step is a beginning.
_QUIET, _LONGEST_WAIT, _BEGINNING = 0.15, 2.0, 1.0
# (so much to do, times as long as the last step took to wait for the next); beyond the last nothing is waited for.
_PAUSES = ((256, 9.0), (1024, 2.0), (4096, 0.5))
_LOOK = 0.05


class Pace:
    """For one thread. `quiet` says for how many seconds there was no call; `stop` ends each wait, and `longest` is how
    many seconds one takes at the most (two without it)."""

    def __init__(self, quiet: Callable[[], float], stop: threading.Event, longest: float = 0) -> None:
        self._quiet, self._stop, self._longest = quiet, stop, longest or _LONGEST_WAIT
        self._resumed = 0.0

    def busy(self) -> bool:
        """Whether there are calls, or were a moment ago."""
        return self._quiet() < _QUIET

    def step(self, left: int = 0) -> None:
        """Before each step: let calls pass. `left` is how many steps there are to do."""
        now = time.monotonic()
        if self.busy():
            worked = now - self._resumed
            longest = self._longest if worked > _BEGINNING else min(self._longest, worked * _times(left))
            self._wait(now + longest, longest)
        self._resumed = time.monotonic()

    def _wait(self, until: float, longest: float) -> None:
        while self.busy() and time.monotonic() < until and not self._stop.is_set():
            self._stop.wait(min(_LOOK, longest))


def _times(left: int) -> float:
    return next((times for most, times in _PAUSES if left <= most), 0.0)
