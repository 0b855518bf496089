"""Usage: what a snapshot adds to its parent, in bytes and inodes; at once, and exactly before long."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from blockdev import Deadline
from snapshotter import counts
from snapshotter.errors import SnapshotterError
from snapshotter.store import Store
from tests.kernel.inside.lab import MIB, Lab, mounted, soon

_BLOCK = 64 << 10


def _never(*arguments: object, **_more: object) -> None:
    raise AssertionError(f"executed: {arguments}")


@pytest.mark.short
@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_inodes_are_those_that_a_snapshot_has_and_its_parent_has_not(make_lab: Callable[..., Lab], fstype: str) -> None:
    lab = make_lab(fstype=fstype, size=(300 if fstype == "xfs" else 32) * MIB, data=512 * MIB)
    with mounted(lab.prepare("a")) as root:
        for number in range(10):
            (root / f"d{number}").mkdir()
            for one in range(20):
                (root / f"d{number}" / f"f{one}").write_bytes(b"x")
    lab.commit("layer", "a")
    lab.reap()
    assert lab.usage("layer")[1] == 210
    lab.prepare("nothing", "layer")
    assert lab.usage("nothing") == (0, 0)
    with mounted(lab.mounts("nothing")):
        pass
    assert lab.usage("nothing")[1] == 0
    with mounted(lab.prepare("one", "layer")) as root:
        (root / "own").write_bytes(b"y" * MIB)
    size, inodes = lab.usage("one")
    assert (inodes, MIB <= size < 3 * MIB) == (1, True)
    with mounted(lab.prepare("less", "layer")) as root:
        subprocess.run(["rm", "-r", str(root / "d0")], check=True)
    assert lab.usage("less")[1] == 0
    lab.view("v", "layer")
    assert lab.usage("v") == (0, 0)
    lab.commit("of one", "one")
    lab.reap()
    assert lab.usage("of one")[1] == 1
    assert not lab.leaks()


def test_of_what_is_mapped_nothing_is_executed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.layer("layer", files={"f": b"x" * MIB})
    lab.reap()
    monkeypatch.setattr("snapshotter.metadata.run", _never)
    with mounted(lab.prepare("a", "layer")) as root:
        (root / "g").write_bytes(b"y" * (2 * MIB))
        os.sync()
        size, inodes = lab.usage("a")
        assert (inodes, 2 * MIB <= size < 4 * MIB) == (1, True)
    lab.prepare("b")
    assert lab.usage("b") == (0, 0)


def test_what_overwrites_its_parent_is_counted_after_one_look(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.layer("layer", files={"f": b"x" * (8 * MIB)})
    lab.reap()
    for key in ("a", "b", "c", "d", "e", "f"):
        with mounted(lab.prepare(key, "layer")) as root, (root / "f").open("r+b") as opened:
            opened.write(b"y" * (4 * MIB))
    assert lab.usage("a")[0] < MIB, "it maps no more than its parent"
    for key in ("a", "b", "c", "d", "e", "f"):
        lab.usage(key)
    looks = []
    listed, added = lab.node.pool.listed, lab.node.pool.added
    monkeypatch.setattr(lab.node.pool, "listed", lambda *more: looks.append("all") or listed(*more))
    monkeypatch.setattr(lab.node.pool, "added", lambda *more: looks.append("one") or added(*more))
    lab.node.snapshots.counts.look(soon())
    # The layer was not asked about since its Commit told of it.
    assert looks == ["all", "one"]
    for key in ("a", "b", "c", "d", "e", "f"):
        assert 4 * MIB <= lab.usage(key)[0] < 6 * MIB
    with mounted(lab.mounts("a")) as root:
        (root / "g").write_bytes(b"z" * (2 * MIB))
        os.sync()
        assert 6 * MIB <= lab.usage("a")[0] < 8 * MIB, "what came after the look is counted at once"
    looks.clear()
    lab.node.snapshots.counts.look(soon())
    assert looks == ["one"], "nothing was written to the others"
    lab.reap_idle()
    assert lab.node.pool.find(lab.stat("a").device) is None
    assert 6 * MIB <= lab.usage("a")[0] < 8 * MIB
    assert lab.usage("b")[1] == 0
    lab.restart()
    assert 6 * MIB <= lab.usage("a")[0] < 8 * MIB, "what was counted before it was unmapped is kept"
    assert lab.node.pool.find(lab.stat("a").device) is None


def test_a_layer_is_counted_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.layer("below", files={"f": b"x" * MIB})
    with mounted(lab.prepare("a", "below")) as root:
        (root / "f").write_bytes(b"y" * MIB)
        (root / "g").write_bytes(b"y" * MIB)
    lab.commit("layer", "a")
    first = lab.usage("layer")
    assert (first[1], 2 * MIB <= first[0] < 4 * MIB) == (1, True)
    lab.reap()
    monkeypatch.setattr("snapshotter.metadata.run", _never)
    monkeypatch.setattr("snapshotter.pool.Pool.activate", _never)
    assert lab.usage("layer") == first
    monkeypatch.undo()
    lab.restart()
    monkeypatch.setattr("snapshotter.metadata.run", _never)
    assert lab.usage("layer") == first


def test_layers_of_an_older_release_are_counted_at_the_first_need(lab: Lab) -> None:
    lab.layer("below", files={"f": b"x" * MIB})
    lab.layer("layer", "below", files={"g": b"y" * MIB})
    lab.reap()
    first = lab.usage("below"), lab.usage("layer")
    with lab.node.store.transaction():
        lab.node.store._db.execute("DROP TABLE counted")
        lab.node.store._db.execute("DELETE FROM facts WHERE name LIKE 'empty %'")
    lab.restart()
    with mounted(lab.prepare("a", "layer")) as root:
        (root / "own").write_bytes(b"z")
    assert lab.usage("a")[1] == 1
    assert (lab.usage("below"), lab.usage("layer")) == first
    assert not lab.leaks()


def test_a_snapshot_that_changes_after_it_was_idle_is_counted_anew(lab: Lab) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "one").write_bytes(b"x" * MIB)
    lab.reap_idle()
    with mounted(lab.mounts("a")) as root:
        (root / "two").write_bytes(b"x" * MIB)
    assert lab.usage("a")[1] == 2
    lab.commit("layer", "a")
    size, inodes = lab.usage("layer")
    assert (inodes, size >= 2 * MIB) == (2, True)


def test_a_guests_broken_filesystem_is_no_error(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    (mount,) = lab.prepare("a", "layer")
    with open(mount.source, "r+b") as device:
        device.write(b"\xff" * (4 * MIB))
    size, inodes = lab.usage("a")
    assert inodes == 0
    assert size >= 3 * MIB
    lab.commit("broken", "a")
    assert lab.usage("broken")[1] == 0


def test_what_is_counted_of_a_layer_goes_with_it(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    device = lab.stat("layer").device
    assert lab.node.store.counted(device)
    lab.remove("layer")
    lab.reap()
    assert lab.node.store.counted(device) is None


def test_the_thread_makes_one_look_for_many(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_SOON", 0.2), ("_EVERY", 0.2)):
        monkeypatch.setattr(counts, name, seconds)
    lab.layer("layer", files={"f": b"x" * MIB})
    with mounted(lab.prepare("a", "layer")) as root, (root / "f").open("r+b") as opened:
        opened.write(b"y" * MIB)
    lab.node.snapshots.counts.start()
    try:
        import time

        until = time.monotonic() + 20
        while lab.usage("a")[0] < MIB:
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        lab.node.snapshots.counts.stop()


def test_an_older_release_has_no_use_for_the_table(lab: Lab) -> None:
    """It deletes devices and leaves what is said of them; that goes at the next start."""
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    device = lab.stat("layer").device
    with lab.node.store.transaction():
        lab.node.store._db.execute("DELETE FROM snapshots")
    lab.stop()
    lab.node.store = Store(os.path.join(lab.state, "snapshots.db"))
    lab.node.store.guard(1)
    assert lab.node.store.counted(device) is None
    lab.node.store.close()
    lab.start()


def test_one_that_cannot_be_looked_at_keeps_no_other_waiting(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.layer("bad", files={"f": b"x" * MIB})
    lab.layer("good", files={"f": b"x" * MIB})
    bad, added = lab.stat("bad").device, lab.node.pool.added

    def failing(device: int, *more: object) -> int:
        if device == bad:
            raise SnapshotterError("the tool does not understand it")
        return added(device, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(lab.node.pool, "added", failing)
    lab.node.snapshots.counts.look(soon())
    counted = lab.node.store.counted(lab.stat("good").device)
    assert counted is not None
    assert counted.added
    with pytest.raises(SnapshotterError, match="'bad' uses cannot be told: the tool does not understand it"):
        lab.usage("bad")
    monkeypatch.undo()
    assert lab.usage("bad")[0] >= MIB


def test_a_look_that_failed_is_made_again_though_nobody_asks(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it fails the service is not well, and on a node where nothing happens nobody may ask for days."""
    monkeypatch.setattr(counts, "_SOON", 0.01)
    monkeypatch.setattr(counts, "_EVERY", 0.2)
    asked, turn, scarce = lab.node.snapshots.counts, lab.node.pool.metadata_snapshot, True

    @contextlib.contextmanager
    def scarcely(deadline: Deadline) -> Iterator[None]:
        if scarce:
            raise OSError(24, "Too many open files")
        with turn(deadline):
            yield

    monkeypatch.setattr(lab.node.pool, "metadata_snapshot", scarcely)
    lab.prepare("a")
    lab.usage("a")
    asked.start()
    try:
        until = time.monotonic() + 20
        while not lab.node.background.troubles() and time.monotonic() < until:
            time.sleep(0.05)
        assert "Too many open files" in lab.node.background.troubles()[0]
        scarce = False
        while lab.node.background.troubles() and time.monotonic() < until:
            time.sleep(0.05)
        assert not lab.node.background.troubles()
    finally:
        asked.stop()
