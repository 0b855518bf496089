"""Layers lent to `runvol images make`: a read-only snapshot of the layer's device, in no list.

containerd's garbage collection removes each snapshot that it does not know, so a View would go while it is read. What
is lent is a device without a row, which is doomed before it is made: it is deleted behind once nobody has it open,
whoever is killed, and the layer may be removed meanwhile.
"""

from __future__ import annotations

import threading
import time

from blockdev import Deadline
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
        taking = self._snapshots.rowless.taking()
        try:
            device = taking.make(
                lambda one: self._snapshots.copy(one, layer.device, deadline), deadline, proof=lambda: self._still(key)
            )
            self._snapshots.map_read_only(device, layer, deadline)
            with self._lock:
                self._until[device] = time.monotonic() + _UNOPENED
        except DeviceMissing as error:
            raise self._lost(key, error) from None
        finally:
            taking.let_go()
        return Mount(fstype=layer.fstype, source=self._pool.path(device), options=("ro",))

    def _layer(self, key: str, deadline: Deadline) -> Snapshot:
        layer = self._snapshots.stat(key, deadline)
        if layer.kind is not Kind.COMMITTED or not layer.device:
            raise BadRequest("key", key, "is no layer with a device of its own; only a committed snapshot is lent")
        self._snapshots.refuse_shared(layer)
        return layer

    def _still(self, key: str) -> None:
        if self._store.find(key) is None:
            raise NotFound(key)

    def _lost(self, key: str, error: DeviceMissing) -> SnapshotterError:
        if self._store.get(key) is None:
            return NotFound(key)
        return SnapshotterError(f"the data of snapshot {key!r} is lost: {error}; pull its image again")

    def give_back(self, path: str) -> None:
        """The device at this node is not needed any more. Nothing happens for another one, or a second time."""
        with self._lock:
            self._until = {one: until for one, until in self._until.items() if self._pool.path(one) != path}

    def keeps(self, device: int) -> bool:
        """Whether the device was just lent, and may not have been opened yet."""
        with self._lock:
            if self._until.get(device, 0.0) > time.monotonic():
                return True
            self._until.pop(device, None)
            return False
