"""Metrics in Prometheus' format: how long calls take, how full the pool is, what was found and put right."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from blockdev import scraped
from blockdev.dm_targets import MAX_THIN_ID
from snapshotter.errors import BadRequest, SnapshotterError
from snapshotter.node import Node
from snapshotter.service import Observer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_MODES = ("rw", "out_of_data_space", "ro", "fail", "error")


class _Pool:
    """Asked at each scrape; nothing is kept."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        node = self._node
        yield GaugeMetricFamily("runvol_pool_ready", "1 once the pool can be used.", value=float(node.ready))
        found = node.found
        for name, value in (
            ("resumed", found.resumed),
            ("settled", found.settled),
            ("orphans", len(found.orphans)),
            ("foreign", len(found.foreign)),
            ("lost", len(found.lost)),
        ):
            yield GaugeMetricFamily(f"runvol_recovery_{name}", f"What the last start found: {name}.", value=value)
        failures = CounterMetricFamily(
            "runvol_background_failures", "What failed behind the calls, and was survived.", labels=["what"]
        )
        for what, count in node.background.failures().items():
            failures.add_metric([what], count)
        yield failures
        yield GaugeMetricFamily(
            "runvol_background_troubles", "Threads that have ended, and what fails now.",
            value=len(node.background.troubles()),
        )  # fmt: skip
        yield CounterMetricFamily("runvol_devices_deleted", "Devices deleted behind.", value=node.reaper.deleted)
        yield CounterMetricFamily(
            "runvol_devices_unmapped_idle", "Devices unmapped as nobody had them open.", value=node.reaper.idled
        )
        yield CounterMetricFamily("runvol_devices_busy", "Deletions put off.", value=node.reaper.failed)
        yield GaugeMetricFamily("runvol_snapshots", "Snapshots in the store.", value=node.store.count())
        yield GaugeMetricFamily("runvol_devices_doomed", "Waiting for deletion.", value=len(node.store.doomed()))
        yield GaugeMetricFamily(
            "runvol_devices_quarantined", "Devices that no snapshot owns.", value=len(node.store.quarantined())
        )
        yield GaugeMetricFamily(
            "runvol_device_ids_given", "Share of the pool's device ids that were given in this epoch.",
            value=node.store.following() / MAX_THIN_ID,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "runvol_store_past", "1 while the store is not what its pool was last served with.",
            value=float(bool(node.store.past)),
        )  # fmt: skip
        yield GaugeMetricFamily(
            "runvol_store_copied_seconds", "When the store was last copied into its pool, in seconds since 1970.",
            value=node.copied_at,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "runvol_gauge_trouble", "1 while the gauge, a filesystem as full as the pool, does not follow it.",
            value=float(bool(node.gauge.trouble)),
        )  # fmt: skip
        yield CounterMetricFamily(
            "runvol_store_flushes", "How often the disk was waited for.", value=node.store.flushes
        )
        if node.images is not None:
            passed = CounterMetricFamily(
                "runvol_images_passed_over", "Shared images that were not used, and whose layers were pulled.",
                labels=["reason"],
            )  # fmt: skip
            for reason, count in node.images.passed_over().items():
                passed.add_metric([reason], count)
            yield passed
        if node.ready:
            yield from self._status()

    def _status(self) -> Iterator[Metric]:
        try:
            status = self._node.pool.status()
        except SnapshotterError:
            return
        for name, value in (
            ("data_blocks_used", status.data_used),
            ("data_blocks", status.data_total),
            ("metadata_blocks_used", status.metadata_used),
            ("metadata_blocks", status.metadata_total),
            ("needs_check", float(status.needs_check)),
        ):
            yield GaugeMetricFamily(f"runvol_pool_{name}", f"Of the thin pool: {name}.", value=value)
        modes = GaugeMetricFamily("runvol_pool_mode", "1 for the pool's mode.", labels=["mode"])
        for mode in _MODES:
            modes.add_metric([mode], float(status.mode == mode))
        yield modes


def serve(node: Node, address: str) -> Observer:
    """Serve `HOST:PORT`; what to call with (rpc, code, seconds) after each call."""
    registry = CollectorRegistry()
    calls = Histogram(
        "runvol_snapshotter_call_seconds", "Duration of containerd's calls.", ["rpc", "code"], buckets=_SECONDS,
        registry=registry,
    )  # fmt: skip
    registry.register(_Pool(node))
    try:
        scraped.listen(address, registry)
    except ValueError as error:
        raise BadRequest("snapshotter.metrics", address, str(error)) from None
    return lambda rpc, code, seconds: calls.labels(rpc, code).observe(seconds)
