"""Images on shared storage: a node that never pulled starts a container from one, and nothing wrong is ever read."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, loops
from blockdev.devicemapper import Mapper, node
from blockdev.dm_targets import SECTOR, Linear
from snapshotter import verity
from snapshotter.errors import AlreadyExists, BadRequest, NotFound, SnapshotterError, Unavailable
from snapshotter.images import PATIENCE, Share
from snapshotter.model import LABEL_REF
from tests.kernel.inside.lab import MIB, Lab, mounted, soon

pytestmark = pytest.mark.short


def chain(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture
def share(tmp_path: Path) -> Share:
    (tmp_path / "share").mkdir()
    return Share(str(tmp_path / "share"))


def make_image(lab: Lab, share: Share, key: str, name: str) -> None:
    (mount,) = lab.view("for the image", key)
    share.make(chain(name), mount.source, mount.fstype)
    lab.remove("for the image")
    lab.reap()


@pytest.fixture
def puller(make_lab: Callable[..., Lab], share: Share) -> Lab:
    """The node that has pulled: two layers, both of them in the share."""
    lab = make_lab()
    lab.layer("base", files={"f": b"base", "big": b"b" * MIB})
    lab.layer("top", "base", files={"g": b"top"})
    make_image(lab, share, "base", "base")
    make_image(lab, share, "top", "top")
    return lab


def extract(lab: Lab, name: str, parent: str, *, namespace: str = "k8s.io") -> str:
    """What containerd does for a layer: the key of its committed snapshot if it is there already."""
    reference = chain(name)
    key = f"{namespace}/7/extract-1 {reference}"
    try:
        lab.node.snapshots.prepare(key, parent, {LABEL_REF: reference}, soon())
    except AlreadyExists:
        # What containerd asks then, its own filter included.
        wanted = f'labels."containerd.io/snapshot.ref"=={reference},parent=="{parent}"'
        ((row,),) = list(lab.node.snapshots.list([wanted]))
        assert row.kind.name == "COMMITTED"
        return row.key
    lab.remove(key)
    return ""


@pytest.fixture
def other(puller: Lab, make_lab: Callable[..., Lab], share: Share) -> Lab:
    return make_lab(images=share.directory)


def test_a_node_that_never_pulled_starts_from_the_image(other: Lab) -> None:
    base = extract(other, "base", "")
    top = extract(other, "top", base)
    assert base
    assert top
    before = other.status().data_used
    with mounted(other.prepare("k8s.io/9/container", top)) as root:
        assert sorted(os.listdir(root)) == ["big", "f", "g"]
        assert (root / "big").read_bytes() == b"b" * MIB
        (root / "f").write_bytes(b"changed here only")
    assert (other.status().data_used - before) * 65536 < 4 * MIB, "the image was copied"
    with mounted(other.prepare("k8s.io/10/container", top)) as root:
        assert (root / "f").read_bytes() == b"base"
    size, _ = other.usage("k8s.io/9/container")
    assert 0 < size < 4 * MIB
    # A layer on top of an image, and a container of that.
    other.commit("committed", "k8s.io/9/container")
    with mounted(other.prepare("k8s.io/11/container", "committed")) as root:
        assert (root / "f").read_bytes() == b"changed here only"
        assert (root / "g").read_bytes() == b"top"


def test_containers_of_an_image_come_back_after_a_reboot(other: Lab) -> None:
    top = extract(other, "top", extract(other, "base", ""))
    with mounted(other.prepare("c", top)) as root:
        (root / "mine").write_bytes(b"kept")
    other.reboot()
    with mounted(other.mounts("c")) as root:
        assert (root / "g").read_bytes() + (root / "mine").read_bytes() == b"topkept"
    assert not other.leaks()


def test_images_are_let_go_of_when_nothing_needs_them(other: Lab) -> None:
    base = extract(other, "base", "")
    top = extract(other, "top", base)
    other.prepare("c", top)
    name = other.node.images.name(chain("top"))  # type: ignore[union-attr]
    assert other.node.mapper.find(name) is not None
    for key in ("c", top, base):
        other.remove(key)
    assert not other.leaks()
    other.reap()
    other.node.reaper.round()
    assert other.node.mapper.find(name) is None


def test_only_chains_that_have_an_image_are_answered(make_lab: Callable[..., Lab], share: Share) -> None:
    """Two images share their base, and one of them is not in the share."""
    maker = make_lab()
    maker.layer("base", files={"f": b"base"})
    maker.layer("first", "base", files={"g": b"first"})
    maker.layer("second", "base", files={"g": b"second"})
    make_image(maker, share, "base", "base")
    make_image(maker, share, "first", "first")
    lab = make_lab(images=share.directory)
    base = extract(lab, "base", "")
    assert extract(lab, "first", base)
    assert extract(lab, "second", base) == ""
    # The second is pulled: its layer is applied to the shared base.
    with mounted(lab.prepare("extract", base)) as root:
        (root / "g").write_bytes(b"second")
    lab.commit("second", "extract")
    assert lab.read("second", "f") + lab.read("second", "g") == b"basesecond"


def test_without_the_reference_a_layer_is_an_ordinary_one(other: Lab) -> None:
    other.prepare("plain")
    assert other.names() == ["plain"]


def test_two_namespaces_share_one_snapshot_of_the_image(other: Lab) -> None:
    """containerd keeps a backend's snapshot while one of its namespaces refers to it."""
    assert extract(other, "base", "") == extract(other, "base", "", namespace="moby") != ""
    assert len(other.names()) == 1


# -- what must not be believed ----------------------------------------------------------------------------------------


def _spoil(share: Share, name: str, part: str, at: int) -> None:
    with open(os.path.join(share.place(chain(name)), part), "r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(("part", "at"), [("image", 1024 + 0x68), ("hashes", 10)])
def test_a_spoilt_image_starts_no_container(other: Lab, share: Share, part: str, at: int) -> None:
    base = extract(other, "base", "")
    _spoil(share, "base", part, at)
    with pytest.raises((Unavailable, SnapshotterError), match="image"):
        other.prepare("c", base)
    assert share.check(chain("base")) or part == "hashes"
    assert "c" not in other


def test_a_spoilt_block_is_an_error_and_never_data(other: Lab, share: Share) -> None:
    base = extract(other, "base", "")
    image = Path(share.place(chain("base"))) / "image"
    at = image.read_bytes().index(b"b" * 4096)
    _spoil(share, "base", "image", at)
    with mounted(other.prepare("c", base)) as root:
        assert (root / "f").read_bytes() == b"base"
        with pytest.raises(OSError, match="Input/output"):
            (root / "big").read_bytes()
    assert "is not what it was" in share.check(chain("base"))


def test_an_image_that_was_replaced_is_refused(puller: Lab, other: Lab, share: Share) -> None:
    base = extract(other, "base", "")
    shutil.rmtree(share.place(chain("base")))
    (mount,) = puller.view("v", "top")
    share.make(chain("base"), mount.source, mount.fstype)
    with pytest.raises(SnapshotterError, match="replaced"):
        other.prepare("c", base)


def test_a_manifest_that_is_none_is_refused(other: Lab, share: Share) -> None:
    place = Path(share.place(chain("base")), "manifest.json")
    for manifest in (b"", b"{}", b"[1]", b"\xff", b'{"chain":"sha256:00"}'):
        place.write_bytes(manifest)
        with pytest.raises(SnapshotterError, match="make it again"):
            extract(other, "base", "")


def test_a_reference_that_is_no_chain_id_reaches_no_path(other: Lab) -> None:
    references = ("../../etc", "sha256:../../../../etc/passwd", "sha256:ABC", "sha256:")
    for number, reference in enumerate(references):
        other.node.snapshots.prepare(f"k{number}", "", {LABEL_REF: reference}, soon())
    with pytest.raises(BadRequest, match="4096"):
        other.node.snapshots.prepare("k", "", {LABEL_REF: "x" * 5000}, soon())
    assert sorted(other.names()) == [f"k{number}" for number in range(len(references))]


# -- making and removing ------------------------------------------------------------------------------------------------


def test_making_twice_keeps_the_first_and_leaves_nothing_beside(puller: Lab, share: Share) -> None:
    before = share.manifest(chain("base"), soon())
    make_image(puller, share, "top", "base")
    assert share.manifest(chain("base"), soon()) == before
    assert sorted(os.listdir(share.directory)) == sorted(c[7:] for c in share.chains())
    assert share.check(chain("top")) == ""
    share.remove(chain("top"))
    assert share.chains() == [chain("base")]
    with pytest.raises(NotFound):
        share.remove(chain("top"))


def test_the_tree_is_the_one_that_veritysetup_makes(tmp_path: Path) -> None:
    """Sizes around the tree's steps: one block, one hash block full, two levels."""
    for blocks in (2, 128, 129, 1000):
        path = tmp_path / f"data{blocks}"
        path.write_bytes(os.urandom(blocks * 2048) + bytes(blocks * 2048))
        root = verity.build(str(path), str(tmp_path / "hashes"), b"salt")
        assert root == verity.root_of(str(path), b"salt")
        expected = -(-blocks // 128) + (1 if blocks > 128 else 0)
        assert os.path.getsize(tmp_path / "hashes") == expected * 4096


# -- a share that does not answer -----------------------------------------------------------------------------------------


def test_a_share_that_hangs_costs_an_error_within_its_limit(other: Lab, share: Share) -> None:
    """A FIFO in the manifest's place: whoever opens it waits for ever."""
    base = extract(other, "base", "")
    path = os.path.join(share.place(chain("base")), "manifest.json")
    os.unlink(path)
    os.mkfifo(path)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="do not answer"):
        other.prepare("c", base)
    assert time.monotonic() - started < PATIENCE + 2
    started = time.monotonic()
    with pytest.raises(Unavailable, match="do not answer"):
        other.prepare("d", base)
    assert time.monotonic() - started < 1, "every call waits anew"
    assert not {row.key for row in other.node.store.children(base)}, "a refused call has left something"
    other.prepare("of nothing")
    # Whoever waits is let go, so that the thread ends.
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def dying(tmp_path: Path, mapper: Mapper) -> Iterator[tuple[Share, Callable[[bool], None]]]:
    """A share on a filesystem whose disk can stop answering."""
    disk = tmp_path / "disk"
    with open(disk, "wb") as opened:
        opened.truncate(256 * MIB)
    device = loops.attach(str(disk), deadline=Deadline.after(20))
    mapper.create("rv-dying")
    mapper.load("rv-dying", [Linear(length=256 * MIB // SECTOR, device=device)])
    mapper.resume("rv-dying")
    subprocess.run(["mkfs.ext4", "-q", node("rv-dying")], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", node("rv-dying"), str(place)], check=True)

    def answer(yes: bool) -> None:
        if yes:
            mapper.resume("rv-dying")
        else:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            mapper.suspend("rv-dying", flush=False, freeze=False)

    yield Share(str(place)), answer
    answer(True)
    time.sleep(0.5)
    for _ in range(20):
        if subprocess.run(["umount", str(place)], check=False, capture_output=True).returncode == 0:
            break
        time.sleep(0.5)
    mapper.remove("rv-dying")
    loops.detach(device, str(disk), Deadline.after(20))


def test_a_share_whose_disk_stops_is_an_error_for_new_containers_and_for_nobody_else(
    make_lab: Callable[..., Lab], dying: tuple[Share, Callable[[bool], None]]
) -> None:
    share, answer = dying
    maker = make_lab()
    maker.layer("base", files={"f": b"base"})
    make_image(maker, share, "base", "base")
    lab = make_lab(images=share.directory)
    base = extract(lab, "base", "")
    lab.prepare("running", base)
    lab.prepare("local")
    answer(False)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="do not answer"):
        lab.prepare("new", base)
    assert time.monotonic() - started < PATIENCE + 3
    started = time.monotonic()
    lab.prepare("other local")
    lab.commit("layer", "local")
    assert time.monotonic() - started < 3
    answer(True)
    time.sleep(1)
    with mounted(lab.prepare("new", base)) as root:
        assert (root / "f").read_bytes() == b"base"
    for key in ("new", "running"):
        lab.remove(key)
    lab.reap()
    lab.remove(base)
    lab.reap()
    lab.node.reaper.round()
