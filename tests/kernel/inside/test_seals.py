"""Committed layers under dm-verity: what a View reads was hashed when the layer was committed, or is not read at all."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev import loops
from snapshotter import verity
from snapshotter.errors import SnapshotterError
from tests.kernel.inside.lab import MIB, Lab, mounted

pytestmark = pytest.mark.short
CONTENT = b"0123456789abcdef" * (MIB // 16)


@pytest.fixture(params=["ext4", "xfs"])
def sealed(make_lab: Callable[..., Lab], request: pytest.FixtureRequest) -> Lab:
    size = 32 * MIB if request.param == "ext4" else 300 * MIB
    lab = make_lab(verity=True, fstype=request.param, size=size)
    lab.layer("layer", files={"f": CONTENT})
    assert lab.seal("layer")
    return lab


def _first_place(device: str) -> int:
    """Where on the device the content lies."""
    with open(device, "rb") as opened:
        at = opened.read().find(CONTENT[:4096])
    assert at > 0
    return at


def test_a_view_of_a_sealed_layer_reads_it_through_verity(sealed: Lab) -> None:
    (mount,) = sealed.view("v", "layer")
    assert mount.source.startswith("/dev/loop")
    assert "ro" in mount.options
    with mounted([mount]) as root:
        assert (root / "f").read_bytes() == CONTENT
        with pytest.raises(OSError, match="Read-only"):
            (root / "new").write_bytes(b"x")
    assert sealed.mounts("v") == [mount]
    sealed.remove("v")
    assert not sealed.leaks()


@pytest.mark.parametrize("mapped", [True, False])
def test_a_window_that_somebody_made_on_a_tree_or_on_what_it_verifies_is_not_taken(sealed: Lab, mapped: bool) -> None:
    """An open view's verified device, or the file of the tree before any view."""
    if mapped:
        (mount,) = sealed.view("v", "layer")
        below = Path(f"/sys/class/block/{os.path.basename(mount.source)}/loop/backing_file").read_text().strip()
        loops.clear(mount.source)
    else:
        (below,) = map(str, (Path(sealed.state) / "seals").iterdir())
    done = subprocess.run(["losetup", "--show", "-r", "-o", "1M", "-f", below], capture_output=True, text=True,
                          check=True)  # fmt: skip
    try:
        with mounted(sealed.mounts("v") if mapped else sealed.view("v", "layer")) as root:
            assert (root / "f").read_bytes() == CONTENT
    finally:
        subprocess.run(["losetup", "-d", done.stdout.strip()], check=False)


def test_what_was_changed_on_the_disk_is_not_read(sealed: Lab) -> None:
    row, pool = sealed.stat("layer"), sealed.node.pool
    pool.activate(row.device, row.size)
    at = _first_place(pool.path(row.device))
    with open(pool.path(row.device), "r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), b"tampered", at + 100)
        os.fsync(opened.fileno())
    assert pool.deactivate(row.device)
    with mounted(sealed.view("v", "layer")) as root, pytest.raises(OSError) as caught:
        (root / "f").read_bytes()
    assert caught.value.errno == errno.EIO
    sealed.remove("v")
    # A container's device is not verified, which the documentation says.
    with mounted(sealed.prepare("c", "layer")) as root:
        assert (root / "f").read_bytes()[100:108] == b"tampered"


def test_views_share_a_tree_and_the_last_one_lets_it_go(sealed: Lab) -> None:
    sealed.view("one", "layer")
    sealed.view("two", "layer")
    sealed.remove("one")
    sealed.reap()
    with mounted(sealed.mounts("two")) as root:
        assert (root / "f").read_bytes() == CONTENT
    sealed.remove("two")
    assert not sealed.leaks()


def test_an_open_view_outlives_a_restart_and_comes_back_after_a_reboot(sealed: Lab) -> None:
    with mounted(sealed.view("v", "layer")) as root:
        sealed.restart()
        sealed.reap()
        assert (root / "f").read_bytes() == CONTENT
    sealed.reboot()
    with mounted(sealed.mounts("v")) as root:
        assert (root / "f").read_bytes() == CONTENT


def test_a_layer_is_sealed_although_somebody_writes_to_what_it_was(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(verity=True)
    with mounted(lab.prepare("k")) as root:
        (root / "before").write_bytes(b"x")
        lab.commit("layer", "k")
        assert lab.seal("layer")
        (root / "late").write_bytes(b"x")
        with mounted(lab.view("v", "layer")) as seen:
            assert sorted(one.name for one in seen.iterdir()) == ["before"]


def test_a_layer_that_somebody_reads_is_sealed_after_that(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(verity=True)
    (mount,) = lab.prepare("k")
    lab.commit("layer", "k")
    with open(mount.source, "rb"):
        assert not lab.seal("layer")
    assert lab.seal("layer")


def test_the_tree_goes_with_its_layer(sealed: Lab) -> None:
    folder = Path(sealed.state) / "seals"
    assert len(list(folder.iterdir())) == 1
    sealed.remove("layer")
    assert not sealed.leaks()
    assert not list(folder.iterdir())
    assert not sealed.node.store.facts("seal ")


def test_a_view_without_its_tree_is_an_error_and_not_an_unverified_read(sealed: Lab) -> None:
    for tree in (Path(sealed.state) / "seals").iterdir():
        tree.unlink()
    with pytest.raises(SnapshotterError, match="is gone"):
        sealed.view("v", "layer")


def test_trees_stay_in_use_when_no_more_are_made(sealed: Lab) -> None:
    sealed.view("v", "layer")
    sealed.stop()
    sealed.settings = sealed.settings.__class__(**{**sealed.settings.__dict__, "verity": False})
    sealed.start()
    assert sealed.node.sealer is None
    with mounted(sealed.mounts("v")) as root:
        assert (root / "f").read_bytes() == CONTENT
    sealed.remove("v")
    assert not sealed.leaks()


def test_a_layer_that_is_being_hashed_is_not_unmapped(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reaper was told of it by its Commit, and comes at the worst moment."""
    lab = make_lab(verity=True)
    lab.layer("layer", files={"f": CONTENT})
    build = verity.build

    def while_the_reaper_is_at_work(image: str, hashes: str, salt: bytes, *_more: object) -> str:
        lab.reap()
        assert lab.node.pool.find(lab.stat("layer").device) is not None
        return build(image, hashes, salt)

    monkeypatch.setattr(verity, "build", while_the_reaper_is_at_work)
    assert lab.node.sealer is not None
    assert lab.node.sealer.seal("layer")
    assert lab.node.seals is not None
    assert lab.node.seals.of(lab.stat("layer").device) is not None
    lab.reap()
    assert lab.node.pool.find(lab.stat("layer").device) is None


def test_the_running_process_seals_by_itself(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(verity=True)
    lab.layer("before", files={"f": CONTENT})
    node = lab.node
    assert node.sealer is not None
    assert node.seals is not None
    node.reaper.start()
    node.sealer.start()
    lab.layer("after", files={"f": CONTENT})
    until = time.monotonic() + 20
    while not all(node.seals.of(lab.stat(name).device) for name in ("before", "after")):
        assert time.monotonic() < until, "not sealed within 20 s"
        time.sleep(0.1)
    node.sealer.stop()
    node.reaper.stop()
