"""Devices of the pool that no row of the store knows: quarantined, and never deleted or given to a snapshot.

They are somebody else's, or they are ours and the store was lost or came back from a copy. Nothing here can tell, and a
guess would give one container's data to another. So they are looked for before the first id is given, and whenever the
pool turns out to have an id already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockdev import Deadline
from snapshotter.errors import SnapshotterError
from snapshotter.pool import DeviceThere, Pool
from snapshotter.store import Store

log = logging.getLogger("runvol.snapshotter")
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Ids without a row, below the next one to be given (`orphans`) and above; ids of rows that the pool lacks."""

    orphans: list[int]
    foreign: list[int]
    lost: list[int]


def compare(store: Store, pool: Pool, deadline: Deadline) -> Compared:
    """Quarantine what the pool has and the store does not know, and give ids above all of it from now on."""
    # The store before and after: an id that is made meanwhile is in one of them, and so is one that is deleted.
    before, rows = store.devices(), store.fulfilled()
    ids = pool.ids(deadline)
    unknown = ids - before - store.devices()
    following = store.following()
    gone = set(store.quarantined()) - ids - rows
    if unknown or gone or max(ids, default=0) >= following:
        with store.transaction():
            store.quarantine(sorted(unknown), time.time_ns())
            store.release(gone)
            store.raise_devices(max(ids, default=0))
    return Compared(
        orphans=sorted(one for one in unknown if one < following),
        foreign=sorted(one for one in unknown if one >= following),
        lost=sorted((rows & before) - ids),
    )


def make(
    store: Store, pool: Pool, first: int, create: Callable[[int], None], another: Callable[[int], int],
    deadline: Deadline,
) -> int:  # fmt: skip
    """Make a device with `create`, under the id `first` or, where the pool has that already, another; which one.

    `another` is called in a transaction, with the id that is quarantined, and writes a new one into the row.
    """
    device = first
    for _ in range(_TRIES):
        try:
            create(device)
        except DeviceThere as error:
            log.error("somebody else's device has the next id; it is quarantined", extra={"why": str(error)})
            store.refuse(device, time.time_ns())
            with store.transaction():
                device = another(device)
            compare(store, pool, deadline)
        else:
            return device
    raise SnapshotterError(
        f"pool {pool.name} has each device already that was to be made ({_TRIES} tries): somebody else makes devices "
        "in it; stop that"
    )
