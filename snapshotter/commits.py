"""A layer is what was there at Commit: who has the device open writes to another one from then on.

A device that nobody has open is the layer, and is written by nobody afterwards; of one that somebody has open the layer
is a snapshot, and the device stays with its holder until the last close.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator

from blockdev import Deadline
from blockdev.errors import BlockdevError
from snapshotter.copies import Copies
from snapshotter.errors import SnapshotterError
from snapshotter.locks import Locks
from snapshotter.model import Kind, Snapshot
from snapshotter.pool import Pool
from snapshotter.store import Store

log = logging.getLogger("runvol.snapshotter")

# Seconds that what is done behind the calls waits for a device to come to rest.
_PATIENCE = 20.0


class Commits:
    """The devices of layers. `after` is told of those that may be unmapped or deleted."""

    def __init__(self, store: Store, pool: Pool, locks: Locks, copies: Copies, after: Callable[[int], None]) -> None:
        self._store, self._pool, self._locks, self._copies, self._after = store, pool, locks, copies, after
        # Committed, and somebody has them open who may write: see `_part`.
        self._open: set[str] = set()

    @contextlib.contextmanager
    def device_of(self, row: Snapshot, name: str, deadline: Deadline) -> Iterator[int]:
        """The device that is to be the layer: the snapshot's own, or inside a snapshot of that."""
        if not self._pool.in_use(row.device) or self._store.get(name) is not None:
            yield row.device
            return
        with self._copies.made(row.device, deadline) as device:
            yield device

    def shut(self, name: str, device: int, deadline: Deadline) -> None:
        """Nobody writes to a committed device: not who opens it from now on, and whoever has opened it since it was
        looked at keeps another."""
        if self._pool.shut(device):
            return
        self._open.add(name)
        try:
            self._part(name, deadline)
        except (SnapshotterError, BlockdevError, OSError) as error:
            log.error("a layer is open, and its holder can still write to it; it is tried again",
                      extra={"key": name, "why": str(error)})  # fmt: skip

    def _part(self, name: str, deadline: Deadline) -> None:
        """Give a committed snapshot a device of its own, and leave the one it has to whoever has that open."""
        row = self._store.get(name)
        if row is not None and row.kind is Kind.COMMITTED and row.device and not self._pool.shut(row.device):
            with self._copies.made(row.device, deadline) as device, self._store.transaction():
                found = self._store.find(name)
                if found is not None and found.device == row.device:
                    self._store.move(name, device, time.time_ns())
            self._pool.reopen(row.device)
            self._after(row.device)
        self._open.discard(name)

    def shut_mapped(self, names: Iterable[str], deadline: Deadline) -> None:
        """Of committed snapshots that are mapped: a process that was killed, or is older, may have left them open."""
        for name in names:
            row = self._store.get(name)
            if row is not None and row.device not in self._store.shared:
                with self._locks.held(name, deadline=deadline):
                    self.shut(name, row.device, deadline)

    def part_open(self) -> None:
        """What `shut` could not do; behind the calls."""
        for name in list(self._open):
            try:
                with self._locks.held(name, deadline=Deadline.after(_PATIENCE)):
                    self._part(name, Deadline.after(_PATIENCE))
            except (SnapshotterError, BlockdevError, OSError) as error:
                log.warning("a layer is still open", extra={"key": name, "why": str(error)})
