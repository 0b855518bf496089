"""Layers lent to `runvol images make`: a read-only snapshot of the layer's device, in no list.

containerd's garbage collection removes each snapshot that it does not know, so a View would go while it is read. What
is lent is a device without a row, which is doomed before it is made: it is deleted behind once nobody has it open,
whoever is killed, and the layer may be removed meanwhile.
"""

from __future__ import annotations

import math
import threading
import time

from blockdev import Deadline
from snapshotter import strangers
from snapshotter.errors import BadRequest, NotFound, SnapshotterError
from snapshotter.model import Kind, Mount, Snapshot
from snapshotter.pool import DeviceMissing, Pool
from snapshotter.snapshots import Snapshotter
from snapshotter.store import Store

# Seconds for which a borrower may take to open the device; from then on its being open keeps it.
_UNOPENED = 20.0


class Lender:
    """Makes such devices, and knows which may not be deleted yet. Safe to use from several threads."""

    def __init__(self, store: Store, pool: Pool, snapshots: Snapshotter) -> None:
        self._store, self._pool, self._snapshots = store, pool, snapshots
        self._until: dict[int, float] = {}
        self._lock = threading.Lock()

    def lend(self, key: str, deadline: Deadline) -> Mount:
        """Where the committed layer `key` can be read, which changes no more. Open it within 20 seconds.

        NotFound without the layer, BadRequest for what has no device of its own, PoolFull, Unavailable.
        """
        layer = self._layer(key, deadline)
        self._pool.admit()
        taken: list[int] = []
        try:
            first = self._snapshots.with_ids(lambda: self._first(key, taken))
            device = strangers.make(
                self._store, self._pool, first, lambda one: self._snapshots.copy(one, layer.device, deadline),
                lambda _taken: self._take(taken), deadline,
            )  # fmt: skip
            self._snapshots.map_read_only(device, layer, deadline)
        except BaseException as error:
            self._let_go(taken)
            if isinstance(error, DeviceMissing):
                raise self._lost(key, error) from None
            raise
        self._let_go([one for one in taken if one != device])
        with self._lock:
            self._until[device] = time.monotonic() + _UNOPENED
        return Mount(fstype=layer.fstype, source=self._pool.path(device), options=("ro",))

    def _layer(self, key: str, deadline: Deadline) -> Snapshot:
        layer = self._snapshots.stat(key, deadline)
        if layer.kind is not Kind.COMMITTED or not layer.device:
            raise BadRequest("key", key, "is no layer with a device of its own; only a committed snapshot is lent")
        self._snapshots.refuse_shared(layer)
        return layer

    def _first(self, key: str, taken: list[int]) -> int:
        with self._store.transaction():
            if self._store.find(key) is None:
                raise NotFound(key)
            return self._take(taken)

    def _take(self, taken: list[int]) -> int:
        """An id, in a transaction: doomed, and kept from the reaper before that can see it."""
        device = self._store.new_device()
        taken.append(device)
        with self._lock:
            self._until[device] = math.inf
        self._store.doom(device, time.time_ns())
        return device

    def _lost(self, key: str, error: DeviceMissing) -> SnapshotterError:
        if self._store.get(key) is None:
            return NotFound(key)
        return SnapshotterError(f"the data of snapshot {key!r} is lost: {error}; pull its image again")

    def give_back(self, path: str) -> None:
        """The device at this node is not needed any more. Nothing happens for another one, or a second time."""
        with self._lock:
            self._until = {one: until for one, until in self._until.items() if self._pool.path(one) != path}

    def _let_go(self, devices: list[int]) -> None:
        with self._lock:
            for device in devices:
                self._until.pop(device, None)

    def keeps(self, device: int) -> bool:
        """Whether the device was just lent, and may not have been opened yet."""
        with self._lock:
            if self._until.get(device, 0.0) > time.monotonic():
                return True
            self._until.pop(device, None)
            return False
