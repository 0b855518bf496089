"""Metrics of the snapshotter: how long calls take, how full the pool is, what was found and put right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from blockdev import scraped
from blockdev.dm_targets import MAX_THIN_ID, PoolStatus
from blockdev.families import COUNTER, GAUGE, HISTOGRAM, Family
from snapshotter.backing import METADATA_BLOCK
from snapshotter.errors import BadRequest, SnapshotterError
from snapshotter.node import Node
from snapshotter.service import Observer

if TYPE_CHECKING:
    from prometheus_client import Histogram
    from prometheus_client.metrics_core import Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_MODES = ("rw", "out_of_data_space", "ro", "fail", "error")

CALL_SECONDS = Family(
    name="runvol_snapshotter_call_seconds",
    kind=HISTOGRAM,
    labels=("rpc", "code"),
    help="Duration of containerd's calls.",
)
READY = Family(name="runvol_pool_ready", kind=GAUGE, help="1 once the pool can be used.")
RESUMED = Family(
    name="runvol_recovery_resumed", kind=GAUGE, help="What the last start found: work that was gone on with."
)
SETTLED = Family(name="runvol_recovery_settled", kind=GAUGE, help="What the last start found: calls that were settled.")
ORPHANS = Family(name="runvol_recovery_orphans", kind=GAUGE, help="What the last start found: devices of no snapshot.")
FOREIGN = Family(name="runvol_recovery_foreign", kind=GAUGE, help="What the last start found: devices of others.")
LOST = Family(name="runvol_recovery_lost", kind=GAUGE, help="What the last start found: snapshots without a device.")
BACKGROUND = Family(
    name="runvol_background_failures_total", kind=COUNTER, labels=("what",),
    help="What failed behind the calls, and was survived.",
)  # fmt: skip
TROUBLES = Family(name="runvol_background_troubles", kind=GAUGE, help="Threads that have ended, and what fails now.")
DELETED = Family(name="runvol_devices_deleted_total", kind=COUNTER, help="Devices deleted behind.")
UNMAPPED = Family(
    name="runvol_devices_unmapped_idle_total", kind=COUNTER, help="Devices unmapped as nobody had them open."
)
BUSY = Family(name="runvol_devices_busy_total", kind=COUNTER, help="Deletions put off.")
SNAPSHOTS = Family(name="runvol_snapshots", kind=GAUGE, help="Snapshots in the store.")
DOOMED = Family(name="runvol_devices_doomed", kind=GAUGE, help="Devices that wait for deletion.")
QUARANTINED = Family(name="runvol_devices_quarantined", kind=GAUGE, help="Devices that no snapshot owns.")
IDS = Family(
    name="runvol_pool_device_ids_given_ratio", kind=GAUGE,
    help="Share of the pool's device ids that were given in this epoch: at 1 there are no more.",
)  # fmt: skip
DAMAGED = Family(
    name="runvol_store_rows_damaged", kind=GAUGE,
    help="Snapshots that the store says something damaged of: they are passed over, all others are served.",
)  # fmt: skip
PAST = Family(name="runvol_store_past", kind=GAUGE, help="1 while the store is not what its pool was last served with.")
COPIED = Family(
    name="runvol_store_copied_timestamp_seconds", kind=GAUGE,
    help="When the store was last copied into its pool, in seconds since 1970.",
)  # fmt: skip
GAUGE_TROUBLE = Family(
    name="runvol_gauge_trouble", kind=GAUGE,
    help="1 while the gauge, a filesystem as full as the pool, does not follow it.",
)  # fmt: skip
FLUSHES = Family(name="runvol_store_flushes_total", kind=COUNTER, help="How often the disk was waited for.")
PASSED_OVER = Family(
    name="runvol_images_passed_over_total", kind=COUNTER, labels=("reason",),
    help="Shared images that were not used, and whose layers were pulled.",
)  # fmt: skip
DATA_USED = Family(name="runvol_pool_data_used_bytes", kind=GAUGE, help="Bytes of the thin pool's data in use.")
DATA = Family(name="runvol_pool_data_bytes", kind=GAUGE, help="Bytes of the thin pool's data.")
METADATA_USED = Family(
    name="runvol_pool_metadata_used_bytes", kind=GAUGE, help="Bytes of the thin pool's metadata in use."
)
METADATA = Family(name="runvol_pool_metadata_bytes", kind=GAUGE, help="Bytes of the thin pool's metadata.")
NEEDS_CHECK = Family(
    name="runvol_pool_needs_check", kind=GAUGE, help="1 while the kernel wants the pool's metadata checked."
)
MODE = Family(
    name="runvol_pool_mode",
    kind=GAUGE,
    labels=("mode",),
    help="1 for the pool's mode: rw is the one that takes writes.",
)
FAMILIES = (
    CALL_SECONDS, READY, DATA_USED, DATA, METADATA_USED, METADATA, MODE, NEEDS_CHECK, IDS, SNAPSHOTS, DOOMED,
    QUARANTINED, DELETED, UNMAPPED, BUSY, DAMAGED, PAST, COPIED, FLUSHES, GAUGE_TROUBLE, PASSED_OVER, BACKGROUND,
    TROUBLES, RESUMED, SETTLED, ORPHANS, FOREIGN, LOST,
)  # fmt: skip


class _Store:
    """What the node's objects and its store say, asked at each scrape."""

    part = "store"

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        node, found = self._node, self._node.found
        yield RESUMED.of(found.resumed)
        yield SETTLED.of(found.settled)
        yield ORPHANS.of(len(found.orphans))
        yield FOREIGN.of(len(found.foreign))
        yield LOST.of(len(found.lost))
        yield BACKGROUND.of(((what,), count) for what, count in node.background.failures().items())
        yield TROUBLES.of(len(node.background.troubles()))
        yield DELETED.of(node.reaper.deleted)
        yield UNMAPPED.of(node.reaper.idled)
        yield BUSY.of(node.reaper.failed)
        yield SNAPSHOTS.of(node.store.count())
        yield DOOMED.of(node.store.count_doomed())
        yield QUARANTINED.of(node.store.count_quarantined())
        yield IDS.of(node.store.following() / MAX_THIN_ID)
        yield DAMAGED.of(len(node.store.damaged_now()))
        yield PAST.of(float(bool(node.store.past)))
        yield COPIED.of(node.copied_at)
        yield GAUGE_TROUBLE.of(float(bool(node.gauge.trouble)))
        yield FLUSHES.of(node.store.flushes)
        if node.images is not None:
            yield PASSED_OVER.of(((reason,), count) for reason, count in node.images.passed_over().items())


class _Pool:
    """What the kernel says of the pool, asked at each scrape."""

    part = "pool"

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        yield READY.of(float(self._node.ready))
        if not self._node.ready:
            return
        try:
            status, block = self._node.pool.status(), self._node.pool.block_bytes()
        except SnapshotterError:
            return
        yield from _filled(status, block)
        yield NEEDS_CHECK.of(float(status.needs_check))
        yield MODE.of(((mode,), float(status.mode == mode)) for mode in _MODES)


def _filled(status: PoolStatus, block: int) -> Iterator[Metric]:
    if not status.data_total:
        return  # a pool that has failed tells no numbers
    yield DATA_USED.of(status.data_used * block)
    yield DATA.of(status.data_total * block)
    yield METADATA_USED.of(status.metadata_used * METADATA_BLOCK)
    yield METADATA.of(status.metadata_total * METADATA_BLOCK)


class _Calls:
    part = "calls"

    def __init__(self, calls: Histogram) -> None:
        self._calls = calls

    def collect(self) -> Iterator[Metric]:
        yield from self._calls.collect()


def serve(node: Node, address: str, *, version: str) -> Observer:
    """Serve `HOST:PORT`; what to call with (rpc, code, seconds) after each call."""
    from prometheus_client import Histogram

    calls = Histogram(CALL_SECONDS.name, CALL_SECONDS.help, CALL_SECONDS.labels, buckets=_SECONDS, registry=None)
    try:
        scraped.listen(address, [_Calls(calls), _Pool(node), _Store(node)], part="snapshotter", version=version)
    except ValueError as error:
        raise BadRequest("snapshotter.metrics", address, str(error)) from None
    return lambda rpc, code, seconds: calls.labels(rpc, code).observe(seconds)
