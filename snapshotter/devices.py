"""A snapshot's device: made of what it starts from, mapped over the shared image that may lie under it, and given only
to whom it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from blockdev import Deadline, filesystems
from snapshotter import strangers
from snapshotter.copies import Copies
from snapshotter.errors import Unavailable, WrongState
from snapshotter.idle import Idle
from snapshotter.model import Kind, Snapshot, State
from snapshotter.pool import Pool
from snapshotter.store import Store


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a new device starts from. `device` 0 means: nothing of the pool, the image alone. `base`: the type of the
    base that it is, empty for a layer."""

    device: int
    size: int
    fstype: str
    image: str
    base: str = ""


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


class Devices:
    """Those of the snapshots that have a row. Safe to use from several threads."""

    def __init__(self, store: Store, pool: Pool, images: Images, idle: Idle, copies: Copies) -> None:
        self._store, self._pool, self._images, self._idle, self._copies = store, pool, images, idle, copies

    def make(self, row: Snapshot, origin: Origin, deadline: Deadline) -> Snapshot:
        """Make and map the device; the row, which has another id where the pool had that one already."""

        def create(device: int) -> None:
            # Only what an earlier life has made for this very row may be there.
            again = row.state is State.RECOVERED
            if not origin.device:
                self._pool.create_thin(device, again=again)
                return
            self._copies.copy(device, origin.device, deadline, again=again)

        device = strangers.make(
            self._store, self._pool, row.device, create, lambda taken: self._store.replace_device(row.key, taken),
            deadline,
        )  # fmt: skip
        row = row if device == row.device else replace(row, device=device)
        self.map(row, deadline)
        if row.size > origin.size:
            filesystems.grow(self._pool.path(row.device), deadline)
        return row

    def map(self, row: Snapshot, deadline: Deadline) -> None:
        """Map the device for a caller. DeviceMissing."""
        below = self._below(row, deadline)
        self._idle.keep(row.device, deadline)
        self._pool.activate(row.device, row.size, read_only=row.kind is Kind.VIEW, origin=below)

    def map_read_only(self, device: int, layer: Snapshot, deadline: Deadline) -> None:
        """Map a copy of a committed layer's device, which has no row."""
        self._pool.activate(device, layer.size, read_only=True, origin=self._below(layer, deadline))

    def _below(self, row: Snapshot, deadline: Deadline) -> str:
        """The shared image under the device; empty for none."""
        return self._images.origin(row.image, deadline) if row.image else ""

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
