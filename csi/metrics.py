"""Metrics in Prometheus' format: what goes on behind the calls."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

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
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadRequest("csi.metrics", address, "takes HOST:PORT")
    registry = CollectorRegistry()
    registry.register(_Work())
    try:
        start_http_server(int(port), addr=host, registry=registry)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "this is no host's name"
        raise BadRequest("csi.metrics", address, f"cannot be listened on: {why}") from None
