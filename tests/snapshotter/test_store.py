"""The store alone: what is durable, what comes back, what is refused."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev.dm_targets import MAX_THIN_ID
from snapshotter import store_seen
from snapshotter.errors import PoolFull, StoreFailed, Unavailable
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


# -- an id is given once, whatever fails ------------------------------------------------------------------------------


def _refuse(store: Store, *words: str) -> None:
    """These statements fail from now on, as on a full or broken disk; none at all: the disk is well again."""

    def allows(_action: int, word: str | None, *_more: object) -> int:
        return sqlite3.SQLITE_DENY if word in words else sqlite3.SQLITE_OK

    store._db.set_authorizer(allows if words else None)


def _draw(store: Store) -> int:
    with store.transaction():
        return store.new_device()


@pytest.mark.parametrize("refused", [("COMMIT",), ("COMMIT", "ROLLBACK")], ids=" and ".join)
@pytest.mark.parametrize("before", [0, 10, 64], ids=lambda count: f"after {count} ids")
def test_a_commit_that_fails_gives_no_id_twice(path: str, before: int, refused: tuple[str, ...]) -> None:
    store = Store(path)
    given = [_draw(store) for _ in range(before)]
    _refuse(store, *refused)
    for _ in range(3):
        with pytest.raises(StoreFailed):
            _draw(store)
    _refuse(store)
    given += [_draw(store) for _ in range(130)]
    store.close()
    store = Store(path)
    given += [_draw(store) for _ in range(130)]
    assert len(set(given)) == len(given)


def test_a_commit_that_fails_takes_its_rows_back(path: str) -> None:
    store = Store(path)
    _refuse(store, "COMMIT", "ROLLBACK")
    with pytest.raises(StoreFailed):
        _insert(store, ROW)
    _refuse(store)
    _insert(store, replace(ROW, key="other"))
    assert store.get("k") is None
    assert Store(path).get("k") is None


def test_refused_calls_use_up_no_ids(path: str) -> None:
    store = Store(path)
    first = _draw(store)
    for _ in range(200):
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.new_device()
            raise ZeroDivisionError
    assert _draw(store) == first + 1


def test_an_id_that_anything_has_already_is_not_given(path: str) -> None:
    store = Store(path)
    with store.transaction():
        store.insert(replace(ROW, device=1))
        store.doom(2, 1)
        store.set_base(Base(fstype="ext4", size=1, device=3, ready=True))
        store.quarantine([4], 1)
    assert _draw(store) == 5


def test_no_id_is_given_before_the_store_was_compared_or_after_the_last_one(path: str) -> None:
    store = Store(path)
    store.barred = "not compared yet"
    with pytest.raises(Unavailable, match="not compared yet"):
        _draw(store)
    store.barred = ""
    with store.transaction():
        store.set_fact("next_device", str(MAX_THIN_ID))
    assert _draw(store) == MAX_THIN_ID
    for _ in range(2):
        with pytest.raises(PoolFull, match="device ids"):
            _draw(store)
    assert store.read_fact("next_device") == str(MAX_THIN_ID + 64)


def test_a_strangers_id_near_the_end_does_not_use_up_all_others(path: str) -> None:
    store = Store(path)
    with store.transaction():
        store.raise_devices(MAX_THIN_ID)
    assert _draw(store) == 1
    for above in (30, 5000, 5010, 4):
        with store.transaction():
            store.raise_devices(above)
    assert _draw(store) == 5011


def test_the_database_refuses_a_second_row_with_a_device(path: str) -> None:
    store = Store(path)
    assert store.guard(1) == {}
    _insert(store, ROW)
    with pytest.raises(StoreFailed, match="UNIQUE"):
        _insert(store, replace(ROW, key="other"))
    with store.transaction():
        store.insert(replace(ROW, key="on a shared image", device=0))
        store.insert(replace(ROW, key="on another", device=0))


def _doubled(path: str) -> Store:
    """What an older release could leave: one device in two rows, one that is a base too, one that is to be deleted."""
    store = Store(path)
    with store.transaction():
        for key, device in (("a", 1), ("b", 1), ("c", 2), ("d", 3), ("e", 4)):
            store.insert(replace(ROW, key=key, device=device, state=State.READY))
        store.set_base(Base(fstype="ext4", size=1, device=2, ready=True))
        store._db.execute("INSERT INTO doomed VALUES (3, 1, 0)")
    return store


def test_devices_that_were_given_twice_are_quarantined_and_named(path: str) -> None:
    store = _doubled(path)
    assert store.guard(1) == {1: ["a", "b"], 2: ["c"], 3: ["d"]}
    assert (store.quarantined(), store.doomed(), store.bases(), set(store.shared)) == ([1, 2, 3], {}, [], {1, 2, 3})
    with store.transaction():
        store.remove("a", 2)
        store.remove("d", 2)
        store.remove("e", 2)
    assert store.doomed() == {4: 1 << 20}, "data that may be another's is deleted"
    # Once each has one row again, the database itself watches over them; what is quarantined stays so.
    assert store.guard(3) == {1: ["b"], 2: ["c"]}
    with pytest.raises(StoreFailed, match="UNIQUE"):
        _insert(store, replace(ROW, key="new", device=2))


def test_a_device_that_a_snapshot_has_cannot_be_doomed(path: str) -> None:
    store = Store(path)
    _insert(store, ROW)
    with store.transaction():
        store.doom(1, 1)
    assert store.doomed() == {}
    assert store.owners(1) == ["k"]


def test_an_id_that_the_pool_had_already_is_never_deleted(path: str) -> None:
    """Not even if it could not be written down at once."""
    store = Store(path)
    _insert(store, ROW)
    _refuse(store, "COMMIT")
    with pytest.raises(StoreFailed):
        store.refuse(1, 1)
    _refuse(store)
    with store.transaction():
        store.remove("k", 2)
    assert (store.doomed(), store.quarantined()) == ({}, [1])


def test_what_is_quarantined_counts_although_the_disk_takes_no_more(path: str) -> None:
    store = _doubled(path)
    store.guard(1)
    with store.transaction():
        store.set_fact("past", "the store is an old copy")
        store.insert(replace(ROW, key="again", device=9, state=State.READY))
        store.set_base(Base(fstype="ext4", size=2, device=9, ready=True))
    store.close()
    store = Store(path)
    _refuse(store, "COMMIT")
    with pytest.raises(StoreFailed):
        store.guard(2)
    assert store.past == "the store is an old copy"
    assert store.shared == {1, 2, 3, 9}


@pytest.mark.parametrize("told", ["", "-5", "0", "many", "1.5", "\u0663"])
def test_of_a_counter_that_is_none_nobody_knows_which_ids_were_given(path: str, told: str) -> None:
    store = Store(path)
    with store.transaction():
        store.set_fact("next_device", told)
    store.close()
    store = Store(path)
    with pytest.raises(PoolFull, match="new epoch"):
        _draw(store)
    assert store.used_up()
    with store.transaction():
        store.begin_again()
    assert _draw(store) == 1


def test_where_no_id_is_left_one_call_begins_a_new_epoch_for_all(path: str) -> None:
    store, begun = Store(path), []
    with store.transaction():
        store.set_fact("next_device", str(MAX_THIN_ID + 1))

    def renew() -> None:
        with store.transaction():
            store.begin_again()
        begun.append(1)

    with pytest.raises(PoolFull):
        store.ids.renewing(lambda: _draw(store))
    store.ids.renew = renew
    with ThreadPoolExecutor(8) as threads:
        given = list(threads.map(lambda _: store.ids.renewing(lambda: _draw(store)), range(40)))
    assert sorted(given) == list(range(1, 41))
    assert begun == [1]


def test_counts_are_the_databases_and_only_of_what_is_a_device(path: str) -> None:
    store = Store(path)
    with store.transaction():
        store.doom(5, 1, 10)
        store.doom(6, 1, 10)
        store.quarantine([7, 8, 9], 1)
    with sqlite3.connect(path) as other:
        other.execute("INSERT INTO doomed VALUES (-5, 1, 7)")
    assert (store.count_doomed(), store.count_quarantined()) == (2, 3)
    assert (store.count_doomed(), store.count_quarantined()) == (len(store.doomed()), len(store.quarantined()))


def test_a_damaged_row_counts_while_it_is_there_and_is_no_longer_left_out_of_copies_once_it_was_made_anew(
    path: str,
) -> None:
    store = Store(path)
    _insert(store, ROW)
    _insert(store, replace(ROW, key="other", device=2))
    with sqlite3.connect(path) as other:
        other.execute("UPDATE snapshots SET kind = 9 WHERE key = 'k'")
    assert [row.key for page in store.pages() for row in page] == ["other"]
    assert store.damaged_now() == ["k"] and list(store_seen.seen(path).damaged) == ["k"]
    assert _keys(store.image()) == ["other"]
    with store.transaction():
        store.remove_damaged("k", 1)
    assert store.damaged_now() == []
    _insert(store, replace(ROW, device=3))
    assert store.damaged_now() == [] and store_seen.seen(path).damaged == ()
    assert _keys(store.image()) == ["k", "other"]


def _keys(content: bytes) -> list[str]:
    raw = bytearray(content)
    raw[18:20] = b"\1\1"
    with closing(sqlite3.connect(":memory:")) as copy:
        copy.deserialize(bytes(raw))
        return [row[0] for row in copy.execute("SELECT key FROM snapshots ORDER BY key")]
