"""A start: the pool is assembled and bound, and what a killed process left is finished or undone.

The socket listens meanwhile. What the store alone can answer is answered at once; the rest waits for the pool, and an
intent that a call asks for is settled by that call.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from blockdev import Deadline
from blockdev.devicemapper import DIRECTORY, stale_nodes
from blockdev.errors import BlockdevError
from snapshotter.bases import Bases
from snapshotter.errors import SnapshotterError
from snapshotter.model import Kind
from snapshotter.pool import Pool
from snapshotter.reaper import Reaper
from snapshotter.snapshots import Snapshotter
from snapshotter.store import Store

log = logging.getLogger("runvol.snapshotter")


@dataclass
class Found:
    """What a start put right; counts, and the ids that nobody knows."""

    resumed: int = 0
    settled: int = 0
    unmapped: int = 0
    orphans: list[int] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


def recover(store: Store, pool: Pool, golden: Bases, snapshots: Snapshotter, reaper: Reaper) -> Found:
    """Bring store, pool and mapped devices into agreement. May be repeated."""
    found = Found()
    found.resumed = len(pool.resume_suspended())
    for row in store.intents():
        try:
            snapshots.settle(row.key, Deadline.after(60))
            found.settled += 1
        except (SnapshotterError, BlockdevError) as error:
            log.warning("an intent is not settled yet", extra={"key": row.key, "why": str(error)})
    golden.drop_unfinished()
    found.unmapped = _unmap(store, pool, reaper)
    compare(store, pool, found)
    return found


def _unmap(store: Store, pool: Pool, reaper: Reaper) -> int:
    """Devices that are mapped although nothing active needs them go, behind."""
    mapped = set(pool.active())
    if not mapped:
        return 0
    needed = {row.device for page in store.pages() for row in page if row.kind is not Kind.COMMITTED}
    reaper.found_mapped(mapped & needed)
    needed |= {base.device for base in store.bases() if not base.ready}
    for device in mapped - needed:
        reaper.tell(device)
    for path in stale_nodes(pool.mapper, pool.device_name(0)[:-1]):
        log.info("a node without a device", extra={"path": path, "directory": DIRECTORY})
    return len(mapped - needed)


def compare(store: Store, pool: Pool, found: Found) -> None:
    """The pool's devices against the store's: an id of ours without a row is deleted, a foreign one quarantined."""
    # The store first: an id that is made meanwhile is in neither set, or in both.
    before = store.devices()
    ids = pool.ids(Deadline.after(120))
    known = before | store.devices()
    following = int(store.read_fact("next_device") or "1")
    found.orphans = sorted(device for device in ids - known if device < following)
    found.foreign = sorted(device for device in ids - known if device >= following)
    missing = {row.device for page in store.pages() for row in page if row.device and row.device in before} - ids
    found.lost = sorted(missing)
    now = time.time_ns()
    with store.transaction():
        store.quarantine(found.foreign, now)
        if found.foreign:
            store.raise_devices(max(found.foreign))
        for device in found.orphans:
            store.doom(device, now)


__all__ = ["Found", "compare", "recover"]
