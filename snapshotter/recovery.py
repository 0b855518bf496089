"""A start: the pool is assembled and bound, and what a killed process left is finished or undone.

The socket listens meanwhile. What the store alone can answer is answered at once; the rest waits for the pool, and an
intent that a call asks for is settled by that call.
"""

from __future__ import annotations

import logging
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
from snapshotter.strangers import Compared

log = logging.getLogger("runvol.snapshotter")
# Seconds that a start waits at most for layers that somebody has open.
_SHUT = 60


@dataclass
class Found:
    """What a start put right; counts, and the ids that nobody knows (`strangers`)."""

    resumed: int = 0
    settled: int = 0
    unmapped: int = 0
    orphans: list[int] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


def recover(
    store: Store, pool: Pool, golden: Bases, snapshots: Snapshotter, reaper: Reaper, compared: Compared | None = None
) -> Found:
    """Bring store, pool and mapped devices into agreement. May be repeated. `compared` was found before any id was
    given, as far as the pool could be read."""
    found = Found()
    if compared is not None:
        found.orphans, found.foreign, found.lost = compared.orphans, compared.foreign, compared.lost
    found.resumed = len(pool.resume_suspended())
    for row in store.intents():
        try:
            snapshots.settle(row.key, Deadline.after(60))
            found.settled += 1
        except (SnapshotterError, BlockdevError) as error:
            log.warning("an intent is not settled yet", extra={"key": row.key, "why": str(error)})
    golden.drop_unfinished()
    found.unmapped = _unmap(store, pool, snapshots, reaper)
    return found


def _unmap(store: Store, pool: Pool, snapshots: Snapshotter, reaper: Reaper) -> int:
    """Devices that are mapped although nothing active needs them go, behind. Layers are written by nobody."""
    mapped = set(pool.active())
    if not mapped:
        return 0
    needed, layers = set(), []
    for row in (row for page in store.pages() for row in page):
        if row.kind is not Kind.COMMITTED:
            needed.add(row.device)
        elif row.device in mapped:
            layers.append(row.key)
    snapshots.commits.shut_mapped(layers, Deadline.after(_SHUT))
    reaper.found_mapped(mapped & needed)
    needed |= {base.device for base in store.bases() if not base.ready}
    for device in mapped - needed:
        reaper.tell(device)
    for path in stale_nodes(pool.mapper, pool.prefix):
        log.info("a node without a device", extra={"path": path, "directory": DIRECTORY})
    return len(mapped - needed)


__all__ = ["Found", "recover"]
