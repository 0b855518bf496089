"""The verbs, on a real pool: what containerd's suite leaves out."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from blockdev import Deadline, ioctls, superblocks
from snapshotter import bases
from snapshotter.errors import (
    AlreadyExists,
    BadRequest,
    NotFound,
    NotOffered,
    PoolFull,
    SnapshotterError,
    TookTooLong,
    Unavailable,
    WrongState,
)
from snapshotter.model import LABEL_SIZE, Kind
from snapshotter.pool import Limits
from snapshotter.tables import Base
from tests.kernel.inside.lab import MIB, Lab, mounted, soon

pytestmark = pytest.mark.short


def test_a_first_layer_is_an_empty_directory_of_mode_0755(lab: Lab) -> None:
    with mounted(lab.prepare("k")) as root:
        assert os.listdir(root) == []
        assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_prepare_commit_view_and_remove_execute_and_mount_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.prepare("warm up the base")
    for module in ("bases", "metadata", "assembly", "backing"):
        monkeypatch.setattr(f"snapshotter.{module}.run", _never)
    monkeypatch.setattr("blockdev.syscalls.mount", _never)
    monkeypatch.setattr("blockdev.syscalls.fsmount", _never)
    lab.prepare("a")
    lab.commit("layer", "a")
    lab.prepare("b", "layer")
    lab.view("v", "layer")
    lab.mounts("b")
    lab.remove("b")
    lab.remove("v")
    lab.remove("layer")


def _never(*arguments: object, **_more: object) -> None:
    raise AssertionError(f"executed or mounted: {arguments}")


def test_a_birth_maps_no_block(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x" * 100_000})
    before = lab.status().data_used
    lab.prepare("a", "layer")
    lab.view("v", "layer")
    assert lab.status().data_used == before


def test_layers_are_isolated_from_their_children(lab: Lab) -> None:
    lab.layer("one", files={"f": b"one"})
    with mounted(lab.prepare("a", "one")) as a, mounted(lab.prepare("b", "one")) as b:
        (a / "f").write_bytes(b"a")
        (b / "new").write_bytes(b"b")
        assert (b / "f").read_bytes() == b"one"
    assert lab.read("one", "f") == b"one"


def test_a_child_of_a_layer_that_is_still_mounted_has_what_was_written(lab: Lab) -> None:
    """Its filesystem is frozen for the moment of the snapshot."""
    mounts = lab.prepare("a")
    with mounted(mounts) as root:
        (root / "f").write_bytes(b"written a moment ago")
        lab.commit("layer", "a")
        with mounted(lab.prepare("b", "layer")) as child:
            assert (child / "f").read_bytes() == b"written a moment ago"


def test_a_view_is_read_only_below_its_mount_options(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    (mount,) = lab.view("v", "layer")
    assert "ro" in mount.options
    assert ioctls.is_read_only(mount.source)
    fd = os.open(mount.source, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x" * 512, 0)
    os.close(fd)


def test_xfs_filesystems_mount_beside_each_other(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(fstype="xfs", size=300 * MIB, data=512 * MIB)
    lab.layer("layer", files={"f": b"x"})
    (mount,) = lab.prepare("a", "layer")
    assert mount.options == ("nouuid",)
    with mounted([mount]) as a, mounted(lab.view("v", "layer")) as v:
        assert (a / "f").read_bytes() == (v / "f").read_bytes() == b"x"
        assert os.listdir(v) == ["f"]


# -- sizes ------------------------------------------------------------------------------------------------------------


def _capacity(lab: Lab, key: str) -> int:
    with mounted(lab.mounts(key)) as root:
        facts = os.statvfs(root)
        return facts.f_blocks * facts.f_frsize


def test_a_size_label_makes_device_and_filesystem_that_large(lab: Lab) -> None:
    lab.prepare("a", size=str(100 * MIB))
    assert ioctls.size_bytes(lab.mounts("a")[0].source) == 100 * MIB
    assert _capacity(lab, "a") > 85 * MIB


def test_sizes_are_inherited_and_only_grow(lab: Lab) -> None:
    lab.prepare("a", size=str(100 * MIB))
    lab.commit("large", "a")
    lab.prepare("same", "large")
    lab.prepare("asked for less", "large", size=str(16 * MIB))
    lab.prepare("more", "large", size=str(200 * MIB))
    assert [lab.stat(key).size // MIB for key in ("same", "asked for less", "more")] == [100, 100, 200]
    assert _capacity(lab, "more") > 170 * MIB
    block = superblocks.read(lab.mounts("more")[0].source)
    assert block is not None
    assert block.clean


def test_a_lower_default_truncates_no_child(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(size=64 * MIB)
    lab.layer("layer", files={"f": b"x"})
    object.__setattr__(lab.settings, "size", 32 * MIB)
    lab.restart()
    lab.prepare("a", "layer")
    assert lab.stat("a").size == 64 * MIB
    assert lab.read("layer", "f") == b"x"


def test_a_namespace_has_a_size_of_its_own(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(by_namespace={"big": 80 * MIB})
    lab.prepare("big/1/a")
    lab.prepare("other/1/a")
    assert (lab.stat("big/1/a").size, lab.stat("other/1/a").size) == (80 * MIB, 32 * MIB)


def test_xfs_grows_with_its_child(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(fstype="xfs", size=300 * MIB, data=512 * MIB)
    lab.layer("layer", files={"f": b"x"})
    lab.prepare("a", "layer", size=str(600 * MIB))
    assert _capacity(lab, "a") > 500 * MIB


@pytest.mark.parametrize("value", ["", "0", "-5", "10G", "1e9", "99999999999999999999"])
def test_a_size_that_is_none_is_refused_by_name(lab: Lab, value: str) -> None:
    if not value:
        lab.prepare("a", size=value)
        return
    with pytest.raises(BadRequest, match="max-size"):
        lab.prepare("a", size=value)
    assert lab.names() == []


# -- the contract's corners -------------------------------------------------------------------------------------------


def test_a_key_may_have_slashes_spaces_and_be_used_again(lab: Lab) -> None:
    key = "k8s.io/4302/extract-474123271-H6yu sha256:3e20"
    for _ in range(2):
        lab.prepare(key)
        lab.commit("k8s.io/4303/sha256:3e20", key)
        lab.remove("k8s.io/4303/sha256:3e20")
    lab.reap()
    assert not lab.leaks()


@pytest.mark.parametrize("key", ["", "a\0b", "k" * 5000])
def test_a_key_that_cannot_be_one_is_refused(lab: Lab, key: str) -> None:
    with pytest.raises(BadRequest, match="key"):
        lab.prepare(key)


def test_refusals_say_what_is_wrong(lab: Lab) -> None:
    lab.prepare("a")
    lab.prepare("b")
    lab.commit("layer", "b")
    lab.view("v", "layer")
    for call, error, words in (
        (lambda: lab.stat("none"), NotFound, "none"),
        (lambda: lab.prepare("c", "none"), NotFound, "parent"),
        (lambda: lab.prepare("c", "a"), BadRequest, "not committed"),
        (lambda: lab.prepare("a"), AlreadyExists, "already exists"),
        (lambda: lab.commit("layer", "a"), AlreadyExists, "layer"),
        (lambda: lab.commit("new", "v"), WrongState, "view"),
        (lambda: lab.commit("new", "layer"), WrongState, "committed"),
        (lambda: lab.mounts("layer"), WrongState, "committed"),
        (lambda: lab.remove("layer"), WrongState, "remove"),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(NotOffered, match="rebase"):
        lab.node.snapshots.commit("new", "a", {}, "layer", soon())
    assert sorted(lab.names()) == ["a", "layer", "v"]


def test_labels_are_updated_deleted_and_limited(lab: Lab) -> None:
    lab.prepare("a")
    update = lab.node.snapshots.update
    assert update("a", {"x": "1", "y": "2", "z": ""}, None, soon()).labels == {"x": "1", "y": "2"}
    assert update("a", {"x": "3"}, ["labels.x", "labels.never-there"], soon()).labels == {"x": "3", "y": "2"}
    assert update("a", {}, ["labels.x"], soon()).labels == {"y": "2"}
    assert update("a", {}, ["labels"], soon()).labels == {}
    with pytest.raises(BadRequest, match="update_mask"):
        update("a", {}, ["kind"], soon())
    with pytest.raises(BadRequest, match="4096"):
        update("a", {"x": "v" * 4096}, None, soon())


def test_commit_replaces_labels_and_times(lab: Lab) -> None:
    lab.prepare("a", containerd__x="1")
    before = lab.stat("a")
    lab.commit("layer", "a", containerd__y="2")
    after = lab.stat("layer")
    assert after.labels == {"containerd/y": "2"}
    assert after.created == after.updated > before.created
    assert after.kind is Kind.COMMITTED


def test_filters_choose(lab: Lab) -> None:
    lab.prepare("a")
    lab.commit("ns/1/sha256:1", "a", containerd_io="x")
    lab.prepare("child", "ns/1/sha256:1")

    def found(*filters: str) -> list[str]:
        return [row.key for page in lab.node.snapshots.list(filters) for row in page]

    assert found("kind==committed") == ["ns/1/sha256:1"]
    assert found('labels."containerd_io"==x,kind==committed', 'name~="^chi"') == ["child", "ns/1/sha256:1"]
    assert found('parent=="ns/1/sha256:1"') == ["child"]
    assert found('parent==""') == ["ns/1/sha256:1"]
    assert found("kind!=active") == ["ns/1/sha256:1"]
    assert found("labels.containerd_io") == ["ns/1/sha256:1"]
    for bad in ("kind==", "==x", "a b", "name~=(", 'name=="x'):
        with pytest.raises(BadRequest, match="filters"):
            found(bad)


def test_usage_is_what_a_snapshot_adds_and_never_negative(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x" * (4 * MIB)})
    size, _ = lab.usage("layer")
    assert 4 * MIB <= size < 7 * MIB
    lab.prepare("a", "layer")
    assert lab.usage("a") == (0, 0)
    with mounted(lab.mounts("a")) as root:
        (root / "g").write_bytes(b"y" * (2 * MIB))
    size, inodes = lab.usage("a")
    assert 2 * MIB <= size < 4 * MIB
    assert inodes >= 0
    lab.view("v", "layer")
    assert lab.usage("v") == (0, 0)


# -- beside each other ------------------------------------------------------------------------------------------------


def test_a_hundred_prepares_at_once(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    failed: list[Exception] = []

    def one(number: int) -> None:
        try:
            lab.prepare(f"k{number}", "layer")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({lab.stat(f"k{number}").device for number in range(100)}) == 100


def test_stat_answers_while_a_mkfs_takes_its_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun, release = bases.run, threading.Event(), threading.Event()

    def slow(program: str, *arguments: str, **more: object) -> object:
        begun.set()
        release.wait(20)
        return run(program, *arguments, **more)  # type: ignore[arg-type]

    lab.prepare("there")
    monkeypatch.setattr(bases, "run", slow)
    thread = threading.Thread(target=lambda: lab.prepare("new", size=str(50 * MIB)))
    thread.start()
    assert begun.wait(10)
    started = time.monotonic()
    lab.stat("there")
    lab.prepare("another")
    assert time.monotonic() - started < 2
    release.set()
    thread.join()
    assert "new" in lab


def test_a_call_on_a_key_that_is_taken_ends_with_its_deadline(lab: Lab) -> None:
    with lab.node.snapshots._locks.held("k", deadline=soon()):
        with pytest.raises(TookTooLong, match="'k'"):
            lab.node.snapshots.prepare("k", "", {}, Deadline.after(0.2))
        lab.prepare("other")


def test_a_slow_reader_of_a_list_blocks_no_writer(lab: Lab) -> None:
    for number in range(300):
        with lab.node.store.transaction():
            pass
        if number < 3:
            lab.prepare(f"a{number}")
    pages = lab.node.snapshots.list([])
    next(pages)
    lab.prepare("while it reads")
    lab.remove("while it reads")


def test_a_device_held_open_is_removed_once_it_is_closed(lab: Lab) -> None:
    (mount,) = lab.prepare("a")
    device = lab.stat("a").device
    with open(mount.source, "rb"):
        started = time.monotonic()
        lab.remove("a")
        assert time.monotonic() - started < 1
        lab.reap()
        assert device in lab.ids()
        assert device in lab.mapped()
        lab.prepare("a")
    lab.reap()
    assert device not in lab.ids()
    assert not lab.leaks()


def test_discarded_blocks_go_back_to_the_disk(lab: Lab) -> None:
    data = lab.description.data
    lab.layer("layer", files={"f": os.urandom(20 * MIB)})
    lab.reap()
    os.sync()
    used = os.stat(data).st_blocks * 512
    assert used > 20 * MIB
    lab.remove("layer")
    lab.reap()
    assert os.stat(data).st_blocks * 512 < used - 15 * MIB


def test_blocks_of_another_are_zeroed_before_they_are_seen(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(discard=False)
    (mount,) = lab.prepare("secret")
    with open(mount.source, "r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), b"SECRET" * 100_000, 8 * MIB)
        os.fsync(opened.fileno())
    lab.remove("secret")
    lab.reap()
    (mount,) = lab.prepare("new")
    with open(mount.source, "r+b", buffering=0) as opened:
        for at in range(0, 32 * MIB, 64 << 10):
            os.pwrite(opened.fileno(), b"\1" * 512, at)
        os.fsync(opened.fileno())
        assert b"SECRET" not in os.pread(opened.fileno(), 32 * MIB, 0)


def test_a_full_pool_refuses_new_snapshots_before_writes_hang(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(data=64 * MIB, size=100 * MIB, limits=Limits(data_reserve=20, extend_by=0))
    mounts = lab.prepare("a")
    with mounted(mounts) as root:
        (root / "f").write_bytes(os.urandom(54 * MIB))
    lab.status()
    with pytest.raises(PoolFull, match="blocks are free"):
        lab.prepare("b")
    assert lab.names() == ["a"]
    lab.extender().extend("data", 64 * MIB, soon())
    lab.prepare("b")


def test_a_device_that_the_pool_lost_is_an_error_that_says_so(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    lab.node.pool.delete(lab.stat("layer").device)
    with pytest.raises(SnapshotterError, match="lost"):
        lab.prepare("a", "layer")
    assert "a" not in lab
    assert lab.restart()
    assert lab.found.lost


def test_the_mounted_filesystems_pass_a_check(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x" * MIB})
    (mount,) = lab.prepare("a", "layer")
    checked = subprocess.run(["e2fsck", "-f", "-n", mount.source], capture_output=True, text=True)
    # What it misses is lost+found, which must not be there.
    assert checked.returncode in (0, 4), checked.stdout
    assert "lost+found" in checked.stdout or checked.returncode == 0


def test_a_base_that_is_being_made_while_a_start_recovers_is_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapshotter import bases

    run, begun, release = bases.run, threading.Event(), threading.Event()

    def slow(program: str, *arguments: str, **more: object) -> object:
        begun.set()
        release.wait(20)
        return run(program, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(bases, "run", slow)
    maker = threading.Thread(target=lambda: lab.prepare("a"))
    maker.start()
    assert begun.wait(10)
    recovery = threading.Thread(target=lab.node.recover)
    recovery.start()
    release.set()
    maker.join()
    recovery.join()
    lab.reap()
    lab.prepare("b")
    assert not lab.leaks()


def test_a_base_that_takes_long_keeps_nobody_else_and_its_own_callers_no_longer_than_their_limit(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.prepare("warm up the base")
    made, begun, release = bases.Bases._made, threading.Event(), threading.Event()

    def slow(these: bases.Bases, fstype: str, size: int, deadline: Deadline) -> Base:
        if size == 64 * MIB:
            begun.set()
            release.wait(60)
        return made(these, fstype, size, deadline)

    monkeypatch.setattr(bases.Bases, "_made", slow)
    maker = threading.Thread(target=lambda: lab.prepare("slow", size=str(64 * MIB)))
    maker.start()
    try:
        assert begun.wait(10)
        started = time.monotonic()
        lab.prepare("other", size=str(48 * MIB))
        with pytest.raises(TookTooLong, match="another call uses it"):
            lab.node.snapshots.prepare("same", "", {LABEL_SIZE: str(64 * MIB)}, Deadline.after(1))
        lab.node.bases.drop_unfinished()
        assert time.monotonic() - started < 20
    finally:
        release.set()
        maker.join()
    assert {"slow", "other"} <= set(lab.names())
    lab.reap()
    assert not lab.leaks()


def test_a_flush_that_could_not_begin_is_no_loss(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "f").write_bytes(b"mine")
    opened, path = os.open, lab.node.pool.path(lab.stat("a").device)

    def none_left(name: str, *arguments: int, **more: int) -> int:
        if name == path:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(name, *arguments, **more)

    with monkeypatch.context() as scarce:
        scarce.setattr("snapshotter.pool.os.open", none_left)
        with pytest.raises(Unavailable, match="Too many open files"):
            lab.commit("layer", "a")
    lab.commit("layer", "a")
    assert lab.read("layer", "f") == b"mine"


def test_a_snapshot_that_was_answered_is_never_replaced_after_a_kill(lab: Lab) -> None:
    """The killed process had not written yet that its caller was answered, and the caller has used the device."""
    with mounted(lab.prepare("a")) as root:
        (root / "f").write_bytes(b"mine")
    lab.restart()
    with pytest.raises(AlreadyExists):
        lab.view("a")
    with pytest.raises(AlreadyExists):
        lab.prepare("a", size=str(64 * MIB))
    with mounted(lab.prepare("a")) as root:
        assert (root / "f").read_bytes() == b"mine"
    with pytest.raises(AlreadyExists):
        lab.prepare("a")
    assert not lab.leaks()
