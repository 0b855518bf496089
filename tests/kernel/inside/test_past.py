"""A store from the past, a lost one, a second server: recognised before anything is mapped, given or deleted."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev.devicemapper import Mapper
from blockdev.dm_targets import MAX_THIN_ID
from snapshotter import keeper as keeper_module
from snapshotter import repairing, stamps
from snapshotter.errors import NotFound, PoolRefused, WrongState
from snapshotter.keeper import Keeper
from snapshotter.node import STORE, Node
from snapshotter.pool import KEEPER
from snapshotter.store import RUN
from tests.kernel.inside.lab import Lab, in_child, mounted, soon


def _write(lab: Lab, key: str, content: str, parent: str = "") -> int:
    with mounted(lab.prepare(key, parent)) as root:
        (root / "secret").write_text(content)
    return lab.stat(key).device


def _secret(lab: Lab, key: str) -> str:
    with mounted(lab.mounts(key)) as root:
        return (root / "secret").read_text()


def _kept(lab: Lab, place: Path) -> None:
    """A copy of the store, made while it is used."""
    with contextlib.closing(sqlite3.connect(lab.node.store.path)) as source:
        with contextlib.closing(sqlite3.connect(place)) as target:
            source.backup(target)


def _lose(lab: Lab, instead: Path | None = None) -> None:
    lab.stop()
    for suffix in ("", "-wal", "-shm", ".refused"):
        Path(lab.state, STORE + suffix).unlink(missing_ok=True)
    if instead is not None:
        shutil.copy(instead, os.path.join(lab.state, STORE))


def _follow(lab: Lab) -> None:
    """What a thread does behind the calls."""
    lab.node._copy_at = 0.0
    lab.node.follow()


def _in_another(work: Callable[[], object]) -> str:
    """What a process of its own is refused with, without the name of the pool; it knows nothing of what this one holds."""

    def alone() -> None:
        keeper_module._HELD.clear()
        try:
            work()
        except PoolRefused as error:
            assert str(error).startswith("another process serves or changes pool"), error
            os._exit(7)

    return "another process serves or changes pool" if os.waitstatus_to_exitcode(in_child(alone)) == 7 else ""


def _repaired(lab: Lab, *, keep: bool = False) -> repairing.Report:
    lab.stop()
    with Mapper() as mapper:
        report = repairing.repair_store(mapper, lab.state, soon(), keep=keep)
    lab.start()
    return report


@pytest.mark.short
def test_an_old_copy_of_the_store_maps_and_deletes_nothing_that_is_not_proven(lab: Lab, tmp_path: Path) -> None:
    lab.layer("layer", files={"f": b"of the image"})
    old = _write(lab, "old", "of old", "layer")
    gone = _write(lab, "gone", "of gone", "layer")
    _kept(lab, tmp_path / "copy")
    lab.remove("gone")
    lab.reap()
    secrets = {_write(lab, f"tenant-{number}", f"of tenant {number}", "layer") for number in range(70)}
    _lose(lab, tmp_path / "copy")
    lab.start()
    assert lab.node.store.past.startswith("the store is an old copy")
    assert {"layer", "old", "gone"} == set(lab.names()), "what the store alone can answer"
    assert secrets | {old} <= set(lab.node.store.quarantined())
    for refused in (lambda: lab.mounts("old"), lambda: lab.prepare("new", "layer"), lambda: lab.commit("l", "old")):
        with pytest.raises(WrongState, match="nothing proves that device .* the store is an old copy"):
            refused()
    for number in range(3):
        with mounted(lab.prepare(f"new-{number}")) as root:
            assert os.listdir(root) == []
        assert lab.stat(f"new-{number}").device > max(secrets | {gone}), "an id that the other side may have given"
    lab.remove("old")
    lab.remove("gone")
    lab.reap()
    assert secrets | {old} <= lab.ids(), "a device was deleted without a proof"
    lab.restart()
    assert lab.node.store.past, "a restart is no decision"
    with pytest.raises(WrongState, match="old copy"):
        lab.prepare("new", "layer")


def test_what_the_pools_own_copy_says_too_is_served(lab: Lab, tmp_path: Path) -> None:
    lab.layer("layer", files={"secret": b"of the image"})
    _write(lab, "old", "of old", "layer")
    _kept(lab, tmp_path / "copy")
    for number in range(70):
        _write(lab, f"tenant-{number}", f"of tenant {number}", "layer")
    _follow(lab)
    _lose(lab, tmp_path / "copy")
    lab.start()
    assert lab.node.store.past
    assert _secret(lab, "old") == "of old"
    with mounted(lab.prepare("new", "layer")) as root:
        assert (root / "secret").read_bytes() == b"of the image"
    _write(lab, "since", "made since", "layer")
    report = _repaired(lab)
    assert {f"tenant-{number}" for number in range(70)} <= set(report.restored)
    assert report.lost == []
    assert not lab.node.store.past
    for number in range(70):
        assert _secret(lab, f"tenant-{number}") == f"of tenant {number}"
    assert (_secret(lab, "old"), _secret(lab, "since")) == ("of old", "made since")
    assert lab.node.store.quarantined() == []
    assert not lab.leaks()


def test_a_lost_store_is_made_again_from_the_pool(lab: Lab) -> None:
    lab.layer("layer", files={"secret": b"of the image"})
    _write(lab, "a", "of a", "layer")
    _write(lab, "b", "of b", "layer")
    _follow(lab)
    lab.remove("b")
    lab.reap()
    late = _write(lab, "late", "after the last copy", "layer")
    _lose(lab)
    lab.start()
    assert "was lost" in lab.node.store.past
    assert lab.names() == []
    _write(lab, "since", "made since")
    _follow(lab)
    _follow(lab)
    report = _repaired(lab)
    assert (report.restored, report.lost) == (["a", "layer"], ["b"])
    assert report.quarantined == [late]
    assert (_secret(lab, "a"), _secret(lab, "since")) == ("of a", "made since")
    assert lab.read("layer", "secret") == b"of the image"
    assert not lab.leaks()
    with pytest.raises(PoolRefused, match="nothing to repair"):
        _repaired(lab)
    lab.start()


def test_an_operator_may_say_that_the_store_is_right(lab: Lab, tmp_path: Path) -> None:
    _write(lab, "a", "of a")
    _kept(lab, tmp_path / "copy")
    for number in range(RUN):
        lab.prepare(f"n{number}")
    _lose(lab, tmp_path / "copy")
    lab.start()
    with pytest.raises(WrongState):
        lab.mounts("a")
    lab.stop()
    with Mapper() as mapper, pytest.raises(NotFound, match="copy of the store"):
        repairing.repair_store(mapper, lab.state, soon())
    lab.start()
    report = _repaired(lab, keep=True)
    # The tenants of the lost store, and the base of this one.
    assert (report.kept, len(report.quarantined)) == (1, RUN + 1)
    assert _secret(lab, "a") == "of a"


def test_the_stamp_moves_with_the_ids_and_a_copy_of_before_does_not_fit(lab: Lab, tmp_path: Path) -> None:
    first = stamps.parse(lab.status().transaction)
    assert first is not None
    for number in range(2 * RUN):
        lab.prepare(f"n{number}")
        lab.remove(f"n{number}")
    after = stamps.parse(lab.status().transaction)
    assert after is not None
    assert (after.epoch, after.run) > (first.epoch, first.run)


@pytest.mark.short
def test_a_second_server_is_refused_and_the_first_notices_a_pool_that_was_moved(lab: Lab, tmp_path: Path) -> None:
    lab.prepare("a")
    shutil.copytree(lab.state, tmp_path / "copied")
    first = lab.node
    try:
        copied = Lab.__new__(Lab)
        copied.directory, copied.state = tmp_path, str(tmp_path / "copied")
        second = type(lab.settings)(state_dir=copied.state, size=lab.settings.size, limits=lab.settings.limits)
        assert _in_another(lambda: Node(second).open_pool()) == "another process serves or changes pool"
        lab.prepare("b")
        number = lab.status().transaction
        lab.node.mapper.message(lab.name, f"set_transaction_id {number} {number + 5}")
        lab.prepare("c")
        with pytest.raises(PoolRefused, match="another process has moved pool"):
            first.stamp.move()
        first._compare()
        assert "another process has moved pool" in first.store.barred
    finally:
        lab.node = first


def test_a_killed_server_holds_nothing(lab: Lab) -> None:
    lab.stop()

    def serve_and_die() -> None:
        Lab(lab.directory, made=True)
        os.kill(os.getpid(), 9)

    assert in_child(serve_and_die) == 9
    lab.start()
    assert lab.node.keeper.held


def test_somebody_elses_device_of_the_keepers_id_is_left_alone(lab: Lab) -> None:
    lab.stop()
    with Mapper() as mapper:
        name = f"runvol-{lab.description.identity[:8]}-keeper"
        mapper.remove(name)
        mapper.message(lab.name, f"delete {KEEPER}")
        mapper.message(lab.name, f"create_thin {KEEPER}")
    lab.start()  # an empty one is what a killed process leaves
    path = lab.node.pool.path(KEEPER)
    lab.stop()
    with open(path, "r+b") as opened:
        opened.write(b"somebody else's")
    with pytest.raises(PoolRefused, match="device 0 of pool .* is somebody else's"):
        lab.start()
    with open(path, "rb") as opened:
        assert opened.read(15) == b"somebody else's"


def test_ids_come_back_in_a_new_epoch_and_no_older_store_fits(lab: Lab, tmp_path: Path) -> None:
    low = _write(lab, "low", "of low")
    _kept(lab, tmp_path / "copy")
    epoch = stamps.parse(lab.status().transaction)
    with lab.node.store.transaction():
        lab.node.store.give_from(MAX_THIN_ID - 1)
    devices = [_write(lab, f"n{number}", f"of n{number}") for number in range(6)]
    assert devices[:2] == [MAX_THIN_ID - 1, MAX_THIN_ID]
    assert len({*devices, low, *lab.bases()}) == 8
    assert max(devices[2:]) < 100
    assert _secret(lab, "low") == "of low"
    assert [_secret(lab, f"n{number}") for number in range(6)] == [f"of n{number}" for number in range(6)]
    after = stamps.parse(lab.status().transaction)
    assert epoch is not None and after is not None and after.epoch != epoch.epoch
    _follow(lab)
    lab.restart()
    assert not lab.node.store.past
    _lose(lab, tmp_path / "copy")
    lab.start()
    assert lab.node.store.past


def test_an_epoch_begins_with_what_is_mapped_and_quarantined_left_out(lab: Lab) -> None:
    lab.node.mapper.message(lab.name, "create_thin 3")
    lab.restart()
    with lab.node.store.transaction():
        lab.node.store.give_from(MAX_THIN_ID + 1)
    taken = {lab.stat(key).device for key in ("a", "b", "c") if lab.prepare(key)}
    assert 3 not in taken
    assert 3 in lab.node.store.quarantined()


def test_copies_of_the_store_take_turns_and_a_torn_one_is_passed_over(lab: Lab) -> None:
    for number in range(6):
        lab.prepare(f"n{number}")
        _follow(lab)
    keeper = lab.node.keeper
    copies = keeper.copies()
    assert len(copies) == 4
    assert [copy.sequence for copy in copies] == [6, 5, 4, 3]
    with contextlib.closing(keeper.read(copies[0]) or sqlite3.connect(":memory:")) as newest:
        assert {row[0] for row in newest.execute("SELECT key FROM snapshots")} == {f"n{number}" for number in range(6)}
    path = lab.node.pool.path(KEEPER)
    with open(path, "r+b") as opened:
        opened.seek(((copies[0].place + 1) << 28) + 5000)
        opened.write(b"torn")
        os.fsync(opened.fileno())
    _lose(lab)
    lab.start()
    report = _repaired(lab)
    assert sorted(report.restored) == [f"n{number}" for number in range(5)]


def test_a_keeper_is_for_one_process_at_a_time(lab: Lab) -> None:
    assert _in_another(lambda: Keeper(lab.node.pool).open()) == "another process serves or changes pool"
    with contextlib.closing(Keeper(lab.node.pool)) as second:
        second.open()
        assert not lab.node.keeper.held, "two in one process"


@pytest.mark.parametrize("reaped", [False, True])
def test_what_was_removed_before_or_after_the_past_came_back_stays_removed(
    lab: Lab, tmp_path: Path, reaped: bool
) -> None:
    _write(lab, "a", "of a")
    _write(lab, "b", "of b")
    _kept(lab, tmp_path / "copy")
    lab.remove("b")
    _write(lab, "c", "of c")
    if reaped:
        lab.reap()
    _follow(lab)
    _lose(lab, tmp_path / "copy")
    lab.start()
    assert _secret(lab, "a") == "of a"
    lab.remove("a")
    if reaped:
        lab.reap()
    report = _repaired(lab)
    assert (lab.names(), report.restored) == (["c"], ["c"])
    assert _secret(lab, "c") == "of c"
    assert not lab.leaks()
    assert lab.node.store.quarantined() == []


def _in_the_past(lab: Lab, copy: Path) -> None:
    """`old` was there when the copy was made, and is in the pool's own; `late` only there."""
    _write(lab, "old", "of old")
    _kept(lab, copy)
    _write(lab, "late", "of late")
    for number in range(RUN):
        lab.prepare(f"n{number}")
        lab.remove(f"n{number}")
    _follow(lab)
    _lose(lab, copy)
    lab.start()
    assert lab.node.store.past


def test_what_was_removed_in_the_past_stays_removed_although_somebody_has_it_open(lab: Lab, tmp_path: Path) -> None:
    _in_the_past(lab, tmp_path / "copy")
    fd = os.open(lab.mounts("old")[0].source, os.O_RDWR)
    try:
        lab.remove("old")
        lab.reap()
        report = _repaired(lab)
        assert (report.restored, report.lost) == (["late"], [])
        assert lab.names() == ["late"]
        assert not lab.node.store.shared
    finally:
        os.close(fd)
    assert not lab.leaks()


def test_what_was_committed_in_the_past_is_not_named_as_gone(lab: Lab, tmp_path: Path) -> None:
    _in_the_past(lab, tmp_path / "copy")
    lab.commit("layer", "old")
    assert _write(lab, "child", "of child", "layer")
    report = _repaired(lab)
    assert (report.restored, report.lost) == (["late"], [])
    assert lab.names() == ["child", "late", "layer"]
    assert lab.read("layer", "secret") == b"of old"
    assert not lab.leaks()


def test_two_copies_that_are_restored_in_turn_lose_nothing_that_either_has_made(lab: Lab, tmp_path: Path) -> None:
    _in_the_past(lab, tmp_path / "first")
    _write(lab, "with the first", "of it")
    _follow(lab)
    _kept(lab, tmp_path / "second")
    for number, name in enumerate(("first", "second", "first")):
        _lose(lab, tmp_path / name)
        lab.start()
        assert lab.node.store.past
        assert _secret(lab, "old") == "of old"
        _write(lab, f"turn {number}", f"of turn {number}")
        _follow(lab)
    _repaired(lab)
    assert _secret(lab, "turn 2") == "of turn 2"
    devices = [lab.stat(key).device for key in lab.names()]
    assert len(devices) == len(set(devices))
    assert {"late", "old", "turn 1", "turn 2"} <= set(lab.names())
    for key in lab.names():
        assert _secret(lab, key).startswith("of ")
    assert not lab.leaks()
