"""Metrics of the NRI plugin: what became of the containers that the runtime has asked about."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from blockdev import scraped
from blockdev.families import COUNTER, GAUGE, HISTOGRAM, Family
from guestmount.errors import BadRequest

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Seconds; the runtime waits two.
_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0)
# What became of a container.
OUTCOMES = UNCHANGED, BY_GUEST, REFUSED, PLACEHOLDER = "unchanged", "mounted_by_guest", "refused", "placeholder"

CONNECTED = Family(name="runvol_nri_connected", kind=GAUGE, help="1 while the runtime asks this plugin.")
CONTAINERS = Family(
    name="runvol_nri_containers_total", kind=COUNTER, labels=("outcome",),
    help="Containers that the runtime has asked about: unchanged, mounted_by_guest, refused (it would bind what another"
    " pod's guest has), placeholder (it was made while the plugin was away, and has no volume).",
)  # fmt: skip
SECONDS = Family(name="runvol_nri_call_seconds", kind=HISTOGRAM, help="How long the runtime was held up by each.")
FAMILIES = (CONNECTED, CONTAINERS, SECONDS)


class Book:
    """What the plugin has answered, counted whoever asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # From 0 on: what rises from nothing to a number has not risen, for a Prometheus.
        self._outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._within, self._seconds = [0] * (len(_BOUNDS) + 1), 0.0

    def note(self, outcome: str) -> None:
        with self._lock:
            self._outcomes[outcome] += 1

    def answered(self, outcome: str, seconds: float) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            self._within[bisect.bisect_left(_BOUNDS, seconds)] += 1
            self._seconds += seconds

    def told(self) -> tuple[Counter[str], list[int], float]:
        with self._lock:
            return Counter(self._outcomes), list(self._within), self._seconds


class _Nri:
    part = "nri"

    def __init__(self, book: Book, connected: Callable[[], bool]) -> None:
        self._book, self._connected = book, connected

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        outcomes, within, seconds = self._book.told()
        yield CONNECTED.of(float(self._connected()))
        yield CONTAINERS.of(((outcome,), number) for outcome, number in outcomes.items())
        total, buckets = 0, []
        for bound, number in zip((*map(str, _BOUNDS), "+Inf"), within, strict=True):
            total += number
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(SECONDS.name, SECONDS.help, buckets=buckets, sum_value=seconds)


def serve(address: str, *, version: str, book: Book, connected: Callable[[], bool]) -> None:
    """Serve `HOST:PORT`. BadRequest."""
    try:
        scraped.listen(address, [_Nri(book, connected)], part="nri", version=version)
    except ValueError as error:
        raise BadRequest("nri.metrics", address, str(error)) from None
