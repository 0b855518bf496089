"""kill -9 between every two steps of entering the past, of what an operator decides on it, and of a new epoch of ids."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from blockdev.devicemapper import Mapper
from blockdev.dm_targets import MAX_THIN_ID
from snapshotter import keeper, repairing, stamps
from snapshotter.errors import AlreadyExists
from tests.kernel.inside.killpoints import Steps
from tests.kernel.inside.lab import Lab, in_child, soon
from tests.kernel.inside.test_past import _follow, _kept, _lose, _repaired, _secret, _write

_MOST_STEPS = 60


def _start(lab: Lab) -> None:
    keeper._HELD.clear()
    lab.start()


def _repair(lab: Lab, *, keep: bool = False) -> None:
    keeper._HELD.clear()
    with Mapper() as mapper:
        repairing.repair_store(mapper, lab.state, soon(), keep=keep)


def _die(work: Callable[[Lab], object], lab: Lab, number: int) -> None:
    Steps(number).install()
    work(lab)


@pytest.mark.parametrize(
    ("work", "keep"),
    [(_start, False), (_repair, False), pytest.param(partial(_repair, keep=True), True, marks=pytest.mark.long)],
    ids=["a start", "repair-store", "repair-store --keep"],
)  # fmt: skip
def test_a_kill_while_the_past_is_found_out_or_decided_on_gives_nothing_away(
    lab: Lab, tmp_path: Path, work: Callable[[Lab], object], keep: bool
) -> None:
    for number in range(1, _MOST_STEPS):
        _write(lab, "old", "of old")
        _kept(lab, tmp_path / "copy")
        _write(lab, "late", "of late")
        _follow(lab)
        uncopied = _write(lab, "uncopied", "of uncopied")
        _lose(lab, tmp_path / "copy")
        status = in_child(partial(_die, work, lab, number))
        lab.start()
        where = f"after a kill in front of step {number}"
        assert {uncopied} <= set(lab.node.store.quarantined()) & lab.ids(), where
        assert _secret(lab, "old") == "of old", where
        if lab.node.store.past:
            _repaired(lab, keep=keep)
        assert {uncopied} <= set(lab.node.store.quarantined()) & lab.ids(), where
        assert _secret(lab, "old") == "of old", where
        assert keep or _secret(lab, "late") == "of late", where
        _clear(lab)
        assert not lab.leaks(), where
        if not os.WIFSIGNALED(status):
            assert status == 0, "it failed by itself"
            break
    assert 5 < number < _MOST_STEPS - 1


def _clear(lab: Lab) -> None:
    """Also what an operator would free."""
    for key in lab.names():
        lab.remove(key)
    store = lab.node.store
    with store.transaction():
        for device in store.quarantined():
            store.doom(device, 1)
            store.release([device])
    lab.reap()


def test_a_kill_while_a_new_epoch_begins_gives_no_device_twice(lab: Lab) -> None:
    low = _write(lab, "low", "of low")
    for number in range(1, _MOST_STEPS):
        before = stamps.parse(lab.status().transaction)
        with lab.node.store.transaction():
            lab.node.store.give_from(MAX_THIN_ID + 1)
        lab.stop()
        status = in_child(partial(_die, _prepare, lab, number))
        lab.start()
        assert not lab.node.store.past, f"after a kill in front of step {number}"
        with contextlib.suppress(AlreadyExists):
            lab.prepare("x")
        after = stamps.parse(lab.status().transaction)
        assert before is not None and after is not None and before.epoch != after.epoch
        assert lab.stat("x").device not in (low, *lab.bases())
        assert _secret(lab, "low") == "of low"
        lab.remove("x")
        assert not lab.leaks()
        if not os.WIFSIGNALED(status):
            assert status == 0, "it failed by itself"
            break
    assert 5 < number < _MOST_STEPS - 1


def _prepare(lab: Lab) -> None:
    lab.start(recover=False)
    lab.prepare("x")
