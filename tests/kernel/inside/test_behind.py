"""What is done behind the calls goes on whatever the calls do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from blockdev import filesystems
from snapshotter.errors import Unavailable
from tests.kernel.inside.lab import MIB, Lab, mounted


@pytest.mark.short
def test_deleting_goes_on_under_endless_calls(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    for number in range(12):
        with mounted(lab.prepare(f"k{number}", "layer")) as root:
            (root / "own").write_bytes(os.urandom(MIB))
    before = lab.status().data_used
    for number in range(12):
        lab.remove(f"k{number}")
    lab.node.activity.begin()
    assert lab.node.activity.quiet_for() == 0
    lab.node.reaper.start()
    try:
        until = time.monotonic() + 30
        while lab.node.store.doomed():
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        lab.node.reaper.stop()
    assert before - lab.status().data_used >= 12 * 16, "their blocks are given back"


def test_what_is_opened_after_its_removal_keeps_its_blocks(lab: Lab) -> None:
    (mount,) = lab.prepare("a")
    with mounted([mount]) as root:
        (root / "f").write_bytes(b"x" * MIB)
    with open(mount.source, "rb") as opened:
        opened.seek(1024)
        first = opened.read(4096)
        lab.remove("a")
        lab.node.reaper.round()
        assert lab.node.store.doomed()
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        opened.seek(1024)
        assert opened.read(4096) == first
    assert not lab.leaks()


def test_a_base_that_nobody_needs_goes_and_what_was_made_of_it_stays(lab: Lab) -> None:
    with mounted(lab.prepare("kept")) as root:
        (root / "f").write_bytes(b"x")
    before = lab.ids()
    for number in range(5):
        lab.prepare(f"s{number}", size=str((40 + number) * MIB))
    with mounted(lab.mounts("s0")) as root:
        (root / "f").write_bytes(b"x")
        (root / "g").write_bytes(b"x")
    for number in range(1, 5):
        lab.remove(f"s{number}")
    lab.reap()
    assert len(lab.bases()) == 6
    lab.node.bases.drop_unused(_never, every=0)
    assert len(lab.bases()) == 6, "they were asked for a moment ago"
    lab.node.bases.unused_after = 0
    lab.node.bases._looked = -1e9
    lab.reap()
    lab.reap()
    assert len(lab.bases()) == 1
    assert lab.ids() == {*before, lab.stat("s0").device}
    # What is counted without them, and made with another one.
    assert lab.usage("s0")[1] == 2
    lab.commit("layer", "s0")
    assert lab.usage("layer")[1] == 2
    assert lab.read("layer", "f") == b"x"
    lab.prepare("s1", size=str(41 * MIB))
    assert len(lab.bases()) == 2
    lab.restart()
    assert lab.usage("layer")[1] == 2
    lab.remove("layer")
    lab.remove("s1")
    lab.node.bases.unused_after = 0
    lab.node.bases._looked = -1e9
    lab.reap()
    lab.reap()
    assert len(lab.bases()) == 1
    assert len(lab.node.store.facts("empty ")) <= 1, "what is said of empty filesystems goes with the last of that size"
    assert not lab.leaks()


def _never(*_: object) -> None:
    raise AssertionError


def test_the_base_that_is_made_ahead_is_the_one_that_is_used(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(size=20_000_000)
    lab.node._make_base()
    made = lab.bases()
    lab.prepare("a")
    assert lab.bases() == made
    assert lab.stat("a").size == 20 * MIB


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_layer_grows_once_for_all_its_larger_children(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, fstype: str
) -> None:
    size = (300 if fstype == "xfs" else 32) * MIB
    lab = make_lab(fstype=fstype, size=size, data=512 * MIB)
    lab.layer("layer", files={"f": b"x"})
    lab.layer("other", files={"f": b"y"})
    lab.reap()
    bases = lab.bases()
    larger = str(2 * size)
    for key in ("first", "second"):
        lab.prepare(key, "layer", size=larger)
    assert len(lab.bases()) == len(bases) + 1
    monkeypatch.setattr(filesystems, "grow", _never)
    used = lab.status().data_used
    third = lab.prepare("third", "layer", size=larger)
    assert lab.status().data_used == used
    with mounted(third) as root:
        assert os.statvfs(root).f_blocks * os.statvfs(root).f_frsize > 1.5 * size
        assert (root / "f").read_bytes() == b"x"
    lab.restart()
    lab.prepare("fourth", "layer", size=larger)
    monkeypatch.undo()
    with mounted(lab.prepare("of another", "other", size=larger)) as root:
        assert (root / "f").read_bytes() == b"y"
    assert lab.stat("fourth").size == 2 * size
    for key in ("first", "second", "third", "fourth", "of another", "layer"):
        lab.remove(key)
    lab.node.bases._looked = -1e9
    lab.reap()
    lab.reap()
    assert lab.bases() == bases, "it goes with its layer"
    assert not lab.leaks()


def test_a_grown_layer_that_is_missing_is_made_anew(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    bases = lab.bases()
    for key in ("first", "second"):
        lab.prepare(key, "layer", size=str(64 * MIB))
    (grown,) = lab.bases() - bases
    lab.node.pool.delete(grown)
    with pytest.raises(Unavailable, match="try again"):
        lab.prepare("third", "layer", size=str(64 * MIB))
    with mounted(lab.prepare("third", "layer", size=str(64 * MIB))) as root:
        assert (root / "f").read_bytes() == b"x"
