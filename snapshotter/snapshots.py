"""containerd's verbs on snapshots: what each means for the store and for the pool.

Prepare writes an intent, makes the device, and lets the snapshot be seen; Commit and Remove only write, what they
leave to do is done behind them (`reaper`). Nothing is executed and nothing is mounted, except to make a filesystem of
a size that was never asked for before.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from blockdev import Deadline, superblocks
from blockdev.errors import BlockdevError
from snapshotter import filters
from snapshotter import labels as asked
from snapshotter.background import Background
from snapshotter.bases import Bases
from snapshotter.commits import Commits
from snapshotter.copies import Copies
from snapshotter.counts import Counts
from snapshotter.devices import Devices, Images, NoImages, Origin
from snapshotter.errors import (
    AlreadyExists,
    BadRequest,
    NotFound,
    NotOffered,
    RowDamaged,
    SnapshotterError,
    StoreFailed,
    Unavailable,
    WrongState,
)
from snapshotter.idle import Idle
from snapshotter.intents import Intents
from snapshotter.layers import Layers
from snapshotter.locks import Locks
from snapshotter.model import LABEL_REF, Kind, Mount, Snapshot, State
from snapshotter.origins import Origins, Sizes
from snapshotter.pool import DeviceMissing, Pool
from snapshotter.rowless import Rowless
from snapshotter.store import Store
from snapshotter.workers import aside
from snapshotter.writebacks import Writebacks

if TYPE_CHECKING:
    from snapshotter.seals import Seals


class Snapshotter:
    """The verbs. Safe to use from several threads.

    `after` is told of devices that may be unmapped or deleted, `committed` of names that were committed, `drawn` of an
    id that was taken.
    """

    def __init__(
        self, store: Store, pool: Pool, golden: Bases, sizes: Sizes, after: Callable[[int], None],
        images: Images | None = None, seals: Seals | None = None, idle: Idle | None = None,
        committed: Callable[[str], None] = lambda _name: None, quiet: Callable[[], float] = lambda: 9.0,
        background: Background | None = None, share_layers: bool = True, drawn: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._pool, self._after = store, pool, after
        self._images: Images = images or NoImages()
        self._seals, self._committed, self._drawn = seals, committed, drawn
        self._idle = idle or Idle(0)
        self._locks, self._writebacks = Locks(), Writebacks(pool)
        self._searching = threading.Lock()
        self.rowless = Rowless(store, pool)
        self.copies = Copies(pool, self.rowless)
        self._devices = Devices(store, pool, self._images, self._idle, self.copies)
        self._intents = Intents(store, self._devices, self._locks, after)
        self._origins = Origins(store, pool, golden, sizes, self._devices, self._intents, self.copies)
        self._layers = Layers(store, self.copies) if share_layers else None
        self.commits = Commits(store, pool, self._locks, self.copies, after)
        self.counts = Counts(store, pool, after, inodes_of_image=self._inodes_of, quiet=quiet, background=background)

    # -- Prepare and View -----------------------------------------------------------------------------------------

    def prepare(
        self, key: str, parent: str, labels: Mapping[str, str], deadline: Deadline, *, kind: Kind = Kind.ACTIVE
    ) -> list[Mount]:
        """A new active snapshot (or view) of `parent`, or of nothing; its mounts.

        A call that was interrupted is made again: it goes on from its own intent.
        """
        asked.check_key("key", key)
        labels = asked.checked(labels)
        with self._locks.held(key, deadline=deadline), self._intents.fulfilling(key):
            if kind is Kind.ACTIVE and (
                self._images.claim(parent, labels, deadline) or self._claim(key, parent, labels, deadline)
            ):
                raise AlreadyExists(labels[LABEL_REF])
            self._intents.settle_held(key, deadline)
            origin, size = self._origins.admitted(key, parent, kind, labels, deadline)
            row = self._intents.write(key, parent, kind, labels, origin, size)
            self._drawn()
            try:
                row = self._devices.make(row, origin, deadline)
            except DeviceMissing as error:
                self._intents.drop(row)
                raise self._lost(parent, origin, error, deadline) from None
            except (SnapshotterError, BlockdevError, OSError):
                # The caller may never come again, and would not find it: an intent is in no list.
                if row.state is State.PREPARING:
                    with contextlib.suppress(SnapshotterError):
                        self._intents.drop(self._store.get(key) or row)
                raise
            self._store.made(row)
            return self._mounts(row, deadline)

    def _claim(self, key: str, parent: str, labels: Mapping[str, str], deadline: Deadline) -> bool:
        """Whether another namespace has the layer that is about to be unpacked; see `layers`."""
        if self._layers is None or not labels.get(LABEL_REF):
            return False
        above = self._store.get(parent) if parent else None
        if parent and (above is None or above.kind is not Kind.COMMITTED):
            return False
        fstype, size = self._origins.filesystem(key, above, labels)
        self._pool.admit()
        return self._layers.claim(key, parent, labels, fstype, size, deadline)

    def _lost(self, parent: str, origin: Origin, error: DeviceMissing, deadline: Deadline) -> SnapshotterError:
        """What to say where the pool has not what the snapshot was to start from."""
        if origin.base:
            self._origins.forget(origin, deadline)
            return Unavailable(f"{error}; the empty base is made anew, try again")
        above = self._store.get(parent)
        if above is not None and above.device != origin.device:
            return Unavailable(f"snapshot {parent!r} got another device meanwhile; try again")
        return SnapshotterError(f"the data of {parent!r} is lost: {error}; pull its image again")

    def settle(self, key: str, deadline: Deadline) -> None:
        """Decide about an intent that no running call owns: a device that exists is kept, another was never made."""
        self._intents.settle(key, deadline)

    # -- Mounts ---------------------------------------------------------------------------------------------------

    def _mounts(self, row: Snapshot, deadline: Deadline) -> list[Mount]:
        source, options = self._pool.path(row.device), ["nouuid"] if row.fstype == "xfs" else []
        if row.kind is Kind.VIEW:
            options.insert(0, "ro")
            if self._seals is not None:
                above = self._store.get(row.parent)
                source = self._seals.open(row, above.device if above is not None else 0, deadline)
        return [Mount(fstype=row.fstype, source=source, options=tuple(options))]

    def mounts(self, key: str, deadline: Deadline) -> list[Mount]:
        """The mount of an active snapshot or view; its device is there when the call returns."""
        row = self._intents.seen(key, deadline)
        self._devices.refuse_shared(row)
        if row.state is State.READY and row.kind is not Kind.COMMITTED:
            self._idle.handed(row.device, deadline.began)
            with aside(must=False):
                if not self._idle.leaving(row.device) and self._pool.find(row.device) is not None:
                    return self._mounts(row, deadline)
        with aside(), self._locks.held(key, deadline=deadline):
            row = self._intents.seen_now(key)
            if row.kind is Kind.COMMITTED:
                raise WrongState(f"snapshot {key!r} is committed and cannot be mounted; prepare or view one of it")
            try:
                self._devices.map(row, deadline)
            except DeviceMissing as error:
                raise SnapshotterError(f"the data of snapshot {key!r} is lost: {error}") from None
            if row.state is State.RECOVERED:
                with self._store.transaction(durable=False):
                    self._store.set_state(key, State.READY)
        return self._mounts(row, deadline)

    # -- Commit ---------------------------------------------------------------------------------------------------

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str, deadline: Deadline) -> None:
        """The active snapshot `key` becomes the committed `name`, as it is now.

        A device that nobody has open is the layer, and is written by nobody from then on; it is unmapped behind. Of one
        that somebody has open the layer is a snapshot: the device stays with its holder until the last close.
        """
        asked.check_key("name", name)
        labels = asked.checked(labels)
        self._devices.refuse_shared(self._intents.seen(key, deadline))
        with self._locks.held(key, name, deadline=deadline):
            row = self._intents.seen_now(key)
            if row.kind is Kind.ACTIVE:
                self._idle.keep(row.device, deadline)
                self._writebacks.flush(row.device, key, deadline)
            _refuse_commit(row, key, parent)
            with self.commits.device_of(row, name, deadline) as device, self._store.transaction():
                found = self._store.find(key)
                if found is None:
                    raise NotFound(key)
                _refuse_commit(found, key, parent)
                if self._store.find(name) is not None:
                    raise AlreadyExists(name)
                self._store.commit(key, name, labels, time.time_ns())
                if device != row.device:
                    self._store.move(name, device, time.time_ns())
            if device == row.device:
                self.commits.shut(name, device, deadline)
        self._after(row.device)
        self.counts.ask(name)
        if self._layers is not None:
            self._layers.committed(name)
        self._committed(name)

    # -- Remove ---------------------------------------------------------------------------------------------------

    def remove(self, key: str, deadline: Deadline) -> None:
        """Forget the snapshot; its device is deleted behind, once nobody has it open. Works on a full disk too, since
        containerd makes room by removals, and stops them at the first that fails."""
        try:
            self._remove(key, deadline)
        except StoreFailed as error:
            if not error.full:
                raise
            self._store.make_room()
            try:
                self._remove(key, deadline)
            except NotFound:  # it is gone, and only the disk did not say so
                self._store.confirm()

    def _remove(self, key: str, deadline: Deadline) -> None:
        try:
            self._intents.seen(key, deadline)
        except RowDamaged:
            with self._locks.held(key, deadline=deadline), aside(must=False), self._store.transaction():
                self._refuse_children(key)
                self._store.remove_damaged(key, time.time_ns())
            return
        with self._locks.held(key, deadline=deadline), aside(must=False), self._store.transaction():
            row = self._store.find(key)
            if row is None:
                raise NotFound(key)
            self._refuse_children(key)
            self._store.remove(key, time.time_ns())
        self._after(row.device)

    def _refuse_children(self, key: str) -> None:
        if self._store.has_children(key):
            raise WrongState(f"cannot remove snapshot {key!r}: it has children; remove them first")

    # -- Stat, Update, List and Usage -----------------------------------------------------------------------------

    def stat(self, key: str, deadline: Deadline) -> Snapshot:
        """The row, without waiting for the call that makes it: it is there once that has ended. NotFound if there is
        nothing. An intent that an earlier process has left is settled first."""
        return self._intents.seen_at_once(key, deadline)

    def update(
        self, key: str, labels: Mapping[str, str], paths: Sequence[str] | None, deadline: Deadline
    ) -> Snapshot:  # fmt: skip
        """Replace all labels, or with `paths` (`labels`, `labels.<name>`) those; an absent value deletes."""
        asked.check_paths(paths or ())
        self._intents.seen(key, deadline)
        with self._locks.held(key, deadline=deadline):
            with aside(must=False), self._store.transaction():
                row = self._store.find(key)
                if row is None:
                    raise NotFound(key)
                changed, now = asked.updated(row.labels, labels, paths or ()), time.time_ns()
                self._store.set_labels(key, changed, now)
            return replace(row, labels=changed, updated=now)

    def list(self, wanted: Sequence[str]) -> Iterator[list[Snapshot]]:
        """Pages of the snapshots that pass the filters, empty ones too; nothing is locked between pages."""
        passes = filters.parse(wanted, filters.Work(self._searching))
        for page in self._store.pages():
            yield [row for row in page if row.state is not State.PREPARING and passes(row)]

    def usage(self, key: str, deadline: Deadline) -> tuple[int, int]:
        """Bytes in blocks that the parent does not have, and inodes more than it has; never negative."""
        row = self._intents.seen(key, deadline)

        def activate() -> None:
            with self._locks.held(key, deadline=deadline):
                if self._intents.seen_now(key).device == row.device:
                    self._devices.map(row, deadline)

        return self.counts.usage(row, activate, deadline)

    def _inodes_of(self, image: str, deadline: Deadline) -> int:
        block = superblocks.space(self._images.origin(image, deadline))
        return max(0, block.inodes - block.free_inodes) if block is not None else 0

    # -- what is lent (`lending`) ---------------------------------------------------------------------------------

    def copy(self, device: int, origin: int, deadline: Deadline) -> None:
        """See `Copies.copy`."""
        self.copies.copy(device, origin, deadline)

    def map_read_only(self, device: int, layer: Snapshot, deadline: Deadline) -> None:
        """See `Devices.map_read_only`."""
        self._devices.map_read_only(device, layer, deadline)

    def refuse_shared(self, row: Snapshot) -> None:
        """See `Devices.refuse_shared`."""
        self._devices.refuse_shared(row)


def _refuse_commit(row: Snapshot, key: str, parent: str) -> None:
    if row.kind is not Kind.ACTIVE:
        raise WrongState(f"snapshot {key!r} is {row.kind.name.lower()}; only an active one is committed")
    if parent and parent != row.parent:
        if row.parent:
            raise BadRequest("parent", parent, f"snapshot {key!r} has the parent {row.parent!r}")
        raise NotOffered("rebase is not offered: a block device cannot be put on another parent at Commit")


__all__ = ["Images", "Sizes", "Snapshotter"]
