"""Golden bases: empty formatted devices, made before anyone asks. A first layer is a snapshot of one, not a mkfs.

The filesystem is made in a sparse file and its few written blocks are copied into a thin device, so that nothing is
mounted, `lost+found` is gone, and no inode table is left for the kernel to zero in every container later.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from blockdev import Deadline, filesystems, sparse
from blockdev.commands import run
from snapshotter import strangers
from snapshotter.errors import BadRequest, SnapshotterError, TookTooLong
from snapshotter.locks import Held, Locks
from snapshotter.pool import Pool
from snapshotter.store import Store
from snapshotter.tables import Base

GRAIN = 1 << 20
LARGEST = 1 << 50
# What a filesystem writes when it is made or grows lies in places: a group of block groups of an ext4 (16 of 128 MiB),
# an allocation group of an XFS (a quarter of what it was made with). Bytes that each takes, measured and doubled.
_EXT4_PLACE, _XFS_PLACES, _PLACE_BYTES = 2 << 30, 4, 256 << 10


# The name of a fact that says what an empty filesystem holds begins so; its type and its size follow.
EMPTY = "empty "
# Seconds after which a base of another size than the configured ones is not needed any more; longer than a call.
_UNUSED = 3600.0
# Seconds that what is done behind the calls waits for one that is being made.
_PATIENCE = 20.0


def rounded(size: int) -> int:
    """The size of the base for this many bytes."""
    return -(-size // GRAIN) * GRAIN


def of_layer(fstype: str, layer: int) -> str:
    """The type of the base that is a layer's filesystem, grown."""
    return f"{fstype} of {layer}"


def _layer_in(kind: str) -> int:
    said = kind.partition(" of ")[2]
    return int(said) if said.isascii() and said.isdecimal() else 0


def _sizes_in(fact: str) -> tuple[str, int]:
    """A type that is none, which nobody needs, for a fact that nobody has written."""
    fstype, _, size = fact.removeprefix(EMPTY).partition(" ")
    return (fstype, int(size)) if size.isascii() and size.isdecimal() else ("", 0)


def check(fstype: str, size: int, *, field: str = "size") -> None:
    """BadRequest for what no base can be."""
    if fstype not in filesystems.SUPPORTED:
        raise BadRequest("fstype", fstype, f"takes {' or '.join(filesystems.SUPPORTED)}")
    if size < filesystems.SMALLEST[fstype]:
        raise BadRequest(field, size, f"a {fstype} has at least {filesystems.SMALLEST[fstype]} bytes")
    if size > LARGEST:
        raise BadRequest(field, size, f"at most {LARGEST} bytes")


def cost(fstype: str, first: int, before: int, size: int) -> tuple[int, int]:
    """(places, bytes at each) that a filesystem writes to grow from `before` to `size` bytes, 0 for one that is made.

    `first` is the size that it was made with.
    """
    place = _EXT4_PLACE if fstype == "ext4" else max(GRAIN, first // _XFS_PLACES)
    return -(-(size - before) // place), _PLACE_BYTES


class Bases:
    """One base for each filesystem type and size, in the pool; made on first demand.

    Those of the sizes in `kept` stay; another goes once nobody has asked for it for `unused_after` seconds. A snapshot
    does not need the device that it was made of. A layer whose children are larger has a base of its own, see `grown`.
    """

    def __init__(
        self, store: Store, pool: Pool, directory: str, kept: Collection[tuple[str, int]] = ()
    ) -> None:  # fmt: skip
        self._store, self._pool, self._directory, self._kept = store, pool, directory, frozenset(kept)
        self._turns = Locks()
        self._ready: dict[tuple[str, int], int] = {}
        self._asked: dict[tuple[str, int], float] = {}
        self.unused_after = _UNUSED
        self._began = self._looked = time.monotonic()

    def device(self, fstype: str, size: int, deadline: Deadline) -> int:
        """The thin id of the base, whole and not mapped."""
        self._asked[fstype, size] = time.monotonic()
        known = self._ready.get((fstype, size))
        if known is not None:
            return known
        with self._turn(fstype, size, deadline):
            base = self._store.base(fstype, size)
            if base is None or not base.ready:
                self._pool.admit(*cost(fstype, size, 0, size))
                base = self._made(fstype, size, deadline)
            self._ready[fstype, size] = base.device
            return base.device

    def _turn(self, fstype: str, size: int, deadline: Deadline) -> Held:
        """One at a time for each base: making one takes as long as the disk does, and may hang. TookTooLong."""
        return self._turns.held(f"the empty {fstype} of {size} bytes", deadline=deadline)

    def forget(self, fstype: str, size: int, deadline: Deadline) -> None:
        """The pool turned out not to have this base: the next demand makes it anew."""
        with self._turn(fstype, size, deadline):
            self._ready.pop((fstype, size), None)
            base = self._store.base(fstype, size)
            if base is not None:
                with self._store.transaction():
                    self._store.forget_base(base)

    def drop_unused(self, leaving: Callable[[Base], object], *, every: float = 60) -> None:
        """Doom the bases that nobody needs; `leaving` is told of one whose snapshots are still there. Does nothing
        until `every` seconds after the last time."""
        now = time.monotonic()
        if now - self._looked < every:
            return
        self._looked = now
        first = self._store.first_layers()
        for base in self._store.bases():
            if base.ready and self._is_unused(base, now):
                if (base.fstype, base.size) in first:
                    leaving(base)
                with (
                    contextlib.suppress(TookTooLong),
                    self._turn(base.fstype, base.size, Deadline.after(_PATIENCE)),
                ):
                    if self._is_unused(base, now):
                        self._drop(base)
        needed = first | {(base.fstype, base.size) for base in self._store.bases()}
        gone = [fact for fact in self._store.facts(EMPTY) if _sizes_in(fact) not in needed]
        if gone:
            with self._store.transaction(durable=False):
                self._store.forget_facts(gone)

    def _is_unused(self, base: Base, now: float) -> bool:
        kind, layer = (base.fstype, base.size), _layer_in(base.fstype)
        if layer and not self._store.owners(layer):
            return True
        return kind not in self._kept and now - self._asked.get(kind, self._began) >= self.unused_after

    def _drop(self, base: Base) -> None:
        self._ready.pop((base.fstype, base.size), None)
        with self._store.transaction():
            self._store.abandon(base.device, time.time_ns(), base.size)
            self._store.forget_base(base)
        self._asked.pop((base.fstype, base.size), None)

    def drop_unfinished(self) -> None:
        """Bases that a killed process was making; not one that a call of this process is making right now."""
        for left in self._store.bases():
            if not left.ready:
                with contextlib.suppress(TookTooLong), self._turn(left.fstype, left.size, Deadline.after(0.1)):
                    now = self._store.base(left.fstype, left.size)
                    if now == left:
                        with self._store.transaction():
                            self._store.abandon(left.device, time.time_ns())
                            self._store.forget_base(left)

    def grown(
        self, fstype: str, layer: int, size: int, create: Callable[[int], None], deadline: Deadline
    ) -> int | None:  # fmt: skip
        """The thin id of a snapshot of the device `layer` whose filesystem has grown to `size` bytes, not mapped.

        Kept from the second demand on, as growing takes a mount: None for the first, and the child grows by itself.
        `create` makes a snapshot of the layer.
        """
        kind = of_layer(fstype, layer)
        again = (kind, size) in self._asked
        self._asked[kind, size] = time.monotonic()
        if (known := self._ready.get((kind, size))) is not None:
            return known
        with self._turn(kind, size, deadline):
            base = self._store.base(kind, size)
            if base is None or not base.ready:
                if not again:
                    return None
                base = self._make(kind, size, create, lambda path: filesystems.grow(path, deadline), deadline)
            self._ready[kind, size] = base.device
            return base.device

    def _made(self, fstype: str, size: int, deadline: Deadline) -> Base:
        with self._formatted_file(fstype, size, deadline) as file:
            return self._make(fstype, size, self._pool.create_thin, lambda path: sparse.copy_written(file, path),
                              deadline)  # fmt: skip

    def _make(
        self, kind: str, size: int, create: Callable[[int], None], fill: Callable[[str], object], deadline: Deadline
    ) -> Base:  # fmt: skip
        unfinished = self._store.base(kind, size)
        with self._store.transaction():
            if unfinished is not None:
                self._store.abandon(unfinished.device, time.time_ns())
            base = Base(fstype=kind, size=size, device=self._store.new_device(), ready=False)
            self._store.set_base(base)
        device = strangers.make(
            self._store, self._pool, base.device, create, lambda _taken: self._moved(base), deadline
        )
        base = replace(base, device=device)
        self._pool.activate(base.device, size)
        try:
            fill(self._pool.path(base.device))
        finally:
            self._pool.deactivate(base.device)
        deadline.poll(f"closing {self._pool.path(base.device)}", lambda: self._pool.deactivate(base.device))
        if self._pool.status().mode != "rw":
            raise SnapshotterError(f"the pool turned {self._pool.status().mode} while the base was written")
        base = replace(base, ready=True)
        with self._store.transaction():
            self._store.set_base(base)
        return base

    def _moved(self, base: Base) -> int:
        """The base is to have another device; inside a transaction."""
        device = self._store.new_device()
        self._store.set_base(replace(base, device=device))
        return device

    @contextlib.contextmanager
    def _formatted_file(self, fstype: str, size: int, deadline: Deadline) -> Iterator[str]:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        path = os.path.join(self._directory, f"{fstype}-{size}.new")
        with open(path, "wb") as opened:
            opened.truncate(size)
        try:
            if fstype == "xfs":
                run("mkfs.xfs", "-q", "-K", path, deadline=deadline)
            else:
                filesystems.make_ext4_on_zeros(path, deadline, "-b", "4096")
                _, said = run("debugfs", "-w", "-R", "rmdir lost+found", path, deadline=deadline)
                if "rmdir:" in said:
                    raise SnapshotterError(f"debugfs could not remove lost+found from the base: {said}")
            yield path
        finally:
            os.unlink(path)
