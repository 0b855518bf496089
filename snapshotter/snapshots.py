"""containerd's verbs on snapshots: what each means for the store and for the pool.

Prepare writes an intent, makes the device, and lets the snapshot be seen; Commit and Remove only write, what they
leave to do is done behind them (`reaper`). Nothing is executed and nothing is mounted, except to make a filesystem of
a size that was never asked for before.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from blockdev import Deadline, filesystems, superblocks
from blockdev.errors import BlockdevError
from snapshotter import bases, filters, names, strangers
from snapshotter.background import Background
from snapshotter.bases import Bases
from snapshotter.copies import Copies
from snapshotter.counts import Counts
from snapshotter.errors import (
    AlreadyExists,
    BadRequest,
    IdsUsedUp,
    NotFound,
    NotOffered,
    SnapshotterError,
    StoreFailed,
    Unavailable,
    WrongState,
)
from snapshotter.idle import Idle
from snapshotter.layers import Layers
from snapshotter.locks import Locks
from snapshotter.model import (
    LABEL_FSTYPE,
    LABEL_PREFIX,
    LABEL_REF,
    LABEL_SIZE,
    Kind,
    Mount,
    Snapshot,
    State,
)
from snapshotter.pool import DeviceMissing, Pool
from snapshotter.store import Store
from snapshotter.workers import aside
from snapshotter.writebacks import Writebacks

if TYPE_CHECKING:
    from snapshotter.seals import Seals

log = logging.getLogger("runvol.snapshotter")

# Bytes of one label, as in containerd, and of all of a snapshot's: a pod's annotations have 256 KiB at the most.
_LABEL_LIMIT, _LABELS_LIMIT = 4096, 1 << 20
_T = TypeVar("_T")
# Seconds that what is done behind the calls waits for a device to come to rest.
_PATIENCE = 20.0
# A label may ask for a filesystem that is so many times as large as the pool, which can grow.
_OVERCOMMIT = 4
# Seconds for which a snapshot may wait for others of its parent without being in anybody's way.
_MAKING = 0.25


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes and filesystem of a new chain: the namespace's own, or the default."""

    fstype: str
    size: int
    by_namespace: Mapping[str, int]

    def of(self, key: str) -> int:
        return self.by_namespace.get(key.split("/", 1)[0], self.size)


class Images(Protocol):
    """Shared images that lie under thin devices; see `images`."""

    def claim(self, parent: str, labels: Mapping[str, str], deadline: Deadline, /) -> bool: ...

    def origin(self, image: str, deadline: Deadline, /) -> str: ...


class NoImages:
    """No shared storage is configured."""

    def claim(self, _parent: str, _labels: Mapping[str, str], _deadline: Deadline) -> bool:
        return False

    def origin(self, image: str, _deadline: Deadline) -> str:
        raise Unavailable(f"image {image} lies on shared storage, and none is configured (snapshotter.images)")


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What a new device starts from. `device` 0 means: nothing of the pool, the image alone. `base`: the type of the
    base that it is, empty for a layer."""

    device: int
    size: int
    fstype: str
    image: str
    base: str = ""


class Snapshotter:
    """The verbs. Safe to use from several threads.

    `after` is told of devices that may be unmapped or deleted, `committed` of names that were committed, `drawn` of an
    id that was taken; `renew` makes ids come back.
    """

    def __init__(
        self, store: Store, pool: Pool, golden: Bases, sizes: Sizes, after: Callable[[int], None],
        images: Images | None = None, seals: Seals | None = None, idle: Idle | None = None,
        committed: Callable[[str], None] = lambda _name: None, quiet: Callable[[], float] = lambda: 9.0,
        background: Background | None = None, share_layers: bool = True, drawn: Callable[[], None] = lambda: None,
        renew: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._store, self._pool, self._bases, self._sizes, self._after = store, pool, golden, sizes, after
        self._images: Images = images or NoImages()
        self._seals, self._committed, self._idle = seals, committed, idle or Idle(0)
        self._drawn, self._renew, self._renewal = drawn, renew, threading.Lock()
        # A layer's children are made one after the other, each in milliseconds.
        self._locks, self._devices = Locks(), Locks(patience=_MAKING)
        self._writebacks = Writebacks(pool)
        # Keys of intents that a call of this process is fulfilling.
        self._preparing: set[str] = set()
        self.copies = Copies(store, pool, self._devices, self.with_ids)
        self._layers = Layers(store, self.copies) if share_layers else None
        self.counts = Counts(store, pool, after, inodes_of_image=self._inodes_of, quiet=quiet, background=background)
        # Committed, and somebody has them open who may write: see `part`.
        self._open_layers: set[str] = set()

    def prepare(
        self, key: str, parent: str, labels: Mapping[str, str], deadline: Deadline, *, kind: Kind = Kind.ACTIVE
    ) -> list[Mount]:
        """A new active snapshot (or view) of `parent`, or of nothing; its mounts.

        A call that was interrupted is made again: it goes on from its own intent.
        """
        _check_key("key", key)
        labels = _check_labels(labels)
        with self._locks.held(key, deadline=deadline), self._fulfilling(key):
            if kind is Kind.ACTIVE and (
                self._images.claim(parent, labels, deadline) or self._claim(key, parent, labels, deadline)
            ):
                raise AlreadyExists(labels[LABEL_REF])
            self._settle(key, deadline)
            self._pool.admit()
            origin = self.with_ids(lambda: self._origin(key, parent, labels, deadline))
            size = self._wanted_size(key, labels, origin) if kind is Kind.ACTIVE else origin.size
            if size > origin.size:
                self._pool.admit(*bases.cost(origin.fstype, self._made_with(parent, origin), origin.size, size))
                smaller = origin
                origin = self.with_ids(lambda: self._grown(smaller, size, deadline))
            row = self._intended(key, parent, kind, labels, origin, size)
            self._drawn()
            try:
                row = self._create(row, origin, deadline)
            except DeviceMissing as error:
                self._drop(row)
                if origin.base:
                    self._bases.forget(origin.base, origin.size)
                    raise Unavailable(f"{error}; the empty base is made anew, try again") from None
                above = self._store.get(parent)
                if above is not None and above.device != origin.device:
                    raise Unavailable(f"snapshot {parent!r} got another device meanwhile; try again") from None
                raise SnapshotterError(f"the data of {parent!r} is lost: {error}; pull its image again") from None
            except (SnapshotterError, BlockdevError, OSError):
                # The caller may never come again, and would not find it: an intent is in no list.
                if row.state is State.PREPARING:
                    with contextlib.suppress(SnapshotterError):
                        self._drop(self._store.get(key) or row)
                raise
            self._store.made(row)
            return self._mounts(row, deadline)

    @contextlib.contextmanager
    def _fulfilling(self, key: str) -> Iterator[None]:
        """Whose lock is held."""
        self._preparing.add(key)
        try:
            yield
        finally:
            self._preparing.discard(key)

    def _grown(self, origin: _Origin, size: int, deadline: Deadline) -> _Origin:
        """The layer's filesystem in this size, if that is kept. One on a shared image grows in each child."""
        if not origin.device or origin.image or origin.base:
            return origin
        found = self._bases.grown(origin.fstype, origin.device, size,
                                  lambda device: self.copy(device, origin.device, deadline), deadline)  # fmt: skip
        if found is None:
            return origin
        return replace(origin, device=found, size=size, base=bases.of_layer(origin.fstype, origin.device))

    def _claim(self, key: str, parent: str, labels: Mapping[str, str], deadline: Deadline) -> bool:
        """Whether another namespace has the layer that is about to be unpacked; see `layers`."""
        if self._layers is None or not labels.get(LABEL_REF):
            return False
        above = self._store.get(parent) if parent else None
        if parent and (above is None or above.kind is not Kind.COMMITTED):
            return False
        if above is not None:
            fstype, size = above.fstype, self._wanted_size(key, labels, _origin_in(above))
        else:
            fstype, size = labels.get(LABEL_FSTYPE, self._sizes.fstype), self._first_size(key, labels)
        self._pool.admit()
        return self._layers.claim(key, parent, labels, fstype, size, deadline)

    def _first_size(self, key: str, labels: Mapping[str, str]) -> int:
        return bases.rounded(self._size_label(key, labels) or self._sizes.of(key))

    def _origin(self, key: str, parent: str, labels: Mapping[str, str], deadline: Deadline) -> _Origin:
        if parent:
            above = self._seen(parent, deadline, what="parent")
            if above.kind is not Kind.COMMITTED:
                raise BadRequest("parent", parent, "is not committed")
            self.refuse_shared(above)
            return _origin_in(above)
        fstype = labels.get(LABEL_FSTYPE, self._sizes.fstype)
        size = self._size_label(key, labels) or self._sizes.of(key)
        bases.check(fstype, size, field=LABEL_SIZE if LABEL_SIZE in labels else "snapshotter.size")
        size = self._first_size(key, labels)
        return _Origin(device=self._bases.device(fstype, size, deadline), size=size, fstype=fstype, image="",
                       base=fstype)  # fmt: skip

    def _wanted_size(self, key: str, labels: Mapping[str, str], origin: _Origin) -> int:
        """Grow only: what is smaller than the parent is the parent's size."""
        asked = self._size_label(key, labels) or 0
        wanted = max(origin.size, asked, self._sizes.by_namespace.get(key.split("/", 1)[0], 0))
        return bases.rounded(wanted) if wanted > origin.size else origin.size

    def _size_label(self, key: str, labels: Mapping[str, str]) -> int | None:
        """The label's bytes. BadRequest for more than a few times what the pool holds, or is given without a label."""
        size = _size_label(labels)
        if size is not None:
            limit = max(_OVERCOMMIT * self._pool.data_bytes(), self._sizes.of(key))
            if size > limit:
                why = f"at most {limit} bytes, {_OVERCOMMIT} times what the pool holds"
                raise BadRequest(LABEL_SIZE, labels[LABEL_SIZE][:80], why)
        return size

    def _made_with(self, parent: str, origin: _Origin) -> int:
        """The size that the filesystem was made with, or a smaller one: that of a base which the first in the chain may
        have grown from. A chain from before the bases, or from elsewhere, has the size of its first."""
        if not parent:
            return origin.size
        first = origin.size
        while parent and (row := self._store.get(parent)) is not None:
            parent, first = row.parent, row.size
        return min([first, *(base.size for base in self._store.bases() if base.fstype == origin.fstype)])

    def refuse_shared(self, row: Snapshot) -> None:
        """WrongState for a snapshot of whose device nobody knows whose data it holds: several had it, or the store is
        not the one that its pool was served with."""
        if row.device in self._store.shared:
            if self._store.past:
                raise WrongState(
                    f"nothing proves that device {row.device} of the pool is still that of snapshot {row.key!r}: "
                    f"{self._store.past}"
                )
            raise WrongState(
                f"device {row.device} of snapshot {row.key!r} was given more than once by an older release, or is not "
                "its own, so its data may be another's: it is quarantined. Remove the snapshot and make it anew "
                "(`runvol pool quarantine` lists such devices)"
            )

    def _intended(
        self, key: str, parent: str, kind: Kind, labels: Mapping[str, str], origin: _Origin, size: int
    ) -> Snapshot:  # fmt: skip
        """`_intend`; an intent that may not be on the disk is none."""
        try:
            return self.with_ids(lambda: self._intend(key, parent, kind, labels, origin, size))
        except StoreFailed:
            row = self._store.get(key)
            if row is not None and row.state is State.PREPARING:
                with contextlib.suppress(SnapshotterError):
                    self._drop(row)
            raise

    def with_ids(self, work: Callable[[], _T]) -> _T:
        """`work`, and once more where no id was left: one call begins a new epoch for all that meet the end at once."""
        try:
            return work()
        except IdsUsedUp:
            if self._renew is None:
                raise
        with self._renewal:
            if self._store.used_up():
                self._renew()
        return work()

    def _intend(
        self, key: str, parent: str, kind: Kind, labels: Mapping[str, str], origin: _Origin, size: int
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

    def _create(self, row: Snapshot, origin: _Origin, deadline: Deadline) -> Snapshot:
        """Make and map the device; the row, which has another id where the pool had that one already."""

        def create(device: int) -> None:
            # Only what an earlier life has made for this very row may be there.
            again = row.state is State.RECOVERED
            if not origin.device:
                self._pool.create_thin(device, again=again)
                return
            self.copy(device, origin.device, deadline, again=again)

        device = strangers.make(
            self._store, self._pool, row.device, create, lambda taken: self._store.replace_device(row.key, taken),
            deadline,
        )  # fmt: skip
        row = row if device == row.device else replace(row, device=device)
        self._activate(row, deadline)
        if row.size > origin.size:
            filesystems.grow(self._pool.path(row.device), deadline)
        return row

    def copy(self, device: int, origin: int, deadline: Deadline, *, again: bool = False) -> None:
        """The device is a snapshot of `origin`, as that is at one instant. DeviceThere, DeviceMissing."""
        with self._devices.held(str(origin), deadline=deadline), self._pool.quiet(origin):
            self._pool.create_snapshot(device, origin, again=again)

    def map_read_only(self, device: int, layer: Snapshot, deadline: Deadline) -> None:
        """Map a copy of a committed layer's device, which has no row."""
        self._pool.activate(device, layer.size, read_only=True, origin=self._below(layer, deadline))

    def _activate(self, row: Snapshot, deadline: Deadline) -> None:
        below = self._below(row, deadline)
        self._idle.keep(row.device, deadline)
        self._pool.activate(row.device, row.size, read_only=row.kind is Kind.VIEW, origin=below)

    def _below(self, row: Snapshot, deadline: Deadline) -> str:
        """The shared image under the device; empty for none."""
        return self._images.origin(row.image, deadline) if row.image else ""

    def _drop(self, row: Snapshot) -> None:
        with self._store.transaction():
            self._store.remove(row.key, time.time_ns())
        self._after(row.device)

    def settle(self, key: str, deadline: Deadline) -> None:
        """Decide about an intent that no running call owns: a device that exists is kept, another was never made."""
        with aside(), self._locks.held(key, deadline=deadline):
            self._settle(key, deadline)

    def _settle(self, key: str, deadline: Deadline) -> None:
        row = self._store.get(key)
        if row is None or row.state is not State.PREPARING:
            return
        if self._store.is_foreign(row.device):
            self._drop(row)
            return
        try:
            self._activate(row, deadline)
        except DeviceMissing:
            self._drop(row)
            return
        with self._store.transaction(durable=False):
            self._store.set_state(key, State.RECOVERED)

    def _seen(self, key: str, deadline: Deadline, *, what: str = "snapshot") -> Snapshot:
        row = self._store.get(key)
        if row is not None and row.state is State.PREPARING:
            self.settle(key, deadline)
            row = self._store.get(key)
        if row is None or row.state is State.PREPARING:
            raise _no_parent(key) if what == "parent" else NotFound(key, what)
        return row

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
        row = self._seen(key, deadline)
        self.refuse_shared(row)
        if row.state is State.READY and row.kind is not Kind.COMMITTED:
            self._idle.handed(row.device, deadline.began)
            with aside(must=False):
                if not self._idle.leaving(row.device) and self._pool.find(row.device) is not None:
                    return self._mounts(row, deadline)
        with aside(), self._locks.held(key, deadline=deadline):
            row = self._seen_now(key)
            if row.kind is Kind.COMMITTED:
                raise WrongState(f"snapshot {key!r} is committed and cannot be mounted; prepare or view one of it")
            try:
                self._activate(row, deadline)
            except DeviceMissing as error:
                raise SnapshotterError(f"the data of snapshot {key!r} is lost: {error}") from None
            if row.state is State.RECOVERED:
                with self._store.transaction(durable=False):
                    self._store.set_state(key, State.READY)
        return self._mounts(row, deadline)

    def _seen_now(self, key: str) -> Snapshot:
        row = self._store.get(key)
        if row is None:
            raise NotFound(key)
        return row

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str, deadline: Deadline) -> None:
        """The active snapshot `key` becomes the committed `name`, as it is now.

        A device that nobody has open is the layer, and is written by nobody from then on; it is unmapped behind. Of one
        that somebody has open the layer is a snapshot: the device stays with its holder until the last close.
        """
        _check_key("name", name)
        labels = _check_labels(labels)
        self.refuse_shared(self._seen(key, deadline))
        with self._locks.held(key, name, deadline=deadline):
            row = self._seen_now(key)
            if row.kind is Kind.ACTIVE:
                self._idle.keep(row.device, deadline)
                self._writebacks.flush(row.device, key, deadline)
            _refuse_commit(row, key, parent)
            with self._layer_of(row, name, deadline) as device, self._store.transaction():
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
                self._shut(name, device, deadline)
        self._after(row.device)
        self.counts.ask(name)
        if self._layers is not None:
            self._layers.committed(name)
        self._committed(name)

    @contextlib.contextmanager
    def _layer_of(self, row: Snapshot, name: str, deadline: Deadline) -> Iterator[int]:
        """The device that is to be the layer: the snapshot's own, or inside a snapshot of that."""
        if not self._pool.in_use(row.device) or self._store.get(name) is not None:
            yield row.device
            return
        with self.copies.made(row.device, deadline) as device:
            yield device

    def _shut(self, name: str, device: int, deadline: Deadline) -> None:
        """Nobody writes to a committed device: not who opens it from now on, and whoever has opened it since it was
        looked at keeps another."""
        if self._pool.shut(device):
            return
        self._open_layers.add(name)
        try:
            self._part(name, deadline)
        except (SnapshotterError, BlockdevError, OSError) as error:
            log.error("a layer is open, and its holder can still write to it; it is tried again",
                      extra={"key": name, "why": str(error)})  # fmt: skip

    def _part(self, name: str, deadline: Deadline) -> None:
        """Give a committed snapshot a device of its own, and leave the one it has to whoever has that open."""
        row = self._store.get(name)
        if row is not None and row.kind is Kind.COMMITTED and row.device and not self._pool.shut(row.device):
            with self.copies.made(row.device, deadline) as device, self._store.transaction():
                found = self._store.find(name)
                if found is not None and found.device == row.device:
                    self._store.move(name, device, time.time_ns())
            self._pool.reopen(row.device)
            self._after(row.device)
        self._open_layers.discard(name)

    def shut_layers(self, names: Iterable[str], deadline: Deadline) -> None:
        """Of committed snapshots that are mapped: a process that was killed, or is older, may have left them open."""
        for name in names:
            row = self._store.get(name)
            if row is not None and row.device not in self._store.shared:
                with self._locks.held(name, deadline=deadline):
                    self._shut(name, row.device, deadline)

    def part_layers(self) -> None:
        """What `_shut` could not do; behind the calls."""
        for name in list(self._open_layers):
            try:
                with self._locks.held(name, deadline=Deadline.after(_PATIENCE)):
                    self._part(name, Deadline.after(_PATIENCE))
            except (SnapshotterError, BlockdevError, OSError) as error:
                log.warning("a layer is still open", extra={"key": name, "why": str(error)})

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
        self._seen(key, deadline)
        with self._locks.held(key, deadline=deadline), aside(must=False), self._store.transaction():
            row = self._store.find(key)
            if row is None:
                raise NotFound(key)
            if self._store.has_children(key):
                raise WrongState(f"cannot remove snapshot {key!r}: it has children; remove them first")
            self._store.remove(key, time.time_ns())
        self._after(row.device)

    def stat(self, key: str, deadline: Deadline) -> Snapshot:
        """The row, without waiting for the call that makes it: it is there once that has ended. NotFound if there is
        nothing. An intent that an earlier process has left is settled first."""
        row = self._store.get(key)
        if row is None or (row.state is State.PREPARING and key in self._preparing):
            raise NotFound(key)
        return self._seen(key, deadline) if row.state is State.PREPARING else row

    def update(
        self, key: str, labels: Mapping[str, str], paths: Sequence[str] | None, deadline: Deadline
    ) -> Snapshot:  # fmt: skip
        """Replace all labels, or with `paths` (`labels`, `labels.<name>`) those; an absent value deletes."""
        for path in paths or ():
            if path != "labels" and not (path.startswith("labels.") and len(path) > len("labels.")):
                raise BadRequest("update_mask", path, "takes labels and labels.<name>")
        self._seen(key, deadline)
        with self._locks.held(key, deadline=deadline):
            with aside(must=False), self._store.transaction():
                row = self._store.find(key)
                if row is None:
                    raise NotFound(key)
                changed = dict(labels) if not paths or "labels" in paths else dict(row.labels)
                for path in paths or ():
                    if path != "labels":
                        name = path.removeprefix("labels.")
                        changed[name] = labels.get(name, "")
                changed = _check_labels(changed)
                now = time.time_ns()
                self._store.set_labels(key, changed, now)
            return replace(row, labels=changed, updated=now)

    def list(self, wanted: Sequence[str]) -> Iterator[list[Snapshot]]:
        """Pages of the snapshots that pass the filters, empty ones too; nothing is locked between pages."""
        passes = filters.parse(wanted)
        for page in self._store.pages():
            yield [row for row in page if row.state is not State.PREPARING and passes(row)]

    def usage(self, key: str, deadline: Deadline) -> tuple[int, int]:
        """Bytes in blocks that the parent does not have, and inodes more than it has; never negative."""
        row = self._seen(key, deadline)

        def activate() -> None:
            with self._locks.held(key, deadline=deadline):
                if self._seen_now(key).device == row.device:
                    self._activate(row, deadline)

        return self.counts.usage(row, activate, deadline)

    def _inodes_of(self, image: str, deadline: Deadline) -> int:
        block = superblocks.space(self._images.origin(image, deadline))
        return max(0, block.inodes - block.free_inodes) if block is not None else 0


def _no_parent(key: str) -> NotFound:
    """containerd asks for no parent that it does not know itself."""
    known = names.of_containerd(key)
    return NotFound(key, "parent", "" if known is None else (
        "containerd has it in its own database, so it was made right before this node's store was lost. Remove the "
        f"containers of its image and the image in namespace {known[0]}, then pull it again"
    ))  # fmt: skip


def _origin_in(above: Snapshot) -> _Origin:
    return _Origin(device=above.device, size=above.size, fstype=above.fstype, image=above.image)


def _refuse_commit(row: Snapshot, key: str, parent: str) -> None:
    if row.kind is not Kind.ACTIVE:
        raise WrongState(f"snapshot {key!r} is {row.kind.name.lower()}; only an active one is committed")
    if parent and parent != row.parent:
        if row.parent:
            raise BadRequest("parent", parent, f"snapshot {key!r} has the parent {row.parent!r}")
        raise NotOffered("rebase is not offered: a block device cannot be put on another parent at Commit")


def _check_key(field: str, key: str) -> None:
    if not key:
        raise BadRequest(field, key, "must not be empty")
    if len(key.encode()) > 4096 or "\0" in key:
        raise BadRequest(field, key[:80], "has at most 4096 bytes and no NUL")


def _check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    total = 0
    for name, value in labels.items():
        length = len(name.encode()) + len(value.encode())
        if length > _LABEL_LIMIT:
            raise BadRequest("labels", name[:80], f"key and value have at most {_LABEL_LIMIT} bytes together")
        total += length
    if total > _LABELS_LIMIT:
        raise BadRequest("labels", f"{len(labels)} labels", f"have at most {_LABELS_LIMIT} bytes together")
    return {name: value for name, value in labels.items() if value}


def _size_label(labels: Mapping[str, str]) -> int | None:
    text = labels.get(LABEL_SIZE)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) == 0:
        raise BadRequest(LABEL_SIZE, text, "is a number of bytes, in decimal digits")
    return int(text)


__all__ = ["LABEL_PREFIX", "Images", "Sizes", "Snapshotter"]
