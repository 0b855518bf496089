"""The pool has an id already, and the store cannot take that down: its disk is full in that moment."""

from __future__ import annotations

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockdev import Deadline
from snapshotter import strangers
from snapshotter.bases import Bases
from snapshotter.errors import NotFound, StoreFailed, Unavailable
from snapshotter.model import Kind, Snapshot, State
from snapshotter.pool import DeviceThere
from snapshotter.refusals import SLOTS, Refusals, _page
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
    path = tmp_path / "page"
    page = Refusals(str(path))
    assert not page.add(7) and "could not be noted" in caplog.text and page.trouble
    path.write_bytes(_page({9})[:8] + b"\1\2")
    assert page.prepare() == {9} and path.stat().st_size == 4096 and not page.trouble
    assert page.add(7) and page.prepare() == {7, 9}
    page.drop(9)
    assert page.prepare() == {7}
    page.clear()
    assert page.prepare() == set()


def test_what_is_noted_at_once_is_all_noted(tmp_path):
    page = Refusals(str(tmp_path / "page"))
    page.prepare()
    for number in range(30):
        ids = range(100 + number * 8, 108 + number * 8)
        page.add(1)
        with ThreadPoolExecutor(9) as threads:
            threads.submit(page.drop, 1)
            assert all(threads.map(page.add, ids))
        assert page.prepare() == {*ids}
        page.clear()


@pytest.mark.parametrize("damage", [b"\xff" * 4096, b"\0" * 7 + b"\x80" + b"\0" * 4088, b"\1\0\0\0" * 1024])
def test_a_damaged_page_names_no_snapshots_device_and_keeps_nothing_shut(tmp_path, damage, caplog):
    store = Store(str(tmp_path / "s.db"))
    store.guard(1)
    with store.transaction():
        row = Snapshot(key=KEY, parent="", kind=Kind.ACTIVE, state=State.READY, device=store.new_device(), size=1,
                       fstype="ext4", created=1, updated=1)  # fmt: skip
        store.insert(row)
    store.close()
    (tmp_path / "s.db.refused").write_bytes(damage)
    store = Store(str(tmp_path / "s.db"))
    assert store.guard(2) == {} and store.quarantined() == [] and not store.is_foreign(row.device)
    assert "damaged note" in caplog.text
    store.close()


def test_a_page_that_is_none_is_named_and_bars_new_ids_alone(tmp_path):
    (tmp_path / "s.db.refused").mkdir()
    store = Store(str(tmp_path / "s.db"))
    with pytest.raises(StoreFailed, match=r"s\.db\.refused.*[Dd]irectory"):
        store.guard(1)
    assert not store.guarded and store.quarantined() == []
    (tmp_path / "s.db.refused").rmdir()
    store.guard(1)
    assert store.guarded
    store.close()


def test_a_start_on_a_full_disk_keeps_to_what_it_knows(tmp_path):
    """Two rows with one device, of an older release, and a device that was refused: neither can be written down now."""
    path = tmp_path / "s.db"
    Store(str(path)).close()
    with sqlite3.connect(path) as made:
        for key in ("one", "two"):
            made.execute(
                "INSERT INTO snapshots (key, parent, kind, state, device, size, fstype, created, updated, image, labels) "
                "VALUES (?, '', ?, ?, 5, 1, 'ext4', 1, 1, '', '')", (key, int(Kind.ACTIVE), int(State.READY)),
            )  # fmt: skip
    page = Refusals(f"{path}.refused")
    page.prepare()
    page.add(7)
    disk = Disk(path)
    disk.full = True
    with pytest.raises(StoreFailed):
        disk.store.guard(1)
    assert disk.store.shared == {5} and disk.store.is_foreign(5) and disk.store.is_foreign(7)
    assert Refusals(f"{path}.refused").prepare() == {7}
    disk.full = False
    assert disk.store.guard(2) == {5: ["one", "two"]} and disk.store.quarantined() == [5, 7]
    assert disk.store.guarded and Refusals(f"{path}.refused").prepare() == set()
    disk.store.close()


def test_so_many_are_refused_and_no_more(tmp_path):
    """The page must not become full: what stands nowhere is handed out after a kill."""
    disk = Disk(tmp_path / "s.db")
    disk.store.guard(1)
    disk.full = True
    for device in range(1000, 1000 + SLOTS // 2):
        with pytest.raises(StoreFailed):
            disk.store.refuse(device, 1)
    with pytest.raises(Unavailable, match="make room"), disk.store.transaction():
        disk.store.new_device()
    disk.full = False
    disk.store.quarantine_refused(1)
    with disk.store.transaction():
        assert disk.store.new_device()
    disk.store.close()


def test_a_device_that_the_operator_frees_is_foreign_no_more(tmp_path):
    """Its snapshot was removed while it was quarantined; the process runs on."""
    disk = Disk(tmp_path / "s.db")
    with disk.store.transaction():
        disk.store.insert(Snapshot(key=KEY, parent="", kind=Kind.ACTIVE, state=State.READY, device=3, size=1,
                                   fstype="ext4", created=1, updated=1))  # fmt: skip
    page = Refusals(f"{disk.store.path}.refused")
    page.prepare()
    page.add(3)
    assert disk.store.guard(1) == {3: [KEY]}
    with disk.store.transaction():
        disk.store.remove(KEY, 1)
    assert disk.store.is_foreign(3)
    with disk.store.transaction():
        disk.store.release([3])
        disk.store.doom(3, 1, 0)
    assert not disk.store.is_foreign(3) and 3 in disk.store.doomed()
    disk.store.close()
