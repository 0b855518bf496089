"""`runvol doctor`, asked again and again behind the calls of a plugin, for its metrics."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from blockdev.families import COUNTER, GAUGE, Family
from runvol.diagnosis import Diagnosis

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

log = logging.getLogger("runvol.doctor")

# Seconds before the first time: a node that starts has other things to do, and much of it is not there yet.
_FIRST = 20.0
# And at most before the second: what was not there yet is no trouble of the node's.
_SECOND = 300.0

FINDINGS = Family(
    name="runvol_doctor_findings", kind=GAUGE, labels=("id", "state"),
    help="What `runvol doctor` says, by its kind and state (ok, warning, broken), as of the last time.",
)  # fmt: skip
EXAMINED = Family(
    name="runvol_doctor_timestamp_seconds", kind=GAUGE,
    help="When doctor was asked last, in seconds since 1970; 0 for not yet.",
)  # fmt: skip
INTERVAL = Family(
    name="runvol_doctor_interval_seconds", kind=GAUGE, help="How often doctor is asked (metrics.doctor_seconds)."
)
SECONDS = Family(name="runvol_doctor_seconds", kind=GAUGE, help="How long that took.")
FAILURES = Family(name="runvol_doctor_failures_total", kind=COUNTER, help="How often it ended before its end.")
FAMILIES = (FINDINGS, EXAMINED, INTERVAL, SECONDS, FAILURES)


class DoctorWatch:
    """Asks `examine` every `interval` seconds in a thread of its own."""

    part = "doctor"

    def __init__(self, examine: Callable[[], Iterable[Diagnosis]], *, interval: float, first: float = _FIRST) -> None:
        self._examine, self._interval, self._first = examine, interval, min(first, interval)
        self._found: Counter[tuple[str, str]] = Counter()
        self._at, self._seconds, self._failures = 0.0, 0.0, 0
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="doctor", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        wait, later = self._first, min(_SECOND, self._interval)
        while not self._stop.wait(wait):
            wait, later = later, self._interval
            try:
                self.ask()
            except Exception:
                self._failures += 1
                log.exception("doctor ended before its end; it is asked again")

    def ask(self) -> None:
        """Whatever `examine` raises."""
        began = time.monotonic()
        self._found = Counter((one.id, one.state) for one in self._examine())
        self._at, self._seconds = time.time(), time.monotonic() - began

    def collect(self) -> Iterator[Metric]:
        yield FINDINGS.of((key, number) for key, number in self._found.items())
        yield EXAMINED.of(self._at)
        yield INTERVAL.of(self._interval)
        yield SECONDS.of(self._seconds)
        yield FAILURES.of(self._failures)
