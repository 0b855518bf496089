"""The store alone: what is durable, what comes back, what is refused."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter.errors import StoreFailed
from snapshotter.model import Kind, Snapshot, State
from snapshotter.store import Base, Store

ROW = Snapshot(key="k", parent="", kind=Kind.ACTIVE, state=State.PREPARING, device=1, size=1 << 20, fstype="ext4",
               created=1, updated=1, labels={"a": "b"})  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s" / "snapshots.db")


def _insert(store: Store, row: Snapshot) -> None:
    with store.transaction():
        store.insert(row)


def test_a_row_comes_back_as_it_was(path: str) -> None:
    store = Store(path)
    _insert(store, ROW)
    store.close()
    assert Store(path).get("k") == ROW


def test_a_transaction_is_whole_or_not_at_all(path: str) -> None:
    store = Store(path)
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.insert(ROW)
        store.new_device()
        raise ZeroDivisionError
    assert store.get("k") is None
    _insert(store, ROW)


def test_ids_are_never_given_twice(path: str) -> None:
    given: set[int] = set()
    for number in range(5):
        store = Store(path)
        for turn in range(40):
            try:
                with store.transaction():
                    device = store.new_device()
                    if turn % 7 == 6:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                continue
            assert device not in given
            given.add(device)
        if number == 2:
            with store.transaction():
                store.raise_devices(10_000)
            assert max(given) < 10_000
        store.close()
    assert max(given) > 10_000


def test_a_fulfilled_intent_is_seen_at_once_and_written_later(path: str) -> None:
    store = Store(path)
    _insert(store, ROW)
    store.made(ROW)
    assert store.get("k").state is State.READY  # type: ignore[union-attr]
    assert store.intents() == []
    beside = Store(path)
    assert beside.get("k").state is State.PREPARING  # type: ignore[union-attr]
    store.write_made()
    assert beside.get("k").state is State.READY  # type: ignore[union-attr]


def test_a_key_that_is_used_again_is_an_intent_again(path: str) -> None:
    store = Store(path)
    _insert(store, ROW)
    store.made(ROW)
    with store.transaction():
        store.remove("k", 1)
    _insert(store, replace(ROW, device=2))
    assert store.get("k").state is State.PREPARING  # type: ignore[union-attr]
    store.write_made()
    assert store.get("k").state is State.PREPARING  # type: ignore[union-attr]


def test_a_reader_never_waits_for_a_writer(path: str) -> None:
    store = Store(path)
    _insert(store, ROW)
    read = threading.Event()
    with store.transaction():
        store.set_labels("k", {}, 2)
        thread = threading.Thread(target=lambda: (store.get("k"), list(store.pages()), read.set()))
        thread.start()
        assert read.wait(5)
    thread.join()


def test_pages_hold_nothing_between_them(path: str) -> None:
    store = Store(path)
    with store.transaction():
        for number in range(600):
            store.insert(replace(ROW, key=f"k{number:04}", device=number + 1))
    pages = store.pages()
    next(pages)
    _insert(store, replace(ROW, key="z", device=5000))
    store.tidy()
    assert sum(map(len, pages)) == 600 - 256 + 1


def test_removal_leaves_the_device_to_be_deleted(path: str) -> None:
    store = Store(path)
    _insert(store, ROW)
    with store.transaction():
        store.remove("k", 7)
        store.doom(9, 8)
    assert Store(path).doomed() == {1: 1 << 20, 9: 0}
    assert store.devices() == {1, 9}


def test_a_base_is_known_by_type_and_size(path: str) -> None:
    store = Store(path)
    base = Base(fstype="xfs", size=1, device=3, ready=False)
    with store.transaction():
        store.set_base(base)
        store.set_base(replace(base, ready=True))
    assert store.base("xfs", 1) == replace(base, ready=True)
    assert store.base("ext4", 1) is None


def test_a_store_of_the_future_and_a_damaged_one_are_refused(path: str) -> None:
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreFailed, match="newer runvol"):
        Store(path)
    Path(path).write_bytes(b"no database at all" * 100)
    for suffix in ("-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    with pytest.raises(StoreFailed, match="runvol doctor"):
        Store(path)
