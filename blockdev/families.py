"""What a metric is called, in Prometheus' words: one line a family, from which a scrape and its documentation are made.

Names follow Prometheus' rules: base units as suffixes (`_seconds`, `_bytes`), `_total` for what only grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
# Samples of one family, and characters of one label: whoever names a volume or a job does not fill a Prometheus.
MOST, _LONGEST = 5000, 200

# Values of the labels, and the sample.
Sample = tuple[Sequence[str], float]


@dataclass(frozen=True, kw_only=True)
class Family:
    """`name` as a query has it; `help` is a sentence."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()

    def of(self, samples: Iterable[Sample] | float) -> Metric:
        """The family with what it has now: one number where there are no labels. Samples of the same labels are one, as
        Prometheus takes no others; what is beyond `MOST` is left out."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        made = (CounterMetricFamily if self.kind == COUNTER else GaugeMetricFamily)(
            self.name, self.help, labels=self.labels
        )
        added: dict[tuple[str, ...], float] = {}
        for values, number in [((), float(samples))] if isinstance(samples, int | float) else samples:
            key = tuple(_cut(one) for one in values)
            if len(key) != len(self.labels):
                raise ValueError(f"{self.name} has the labels {self.labels}, and was given {key}")
            if key in added or len(added) < MOST:
                added[key] = added.get(key, 0.0) + number
        for key, number in added.items():
            made.add_metric(key, number)
        return made


def _cut(value: str) -> str:
    """A label's value, of characters that a scrape can be written in."""
    text = value.encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
