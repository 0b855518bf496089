"""Rows of snapshots whose device may not exist yet: written first, fulfilled or dropped by the call that wrote them.

Of one that a killed process has left, the pool decides: a device that exists is kept, and the call that is made again
goes on from it; another was never made.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from blockdev import Deadline
from snapshotter import names
from snapshotter.devices import Devices, Origin
from snapshotter.errors import AlreadyExists, NotFound, SnapshotterError, StoreFailed
from snapshotter.locks import Locks
from snapshotter.model import Kind, Snapshot, State
from snapshotter.pool import DeviceMissing
from snapshotter.store import Store
from snapshotter.workers import aside


class Intents:
    """Those of one store, and the rows that are more than one. `after` is told of devices that were dropped."""

    def __init__(self, store: Store, devices: Devices, locks: Locks, after: Callable[[int], None]) -> None:
        self._store, self._devices, self._locks, self._after = store, devices, locks, after
        # Keys of those that a call of this process is fulfilling.
        self._preparing: set[str] = set()

    @contextlib.contextmanager
    def fulfilling(self, key: str) -> Iterator[None]:
        """For the call that holds the key's lock."""
        self._preparing.add(key)
        try:
            yield
        finally:
            self._preparing.discard(key)

    def write(
        self, key: str, parent: str, kind: Kind, labels: Mapping[str, str], origin: Origin, size: int
    ) -> Snapshot:  # fmt: skip
        """A new intent, or the one of an earlier call; one that may not be on the disk is none. AlreadyExists."""
        try:
            return self._store.ids.renewing(lambda: self._write(key, parent, kind, labels, origin, size))
        except StoreFailed:
            row = self._store.get(key)
            if row is not None and row.state is State.PREPARING:
                with contextlib.suppress(SnapshotterError):
                    self.drop(row)
            raise

    def _write(
        self, key: str, parent: str, kind: Kind, labels: Mapping[str, str], origin: Origin, size: int
    ) -> Snapshot:  # fmt: skip
        now = time.time_ns()
        with self._store.transaction():
            existing = self._store.find(key)
            if existing is not None:
                same = (existing.parent, existing.kind, existing.size) == (parent, kind, size)
                if existing.state is not State.RECOVERED or not same:
                    raise AlreadyExists(key)
                self._store.set_labels(key, labels, now)
                return existing
            if parent:
                above = self._store.find(parent)
                if above is None or above.kind is not Kind.COMMITTED:
                    raise _no_parent(parent)
            row = Snapshot(
                key=key, parent=parent, kind=kind, state=State.PREPARING, device=self._store.new_device(), size=size,
                fstype=origin.fstype, created=now, updated=now, image=origin.image, labels=labels,
            )  # fmt: skip
            self._store.insert(row)
            return row

    def drop(self, row: Snapshot) -> None:
        """It comes to nothing, and its device goes."""
        with self._store.transaction():
            self._store.remove(row.key, time.time_ns())
        self._after(row.device)

    def settle(self, key: str, deadline: Deadline) -> None:
        """Decide about one that no running call owns."""
        with aside(), self._locks.held(key, deadline=deadline):
            self.settle_held(key, deadline)

    def settle_held(self, key: str, deadline: Deadline) -> None:
        """The same, by whom the key's lock is held."""
        row = self._store.get(key)
        if row is None or row.state is not State.PREPARING:
            return
        if self._store.is_foreign(row.device):
            self.drop(row)
            return
        try:
            self._devices.map(row, deadline)
        except DeviceMissing:
            self.drop(row)
            return
        with self._store.transaction(durable=False):
            self._store.set_state(key, State.RECOVERED)

    def seen(self, key: str, deadline: Deadline, *, what: str = "snapshot") -> Snapshot:
        """The row, once whoever makes it has ended. NotFound."""
        row = self._store.get(key)
        if row is not None and row.state is State.PREPARING:
            self.settle(key, deadline)
            row = self._store.get(key)
        if row is None or row.state is State.PREPARING:
            raise _no_parent(key) if what == "parent" else NotFound(key, what)
        return row

    def seen_now(self, key: str) -> Snapshot:
        """The row, whatever becomes of it. NotFound."""
        row = self._store.get(key)
        if row is None:
            raise NotFound(key)
        return row

    def seen_at_once(self, key: str, deadline: Deadline) -> Snapshot:
        """The row, without waiting for the call that makes it: it is there once that has ended. NotFound; what an
        earlier process has left is settled first."""
        row = self._store.get(key)
        if row is None or (row.state is State.PREPARING and key in self._preparing):
            raise NotFound(key)
        return self.seen(key, deadline) if row.state is State.PREPARING else row


def _no_parent(key: str) -> NotFound:
    """containerd asks for no parent that it does not know itself."""
    known = names.of_containerd(key)
    return NotFound(key, "parent", "" if known is None else (
        "containerd has it in its own database, so it was made right before this node's store was lost. Remove the "
        f"containers of its image and the image in namespace {known[0]}, then pull it again"
    ))  # fmt: skip
