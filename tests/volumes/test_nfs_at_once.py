"""Controllers and calls beside each other on one share, killed at any moment, full shares, and records elsewhere."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from blockdev import Deadline, nfs, trees
from blockdev.errors import WaitExpired
from tests.disks import fill_bytes, mounted
from tests.nas_of_directories import below, serve
from tests.volumes.test_nfs_backend import CLASS, KEY, MIB, REMOVED, make, record
from volumes import (
    ContentSource,
    InvalidParameter,
    NoSpace,
    SizeRange,
    VolumeConflict,
    VolumeNotFound,
    VolumeUnfinished,
    export_ids,
    exports,
    nfs_deletion,
    nfs_filling,
    nfs_share,
    share_lock,
)
from volumes import share as on_share
from volumes.nfs import NfsBackend


class Killed(BaseException):
    """As a process that ends in this moment: nothing of it goes on."""


def killer(after: int) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """What makes calls end the process at the one of this number, of all of them together."""
    steps = itertools.count(1)

    def killing(call: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **more: object) -> object:
            if next(steps) == after:
                raise Killed
            return call(*arguments, **more)

        return step

    return killing


@pytest.fixture
def shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every path of the server `nas` below `tmp_path/nas`."""
    top = tmp_path / "nas"
    for name in ("e", "records", "other"):
        (top / name).mkdir(parents=True)
        (top / name).chmod(0o777)

    serve(monkeypatch, below(top))
    return top


@pytest.fixture
def share(shares: Path) -> Path:
    return shares / "e"


@pytest.fixture
def fresh(shares: Path, tmp_path: Path) -> Callable[..., NfsBackend]:
    """A controller that remembers nothing."""
    numbers = itertools.count()

    def made(**more) -> NfsBackend:
        state = tmp_path / f"state-{next(numbers)}"
        state.mkdir()
        return NfsBackend(str(state), **more)

    return made


def left(share: Path) -> list[str]:
    """All but the lock."""
    return sorted(str(path.relative_to(share)) for path in share.rglob("*")
                  if path.name not in ("lock", ".runvol"))  # fmt: skip


def until_done(call: Callable[[], object]) -> object:
    """As a sidecar: asked again while it is under way."""
    until = time.monotonic() + 20
    while True:
        try:
            return call()
        except VolumeUnfinished:
            if time.monotonic() > until:
                raise
            time.sleep(0.005)


# -- changes beside each other


def test_a_deletion_takes_away_no_volume_that_was_made_meanwhile(fresh, share, monkeypatch):
    """One controller's deletion stands still after the names are changed; another makes the volume anew."""
    slow, quick = fresh(), fresh()
    volume = make(slow, **REMOVED)
    (share / "one/old").write_text("x")
    stands, go = threading.Event(), threading.Event()
    before = nfs_deletion._tidied

    def tidied(*arguments):
        if threading.current_thread().name.startswith("deleting") and not stands.is_set():
            stands.set()
            assert go.wait(20)
        before(*arguments)

    monkeypatch.setattr(nfs_deletion, "_tidied", tidied)
    with ThreadPoolExecutor(1) as pool:
        deletion = pool.submit(until_done, lambda: slow.delete(volume.volume_id))
        assert stands.wait(20)
        quick.delete(volume.volume_id)
        again = make(quick, **REMOVED)
        (share / "one/new").write_text("y")
        go.set()
        deletion.result()
    assert again.volume_id == volume.volume_id
    assert quick.get(volume.volume_id) is not None
    assert os.listdir(share / "one") == ["new"]
    quick.delete(volume.volume_id)
    assert left(share) == []


@pytest.mark.parametrize("seed", range(int(os.environ.get("RUNVOL_ROUNDS", "3"))))
def test_everything_at_once_leaves_what_was_answered(fresh, share, seed):
    """Two controllers, eight threads, few names, one in another: what was said to be there is, and in the end nothing."""
    chance, controllers = random.Random(seed), [fresh(), fresh()]
    names = {"a": "p", "b": "p/b", "c": "p/c", "d": "q", "e": "q"}

    def deed(number: int) -> None:
        dice = random.Random(number * 1000 + seed)
        one, name = controllers[dice.randrange(2)], dice.choice([*names])
        with contextlib.suppress(VolumeUnfinished, VolumeConflict, VolumeNotFound):
            volume = make(one, name, subDir=names[name], **REMOVED)
            if dice.random() < 0.5:
                one.expand(volume.volume_id, SizeRange(required=dice.randrange(1, 9) * MIB))
            if dice.random() < 0.7:
                controllers[dice.randrange(2)].delete(volume.volume_id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(deed, range(120)))
    for _place, volume in fresh(exports_known=["nas:/e"]).list():
        assert (share / volume.parameters["path"].removeprefix("/e/")).is_dir()
    order = [*names]
    chance.shuffle(order)
    for name in order:
        handle = export_ids.id_of(nfs.Export(server="nas", path="/e"), name, "nfs-")
        until_done(lambda handle=handle: fresh().delete(handle))
    # Directories on the way to a subDir were made by nobody's volume.
    assert [name for name in left(share) if name not in ("p", "q")] == []


def test_expansions_beside_each_other_never_shrink(fresh, share, monkeypatch):
    one, two = fresh(), fresh()
    volume = make(one)
    before, held = on_share.read, threading.Barrier(2)

    def read(*arguments):
        found = before(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):
            held.wait(0.3)
        return found

    monkeypatch.setattr(on_share, "read", read)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(backend.expand, volume.volume_id, SizeRange(required=size * MIB))
                 for backend, size in ((one, 8), (two, 2))]  # fmt: skip
        for each in asked:
            each.result()
    monkeypatch.undo()


def test_the_lock_is_waited_for_and_said(fresh, share, monkeypatch):
    monkeypatch.setattr(share_lock, "_PATIENCE", 0.1)
    volume = make(fresh())
    root = os.open(share, os.O_RDONLY | os.O_DIRECTORY)
    with share_lock.changing(root), pytest.raises(VolumeUnfinished, match="another controller"):
        fresh().expand(volume.volume_id, SizeRange(required=4 * MIB))
    os.close(root)
    assert fresh().expand(volume.volume_id, SizeRange(required=4 * MIB)).capacity_bytes == 4 * MIB


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_lies_in_the_locks_place_is_neither_waited_for_nor_followed(fresh, share, tmp_path, kind):
    make(fresh())
    lock, outside = share / ".runvol/lock", tmp_path / "outside"
    lock.unlink()
    {"fifo": lambda: os.mkfifo(lock), "link": lambda: lock.symlink_to(outside), "directory": lock.mkdir}[kind]()
    with pytest.raises(Exception, match=r"\.runvol/lock is no regular file"):
        make(fresh(), "two")
    assert not outside.exists()


# -- what a killed or failed call leaves


@pytest.mark.parametrize("at", range(12))
def test_a_deletion_that_was_killed_anywhere_is_finished_by_the_next(fresh, share, monkeypatch, at):
    """Three volumes in one another; the outer one was deleted before."""
    volumes = [make(fresh(), name, subDir=place, **REMOVED)
               for name, place in (("outer", "o"), ("middle", "o/m"), ("inner", "o/m/i"))]  # fmt: skip
    fresh().delete(volumes[0].volume_id)
    fresh().delete(volumes[1].volume_id)
    count = itertools.count()

    def killing(call):
        def once(*arguments, **more):
            if next(count) == at:
                raise Killed
            return call(*arguments, **more)

        return once

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(os, name, killing(getattr(os, name)))
        with contextlib.suppress(Killed):
            root = os.open(share, os.O_RDONLY | os.O_DIRECTORY)
            export = nfs.Export(server="nas", path="/e")
            from volumes.jobs import Jobs
            from volumes.nfs_share import Place, Share

            one = Share(Place(export, export), root, root)
            nfs_deletion.delete(one, export_ids.short(volumes[2].volume_id), Jobs())
    for volume in (volumes[2], *volumes):
        fresh().delete(volume.volume_id)
    monkeypatch.setattr(share_lock, "_ALIVE", -1.0)
    fresh().delete(volumes[0].volume_id)  # what is nobody's any more goes with any deletion, once it is old
    assert left(share) == []
    make(fresh(), "outer", subDir="o")


@pytest.mark.parametrize("what", ["snapshot", "clone"])
def test_a_copy_that_failed_leaves_its_source_as_it_was(fresh, share, monkeypatch, what):
    backend = fresh()
    source = make(backend, "source", **REMOVED)
    (share / "source/f").write_text("x")

    def full(*_arguments, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("volumes.archives.pack", full)
        patched.setattr("volumes.archives.copy", full)
        for _again in range(2):
            with pytest.raises(NoSpace):
                if what == "snapshot":
                    backend.take_snapshot("s", source.volume_id, Deadline.after(20))
                else:
                    make(backend, "clone", ContentSource(kind="volume", source_id=source.volume_id))
    assert len(list((share / ".runvol").glob("*.json"))) == 1
    fresh().delete(source.volume_id)
    assert left(share) == []


@pytest.mark.parametrize("what", ["snapshot", "clone"])
def test_half_a_copy_keeps_its_source_while_somebody_works_on_it_and_no_longer(fresh, share, monkeypatch, what):
    backend = fresh()
    source = make(backend, "source", **REMOVED)
    (share / "source/f").write_text("x")

    def killed(*_arguments, **_more):
        raise Killed

    with monkeypatch.context() as patched:
        for name in ("pack", "copy"):
            patched.setattr(f"volumes.archives.{name}", killed)
        for module in (on_share,):
            patched.setattr(module, "remove_tree", lambda *_arguments: None)
        with pytest.raises((Killed, VolumeUnfinished)):
            if what == "snapshot":
                backend.take_snapshot("s", source.volume_id, Deadline.after(20))
            else:
                make(backend, "clone", ContentSource(kind="volume", source_id=source.volume_id))
    other = fresh()
    with pytest.raises(VolumeUnfinished, match="is being copied"):
        other.delete(source.volume_id)
    old = time.time() - 1000
    for path in (share / ".runvol").iterdir():
        os.utime(path, (old, old))
    other.delete(source.volume_id)
    assert left(share) == []


def test_a_clone_is_nobody_elses_directory(fresh, share, monkeypatch):
    backend = fresh()
    source = make(backend, "source")
    (share / "source/mine").write_text("x")
    before = nfs_filling._copied

    def copied(*arguments):
        before(*arguments)
        make(fresh(), "plain", subDir="team")

    monkeypatch.setattr(nfs_filling, "_copied", copied)
    with pytest.raises(VolumeConflict, match="somebody else"):
        until_done(
            lambda: make(backend, "clone", ContentSource(kind="volume", source_id=source.volume_id), subDir="team")
        )
    assert os.listdir(share / "team") == []
    assert {one.name for _place, one in backend.list()} == {"source", "plain"}


def test_one_volume_that_wants_it_kept_is_enough(fresh, share):
    kept = make(fresh(), "kept", subDir="x")
    dropped = make(fresh(), "dropped", subDir="x", **REMOVED)
    (share / "x/data").write_text("precious")
    fresh().delete(kept.volume_id)
    fresh().delete(dropped.volume_id)
    (archived,) = share.glob("archived-*")
    assert (archived / "data").read_text() == "precious"


# -- a full share


@pytest.fixture
def full(share: Path, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """The share lies on a disk of its own, which a call fills to the last byte."""
    with mounted(tmp_path / "image", share, ["mkfs.ext4", "-q", "-m", "0"], size=32 * MIB):
        yield lambda: fill_bytes(share)


@pytest.mark.parametrize("more", [REMOVED, {}], ids=["removed", "archived"])
def test_volumes_and_snapshots_go_from_a_full_share(fresh, share, full, more):
    backend = fresh()
    volumes = [make(backend, name, subDir=place, **more) for name, place in (("a", "a"), ("b", "b"), ("c", "b/c"))]
    for volume in volumes:
        (share / volume.parameters["subDir"] / "data").write_text("x")
    snapshot = backend.take_snapshot("s", volumes[0].volume_id, Deadline.after(20))
    full()
    with pytest.raises(NoSpace):
        make(backend, "new")
    backend.delete_snapshot(snapshot.snapshot_id)
    for volume in volumes:
        fresh().delete(volume.volume_id)
    assert not list((share / ".runvol").glob("*.json"))
    assert sorted({name[0] for name in os.listdir(share)} & {*"abc"}) == ([] if more else ["a"])  # archived-…
    assert fresh(exports_known=["nas:/e"]).list() == []


def test_a_directory_that_cannot_even_be_renamed_is_removed_where_it_lies(fresh, share, monkeypatch):
    backend = fresh()
    volume = make(backend, **REMOVED)
    (share / "one/data").write_text("x")
    before = os.rename

    def rename(source, target, **more):
        if str(target).startswith("gone-") or str(source).startswith("."):
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(source, target, **more)

    monkeypatch.setattr(os, "rename", rename)
    backend.delete(volume.volume_id)
    monkeypatch.undo()
    assert not (share / "one").exists() and not list((share / ".runvol").glob("*.json"))


# -- a stranger's records, and records elsewhere


def test_a_share_lists_its_own_volumes_alone(fresh, share, shares):
    theirs = make(fresh(), "theirs")
    mine = fresh()
    mine.create("mine", SizeRange(required=MIB), CLASS | {"path": "/other"}, [])
    planted = record(share, theirs)
    (shares / "other/.runvol" / planted.name).write_text(planted.read_text().replace("1048576", "4096"))
    both = fresh(exports_known=["nas:/other", "nas:/e"])
    assert sorted((one.name, one.capacity_bytes, one.parameters["path"]) for _place, one in both.list()) == [
        ("mine", MIB, "/other/mine"), ("theirs", MIB, "/e/theirs")]  # fmt: skip


@pytest.mark.parametrize(
    "facts",
    [{"name": "another"}, {"name": "n\x1b[2J"}, {"parameters": {**CLASS, "mode": "zz"}}, {"path": "/other"},
     {"parameters": {**CLASS, "vers": "99"}}, {"parameters": {**CLASS, "options": "\n\x1b[31m"}}],
)  # fmt: skip
def test_a_record_says_nothing_that_no_class_could(fresh, share, facts):
    volume = make(fresh())
    path = record(share, volume)
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    for call in (fresh().get, fresh().delete):
        with pytest.raises(VolumeUnfinished, match="cannot be read"):
            call(volume.volume_id)
    assert (share / "one").is_dir()


def test_one_record_that_cannot_be_read_stops_itself_only(fresh, share, monkeypatch):
    backend = fresh()
    one, two = make(backend, "one"), make(backend, "two")
    before = on_share._content

    def content(place, name):
        if name == f"{export_ids.short(one.volume_id)}.json":
            raise OSError(errno.EIO, "Input/output error")
        return before(place, name)

    monkeypatch.setattr(on_share, "_content", content)
    told: list[str] = []
    assert [each.name for _place, each in backend.list(trouble=told.append)] == ["two"]
    assert len(told) == 1 and "Input/output error" in told[0]
    backend.delete(two.volume_id)


def test_records_may_lie_where_no_pod_can_write(fresh, shares):
    backend, more = fresh(), {"recordsPath": "/records"}
    volume = make(backend, "one", **more)
    (shares / "e/one/f").write_text("x")
    assert volume.parameters["path"] == "/e/one"
    assert sorted(os.listdir(shares / "e/.runvol")) == ["lock", "records-path"]
    assert backend.attach(volume.volume_id).path == "/e/one"
    # Freshly started, from the id alone.
    assert fresh().get(volume.volume_id) == volume
    assert fresh().expand(volume.volume_id, SizeRange(required=4 * MIB)).capacity_bytes == 4 * MIB
    assert make(fresh(), "one", **more).volume_id == volume.volume_id
    snapshot = fresh().take_snapshot("s", volume.volume_id, Deadline.after(20))
    assert (shares / "records/.runvol" / f"{export_ids.short(snapshot.snapshot_id)}.tar").exists()
    restored = make(fresh(), "two", ContentSource(kind="snapshot", source_id=snapshot.snapshot_id), **more)
    cloned = make(fresh(), "three", ContentSource(kind="volume", source_id=volume.volume_id), **more)
    assert (shares / "e/two/f").read_text() == (shares / "e/three/f").read_text() == "x"
    listing = fresh(exports_known=["nas:/records"])
    assert sorted(one.parameters["path"] for _place, one in listing.list()) == ["/e/one", "/e/three", "/e/two"]
    assert [one.snapshot_id for _place, one in listing.snapshots()] == [snapshot.snapshot_id]
    with pytest.raises(InvalidParameter, match="another share"):
        make(fresh(), "four", ContentSource(kind="volume", source_id=volume.volume_id), path="/other", **more)
    fresh().delete_snapshot(snapshot.snapshot_id)
    for one in (volume, restored, cloned):
        fresh().delete(one.volume_id)
    assert not list((shares / "records/.runvol").glob("*.json"))
    assert sorted(name.split("-")[0] for name in os.listdir(shares / "e")) == [".runvol", *["archived"] * 3]


def test_nobody_leads_a_records_share_elsewhere(fresh, shares):
    """Whoever can write the record of a volume without `recordsPath` would have another export's directory removed."""
    volume = make(fresh(), **REMOVED)
    (shares / "other/one").mkdir()
    path = record(shares / "e", volume)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"path": "/other"}))
    with pytest.raises(VolumeUnfinished, match="cannot be read"):
        fresh().delete(volume.volume_id)
    assert (shares / "other/one").is_dir()
    assert KEY in volume.volume_id


# -- what belongs to somebody else


def test_a_creation_that_ended_before_it_made_anything_owns_nothing(fresh, share, monkeypatch):
    def killed(*_arguments, **_more):
        raise Killed

    (share / ".runvol").mkdir(mode=0o700)
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", killed)
        with contextlib.suppress(Killed):
            make(fresh(), "one", subDir="team", **REMOVED)
    (share / "team").mkdir(exist_ok=True)
    (share / "team/data").write_text("precious")
    handle = export_ids.id_of(nfs.Export(server="nas", path="/e"), "one", "nfs-")
    fresh().delete(handle)
    assert (share / "team/data").read_text() == "precious"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_exports_within_one_another_are_one_place(fresh, shares, order):
    """Two classes with one records export: `/e` and a directory of it."""
    (shares / "e/p").mkdir()
    more = {"recordsPath": "/records", **REMOVED}
    volumes = [make(fresh(), "outer", subDir="p/x", **more), make(fresh(), "inner", path="/e/p", subDir="x", **more)]
    (shares / "e/p/x/data").write_text("precious")
    fresh().delete(volumes[order[0]].volume_id)
    assert (shares / "e/p/x/data").read_text() == "precious"
    fresh().delete(volumes[order[1]].volume_id)
    assert not (shares / "e/p/x").exists()


def test_volumes_whose_records_lie_here_and_there_share_no_directory(fresh, shares):
    """An operator turns `recordsPath` on for a class."""
    before = make(fresh(), "before", subDir="team", **REMOVED)
    with pytest.raises(InvalidParameter, match="volumes on /e whose records lie there; delete them first"):
        make(fresh(), "after", subDir="team/x", recordsPath="/records", **REMOVED)
    assert not list((shares / "records").rglob("*.json"))
    fresh().delete(before.volume_id)
    make(fresh(), "after", subDir="team/x", recordsPath="/records", **REMOVED)


@pytest.mark.parametrize("path", ["/e/records", "/e/", "/e/./x", "/e//y"])
def test_records_do_not_lie_where_pods_have_all(fresh, shares, path):
    if path.rstrip("/") == "/e":
        make(fresh(), recordsPath=path)  # the same export
        return
    with pytest.raises(InvalidParameter, match="recordsPath"):
        make(fresh(), recordsPath=path)


def test_nothing_is_made_in_what_is_being_removed(fresh, share, monkeypatch):
    outer = make(fresh(), "outer", subDir="p", **REMOVED)
    (share / "p/data").write_text("x")
    before, stands, go = os.rename, threading.Event(), threading.Event()

    def rename(source, target, **more):
        if str(target).startswith("gone-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(source, target, **more)

    removed = trees.remove_content

    def remove_content(fd, name, deadline):
        stands.set()
        assert go.wait(20)
        removed(fd, name, deadline)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(trees, "remove_content", remove_content)
    with ThreadPoolExecutor(1) as pool:
        deletion = pool.submit(until_done, lambda: fresh().delete(outer.volume_id))
        assert stands.wait(20)
        for place in ("p", "p/i"):
            with pytest.raises(VolumeUnfinished, match="is being deleted"):
                make(fresh(), f"new-{place.replace('/', '-')}", subDir=place)
        go.set()
        deletion.result()
    assert make(fresh(), "new", subDir="p/i")


def test_a_volume_is_made_anew_once_its_deletion_is_done(fresh, share, monkeypatch):
    backend = fresh()
    volume = make(backend, **REMOVED)
    before, stands, go = nfs_deletion._tidied, threading.Event(), threading.Event()

    def tidied(*arguments):
        if not stands.is_set():
            stands.set()
            assert go.wait(20)
        before(*arguments)

    monkeypatch.setattr(nfs_deletion, "_tidied", tidied)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(backend.delete, volume.volume_id)
        assert stands.wait(20)
        for one in (backend, fresh()):
            with pytest.raises(VolumeUnfinished, match="is being deleted"):
                make(one, **REMOVED)
        second = pool.submit(backend.delete, volume.volume_id)
        time.sleep(0.1)
        go.set()
        first.result()
        second.result()
    assert backend.get(volume.volume_id) is None
    assert not (share / "one").exists()
    assert make(backend, **REMOVED) == volume


def test_a_deletion_that_had_no_more_time_goes_on(fresh, shares, monkeypatch):
    """Also where the records are on another export than the files."""
    volume = make(fresh(), recordsPath="/records", **REMOVED)
    (shares / "e/one/f").write_text("x")
    removed, late = on_share.remove_tree, [True]

    def remove_tree(root, path):
        if late and "gone-" in path:
            raise WaitExpired(path, 1)
        removed(root, path)

    monkeypatch.setattr(on_share, "remove_tree", remove_tree)
    for _ in range(2):
        with pytest.raises(WaitExpired):
            fresh().delete(volume.volume_id)
    late.clear()
    fresh().delete(volume.volume_id)
    assert [name for name in os.listdir(shares / "e/.runvol") if "gone" in name] == []
    assert not list((shares / "records/.runvol").glob("*.json"))


def test_what_is_made_anew_is_not_taken_by_a_slow_deletion(fresh, share, monkeypatch):
    """Two controllers delete one volume where it lies; one is quick, and the volume is made anew."""
    volume = make(fresh(), **REMOVED)
    path = record(share, volume)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inode": 0, "serial": "", "deleting": True}))
    (share / "one/f").write_text("old")
    before, turns = nfs_deletion._tidied, itertools.count()

    def tidied(*arguments):
        before(*arguments)
        if next(turns) == 0:
            fresh().delete(volume.volume_id)
            make(fresh(), **REMOVED)
            (share / "one/f").write_text("new")

    monkeypatch.setattr(nfs_deletion, "_tidied", tidied)
    fresh().delete(volume.volume_id)
    assert (share / "one/f").read_text() == "new"
    assert fresh().get(volume.volume_id) is not None


def test_a_volume_is_not_made_where_another_is_being_removed(fresh, share):
    going = make(fresh(), "a", subDir="same", **REMOVED)
    path = record(share, going)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ready": False, "deleting": True}))
    with pytest.raises(VolumeUnfinished, match="is being deleted"):
        make(fresh(), "same", **REMOVED)
    fresh().delete(going.volume_id)
    make(fresh(), "same", **REMOVED)


def test_an_earlier_deleted_volume_makes_nothing_ours(fresh, share):
    """Its record waits for others, and its directory is not there any more."""
    outer, inner = make(fresh(), "outer", subDir="p", **REMOVED), make(fresh(), "inner", subDir="p/i", **REMOVED)
    fresh().delete(outer.volume_id)
    os.rename(share / "p", share / "away")
    (share / "p/i").mkdir(parents=True)
    (share / "p/by-hand").write_text("x")
    third = make(fresh(), "third", subDir="p", **REMOVED)
    assert json.loads(record(share, third).read_text())["made"] is False
    for volume in (inner, third):
        fresh().delete(volume.volume_id)
    assert (share / "p/by-hand").read_text() == "x"


def test_a_record_that_cannot_be_read_holds_up_what_waits_and_says_so(fresh, shares):
    (shares / "e/team").mkdir()
    more = {"recordsPath": "/records", **REMOVED}
    outer = make(fresh(), "outer", subDir="team/o", **more)
    inner = make(fresh(), "o", path="/e/team", **more)
    fresh().delete(outer.volume_id)
    bad = shares / "records/.runvol/nfs-aaaaaaaaaaaa-bbbbbbbbbbbbbbbbbbbb.json"
    bad.write_text("{")
    with pytest.raises(VolumeUnfinished, match="cannot be read"):
        fresh().delete(inner.volume_id)
    bad.unlink()
    fresh().delete(inner.volume_id)
    assert not list((shares / "records/.runvol").glob("*.json"))
    assert not (shares / "e/team/o").exists()


def test_a_long_name_can_be_archived(fresh, share):
    volume = make(fresh(), "one", subDir=f"{'ä' * 90}/{'ö' * 90}")
    fresh().delete(volume.volume_id)
    (archived,) = share.glob("archived-*")
    assert len(os.fsencode(archived.name)) < 256


def test_what_kills_have_left_goes_with_the_success(fresh, share, monkeypatch):
    source = make(fresh(), "source")
    (share / "source/f").write_text("x")
    wanted = ContentSource(kind="volume", source_id=source.volume_id)

    def killed(*_arguments, **_more):
        raise Killed

    for _again in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(nfs_filling, "_placed", killed)
            patched.setattr("volumes.archives.pack", killed)
            patched.setattr(on_share, "remove_tree", lambda *_arguments: None)
            for call in (lambda: make(fresh(), "clone", wanted),
                         lambda: fresh().take_snapshot("s", source.volume_id, Deadline.after(20))):  # fmt: skip
                with contextlib.suppress(Killed, VolumeUnfinished):
                    call()
    assert len([name for name in os.listdir(share / ".runvol") if "new" in name]) >= 2
    make(fresh(), "clone", wanted)
    fresh().take_snapshot("s", source.volume_id, Deadline.after(20))
    assert not [name for name in os.listdir(share / ".runvol") if "new" in name]


def test_a_lock_whose_name_was_taken_away_is_none(fresh, share):
    make(fresh())
    root = os.open(share, os.O_RDONLY | os.O_DIRECTORY)
    place = os.open(share / ".runvol", os.O_RDONLY | os.O_DIRECTORY)
    old = share_lock._lock_file(place)
    before, seen = share_lock._lock_file, []

    def lock_file(where):
        fd = before(where) if seen else os.dup(old)
        if not seen:
            (share / ".runvol/lock").unlink()
        seen.append(fd)
        return fd

    share_lock._lock_file = lock_file
    try:
        with share_lock.changing(root):
            assert len(seen) == 2
    finally:
        share_lock._lock_file = before
        for fd in (old, place, root):
            os.close(fd)


def test_a_name_that_no_server_has_stops_no_list(fresh, share, monkeypatch):
    """Said by a class that somebody has misspelt."""
    volume = make(fresh())
    told: list[str] = []
    said = [exports.Said(parameters={"server": server, "path": "/e"}) for server in ("nas..local", "x" * 64, "nas")]
    listed = fresh(cluster=lambda: said).list(trouble=told.append)
    assert [one.volume_id for _place, one in listed] == [volume.volume_id]
    with pytest.raises(nfs.ServerSilent, match="no name that a server can have"):
        nfs.resolve("nas..local", Deadline.after(3))


def test_no_list_shows_what_a_stranger_says_of_another_export(fresh, shares):
    """Whoever can write to a share may choose a name and a path, and compute the id that belongs to both."""
    mine = make(fresh(), "mine")
    (shares / "other/secret").mkdir()
    facts = json.loads(record(shares / "e", mine).read_text())
    name, path = "any", "/other"
    planted = f"nfs-{KEY}-{export_ids.digest(export_ids.name_of(name, path))[:20]}"
    facts |= {"volume_id": planted, "handle": planted, "name": name, "path": path, "directory": "secret"}
    (shares / "e/.runvol" / f"{planted}.json").write_text(json.dumps(facts))
    told: list[str] = []
    listed = fresh(exports_known=["nas:/e"]).list(trouble=told.append)
    assert [one.volume_id for _place, one in listed] == [mine.volume_id]
    assert "exports for records are for nothing else" in told[0]


def test_many_records_are_read_side_by_side(fresh, share, monkeypatch):
    """Each costs round trips; all others of the share wait for a deletion, which reads them all."""
    backend = fresh()
    made = [make(backend, f"v-{number}") for number in range(100)]
    record(share, made[7]).write_text("{")
    before, at_once, most = on_share._content, [], []

    def content(place, name):
        at_once.append(name)
        most.append(len(at_once))
        time.sleep(0.002)
        at_once.remove(name)
        return before(place, name)

    monkeypatch.setattr(on_share, "_content", content)
    told: list[str] = []
    listed = [each.name for _place, each in backend.list(trouble=told.append)]
    assert sorted(listed) == sorted(one.name for one in made if one is not made[7])
    assert len(told) == 1
    assert max(most) > 2


# -- a share without room for another name, or of several filesystems


def no_names(*_arguments: object, **_more: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_would_be_archived_is_not_removed_for_want_of_room(fresh, share, monkeypatch):
    volume = make(fresh(), "a", **REMOVED)
    os.rename(share / "a", share / "a.bak")
    (share / "a").mkdir()
    (share / "a/precious").write_text("from a backup")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", no_names)
        with pytest.raises(NoSpace):
            fresh().delete(volume.volume_id)
    assert (share / "a/precious").read_text() == "from a backup"
    fresh().delete(volume.volume_id)
    assert [path.read_text() for path in share.glob("archived-a-*/precious")] == ["from a backup"]


def test_what_is_put_in_the_place_of_a_volume_that_goes_is_archived(fresh, share, monkeypatch):
    """On a full share it goes where it lies, and takes its time."""
    volume, real, rename = make(fresh(), "a", **REMOVED), share_lock.changing, os.rename
    (share / "restored").mkdir()
    turns = itertools.count()

    def changing(records: int) -> object:
        if next(turns) == 1:
            rename(share / "restored", share / "a")
            (share / "a/precious").write_text("new")
        return real(records)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", no_names)
        patched.setattr(share_lock, "changing", changing)
        with pytest.raises(NoSpace):
            fresh().delete(volume.volume_id)
    fresh().delete(volume.volume_id)
    assert [path.read_text() for path in share.glob("archived-a-*/precious")] == ["new"]
    assert os.listdir(share / ".runvol") == ["lock"]


def test_what_waited_for_others_goes_on_a_full_share_too(fresh, share, monkeypatch):
    outer = make(fresh(), "outer", subDir="team", **REMOVED)
    (share / "team/big").write_text("x")
    inner = make(fresh(), "inner", subDir="team/i", **REMOVED)
    fresh().delete(outer.volume_id)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", no_names)
        fresh().delete(inner.volume_id)
    assert not (share / "team").exists()
    assert os.listdir(share / ".runvol") == ["lock"]


@pytest.mark.parametrize("after", range(1, 14))
def test_a_deletion_that_was_killed_leaves_nothing_that_waited(fresh, share, monkeypatch, after):
    volumes = [make(fresh(), name, subDir=where, **REMOVED) for name, where in
               (("outer", "team"), ("middle", "team/m"), ("inner", "team/m/i"))]  # fmt: skip
    for volume in volumes[:2]:
        fresh().delete(volume.volume_id)
    killing = killer(after)

    with monkeypatch.context() as patched:
        for where, name in ((os, "rename"), (on_share, "write"), (on_share, "remove"), (on_share, "remove_tree")):
            patched.setattr(where, name, killing(getattr(where, name)))
        with contextlib.suppress(Killed):
            fresh().delete(volumes[2].volume_id)
    fresh().delete(volumes[2].volume_id)
    assert sorted(os.listdir(share)) == [".runvol"]
    assert os.listdir(share / ".runvol") == ["lock"]


def test_a_directory_on_another_filesystem_of_the_server_is_refused(fresh, share, tmp_path):
    (share / "team").mkdir()
    with mounted(tmp_path / "image", share / "team", ["mkfs.ext4", "-q"], size=8 << 20):
        with pytest.raises(InvalidParameter, match="'team' is another filesystem of the server than /e"):
            make(fresh(), "one", subDir="team/x", **REMOVED)
        assert not list(share.glob(".runvol/*.json"))
        (share / "team/old").mkdir()
        found = make(fresh(), "found", subDir="team/old", **REMOVED)
        fresh().delete(found.volume_id)
        assert (share / "team/old").is_dir()


@pytest.mark.parametrize("keeps", ["true", "false"])
def test_a_volume_that_was_made_on_another_filesystem_can_be_deleted(fresh, share, tmp_path, monkeypatch, keeps):
    """By a release that did not refuse it."""
    (share / "team").mkdir()
    with mounted(tmp_path / "image", share / "team", ["mkfs.ext4", "-q"], size=8 << 20):
        with monkeypatch.context() as patched:
            patched.setattr(nfs_share, "check_one_filesystem", lambda *_: None)
            volume = make(fresh(), "one", subDir="team/x", archiveOnDelete=keeps)
        (share / "team/x/f").write_text("x")
        fresh().delete(volume.volume_id)
        left = sorted(name.split("-")[0] for name in os.listdir(share / "team"))
        assert left == (["archived", "lost+found"] if keeps == "true" else ["lost+found"])
    assert os.listdir(share / ".runvol") == ["lock"]


def test_one_leftover_that_stays_keeps_no_other(fresh, share, monkeypatch):
    volume, removed = make(fresh(), **REMOVED), on_share.remove_tree
    for name in ("gone-nfs-1", "gone-nfs-2", "gone-nfs-3", "new-nfs-4"):
        (share / ".runvol" / name).mkdir()

    def stays(root: int, path: str) -> None:
        if path.endswith("gone-nfs-2"):
            raise OSError(errno.EPERM, "no")
        removed(root, path)

    monkeypatch.setattr(share_lock, "_ALIVE", -1.0)
    monkeypatch.setattr(on_share, "remove_tree", stays)
    fresh().delete(volume.volume_id)
    until = time.monotonic() + 10
    while sorted(os.listdir(share / ".runvol")) != ["gone-nfs-2", "lock"]:
        assert time.monotonic() < until, os.listdir(share / ".runvol")
        time.sleep(0.02)


def test_a_leftover_that_another_controller_removes_meanwhile_is_none(fresh, share, monkeypatch):
    make(fresh(), **REMOVED)
    root = os.open(share, os.O_RDONLY)
    monkeypatch.setattr(on_share, "names", lambda *_: ["gone-nfs-away"])
    share_lock.tidy_abandoned(root, root, "gone-")
    os.close(root)


def test_a_record_that_is_written_over_is_whole_at_each_moment(fresh, share, monkeypatch):
    volume = make(fresh(), "one", **REMOVED)
    path, root = record(share, volume), os.open(share, os.O_RDONLY)
    before = on_share.read(root, export_ids.short(volume.volume_id), on_share.Record)
    monkeypatch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(Killed()))
    for facts in ({"ready": False, "deleting": True}, {"deleting": False, "ready": True}, {"serial": ""}):
        changed = msgspec.structs.replace(before, **facts)
        with contextlib.suppress(Killed):
            on_share.write_over(root, changed)
        assert on_share.read(root, changed.volume_id, on_share.Record) == changed, path.read_text()
    os.close(root)


def test_a_snapshot_stays_where_nobody_can_look_who_copies_it(fresh, shares, monkeypatch):
    more = {"recordsPath": "/records"}
    volume = make(fresh(), "one", **more)
    snapshot = fresh().take_snapshot("s", volume.volume_id, Deadline.after(20))
    known = export_ids.short(snapshot.snapshot_id)
    half = json.loads(next((shares / "records/.runvol").glob("nfs-*.json")).read_text())
    other = export_ids.short(export_ids.id_of(nfs.Export(server="nas", path="/records"), "two\0/e", "nfs-"))
    half |= {"name": "two", "volume_id": other, "ready": False, "source": f"snapshot:{known}", "handle": ""}
    file = shares / "records/.runvol" / f"{other}.json"
    file.write_text(json.dumps(half))
    os.utime(file, (0, 0))
    opened = exports.opened

    @contextlib.contextmanager
    def silent(export: nfs.Export) -> Iterator[int]:
        if export.path == "/e":
            raise nfs.ServerSilent(export.source, 1)
        with opened(export) as root:
            yield root

    with monkeypatch.context() as patched:
        patched.setattr(exports, "opened", silent)
        with pytest.raises(VolumeUnfinished, match="being made from"):
            fresh().delete_snapshot(snapshot.snapshot_id)
    fresh().delete_snapshot(snapshot.snapshot_id)


def test_records_are_read_where_no_thread_is_to_be_had(fresh, monkeypatch):
    backend = fresh()
    made = [make(backend, f"v-{number}").name for number in range(12)]

    def none(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with exports.opened(nfs.Export(server="nas", path="/e")) as root, monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none)
        found = [one.name for one in on_share.records(root, on_share.NFS_VOLUME, on_share.Record, pytest.fail)]
    assert sorted(found) == sorted(made)


def test_a_creation_that_made_nothing_makes_nothing_ours(fresh, share, monkeypatch):
    """Killed before its directory was made, which somebody makes then; another volume has the same place."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with contextlib.suppress(Killed):
            make(fresh(), "a", subDir="team", **REMOVED)
    (share / "team").mkdir()
    (share / "team/by-hand").write_text("x")
    other = make(fresh(), "b", subDir="team", **REMOVED)
    handle = export_ids.id_of(nfs.Export(server="nas", path="/e"), "a", "nfs-")
    for one in (other.volume_id, handle):
        fresh().delete(one)
    assert (share / "team/by-hand").read_text() == "x"


@pytest.mark.parametrize("after", range(1, 12))
@pytest.mark.parametrize("full", [False, True])
def test_a_killed_deletion_takes_nothing_that_was_made_in_its_place(fresh, share, monkeypatch, after, full):
    """By hand, or by a volume of that name; the inode may be the same again."""
    gone = make(fresh(), "a", subDir="v", **REMOVED)
    (share / "v/f").write_text("x")
    inode, killing, rename = (share / "v").stat().st_ino, killer(after), os.rename

    def named(source: object, target: object, **more: object) -> object:
        return no_names() if full and str(target).startswith("gone-") else rename(source, target, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killing(named))
        for where, name in ((os, "rmdir"), (on_share, "write"), (on_share, "remove"), (on_share, "remove_tree")):
            patched.setattr(where, name, killing(getattr(where, name)))
        with contextlib.suppress(Killed):
            fresh().delete(gone.volume_id)
    if (share / "v").exists():
        fresh().delete(gone.volume_id)  # nothing of it was done yet
        return
    living = make(fresh(), "v", **REMOVED)
    (share / "v/precious").write_text("living")
    path = record(share, living)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inode": (share / "v").stat().st_ino}))
    old = share / ".runvol" / f"{export_ids.short(gone.volume_id)}.json"
    if old.exists() and json.loads(old.read_text())["inode"] == inode:
        again = json.loads(old.read_text()) | {"inode": (share / "v").stat().st_ino}
        old.write_text(json.dumps(again))
    fresh().delete(gone.volume_id)
    assert (share / "v/precious").read_text() == "living"
    assert fresh().get(living.volume_id) is not None
