"""What an operator decides about devices that no snapshot has: they are deleted, or become a snapshot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from blockdev import Deadline, superblocks
from blockdev.devicemapper import Mapper
from blockdev.dm_targets import SECTOR
from blockdev.errors import FilesystemDamaged
from snapshotter import past, turns
from snapshotter import store as stores
from snapshotter.alone import Alone, alone
from snapshotter.errors import AlreadyExists, BadRequest, NotFound, PoolRefused, WrongState
from snapshotter.model import Kind, Snapshot, State
from snapshotter.pool import Pool
from snapshotter.store import Store

_WHAT = "quarantined device"
# Longer than any filesystem in a pool; a thin device is as long as it is mapped.
_LONGEST = 1 << 50
_FSTYPES = ("ext4", "xfs")


def check(store: Store, devices: Sequence[int]) -> None:
    """NotFound for one that is not quarantined, WrongState for a snapshot's."""
    there = store.quarantined()
    for device in devices:
        _check(store, device, there)


def free(state_dir: str, devices: Sequence[int], deadline: Deadline) -> None:
    """Have the snapshotter, beside which this may be called, delete these devices and their data. All of them or none:
    NotFound and WrongState as for `check`."""
    with turns.beside(state_dir, deadline):
        store = stores.existing(state_dir)
        try:
            with store.transaction():
                check(store, devices)
                for device in devices:
                    store.doom(device, time.time_ns())
                store.release(devices)
        finally:
            store.close()


def _check(store: Store, device: int, there: Sequence[int]) -> None:
    if device not in there:
        raise NotFound(str(device), _WHAT)
    if owners := store.owners(device):
        raise WrongState(f"device {device} is that of snapshot {owners[0]!r}; remove the snapshot first")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The snapshot that a device is to be. `key` and `parent` as containerd has them in the backend
    (`namespace/number/name`)."""

    device: int
    key: str
    parent: str = ""
    committed: bool = False


def adopt(mapper: Mapper, state_dir: str, wanted: Wanted, deadline: Deadline) -> Snapshot:
    """The quarantined device is this snapshot from now on, its size and filesystem as its superblock says.

    PoolRefused beside a server, or where the store is not the pool's own; BadRequest, NotFound, AlreadyExists and
    WrongState for what cannot be; nothing is changed then. FilesystemDamaged.
    """
    if not wanted.key:
        raise BadRequest("--key", wanted.key, "a snapshot has one")
    with alone(mapper, state_dir, deadline, lambda: stores.existing(state_dir)) as it:
        return _adopt(it, wanted, deadline)


def _adopt(it: Alone, wanted: Wanted, deadline: Deadline) -> Snapshot:
    store, pool = it.store, it.pool
    why = store.past or past.recognised(store, pool, it.stamp, pool.status(), deadline)
    if why:
        raise PoolRefused(f"{why}; that comes first")
    _check(store, wanted.device, store.quarantined())
    if store.get(wanted.key) is not None:
        raise AlreadyExists(wanted.key)
    found = _read(pool, wanted)
    _check_parent(store, wanted, found)
    now = time.time_ns()
    row = Snapshot(
        key=wanted.key, parent=wanted.parent, kind=Kind.COMMITTED if wanted.committed else Kind.ACTIVE,
        state=State.READY, device=wanted.device, size=-(-found.total_bytes // SECTOR) * SECTOR, fstype=found.fstype,
        created=now, updated=now,
    )  # fmt: skip
    with store.transaction():
        store.put(row)
        store.release([wanted.device])
    it.agree()
    return row


def _read(pool: Pool, wanted: Wanted) -> superblocks.Superblock:
    """What is on the device, which is mapped read-only for that, and was not open."""
    device = wanted.device
    if not pool.deactivate(device):
        raise WrongState(f"device {device} is open: {pool.holders(device)}; end that first")
    pool.activate(device, _LONGEST, read_only=True)
    try:
        found = superblocks.read(pool.path(device))
    except FilesystemDamaged as error:
        raise WrongState(f"device {device} becomes no snapshot: {error}") from None
    finally:
        pool.deactivate(device)
    if found is None or found.fstype not in _FSTYPES:
        raise WrongState(f"device {device} becomes no snapshot: it holds {found.fstype if found else 'no filesystem'} "
                         f"(a snapshot has {' or '.join(_FSTYPES)})")  # fmt: skip
    if wanted.committed and not found.clean:
        raise WrongState(
            f"device {device} becomes no committed snapshot: its filesystem was not unmounted, or has errors. Adopt it "
            "without --committed, and mount it once"
        )
    return found


def _check_parent(store: Store, wanted: Wanted, found: superblocks.Superblock) -> None:
    if not wanted.parent:
        return
    parent = store.get(wanted.parent)
    if parent is None:
        raise NotFound(wanted.parent)
    if parent.kind is not Kind.COMMITTED:
        raise WrongState(f"{wanted.parent!r} is no parent: it is not committed")
    if (parent.fstype, parent.size > found.total_bytes) != (found.fstype, False):
        raise WrongState(
            f"{wanted.parent!r} is not the parent of device {wanted.device}: it holds {parent.fstype} of {parent.size} "
            f"bytes, and the device {found.fstype} of {found.total_bytes}"
        )


__all__ = ["Wanted", "adopt", "check", "free"]
