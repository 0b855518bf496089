"""The pool has an id already, and the store cannot take that down: its disk is full in that moment."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from blockdev import Deadline
from snapshotter import strangers
from snapshotter.bases import Bases
from snapshotter.errors import NotFound, StoreFailed
from snapshotter.pool import DeviceThere
from snapshotter.refusals import Refusals
from snapshotter.snapshots import Sizes, Snapshotter
from snapshotter.store import Base, Store

KEY = "k8s/1/c"
SIZES = Sizes(fstype="ext4", size=1 << 30, by_namespace={})


class Disk:
    """A store whose disk is full while `full`."""

    def __init__(self, path: Path) -> None:
        self.full, self.store = False, Store(str(path))
        commit = self.store._commit

        def refused() -> None:
            if self.full:
                raise sqlite3.OperationalError("database or disk is full")
            commit()

        self.store._commit = refused


class Pool:
    """What the real one answers for an id that is taken. `disk` is full from that moment on."""

    name = "p"

    def __init__(self, disk: Disk, taken: dict[int, str]) -> None:
        self.disk, self.devices, self.mapped = disk, taken, set()

    def admit(self, *_cost: int) -> None:
        pass

    def data_bytes(self) -> int:
        return 1 << 40

    def ids(self, _deadline: Deadline) -> set[int]:
        return set(self.devices)

    @contextlib.contextmanager
    def quiet(self, _device: int):
        yield

    def create_snapshot(self, device: int, _origin: int, *, again: bool = False) -> None:
        if device in self.devices and not again:
            self.disk.full = True
            raise DeviceThere(f"pool p has a device {device} already that no snapshot has made")
        self.devices[device] = "copy"

    def activate(self, device: int, _size: int, **_more: object) -> None:
        self.mapped.add(device)

    def path(self, device: int) -> str:
        return f"/dev/mapper/p-{device}"

    def find(self, device: int) -> object:
        return device if device in self.mapped else None


class Golden:
    def device(self, *_wanted: object) -> int:
        return 1


@pytest.fixture
def refused(tmp_path: Path):
    """A Prepare that met somebody else's device 2 while the disk became full."""
    disk = Disk(tmp_path / "s.db")
    disk.store.guard(1)
    with disk.store.transaction():
        assert disk.store.new_device() == 1
    pool = Pool(disk, {1: "base", 2: "SOMEBODY ELSE'S"})
    snapshots = Snapshotter(disk.store, pool, Golden(), SIZES, lambda _device: None)
    with pytest.raises(StoreFailed):
        snapshots.prepare(KEY, "", {}, Deadline.after(10))
    disk.full = False
    yield disk, pool, snapshots
    disk.store.close()


def test_its_row_never_gets_the_device(refused):
    disk, pool, snapshots = refused
    with pytest.raises(NotFound):
        snapshots.mounts(KEY, Deadline.after(10))
    assert 2 not in pool.mapped and disk.store.quarantined() == [2] and not disk.store.doomed()
    (mount,) = snapshots.prepare(KEY, "", {}, Deadline.after(10))
    assert mount.source in {f"/dev/mapper/p-{device}" for device in pool.devices if device > 2}


def test_the_next_start_knows_it_although_the_store_does_not(refused, tmp_path):
    disk, pool, _snapshots = refused
    disk.store.close()
    disk.store = store = Store(str(tmp_path / "s.db"))
    assert store.guard(2) == {2: [KEY]} and store.quarantined() == [2]
    strangers.compare(store, pool, Deadline.after(10))
    snapshots = Snapshotter(store, pool, Golden(), SIZES, lambda _device: None)
    for row in store.intents():
        snapshots.settle(row.key, Deadline.after(10))
    with pytest.raises(NotFound):
        snapshots.mounts(KEY, Deadline.after(10))
    assert 2 not in pool.mapped and not store.doomed()
    assert Refusals(f"{store.path}.refused").prepare() == set()


def test_it_is_foreign_until_the_store_has_it_and_then_too(refused):
    disk, _pool, _snapshots = refused
    assert disk.store.is_foreign(2) and not disk.store.quarantined()
    disk.store.quarantine_refused(2)
    assert disk.store.is_foreign(2) and disk.store.quarantined() == [2] and not disk.store.is_foreign(1)


def test_an_unfinished_base_with_it_is_forgotten_and_nothing_deleted(tmp_path):
    disk = Disk(tmp_path / "s.db")
    disk.store.guard(1)
    with disk.store.transaction():
        disk.store.set_base(Base(fstype="ext4", size=1 << 30, device=disk.store.new_device(), ready=False))
    disk.full = True
    with pytest.raises(StoreFailed):
        disk.store.refuse(1, 1)
    disk.full = False
    disk.store.close()
    store = Store(str(tmp_path / "s.db"))
    store.guard(2)
    Bases(store, Pool(disk, {1: "SOMEBODY ELSE'S"}), str(tmp_path)).drop_unfinished()
    assert store.quarantined() == [1] and not store.doomed() and not store.bases()
    store.close()


def test_a_page_that_cannot_be_written_is_told_and_one_that_is_short_is_made_whole(tmp_path, caplog):
    page = Refusals(str(tmp_path / "page"))
    assert not page.add(7) and "could not be noted" in caplog.text
    (tmp_path / "page").write_bytes((9).to_bytes(8, "little") + b"\1\2")
    assert page.prepare() == {9} and (tmp_path / "page").stat().st_size == 4096
    assert page.add(7) and page.prepare() == {7, 9}
    page.drop(9)
    assert page.prepare() == {7}
