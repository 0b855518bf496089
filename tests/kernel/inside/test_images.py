"""Images on shared storage: a node that never pulled starts a container from one, and nothing wrong is ever read."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev import Deadline, loops
from blockdev.devicemapper import Mapper, node
from blockdev.dm_targets import SECTOR, Linear
from snapshotter import images, metrics, signatures, verity
from snapshotter.errors import AlreadyExists, BadRequest, NotFound, SnapshotterError, Unavailable, WrongState
from snapshotter.images import PATIENCE, Share
from snapshotter.model import LABEL_REF, Mount
from tests.kernel.inside.lab import MIB, Lab, mounted, soon

pytestmark = pytest.mark.short


def chain(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture
def share(tmp_path: Path) -> Share:
    (tmp_path / "share").mkdir()
    return Share(str(tmp_path / "share"))


def key_file(share: Share) -> str:
    """The operator's, beside the share; made with its public one when it is first asked for."""
    path = f"{share.directory}.key"
    if not os.path.exists(path):
        signatures.make_key(path)
    return path


def trusting(share: Share) -> dict[str, object]:
    """What a lab of a node is made with that uses the share."""
    key_file(share)
    return {"images": share.directory, "image_keys": (f"{share.directory}.key.pub",)}


def make_image(lab: Lab, share: Share, key: str, name: str, *, signed: bool = True) -> None:
    (mount,) = lab.view("for the image", key)
    signing = signatures.private_key(key_file(share)) if signed else None
    share.make(chain(name), mount.source, mount.fstype, key=signing)
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
    return make_lab(**trusting(share))


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


def _window(path: str) -> str:
    """A loop device that shows the file shifted, as somebody makes it to look inside."""
    command = ["losetup", "--show", "-r", "-o", "64K", "-f", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("part", ["image", "hashes", "verified"])
def test_a_window_that_somebody_made_on_a_part_of_an_image_is_not_taken(other: Lab, share: Share, part: str) -> None:
    base = extract(other, "base", "")
    path = os.path.join(share.place(chain("base")), "image" if part == "verified" else part)
    theirs = _window(path)
    try:
        if part == "verified":  # a number below that of ours, which the kernel lists first
            other.prepare("first", base)
            loops.clear(theirs)
            theirs = _window(node(f"runvol-image-{chain('base')[7:39]}"))
        with mounted(other.prepare("c", base)) as root:
            assert (root / "big").read_bytes() == b"b" * MIB
    finally:
        subprocess.run(["losetup", "-d", theirs], check=False)


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
    lab = make_lab(**trusting(share))
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


def test_a_manifest_that_is_none_is_passed_over(other: Lab, share: Share, caplog: pytest.LogCaptureFixture) -> None:
    """What lies on the share can be anybody's: the layers are pulled as ever, and one line says why."""
    for name in ("manifest.json", "manifest.signed"):
        Path(share.place(chain("base")), name).unlink()
    place = Path(share.place(chain("base")), "manifest.json")
    for manifest in (b"", b"{}", b"[1]", b"\xff", b'{"chain":"sha256:00"}'):
        place.write_bytes(manifest)
        assert extract(other, "base", "") == ""
        with pytest.raises(SnapshotterError, match="make it again"):
            share.manifest(chain("base"), soon())
    assert other.node.images is not None
    assert other.node.images.passed_over() == {"damaged": 5}
    assert len([one for one in caplog.records if "passed over" in one.message]) == 1


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
        assert root == verity.tree(str(path), b"salt")[1]
        expected = -(-blocks // 128) + (1 if blocks > 128 else 0)
        assert os.path.getsize(tmp_path / "hashes") == expected * 4096


# -- a share that does not answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "manifest.signed", "image", "hashes"])
def test_nobody_waits_for_a_fifo_in_the_place_of_a_file(other: Lab, share: Share, name: str) -> None:
    base = extract(other, "base", "")
    path = os.path.join(share.place(chain("base")), name)
    os.unlink(path)
    os.mkfifo(path)
    started = time.monotonic()
    if name.startswith("manifest"):
        # What is mapped was decided when the image was first used.
        other.prepare("c", base)
    else:
        with pytest.raises(SnapshotterError, match=f"{name} is no regular file"):
            other.prepare("c", base)
        assert not {row.key for row in other.node.store.children(base)}, "a refused call has left something"
    assert time.monotonic() - started < PATIENCE


def test_a_link_in_the_place_of_a_file_is_not_followed(other: Lab, share: Share, tmp_path: Path) -> None:
    base = extract(other, "base", "")
    for name in ("image", "hashes"):
        inside, elsewhere = Path(share.place(chain("base")), name), tmp_path / f"elsewhere-{name}"
        inside.rename(elsewhere)
        inside.symlink_to(elsewhere)
        with pytest.raises(SnapshotterError, match=f"{name} is no regular file"):
            other.prepare("c", base)
        assert not loops.find(str(elsewhere))
        inside.unlink()
        elsewhere.rename(inside)
    with mounted(other.prepare("c", base)) as root:
        assert (root / "f").read_bytes() == b"base"


@pytest.mark.parametrize(("name", "size"), [("image", 4096), ("image", 0), ("hashes", 4096), ("hashes", 0)])
def test_parts_of_a_wrong_size_leave_nothing(other: Lab, share: Share, name: str, size: int) -> None:
    base = extract(other, "base", "")
    path = Path(share.place(chain("base")), name)
    os.truncate(path, size)
    with pytest.raises(SnapshotterError, match=f"{name} has {size} bytes instead of"):
        other.prepare("c", base)
    assert not loops.find(str(path))
    assert other.node.images is not None
    assert other.node.mapper.find(other.node.images.name(chain("base"))) is None
    assert "c" not in other


def test_what_a_killed_process_has_mapped_without_a_table_goes(other: Lab) -> None:
    base = extract(other, "base", "")
    assert other.node.images is not None
    other.node.mapper.create(other.node.images.name(chain("base")), f"RUNVOL-IMAGE-{chain('base')[7:]}")
    with mounted(other.prepare("c", base)) as root:
        assert (root / "f").read_bytes() == b"base"


# -- who is believed ------------------------------------------------------------------------------------------------------


def test_an_image_that_nobody_has_signed_is_pulled_instead(
    puller: Lab, make_lab: Callable[..., Lab], share: Share, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody who can write to the share puts a filesystem of theirs under a chain."""
    make_image(puller, share, "top", "theirs", signed=False)
    lab = make_lab(**trusting(share))
    for _ in range(3):
        assert extract(lab, "theirs", "") == ""
    assert not lab.names()
    assert lab.node.images is not None
    assert lab.node.images.passed_over() == {"unsigned": 3}
    (counted,) = [one for one in metrics._Store(lab.node).collect() if one.name == "runvol_images_passed_over"]
    assert [(one.name, one.labels, one.value) for one in counted.samples] == [
        ("runvol_images_passed_over_total", {"reason": "unsigned"}, 3)
    ]
    (line,) = [one for one in caplog.records if "passed over" in one.message]
    assert (line.__dict__["chain"], line.__dict__["why"]) == (chain("theirs"), "it is not signed")
    assert extract(lab, "base", "")
    # Without any setting nothing is believed, with an explicit one everything is.
    assert extract(make_lab(images=share.directory), "theirs", "") == ""
    assert extract(make_lab(images=share.directory, images_unsigned=True), "theirs", "")


def test_the_operators_list_is_believed_without_a_signature(
    puller: Lab, make_lab: Callable[..., Lab], share: Share, tmp_path: Path
) -> None:
    make_image(puller, share, "top", "listed", signed=False)
    manifest = share.manifest(chain("listed"), soon())
    assert manifest is not None
    roots = tmp_path / "roots"
    roots.write_text(f"{chain('listed')} {'0' * 64}\n")
    lab = make_lab(images=share.directory, image_roots=str(roots))
    assert extract(lab, "listed", "") == ""
    roots.write_text(f"{chain('listed')} {manifest.root}\n")
    with mounted(lab.prepare("c", extract(lab, "listed", ""))) as root:
        assert (root / "g").read_bytes() == b"top"


def test_what_was_used_before_goes_on_and_is_remembered_until_it_is_forgotten(
    puller: Lab, make_lab: Callable[..., Lab], share: Share
) -> None:
    """An older release used whatever was there; this one is its upgrade."""
    make_image(puller, share, "top", "old", signed=False)
    lab = make_lab(images=share.directory, images_unsigned=True)
    old = extract(lab, "old", "")
    with mounted(lab.prepare("before", old)) as root:
        (root / "mine").write_bytes(b"kept")
    lab.settings = replace(lab.settings, images_unsigned=False)
    lab.reboot()
    with mounted(lab.mounts("before")) as root:
        assert (root / "g").read_bytes() + (root / "mine").read_bytes() == b"topkept"
    lab.prepare("after", old)
    with pytest.raises(WrongState, match="3 snapshots of this node stand on it"):
        images.forget(lab.node.store, chain("old"))
    for key in ("before", "after", old):
        lab.remove(key)
    lab.reap()
    lab.node.reaper.round()
    # Nothing stands on it any more, and it is still the one.
    assert extract(lab, "old", "") == old
    share.remove(chain("old"))
    make_image(puller, share, "base", "old")
    lab.remove(old)
    assert extract(lab, "old", "") == ""
    assert lab.node.images is not None
    assert lab.node.images.passed_over() == {"replaced": 1}
    images.forget(lab.node.store, chain("old"))
    with mounted(lab.prepare("anew", extract(lab, "old", ""))) as root:
        assert not (root / "g").exists()
    with pytest.raises(NotFound):
        images.forget(lab.node.store, chain("never used"))


def test_a_node_needs_no_more_than_to_read_the_share(
    puller: Lab, make_lab: Callable[..., Lab], share: Share, tmp_path: Path
) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    subprocess.run(["mount", "--bind", share.directory, str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro,nodev,nosuid", str(place)], check=True)
    try:
        lab = make_lab(**{**trusting(share), "images": str(place)})
        top = extract(lab, "top", extract(lab, "base", ""))
        with mounted(lab.prepare("c", top)) as root:
            assert (root / "g").read_bytes() == b"top"
            (root / "mine").write_bytes(b"kept")
        lab.reboot()
        with mounted(lab.mounts("c")) as root:
            assert (root / "mine").read_bytes() == b"kept"
        with pytest.raises(Unavailable, match="Read-only"):
            Share(str(place)).remove(chain("top"))
        lab.remove("c")
        lab.reap()
        lab.node.reaper.round()
        lab.destroy()
    finally:
        subprocess.run(["umount", str(place)], check=True)


# -- what `images make` reads ---------------------------------------------------------------------------------------------


def lend(lab: Lab, key: str) -> str:
    return lab.node.lender.lend(key, soon()).source


def test_a_lent_layer_is_in_no_list_and_goes_when_it_is_closed(lab: Lab) -> None:
    lab.layer("base", files={"f": b"base"})
    before = lab.names()
    path = lend(lab, "base")
    fd = os.open(path, os.O_RDONLY)
    assert lab.names() == before
    lab.node.lender.give_back(path)
    lab.reap()
    assert os.pread(fd, 2, 1024 + 0x38) == b"\x53\xef"
    os.close(fd)
    assert lab.node.mapper.find(os.path.basename(path)).read_only  # type: ignore[union-attr]
    assert not lab.leaks()
    assert not os.path.exists(path)


def test_a_lent_layer_waits_a_while_for_who_borrows_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.layer("base", files={"f": b"base"})
    path = lend(lab, "base")
    lab.reap()
    assert os.path.exists(path)
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 21)
    assert not lab.leaks()
    assert not os.path.exists(path)


def test_a_lent_layer_is_read_although_it_is_removed_and_the_server_killed(lab: Lab, share: Share) -> None:
    lab.layer("base", files={"f": b"base", "big": b"b" * MIB})
    first, second = lend(lab, "base"), lend(lab, "base")
    assert first != second
    fds = [os.open(path, os.O_RDONLY) for path in (first, second)]
    lab.remove("base")
    lab.reap()
    lab.restart()
    lab.reap()
    signing = signatures.private_key(key_file(share))
    share.make(chain("base"), f"/proc/self/fd/{fds[0]}", "ext4", key=signing)
    assert share.check(chain("base")) == ""
    for fd in fds:
        os.close(fd)
    assert not lab.leaks()


def test_what_is_no_layer_is_not_lent(other: Lab) -> None:
    base = extract(other, "base", "")
    other.prepare("active")
    for key in ("active", base):
        with pytest.raises(BadRequest, match="only a committed snapshot is lent"):
            lend(other, key)
    with pytest.raises(NotFound):
        lend(other, "nothing")
    with mounted(other.prepare("c", base)) as root:
        (root / "mine").write_bytes(b"mine")
    other.commit("on an image", "c")
    path = lend(other, "on an image")
    with mounted([Mount(fstype="ext4", source=path, options=("ro",))]) as root:
        assert sorted(os.listdir(root)) == ["big", "f", "mine"]
    other.node.lender.give_back(path)
    assert not other.leaks()


@pytest.mark.parametrize("at", ["doomed", "made", "mapped"])
def test_a_server_that_is_killed_while_it_lends_leaves_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    lab.layer("base", files={"f": b"base"})
    snapshots, pool = lab.node.snapshots, lab.node.pool

    class Killed(BaseException):
        pass

    def dies(*_: object, **__: object) -> None:
        raise Killed

    if at == "doomed":
        monkeypatch.setattr(snapshots, "copy", dies)
    elif at == "made":
        monkeypatch.setattr(snapshots, "map_read_only", dies)
    else:
        activate = pool.activate
        monkeypatch.setattr(pool, "activate", lambda *words, **named: (activate(*words, **named), dies()))
    with pytest.raises(Killed):
        lab.node.lender.lend("base", soon())
    monkeypatch.undo()
    lab.restart()
    assert not lab.leaks()
    assert lab.read("base", "f") == b"base"


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
    lab = make_lab(**trusting(share))
    base = extract(lab, "base", "")
    lab.prepare("running", base)
    lab.prepare("local")
    answer(False)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="do not answer"):
        lab.prepare("new", base)
    assert time.monotonic() - started < PATIENCE + 3
    started = time.monotonic()
    with pytest.raises(Unavailable, match="do not answer"):
        lab.prepare("newer", base)
    assert time.monotonic() - started < 1, "every call waits anew"
    assert not {row.key for row in lab.node.store.children(base)} - {"running"}, "a refused call has left something"
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
