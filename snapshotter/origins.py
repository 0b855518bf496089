"""What a new snapshot starts from, and how large its filesystem is: its parent, or an empty base.

Grown where a label or the namespace wants more than the parent has, and refused where the pool could never hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from blockdev import Deadline
from snapshotter import bases
from snapshotter import labels as asked
from snapshotter.bases import Bases
from snapshotter.copies import Copies
from snapshotter.devices import Devices, Origin
from snapshotter.errors import BadRequest
from snapshotter.intents import Intents
from snapshotter.model import LABEL_FSTYPE, LABEL_SIZE, Kind, Snapshot
from snapshotter.pool import Pool
from snapshotter.store import Store

# A label may ask for a filesystem that is so many times as large as the pool, which can grow.
_OVERCOMMIT = 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes and filesystem of a new chain: the namespace's own, or the default."""

    fstype: str
    size: int
    by_namespace: Mapping[str, int]

    def of(self, key: str) -> int:
        return self.by_namespace.get(key.split("/", 1)[0], self.size)

    def wanted(self, key: str) -> int:
        """What the namespace wants of a child too; 0 for nothing."""
        return self.by_namespace.get(key.split("/", 1)[0], 0)


class Origins:
    """Those of a pool's snapshots. Safe to use from several threads."""

    def __init__(
        self, store: Store, pool: Pool, golden: Bases, sizes: Sizes, devices: Devices, intents: Intents, copies: Copies
    ) -> None:
        self._store, self._pool, self._bases, self._sizes = store, pool, golden, sizes
        self._devices, self._intents, self._copies = devices, intents, copies

    def admitted(
        self, key: str, parent: str, kind: Kind, labels: Mapping[str, str], deadline: Deadline
    ) -> tuple[Origin, int]:  # fmt: skip
        """What the snapshot starts from, and its size in bytes.

        BadRequest for what cannot be, NotFound, WrongState; PoolFull and Unavailable where the pool takes no such one.
        """
        self._pool.admit()
        origin = self._store.ids.renewing(lambda: self._of(key, parent, labels, deadline))
        size = self._wanted_size(key, labels, origin) if kind is Kind.ACTIVE else origin.size
        if size > origin.size:
            self._pool.admit(*bases.cost(origin.fstype, self._made_with(parent, origin), origin.size, size))
            smaller = origin
            origin = self._store.ids.renewing(lambda: self._grown(smaller, size, deadline))
        return origin, size

    def filesystem(self, key: str, above: Snapshot | None, labels: Mapping[str, str]) -> tuple[str, int]:
        """Type and size of that of a child of `above`, or of a first layer."""
        if above is not None:
            return above.fstype, self._wanted_size(key, labels, _origin_in(above))
        return labels.get(LABEL_FSTYPE, self._sizes.fstype), self._first_size(key, labels)

    def forget(self, origin: Origin, deadline: Deadline) -> None:
        """The pool turned out not to have this base."""
        self._bases.forget(origin.base, origin.size, deadline)

    def _of(self, key: str, parent: str, labels: Mapping[str, str], deadline: Deadline) -> Origin:
        if parent:
            above = self._intents.seen(parent, deadline, what="parent")
            if above.kind is not Kind.COMMITTED:
                raise BadRequest("parent", parent, "is not committed")
            self._devices.refuse_shared(above)
            return _origin_in(above)
        fstype = labels.get(LABEL_FSTYPE, self._sizes.fstype)
        size = self._size_label(key, labels) or self._sizes.of(key)
        bases.check(fstype, size, field=LABEL_SIZE if LABEL_SIZE in labels else "snapshotter.size")
        size = self._first_size(key, labels)
        return Origin(device=self._bases.device(fstype, size, deadline), size=size, fstype=fstype, image="",
                      base=fstype)  # fmt: skip

    def _grown(self, origin: Origin, size: int, deadline: Deadline) -> Origin:
        """The layer's filesystem in this size, if that is kept. One on a shared image grows in each child."""
        if not origin.device or origin.image or origin.base:
            return origin

        def create(device: int) -> None:
            self._copies.copy(device, origin.device, deadline)

        found = self._bases.grown(origin.fstype, origin.device, size, create, deadline)
        if found is None:
            return origin
        return replace(origin, device=found, size=size, base=bases.of_layer(origin.fstype, origin.device))

    def _first_size(self, key: str, labels: Mapping[str, str]) -> int:
        return bases.rounded(self._size_label(key, labels) or self._sizes.of(key))

    def _wanted_size(self, key: str, labels: Mapping[str, str], origin: Origin) -> int:
        """Grow only: what is smaller than the parent is the parent's size."""
        wanted = max(origin.size, self._size_label(key, labels) or 0, self._sizes.wanted(key))
        return bases.rounded(wanted) if wanted > origin.size else origin.size

    def _size_label(self, key: str, labels: Mapping[str, str]) -> int | None:
        """The label's bytes. BadRequest for more than a few times what the pool holds, or is given without a label."""
        size = asked.size(labels)
        if size is not None:
            limit = max(_OVERCOMMIT * self._pool.data_bytes(), self._sizes.of(key))
            if size > limit:
                why = f"at most {limit} bytes, {_OVERCOMMIT} times what the pool holds"
                raise BadRequest(LABEL_SIZE, labels[LABEL_SIZE][:80], why)
        return size

    def _made_with(self, parent: str, origin: Origin) -> int:
        """The size that the filesystem was made with, or a smaller one: that of a base which the first in the chain may
        have grown from. A chain from before the bases, or from elsewhere, has the size of its first."""
        if not parent:
            return origin.size
        first = origin.size
        while parent and (row := self._store.sound(parent)) is not None:
            parent, first = row.parent, row.size
        return min([first, *(base.size for base in self._store.bases() if base.fstype == origin.fstype)])


def _origin_in(above: Snapshot) -> Origin:
    return Origin(device=above.device, size=above.size, fstype=above.fstype, image=above.image)
