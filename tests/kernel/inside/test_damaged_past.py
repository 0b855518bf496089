"""A store that its pool was not last served with, when something else is wrong too: a damaged copy, a full disk, facts
that make no sense, trees that went with the store; and the end of the ids for those who do not prepare."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev.devicemapper import Mapper
from blockdev.dm_targets import MAX_THIN_ID
from snapshotter import keeper, repairing, stamps
from snapshotter.errors import AlreadyExists, PoolRefused, Unavailable, WrongState
from snapshotter.model import LABEL_REF
from snapshotter.store import Store
from tests.kernel.inside.lab import Lab, soon
from tests.kernel.inside.test_past import _follow, _kept, _lose, _repaired, _secret, _write

_TABLES = """
CREATE TABLE facts (name, value);
CREATE TABLE bases (fstype, size, device, ready);
CREATE TABLE doomed (device, since, size);
"""
_ROWS = "CREATE TABLE snapshots (key, parent, kind, state, device, size, fstype, created, updated, image, labels);"
_VIEW = """
CREATE VIEW snapshots AS WITH RECURSIVE numbers (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM numbers)
SELECT 'k' || x AS key, '' AS parent, 1 AS kind, 1 AS state, x AS device, 1 AS size, 'ext4' AS fstype, 0 AS created,
0 AS updated, '' AS image, '' AS labels FROM numbers;
"""


def _database(script: str) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.executescript(script)
        return made.serialize()


def _row(**other: object) -> bytes:
    row = {"key": "k", "parent": "", "kind": 2, "state": 1, "device": 1, "size": 1, "fstype": "ext4", "created": 0,
           "updated": 0, "image": "", "labels": ""} | other  # fmt: skip
    values = ", ".join(str(value) if isinstance(value, int) else f"'{value}'" for value in row.values())
    return _database(f"{_TABLES}{_ROWS}INSERT INTO snapshots VALUES ({values});")  # noqa: S608


# Each is whole as far as header and sum tell: the store was damaged when it was copied, or somebody has written it.
DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda _good: bytes(8192),
    "its first pages": lambda good: good[:8192],
    "all pages but the first are zeros": lambda good: good[:4096] + bytes(len(good) - 4096),
    "another database": lambda _good: _database("CREATE TABLE other (a);"),
    "a view without an end": lambda _good: _database(_TABLES + _VIEW),
    "a device that is none": lambda _good: _row(device="x"),
    "a device beyond all": lambda _good: _row(device=1 << 40),
    "a kind that is none": lambda _good: _row(kind=99),
    "labels that are none": lambda _good: _row(labels="{"),
    "of a newer release": lambda _good: _database(f"{_TABLES}{_ROWS}PRAGMA user_version = 1000;"),
}  # fmt: skip


def _put(lab: Lab, content: bytes) -> None:
    """A copy that is newer than all others, and of another lineage."""
    copies, lineage = lab.node.keeper.copies(), b"e" * 16
    device, place = lab.node.pool.path(keeper.KEEPER), keeper._place(copies, lineage.decode())
    raw = keeper._HEADER.pack(b"runvolsc", 1, copies[0].sequence + 1, lab.status().transaction, time.time_ns(),
                              len(content), hashlib.sha256(content).digest(), lineage)  # fmt: skip
    fd = os.open(device, os.O_RDWR)
    try:
        os.pwrite(fd, content, (place + 1) << 28)
        os.pwrite(fd, raw + struct.pack("<I", zlib.crc32(raw)), 4096 * (place + 1))
        os.fsync(fd)
    finally:
        os.close(fd)


def test_a_copy_of_a_damaged_store_is_passed_over_for_a_good_one(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    for what, damage in DAMAGED.items():
        _write(lab, what, f"of {what}")
        _follow(lab)
        _put(lab, damage(lab.node.store.image()))
        _lose(lab)
        caplog.clear()
        lab.start()
        assert "was lost" in lab.node.store.past, what
        assert "a copy of the store cannot be read" in caplog.messages, what
        report = _repaired(lab)
        assert report.restored == [what]
        assert _secret(lab, what) == f"of {what}"
        lab.remove(what)
        lab.reap()


def test_what_nothing_proves_stays_out_of_reach_while_the_state_disk_is_full(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(lab, "old", "of old")
    _kept(lab, tmp_path / "copy")
    for number in range(70):
        lab.prepare(f"tenant-{number}")
    _lose(lab, tmp_path / "copy")
    lab.start()
    lab.stop()

    def full(_store: Store) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_commit", full)
        lab.start(recover=False)
        assert lab.node.store.past
        with pytest.raises(WrongState, match="nothing proves that device"):
            lab.mounts("old")


def test_once_somebody_else_has_moved_the_pool_on_nothing_is_given_or_deleted(lab: Lab) -> None:
    lab.prepare("a")
    number = lab.status().transaction
    lab.node.mapper.message(lab.name, f"set_transaction_id {number} {number + 5}")
    lab.remove("a")
    before = lab.ids()
    with pytest.raises(PoolRefused, match="another process has moved pool"):
        _follow(lab)
    lab.reap()
    assert lab.ids() == before
    with pytest.raises(Unavailable, match="another process has moved pool"):
        lab.prepare("b")
    lab.node.mapper.message(lab.name, f"set_transaction_id {number + 5} {number}")
    lab.node._compare()
    lab.prepare("b")
    assert not lab.leaks()


def test_a_layer_whose_tree_went_with_the_store_is_sealed_anew(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(verity=True)
    lab.layer("layer", files={"secret": b"of the image"})
    assert lab.seal("layer")
    _follow(lab)
    _lose(lab)
    shutil.rmtree(Path(lab.state) / "seals")
    lab.start()
    _repaired(lab)
    assert lab.read("layer", "secret") == b"of the image"
    assert lab.seal("layer")
    assert lab.read("layer", "secret") == b"of the image"
    assert not lab.leaks()


def test_a_layer_whose_tree_is_there_stays_sealed(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(verity=True)
    lab.layer("layer", files={"secret": b"of the image"})
    assert lab.seal("layer")
    assert lab.node.seals is not None
    before = lab.node.seals.of(lab.stat("layer").device)
    _follow(lab)
    _lose(lab)
    # A start with an empty store would sweep the trees of layers that it does not know.
    with Mapper() as mapper:
        repairing.repair_store(mapper, lab.state, soon())
    lab.start()
    assert lab.node.seals is not None
    assert lab.node.seals.of(lab.stat("layer").device) == before
    assert lab.read("layer", "secret") == b"of the image"


@pytest.mark.parametrize("value", ["garbage", "", "-1", "٣", str(1 << 80)])
def test_a_stamp_that_is_none_is_that_of_another_moment(lab: Lab, value: str) -> None:
    _write(lab, "a", "of a")
    _follow(lab)
    with lab.node.store.transaction():
        lab.node.store.set_fact("generation", value)
        lab.node.store.forget_facts(["generation_next"])
    lab.restart()
    assert lab.node.store.past.startswith(f"the store is an old copy: its stamp is {value}")
    assert _secret(lab, "a") == "of a", "the pool's own copy says the same"


def _use_ids_up(lab: Lab) -> int:
    with lab.node.store.transaction():
        lab.node.store.give_from(MAX_THIN_ID + 1)
    return lab.status().transaction


def _new_epoch(lab: Lab, before: int) -> bool:
    then, now = stamps.parse(before), stamps.parse(lab.status().transaction)
    return then is not None and now is not None and then.epoch != now.epoch


def test_a_commit_of_what_is_open_begins_the_new_epoch_that_it_needs(lab: Lab) -> None:
    fd = os.open(lab.prepare("a")[0].source, os.O_RDWR)
    try:
        before = _use_ids_up(lab)
        lab.commit("layer", "a")
        assert _new_epoch(lab, before)
    finally:
        os.close(fd)
    assert not lab.leaks()


def test_so_does_who_takes_over_a_layer_or_borrows_one(lab: Lab) -> None:
    labels = {LABEL_REF: f"sha256:{'a' * 64}"}
    lab.node.snapshots.prepare("k8s.io/1/x", "", labels, soon())
    lab.node.snapshots.commit("k8s.io/2/layer", "k8s.io/1/x", labels, "", soon())
    before = _use_ids_up(lab)
    with pytest.raises(AlreadyExists):
        lab.node.snapshots.prepare("moby/3/x", "", labels, soon())
    assert _new_epoch(lab, before)
    before = _use_ids_up(lab)
    lab.node.lender.lend("k8s.io/2/layer", soon())
    assert _new_epoch(lab, before)
