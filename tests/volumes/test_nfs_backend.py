"""NFS volumes over a share that is a directory here: whose directories are touched, what is remembered, and shares whose
pods write what they like. The real servers are in the kernel tier."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from blockdev import Deadline, nfs
from blockdev.errors import MountFailed
from tests.nas_of_directories import serve
from volumes import (
    VOLUME_ID,
    AccessMode,
    Capability,
    ContentSource,
    InvalidParameter,
    SizeRange,
    StoreFailed,
    VolumeNotFound,
    VolumeUnfinished,
    export_ids,
    nfs_parameters,
    parameters,
)
from volumes.errors import ExportUnknown
from volumes.exports import Exports
from volumes.nfs import NfsBackend

MIB = 1 << 20
CLASS = {"backend": "nfs", "server": "nas", "path": "/e"}
REMOVED = {"archiveOnDelete": "false"}
KEY = export_ids.key(nfs.Export(server="nas", path="/e"))


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the server `nas` exports; no other server answers."""
    root = tmp_path / "share"
    root.mkdir(mode=0o777)
    root.chmod(0o777)

    serve(monkeypatch, lambda export: root if export.server == "nas" and export.version != "3" else None)
    return root


@pytest.fixture
def backend(share: Path, tmp_path: Path) -> NfsBackend:
    del share
    (tmp_path / "state").mkdir()
    return NfsBackend(str(tmp_path / "state"))


def make(backend: NfsBackend, name: str = "one", source: ContentSource | None = None, **more: str):
    return backend.create(name, SizeRange(required=MIB), CLASS | more, [], source)


def record(share: Path, volume) -> Path:
    return share / ".runvol" / f"{export_ids.short(volume.volume_id)}.json"


def forget_who_made_it(share: Path, volume) -> None:
    """As an earlier release wrote it."""
    facts = json.loads(record(share, volume).read_text())
    del facts["made"]
    record(share, volume).write_text(json.dumps(facts))


# -- what is remembered


def test_exports_that_are_remembered_at_once_are_all_remembered(tmp_path):
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for other in range(5):
                Exports(str(tmp_path)).remember(nfs.Export(server=f"nas-{number}-{other}", path="/e"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(Exports(str(tmp_path)).known()) == 40
    assert sorted(os.listdir(tmp_path)) == ["exports.json", "exports.lock"]


def test_an_export_that_never_worked_is_not_remembered(backend, tmp_path):
    for wrong in ({"server": "nobody"}, {"vers": "3"}):
        with pytest.raises(MountFailed):
            make(backend, **wrong)
    assert Exports(str(tmp_path / "state")).known() == []


def test_an_export_that_an_earlier_release_remembered_although_it_never_worked_is_passed_over(backend, tmp_path):
    known = [nfs.Export(server="nas", path="/e"), nfs.Export(server="nobody", path="/x"),
             nfs.Export(server="nas", path="/e", version="3")]  # fmt: skip
    for export in known:
        Exports(str(tmp_path / "state")).remember(export)
    volume, said = make(backend), []
    assert [one.volume_id for _place, one in backend.list(trouble=said.append)] == [volume.volume_id]
    assert said == ["what lies on the export nobody:/x: mounting nobody:/x on nowhere: nobody answers"]
    assert backend.snapshots(trouble=said.append) == []
    backend.delete(volume.volume_id)


def test_a_damaged_list_of_exports_is_named_and_never_written_over(backend, tmp_path):
    volume = make(backend)
    file = tmp_path / "state/exports.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    said: list[str] = []
    assert backend.list(trouble=said.append) == []
    assert "exports.json cannot be read" in said[0]
    older = export_ids.short(volume.volume_id)  # which does not say its export
    for call in (lambda: make(backend, "two"), lambda: backend.delete(older)):
        with pytest.raises(StoreFailed, match=r"exports\.json cannot be read"):
            call()
    backend.delete(volume.volume_id)
    assert file.read_bytes() == whole[:-5]


# -- "not found" is not "gone"


def test_what_lies_on_an_export_that_nobody_remembers_is_not_said_to_be_gone(backend, share, tmp_path):
    volume = make(backend)
    taken = backend.take_snapshot("s", volume.volume_id, Deadline.after(20))
    (tmp_path / "fresh").mkdir()
    fresh = NfsBackend(str(tmp_path / "fresh"))
    # Ids as an earlier release gave them, and as exports of very long names have them.
    volume_id, snapshot_id = export_ids.short(volume.volume_id), export_ids.short(taken.snapshot_id)
    for call in (
        lambda: fresh.delete(volume_id),
        lambda: fresh.get(volume_id),
        lambda: fresh.delete_snapshot(snapshot_id),
        lambda: fresh.snapshot(snapshot_id),
        lambda: fresh.take_snapshot("t", volume_id, Deadline.after(5)),
        lambda: fresh.expand(volume_id, SizeRange(required=2 * MIB)),
    ):
        with pytest.raises(ExportUnknown, match="no export known for this id"):
            call()
    assert (share / "one").is_dir()
    make(fresh, "two")  # of the same class
    fresh.delete_snapshot(snapshot_id)
    fresh.delete(volume_id)
    assert not (share / "one").exists()


def test_any_controller_serves_what_another_one_has_made(backend, share, tmp_path):
    """Freshly started, it knows nothing but the id; the ids that it gives are the same."""
    made = make(backend)
    taken = backend.take_snapshot("s", made.volume_id, Deadline.after(20))

    def fresh() -> NfsBackend:
        state = tmp_path / os.urandom(4).hex()
        state.mkdir()
        return NfsBackend(str(state))

    assert fresh().get(made.volume_id) == made
    assert fresh().expand(made.volume_id, SizeRange(required=2 * MIB)).volume_id == made.volume_id
    assert fresh().snapshot(taken.snapshot_id) == taken
    again = fresh().take_snapshot("s", made.volume_id, Deadline.after(20))
    assert again == taken
    clone = make(fresh(), "two", ContentSource(kind="snapshot", source_id=taken.snapshot_id))
    assert fresh().list() == []
    configured = NfsBackend(str(tmp_path / "configured"), exports_known=["nas:/e"])
    assert {one.volume_id for _place, one in configured.list()} == {made.volume_id, clone.volume_id}
    assert [one.snapshot_id for _place, one in configured.snapshots(source=made.volume_id)] == [taken.snapshot_id]
    fresh().delete_snapshot(taken.snapshot_id)
    for one in (made, clone):
        fresh().delete(one.volume_id)
        assert fresh().get(one.volume_id) is None
    assert not [name for name in os.listdir(share) if not name.startswith((".runvol", "archived-"))]


def test_volumes_of_an_earlier_release_keep_their_ids(backend, share, tmp_path):
    volume = make(backend)
    facts = json.loads(record(share, volume).read_text())
    del facts["handle"]
    record(share, volume).write_text(json.dumps(facts))
    old = export_ids.short(volume.volume_id)
    assert [one.volume_id for _place, one in backend.list()] == [old] == [backend.get(old).volume_id]
    assert make(backend).volume_id == old
    taken = backend.take_snapshot("s", old, Deadline.after(20))
    assert taken.source == old and backend.take_snapshot("s", old, Deadline.after(20)) == taken
    backend.delete_snapshot(taken.snapshot_id)
    backend.delete(old)


@pytest.mark.parametrize(
    ("server", "path", "whole"),
    [
        ("nas", "/e", True),
        ("10.0.0.1", "/", True),
        ("fd00::1", "/srv/nfs/kubernetes", True),
        ("fs-0123456789abcdef0.efs.us-east-1.amazonaws.com", "/", True),
        ("0a1b2c3d4e-xyz12.cn-hangzhou.nas.aliyuncs.com", "/share/kubernetes/volumes", True),
        ("nas", "/ä/" + "x" * 20, True),
        ("nas", "/" + "random-" * 30, True),
        ("nas", "/" + "".join(f"{number:x}" for number in range(900, 1100)), False),
    ],
)
def test_an_id_says_its_export_where_there_is_room(server, path, whole):
    export = nfs.Export(server=server, path=path)
    for prefix in ("nfs-", "nfssnap-"):
        one = export_ids.id_of(export, "pvc-0a1b2c3d", prefix)
        assert VOLUME_ID.match(one) and len(one) <= 128
        assert path not in one or path == "/"
        found = export_ids.export_of(one)
        assert ((found.server, found.path) == (server, path)) if whole else found is None


@pytest.mark.parametrize("tail", ["", "a", "aaaaaaaa", "7" * 80, "abxgc4z2f5aa"])
def test_an_id_that_says_another_export_than_its_own_says_none(tail):
    one = export_ids.id_of(nfs.Export(server="nas", path="/e"), "one", "nfs-")
    assert export_ids.export_of(f"{export_ids.short(one)}.{tail}") is None


@pytest.mark.parametrize("one_id", ["nfs-mine", "nfs-given-0123456789abcdef", "nas-of-team-a"])
def test_an_id_that_runvol_never_gives_is_gone_at_once(backend, one_id):
    backend.delete(one_id)
    backend.delete_snapshot(f"nfssnap-{one_id}")
    assert backend.get(one_id) is None


# -- whose directory it is


@pytest.mark.parametrize("more", [REMOVED, {}])
def test_a_directory_that_was_there_before_is_left_as_it_is(backend, share, more):
    (share / "home/alice").mkdir(parents=True)
    (share / "home").chmod(0o700)
    volume = make(backend, "pv-home", subDir="home", mode="0777", **more)
    assert (share / "home").stat().st_mode & 0o777 == 0o700
    assert json.loads(record(share, volume).read_text())["made"] is False
    backend.delete(volume.volume_id)
    assert (share / "home/alice").is_dir()
    assert sorted(os.listdir(share)) == [".runvol", "home"]


def test_an_empty_one_is_not_ours_either(backend, share):
    (share / "one").mkdir(0o750)
    backend.delete(make(backend, **REMOVED).volume_id)
    assert (share / "one").stat().st_mode & 0o777 == 0o750


def test_what_runvol_has_made_is_removed_with_its_content(backend, share):
    volume = make(backend, mode="0750", **REMOVED)
    assert (share / "one").stat().st_mode & 0o777 == 0o750
    (share / "one/data").write_text("x")
    backend.delete(volume.volume_id)
    assert os.listdir(share) == [".runvol"]
    assert os.listdir(share / ".runvol") == ["lock"]


def test_a_record_that_does_not_say_who_made_the_directory_lets_nothing_be_removed(backend, share):
    volume = make(backend, **REMOVED)
    (share / "one/data").write_text("x")
    forget_who_made_it(share, volume)
    assert make(backend, **REMOVED).volume_id == volume.volume_id
    backend.delete(volume.volume_id)
    assert not (share / "one").exists()
    (archived,) = share.glob("archived-one-*")
    assert (archived / "data").read_text() == "x"


@pytest.mark.parametrize("content", [None, "x"])
def test_a_creation_that_was_killed_goes_on_with_its_own_directory_only(backend, share, content):
    """Killed between the directory and the end of the record. What somebody has put there since is somebody's."""
    volume = make(backend, **REMOVED)
    facts = json.loads(record(share, volume).read_text())
    record(share, volume).write_text(json.dumps(facts | {"ready": False}))
    (share / "one").chmod(0o700)
    if content:
        (share / "one/theirs").write_text(content)
    make(backend, **REMOVED)
    assert (share / "one").stat().st_mode & 0o777 == (0o700 if content else 0o777)
    backend.delete(volume.volume_id)
    assert (share / "one").exists() == bool(content)


def test_a_sub_directory_of_several_volumes_goes_with_the_last(backend, share):
    one, two = (make(backend, name, subDir="team/a", **REMOVED) for name in ("one", "two"))
    (share / "team/a/data").write_text("x")
    backend.delete(one.volume_id)
    assert (share / "team/a/data").exists()
    three = make(backend, "three", subDir="team/a", mode="0700", **REMOVED)
    assert (share / "team/a").stat().st_mode & 0o777 == 0o777, "the others' permissions stay"
    backend.delete(two.volume_id)
    backend.delete(three.volume_id)
    assert not (share / "team/a").exists()


def test_a_name_may_be_archived_again(backend, share):
    for number in range(3):
        volume = make(backend)
        (share / "one/data").write_text(str(number))
        backend.delete(volume.volume_id)
    assert sorted(path.read_text() for path in share.glob("archived-one-*/data")) == ["0", "1", "2"]


def test_a_removal_that_was_killed_is_finished(backend, share):
    volume = make(backend, **REMOVED)
    (share / ".runvol" / f"gone-{export_ids.short(volume.volume_id)}" / "deep").mkdir(parents=True)
    backend.delete(volume.volume_id)
    assert os.listdir(share / ".runvol") == ["lock"]


def test_a_deep_volume_goes(backend, share):
    volume = make(backend, **REMOVED)
    there = os.open(share / "one", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("a", dir_fd=there)
        below = os.open("a", os.O_RDONLY, dir_fd=there)
        os.close(there)
        there = below
    os.close(there)
    backend.delete(volume.volume_id)
    assert os.listdir(share) == [".runvol"]


def test_a_clone_that_was_deleted_while_nobody_asked_is_made_again(backend, share, monkeypatch):
    source = make(backend, "source")
    (share / "source/data").write_text("precious")
    wanted = ContentSource(kind="volume", source_id=source.volume_id)
    monkeypatch.setattr("volumes.nfs_filling.PATIENCE", 0.0)
    with pytest.raises(VolumeUnfinished):
        make(backend, "clone", wanted)
    until = time.monotonic() + 20
    while not (share / "clone/data").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    clone_id = export_ids.id_of(nfs.Export(server="nas", path="/e"), "clone", "nfs-")
    while backend._jobs.progress(export_ids.short(clone_id)) is not None:
        time.sleep(0.01)
    monkeypatch.setattr("volumes.nfs_filling.PATIENCE", 20.0)
    backend.delete(clone_id)
    make(backend, "clone", wanted)
    assert (share / "clone/data").read_text() == "precious"


# -- a share whose pods write what they like


def test_records_that_lead_elsewhere_by_a_link_are_not_followed(backend, share, tmp_path):
    volume = make(backend)
    outside = tmp_path / "outside"
    outside.mkdir()
    (share / ".runvol").rename(share / ".mine")
    (share / ".runvol").symlink_to(outside)
    for call in (
        lambda: make(backend, "two"),
        lambda: backend.get(volume.volume_id),
        lambda: backend.delete(volume.volume_id),
        lambda: backend.take_snapshot("s", volume.volume_id, Deadline.after(5)),
    ):
        with pytest.raises(StoreFailed, match="leads through a link"):
            call()
    said: list[str] = []
    assert backend.list(trouble=said.append) == []
    assert said
    assert os.listdir(outside) == []


@pytest.mark.parametrize("kind", ["fifo", "link", "junk", "directory", "another's"])
def test_one_bad_record_stops_itself_only(backend, share, tmp_path, kind):
    one, two = make(backend, "one", **REMOVED), make(backend, "two", **REMOVED)
    (share / "two/data").write_text("x")
    bad = share / f".runvol/nfs-{KEY}-0123456789abcdef0123.json"
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "link":
        (tmp_path / "elsewhere").write_text(record(share, one).read_text())
        bad.symlink_to(tmp_path / "elsewhere")
    elif kind == "directory":
        bad.mkdir()
    else:
        bad.write_text("{" if kind == "junk" else record(share, one).read_text())
    said: list[str] = []
    assert {volume.volume_id for _place, volume in backend.list(trouble=said.append)} == {one.volume_id, two.volume_id}
    assert len(said) == 1
    assert f".runvol/nfs-{KEY}-0123456789abcdef0123.json cannot be read" in said[0]
    backend.delete(one.volume_id)
    backend.delete(two.volume_id)
    assert not (share / "two").exists()
    (kept,) = share.glob("archived-two-*")
    assert (kept / "data").exists(), "removed is nothing while a record cannot be read"


def test_a_sub_directory_waits_for_the_record_that_cannot_be_read(backend, share):
    volume = make(backend, subDir="team/a")
    (share / f".runvol/nfs-{KEY}-0123456789abcdef0123.json").write_text("{")
    with pytest.raises(VolumeUnfinished, match=rf"nfs-{KEY}-0123456789abcdef0123\.json"):
        backend.delete(volume.volume_id)
    assert (share / "team/a").is_dir()


def test_a_file_that_can_be_nobodys_record_keeps_nothing(backend, share):
    """Whoever has the share whole can put one there, under any name."""
    one, two = make(backend, "one", **REMOVED), make(backend, "two", subDir="team/a", **REMOVED)
    for name in ("nfs-junk.json", "nfs-.json", "nfs-0123456789ab-0123456789ABCDEF0123.json", "nfssnap-x.json"):
        (share / ".runvol" / name).write_text("{")
    said: list[str] = []
    assert len(backend.list(trouble=said.append)) == 2 and not said
    backend.delete(one.volume_id)
    backend.delete(two.volume_id)
    assert not (share / "one").exists() and not (share / "team/a").exists()


# -- what the volume context of a static volume says


def test_a_static_volumes_sub_directory_is_what_is_mounted(backend):
    context = parameters.check_context(CLASS | {"subDir": "app1/data", "volumeAs": "subpath"})
    assert backend.attach("static-1", context).path == "/e/app1/data"
    assert backend.attach("static-1", CLASS).path == "/e"
    assert backend.attach("static-1", CLASS | {"subDir": "a", "volumeAs": "sharepath"}).path == "/e/a"
    for wrong in ("../other", "a/../b", "/a", ".runvol"):
        with pytest.raises(InvalidParameter, match="'subDir'"):
            parameters.check_context(CLASS | {"subDir": wrong})


def test_what_a_node_could_only_ignore_is_refused_by_name(backend):
    for key, value in (("archiveOnDelete", "false"), ("preallocate", "true"), ("quota", "none")):
        with pytest.raises(InvalidParameter, match=f"'{key}'.*take it out of the volumeAttributes"):
            parameters.check_delivered({key: value})
    more = {"subDir": "a/b", "volumeAs": "subpath", "mode": "0700", "vers": "4.2", "options": "nconnect=2"}
    volume = backend.create("one", SizeRange(required=MIB), CLASS | more | REMOVED, [])
    context = parameters.context_of(volume.parameters)
    parameters.check_delivered(parameters.check_context(context))
    assert backend.attach(volume.volume_id, context).path == "/e/a/b", "joined once"
    assert backend.attach(volume.volume_id, {}).path == "/e/a/b"
    with pytest.raises(VolumeNotFound):
        backend.attach("nfs-mine", {})


# -- records that somebody on the share has written


def rewritten(share: Path, volume, **facts) -> None:
    record(share, volume).write_text(json.dumps(json.loads(record(share, volume).read_text()) | facts))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"directory": "/another-tenants-export"}, "no place below the share"),
        ({"directory": "../other"}, "no place below the share"),
        ({"directory": "a//b"}, "no place below the share"),
        ({"directory": ".runvol"}, "no place below the share"),
        ({"directory": "."}, "no place below the share"),
        ({"capacity": 1 << 70}, "capacity"),
        ({"capacity": 0}, "capacity"),
        ({"parameters": {"zzz": "1"}}, "no parameter"),
        ({"source": "elsewhere"}, "neither volume nor snapshot"),
    ],
    ids=str,
)
def test_a_record_that_runvol_cannot_have_written_stops_itself_only(backend, share, facts, words):
    volume, other = make(backend, "one"), make(backend, "two")
    rewritten(share, volume, **facts)
    said: list[str] = []
    assert [one.volume_id for _place, one in backend.list(trouble=said.append)] == [other.volume_id]
    assert words in said[0]
    for call in (backend.get, backend.attach, backend.delete):
        with pytest.raises(VolumeUnfinished, match=words):
            call(volume.volume_id)


@pytest.mark.parametrize("facts", [{"created": 1e300}, {"created": -1.0}, {"capacity": 1 << 70}, {"source": "/x"}])
def test_a_snapshots_record_that_runvol_cannot_have_written_stops_itself_only(backend, share, facts):
    volume = make(backend)
    one, two = (backend.take_snapshot(name, volume.volume_id, Deadline.after(20)) for name in ("s1", "s2"))
    path = share / ".runvol" / f"{export_ids.short(one.snapshot_id)}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    said: list[str] = []
    assert [found.snapshot_id for _place, found in backend.snapshots(trouble=said.append)] == [two.snapshot_id]
    assert len(said) == 1


@pytest.mark.parametrize("place", ["/another-tenants-export", "another", ""])
def test_a_record_does_not_say_where_a_volume_lies_that_is_being_made(backend, share, monkeypatch, place):
    """The copy is under way, and the provisioner asks again: in between somebody on the share says that all is done."""
    source = make(backend, "source")
    content = ContentSource(kind="volume", source_id=source.volume_id)

    def unfinished(*_: object) -> None:
        raise VolumeUnfinished("still being copied")

    with monkeypatch.context() as patched:
        patched.setattr(backend._jobs, "finished", unfinished)
        with pytest.raises(VolumeUnfinished):
            make(backend, "clone", content)
    (path,) = (one for one in (share / ".runvol").glob("*.json") if json.loads(one.read_text())["name"] == "clone")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"directory": place, "ready": True}))
    with pytest.raises(VolumeUnfinished, match="place"):
        make(backend, "clone", content)


def test_a_record_does_not_say_which_server_a_volume_is_on(backend, share):
    volume = make(backend)
    rewritten(share, volume, parameters={**CLASS, "server": "evil", "path": "/theirs"})
    attached = backend.attach(volume.volume_id)
    assert (attached.server, attached.path) == ("nas", "/e/one")


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_lies_where_a_volume_would_be_archived_keeps_none(backend, share, what):
    volume = make(backend)
    (share / "one/data").write_text("x")
    at = share / f"archived-one-{export_ids.short(volume.volume_id)[-8:]}"
    at.write_text("") if what == "file" else at.symlink_to("/nowhere")
    backend.delete(volume.volume_id)
    assert (share / f"{at.name}-2/data").read_text() == "x"


@pytest.mark.parametrize("bound", ["_MOST", "_MOST_BYTES"])
def test_so_many_records_are_looked_at_and_no_more(backend, share, monkeypatch, bound):
    """With more of them nothing is known to be alone in its directory, so nothing is removed."""
    monkeypatch.setattr(f"volumes.share.{bound}", 3)
    volume = make(backend, **REMOVED)
    for number in range(5):
        (share / f".runvol/nfs-{KEY}-{number:020x}.json").write_text("{")
    said: list[str] = []
    backend.list(trouble=said.append)
    assert "are not looked at" in said[-1]
    backend.delete(volume.volume_id)
    assert len([*share.glob("archived-one-*")]) == 1


@pytest.mark.parametrize("archived", ["true", "false"])
@pytest.mark.parametrize("order", ["outer", "inner", "middle"])
def test_volumes_in_one_another_leave_nothing_whichever_goes_first(backend, share, archived, order):
    places = {"outer": "top", "middle": "top/in", "inner": "top/in/deep"}
    made = {name: make(backend, name, subDir=place, archiveOnDelete=archived) for name, place in places.items()}
    for name, place in places.items():
        (share / place / f"of-{name}").write_text("x")
    names = [order, *(name for name in ("outer", "middle", "inner") if name != order)]
    for number, name in enumerate(names, 1):
        backend.delete(made[name].volume_id)
        backend.delete(made[name].volume_id)
        assert backend.get(made[name].volume_id) is None
        for left in names[number:]:
            assert (share / places[left] / f"of-{left}").exists(), f"{left} was hurt by the end of {name}"
        assert len(backend.list()) == len(names) - number
    assert not (share / "top").exists()
    assert not [one for one in os.listdir(share / ".runvol") if one.endswith(".json")]
    assert (sum(1 for one in os.listdir(share) if one.startswith("archived-")) > 0) == (archived == "true")


def test_a_volume_that_waits_for_its_end_is_made_anew_after_it(backend, share):
    outer, inner = make(backend, "outer", subDir="top", **REMOVED), make(backend, "inner", subDir="top/in", **REMOVED)
    (share / "top/old").write_text("x")
    backend.delete(outer.volume_id)
    with pytest.raises(VolumeUnfinished, match="stays until the volumes that lie in it"):
        make(backend, "outer", subDir="top", **REMOVED)
    backend.delete(inner.volume_id)
    again = make(backend, "outer", subDir="top", **REMOVED)
    assert os.listdir(share / "top") == []
    backend.delete(again.volume_id)
    assert os.listdir(share) == [".runvol"]


def test_a_planted_end_takes_nothing_that_the_deleted_volume_was_not_in(backend, share):
    (share / "others").mkdir()
    (share / "others/file").write_text("x")
    volume, planted = make(backend, "one", **REMOVED), make(backend, "two", subDir="others/x", **REMOVED)
    facts = json.loads(record(share, planted).read_text())
    record(share, planted).write_text(json.dumps(facts | {"directory": "others", "gone": True, "ready": False}))
    backend.delete(volume.volume_id)
    assert (share / "others/file").read_text() == "x"


def test_what_a_share_is_reached_by_goes_with_it(tmp_path, monkeypatch):
    """The options of a class's `mountOptions`, of its parameter and of the setting; the others are the node's matter."""
    seen: list[nfs.Export] = []

    @contextlib.contextmanager
    def opened(export, deadline):
        seen.append(export)
        raise nfs.ServerSilent(export.server, "it is a test", export.port)
        yield

    monkeypatch.setattr(nfs, "opened", opened)
    flags = ("port=2050", "hard", "sec=krb5p")
    uses = [Capability(mode=AccessMode.MULTI_NODE_MULTI_WRITER, mount_flags=flags)]
    backend = NfsBackend(str(tmp_path), exports_known=["nas:/e;port=2051;vers=4.2"])
    with pytest.raises(nfs.ServerSilent, match="port 2050"):
        backend.create("one", SizeRange(required=MIB), CLASS | {"options": "noresvport,noatime"}, uses)
    assert seen[-1].options == ("port=2050", "sec=krb5p", "noresvport")
    seen.clear()
    one = export_ids.id_of(nfs.Export(server="nas", path="/e"), "one", "nfs-")
    with pytest.raises(nfs.ServerSilent, match="port 2051"):
        backend.delete(one)
    asked = [(export.port, export.version) for export in seen]
    assert asked == [(2051, "4.2"), (2049, "4.1"), (2049, "3")], "a silent server is not asked in each version"


@pytest.mark.parametrize(
    ("server", "is_one"),
    [("fe80::1%eth0.5", True), ("fd00::7", True), ("nas-1.example.com", True), ("fe80::1%x,addr=127.0.0.1", False),
     ("fe80::1%", False), ("fe80::1%a b", False), ("nas,addr=1", False), ("a" * 300, False)],
)  # fmt: skip
def test_a_server_is_a_name_or_an_address_and_no_option(server, is_one):
    assert nfs_parameters.is_server(server) is is_one


def test_a_port_that_is_none_is_refused_at_stage_too(backend):
    assert "no number from 0 to 65535" in backend.refuses("port=99999999999")
    assert backend.refuses("port=2050") is None
