"""Metrics in Prometheus' format: what goes on behind the calls."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from blockdev import scraped
from guestmount import BadRequest
from volumes import work


class _Work:
    """Asked at each scrape; nothing is kept."""

    def collect(self) -> Iterator[Metric]:
        items = work.running.items()
        yield GaugeMetricFamily("runvol_work", "Copies, walks and deletions behind calls now.", value=len(items))
        for name, help_text in (
            ("bytes_done", "Bytes of it that are done."),
            ("bytes", "Bytes that it has in all; 0 if that is not known."),
            ("seconds", "Seconds since it began."),
        ):
            family = GaugeMetricFamily(f"runvol_work_{name}", help_text, labels=["work"])
            for one in items:
                value = {"bytes_done": one.done, "bytes": one.total, "seconds": one.seconds}[name]
                family.add_metric([one.what], value)
            yield family


def serve(address: str) -> None:
    """Serve `HOST:PORT`. BadRequest."""
    registry = CollectorRegistry()
    registry.register(_Work())
    try:
        scraped.listen(address, registry)
    except ValueError as error:
        raise BadRequest("csi.metrics", address, str(error)) from None
