"""Ids that the pool has and no row knows, devices of others, and what a damaged or older store could give away."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev import Deadline
from snapshotter import metadata
from snapshotter import pool as pools
from snapshotter.errors import StoreFailed, Unavailable, WrongState
from snapshotter.node import STORE, Node
from tests.kernel.inside.lab import MIB, Lab, mounted, soon


def _somebody_makes(lab: Lab, *devices: int) -> None:
    for device in devices:
        lab.node.mapper.message(lab.name, f"create_thin {device}")


def _next(lab: Lab) -> int:
    """The id that comes next."""
    return max(lab.node.store.devices()) + 1


@pytest.mark.short
def test_an_id_that_somebody_took_is_quarantined_and_another_is_given(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"mine"})
    taken = _next(lab)
    _somebody_makes(lab, taken, taken + 1, taken + 2, taken + 50)
    with mounted(lab.prepare("a", "layer")) as root:
        assert (root / "f").read_bytes() == b"mine"
    assert lab.stat("a").device > taken + 50
    assert lab.node.store.quarantined() == [taken, taken + 1, taken + 2, taken + 50]
    lab.remove("a")
    assert not lab.leaks()
    assert {taken, taken + 1, taken + 2, taken + 50} <= lab.ids(), "somebody else's device was deleted"


def test_a_base_is_not_somebody_elses_device_either(lab: Lab) -> None:
    lab.prepare("a")
    taken = _next(lab)
    _somebody_makes(lab, taken)
    lab.prepare("b", size=str(48 * MIB))
    assert taken not in lab.bases() | {lab.stat("b").device}
    assert lab.node.store.quarantined() == [taken]
    lab.reap()
    assert taken in lab.ids()


def test_what_shortens_the_kernels_list_deletes_nobody_elses_device(lab: Lab) -> None:
    lab.prepare("a")
    lab.reap_idle()
    assert len(lab.node.reaper.entries)
    lab.node.reaper.entries.kept = 0
    taken = _next(lab)
    _somebody_makes(lab, taken)
    lab.node.reaper._busy = lambda: 9.0
    lab.reap()
    assert taken in lab.ids()
    assert lab.node.store.quarantined() == [taken]


def test_a_failure_right_after_dooms_nobody_elses_device(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full just when the id turns out to be taken."""
    lab.layer("layer", files={"f": b"x"})
    taken = _next(lab)
    _somebody_makes(lab, taken)
    commit, full = lab.node.store._commit, [False]

    def create(device: int, origin: int, *, again: bool = False) -> None:
        full[0] = True
        type(lab.node.pool).create_snapshot(lab.node.pool, device, origin, again=again)

    def failing() -> None:
        if full[0]:
            raise sqlite3.OperationalError("database or disk is full")
        commit()

    monkeypatch.setattr(lab.node.pool, "create_snapshot", create)
    monkeypatch.setattr(lab.node.store, "_commit", failing)
    with pytest.raises(StoreFailed):
        lab.prepare("a", "layer")
    full[0] = False
    monkeypatch.undo()
    lab.prepare("a", "layer")
    lab.remove("a")
    lab.reap()
    assert taken in lab.ids()


def test_only_what_an_earlier_life_made_for_the_row_counts_as_made(lab: Lab) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "f").write_bytes(b"mine")
    device = lab.stat("a").device
    lab.restart()
    with mounted(lab.prepare("a")) as root:
        assert (root / "f").read_bytes() == b"mine"
    assert lab.stat("a").device == device
    with pytest.raises(pools.DeviceThere, match="already"):
        lab.node.pool.create_thin(device)
    lab.node.pool.create_thin(device, again=True)


def _copy_of_store(lab: Lab, place: Path) -> None:
    """As sqlite's online backup, or a snapshot of the filesystem, makes it of a running server's."""
    with sqlite3.connect(lab.node.store.path) as source, sqlite3.connect(place) as target:
        source.backup(target)


def _put_back(lab: Lab, place: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(lab.state, STORE + suffix).unlink(missing_ok=True)
    shutil.copy(place, os.path.join(lab.state, STORE))


def test_a_copy_of_the_store_from_this_very_run_costs_nobody_their_data(lab: Lab, tmp_path: Path) -> None:
    lab.prepare("first")
    lab.reap()
    _copy_of_store(lab, tmp_path / "copy")
    secrets = {}
    for number in range(70):
        with mounted(lab.prepare(f"tenant-{number}")) as root:
            (root / "secret").write_text(f"of tenant {number}")
        secrets[lab.stat(f"tenant-{number}").device] = number
    lab.stop()
    _put_back(lab, tmp_path / "copy")
    lab.start(recover=False)
    assert secrets.keys() <= set(lab.node.store.quarantined()), "before the first call"
    for number in range(3):
        with mounted(lab.prepare(f"new-{number}")) as root:
            assert os.listdir(root) == []
    lab.found = lab.node.recover()
    lab.reap()
    assert secrets.keys() <= lab.ids()
    assert set(lab.found.orphans + lab.found.foreign) == secrets.keys()
    lab.restart()
    assert secrets.keys() <= set(lab.node.store.quarantined())


def test_what_is_quarantined_and_gone_from_the_pool_is_forgotten(lab: Lab) -> None:
    _somebody_makes(lab, 4000)
    lab.restart()
    assert lab.node.store.quarantined() == [4000]
    lab.node.pool.delete(4000)
    lab.restart()
    assert lab.node.store.quarantined() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A state directory of 4 MiB."""
    state = tmp_path / "lab0" / "state"
    state.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(state)], check=True)
    yield state
    subprocess.run(["umount", "-l", str(state)], check=True)


def test_no_container_gets_anothers_root_after_the_state_disk_was_full(
    small_disk: Path, make_lab: Callable[..., Lab]
) -> None:
    lab = make_lab(size=16 * MIB, data=512 * MIB)
    lab.prepare("first")
    lab.reap()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as opened:
        while True:
            opened.write(bytes(4096))
    for number in range(70):
        with pytest.raises(StoreFailed, match="full"):
            lab.prepare(f"full-{number}")
    filler.unlink()
    seen: set[int] = set()
    for number in range(70):
        with mounted(lab.prepare(f"k{number}")) as root:
            assert os.listdir(root) == []
            (root / "secret").write_text(str(number))
        seen.add(lab.stat(f"k{number}").device)
    assert len(seen) == 70
    assert not lab.leaks()


def test_a_device_that_an_older_release_gave_twice_is_refused_kept_and_named(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    for key in ("a", "b"):
        lab.prepare(key, "layer")
    device = lab.stat("a").device
    lab.reap()
    lab.node.store._db.execute("DROP INDEX one_row")
    lab.node.store._db.execute("UPDATE snapshots SET device = ? WHERE key = 'b'", (device,))
    lab.restart()
    assert device in lab.node.store.quarantined()
    for call in (lambda: lab.mounts("a"), lambda: lab.mounts("b"), lambda: lab.commit("c", "a")):
        with pytest.raises(WrongState, match=f"device {device} of snapshot .* more than once"):
            call()
    lab.prepare("c", "layer")
    lab.remove("a")
    lab.remove("b")
    lab.reap()
    assert device in lab.ids(), "data that may be another's is deleted"
    lab.restart()
    lab.prepare("a", "layer")


# -- the list of ids --------------------------------------------------------------------------------------------------


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thin_ls that warns of something, as both its streams are read as one."""
    run = metadata.run

    def with_a_warning(program: str, *arguments: str, **more: object) -> tuple[int, str]:
        code, output = run(program, *arguments, **more)  # type: ignore[arg-type]
        return code, f"Warning: something harmless\n{output}" if program.startswith("thin_") else output

    monkeypatch.setattr(metadata, "run", with_a_warning)


@pytest.mark.usefixtures("noisy")
def test_a_tools_warning_is_no_device(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x" * MIB})
    lab.prepare("a", "layer")
    assert lab.ids() == {*lab.bases(), lab.stat("a").device, lab.stat("layer").device}
    assert lab.usage("layer")[0] >= MIB
    assert lab.node.pool.mapped_bytes(soon()).keys() == lab.ids()


def _run_behind(lab: Lab) -> Node:
    lab.stop()
    lab.node = Node(lab.settings)
    lab.node.start()
    return lab.node


def test_a_start_goes_on_trying_whatever_it_meets(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.prepare("a")
    lab.remove("a")
    broken = [True]
    ids = pools.Pool.ids

    def failing(self: pools.Pool, deadline: object) -> set[int]:
        if broken[0]:
            raise ValueError("what nobody has thought of")
        return ids(self, deadline)  # type: ignore[arg-type]

    monkeypatch.setattr(pools.Pool, "ids", failing)
    node = _run_behind(lab)
    _until(lambda: bool(node.background.troubles()))
    with pytest.raises(Unavailable, match="nobody has thought of"):
        node.wait_for_pool(Deadline.after(3))
    assert any("nobody has thought of" in trouble for trouble in node.background.troubles())
    broken[0] = False
    _until(lambda: node.ready and not node.background.troubles())
    _until(lambda: not node.store.doomed())
    node.stop()
    lab.start()


def test_a_recovery_that_fails_is_made_again_and_deletions_go_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.prepare("a")
    lab.remove("a")
    broken = [True]
    resume = pools.Pool.resume_suspended

    def failing(self: pools.Pool) -> list[int]:
        if broken[0]:
            raise KeyError("what nobody has thought of")
        return resume(self)

    monkeypatch.setattr(pools.Pool, "resume_suspended", failing)
    node = _run_behind(lab)
    _until(lambda: any("the recovery" in trouble for trouble in node.background.troubles()))
    _until(lambda: not node.store.doomed())
    broken[0] = False
    _until(lambda: not node.background.troubles())
    node.stop()
    lab.start()


def _until(ready: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_pool_that_cannot_be_compared_serves_what_is_there_and_gives_no_id(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.prepare("a")
    status = lab.status()
    monkeypatch.setattr(pools.Pool, "status", lambda _self: replace(status, mode="ro", needs_check=True))
    lab.restart()
    assert lab.mounts("a")
    monkeypatch.undo()
    with pytest.raises(Unavailable, match="cannot be compared with the store's while it is waiting for a check"):
        lab.prepare("b")
    lab.node._compare()
    lab.prepare("b")
    assert not lab.leaks()
