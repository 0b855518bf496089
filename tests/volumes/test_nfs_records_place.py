"""One export has the records of an export's volumes, and what pods write beside the directories changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nas_of_directories import below, serve
from tests.volumes.test_nfs_at_once import Killed, fresh  # noqa: F401
from tests.volumes.test_nfs_backend import CLASS, MIB, REMOVED, make
from volumes import ContentSource, InvalidParameter, VolumeUnfinished, export_ids, nfs_records_place, share
from volumes.nfs import NfsBackend
from volumes.share import Record

Fresh = Callable[..., NfsBackend]
APART = {"recordsPath": "/records", **REMOVED}


@pytest.fixture
def shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every path of the server `nas` below `tmp_path/nas`."""
    for name in ("e/in", "records", "others"):
        (tmp_path / "nas" / name).mkdir(parents=True)
    serve(monkeypatch, below(tmp_path / "nas"))
    return tmp_path / "nas"


def planted(shares: Path, name: str, **facts: object) -> None:
    """A record of which nobody but a pod knows, where the directories are."""
    ident = f"nfs-000000000000-{export_ids.digest(name)[:20]}"
    whole = {"volume_id": ident, "name": name, "directory": "team", "capacity": MIB, "parameters": dict(CLASS),
             "ready": True, "made": True, "serial": "ab", **facts}  # fmt: skip
    (shares / "e/.runvol").mkdir(exist_ok=True)
    (shares / "e/.runvol" / f"{ident}.json").write_text(json.dumps(whole))


PLANTED = {
    "nonsense": None,
    "the whole share, which goes": {"directory": "", "deleting": True, "ready": False},
    "a living one in the same place": {"directory": "team/one"},
    "a deleted one around it": {"directory": "team", "gone": True, "ready": False},
}


@pytest.mark.parametrize("facts", PLANTED.values(), ids=PLANTED.keys())
def test_what_a_pod_writes_beside_the_directories_is_believed_in_nothing(fresh, shares, facts):  # noqa: F811
    first = make(fresh(), "first", **APART)
    if facts is None:
        (shares / "e/.runvol/nfs-000000000000-00000000000000000000.json").write_text("{")
    else:
        planted(shares, "evil", **facts)
    volume = make(fresh(), "one", subDir="team/one", **APART)
    fresh().delete(volume.volume_id)
    assert not (shares / "e/team/one").exists()
    fresh().delete(first.volume_id)
    assert sorted(os.listdir(shares / "e")) == [".runvol", "in", "team"]


def test_a_name_of_two_parts_is_nobodys(fresh, shares):  # noqa: F811
    """An id is made of the name and the export, with a NUL between them."""
    victim, own = make(fresh(), "victim", **APART), make(fresh(), "mine", **APART)
    handle = export_ids.short(victim.volume_id)
    path = shares / "records/.runvol" / f"{handle}.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "name": "victim\0/e", "path": ""}))
    for call in (lambda: make(fresh(), "victim", **APART), lambda: fresh().delete(victim.volume_id)):
        with pytest.raises(VolumeUnfinished, match="no volume is called"):
            call()
    planted(shares, "victim\0/e", gone=True, ready=False, volume_id=handle, directory="mine")
    fresh().delete(own.volume_id)
    path.write_text(json.dumps(facts))
    assert make(fresh(), "victim", **APART) == victim


@pytest.mark.parametrize("first", ["on the export itself", "apart", "on another export"])
@pytest.mark.parametrize("second", ["on the export itself", "apart", "on another export"])
def test_one_export_has_its_records_in_one_place(fresh, shares, first, second):  # noqa: F811
    places = {"on the export itself": REMOVED, "apart": APART,
              "on another export": {**REMOVED, "recordsPath": "/others"}}  # fmt: skip
    outer = make(fresh(), "outer", subDir="team", **places[first])
    if first == second:
        fresh().delete(make(fresh(), "inner", subDir="team/b", **places[second]).volume_id)
    else:
        with pytest.raises(InvalidParameter, match="recordsPath"):
            make(fresh(), "inner", subDir="team/b", **places[second])
    assert os.listdir(shares / "e/team") == []
    fresh().delete(outer.volume_id)
    assert not (shares / "e/team").exists()


def test_an_export_of_records_has_no_volumes(fresh, shares):  # noqa: F811
    make(fresh(), "one", **APART)
    with pytest.raises(InvalidParameter, match="'path' = '/records': is the `recordsPath` of other volumes"):
        make(fresh(), "two", path="/records", **REMOVED)
    make(fresh(), "three", path="/others", **REMOVED)
    with pytest.raises(InvalidParameter, match="'/others': has volumes itself"):
        make(fresh(), "four", path="/e/in", **{**REMOVED, "recordsPath": "/others"})
    assert sorted(os.listdir(shares / "others/.runvol")) == sorted(
        ["lock", *(name for name in os.listdir(shares / "others/.runvol") if name.endswith(".json"))]
    )


@pytest.mark.parametrize("after", [0, 1])
def test_a_first_volume_that_was_interrupted_is_made_by_the_next_call(fresh, shares, monkeypatch, after):  # noqa: F811
    written, write = [], nfs_records_place._write

    def killed(*arguments: object) -> None:
        if len(written) == after:
            raise Killed
        written.append(arguments)
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(nfs_records_place, "_write", killed)
        with contextlib.suppress(Killed):
            make(fresh(), "one", **APART)
    assert len(written) == after
    assert make(fresh(), "one", **APART).parameters["path"] == "/e/one"


@pytest.mark.parametrize("facts", [{}, {"inode": 0, "serial": ""}])
def test_what_waited_goes_where_it_lies_and_nowhere_else(fresh, shares, facts):  # noqa: F811
    """`/e` and `/e/in` have their records in one place, and volumes of the same directory's name."""
    living, around = make(fresh(), "d", **APART), make(fresh(), "t", path="/e/in", subDir="d", **APART)
    inner = make(fresh(), "e", subDir="in/d/e", **APART)
    (shares / "e/d/precious").write_text("living")
    file = shares / "records/.runvol" / f"{export_ids.short(around.volume_id)}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    fresh().delete(around.volume_id)
    assert (shares / "e/in/d/e").is_dir()
    fresh().delete(inner.volume_id)
    assert (shares / "e/d/precious").read_text() == "living"
    assert not (shares / "e/in/d").exists()
    assert make(fresh(), "d", **APART) == living
    root = os.open(shares / "records", os.O_RDONLY)
    try:
        assert [one.name for one in share.records(root, share.NFS_VOLUME, Record, pytest.fail)] == ["d"]
    finally:
        os.close(root)


def test_an_export_whose_records_are_elsewhere_has_none_of_others(fresh, shares):  # noqa: F811
    """Pods may have it whole, with what would lie there."""
    make(fresh(), "whole", path="/e", recordsPath="/records", volumeAs="sharepath")
    with pytest.raises(InvalidParameter, match="'/e': has volumes, whose records are kept on '/records'"):
        make(fresh(), "one", path="/others", recordsPath="/e")
    volume = make(fresh(), "two", path="/others", recordsPath="/records")
    with pytest.raises(InvalidParameter, match="is the `recordsPath` of other volumes"):
        make(fresh(), "three", path="/records", recordsPath="/e/in")
    fresh().delete(volume.volume_id)


def test_the_advice_names_both_marks(fresh, shares):  # noqa: F811
    fresh().delete(make(fresh(), "one", **APART).volume_id)
    with pytest.raises(InvalidParameter, match=r"records-path there; .* remove that file and \.runvol/data-"):
        make(fresh(), "two", **REMOVED)
    for path in (shares / "e/.runvol/records-path", *(shares / "records/.runvol").glob("data-*")):
        path.unlink()
    make(fresh(), "two", **REMOVED)
    with pytest.raises(InvalidParameter, match="volumes on /e whose records lie there"):
        make(fresh(), "one", **APART)


@pytest.mark.parametrize("what", ["nothing", "another place", "a FIFO", "a file for the directory"])
def test_whoever_has_the_directories_export_stops_no_volume_of_the_class(fresh, shares, what):  # noqa: F811
    make(fresh(), "one", **APART)
    mark = shares / "e/.runvol/records-path"
    if what == "another place":
        mark.write_text("/others\n")
    elif what == "a file for the directory":
        for path in (shares / "e/.runvol").iterdir():
            path.unlink()
        (shares / "e/.runvol").rmdir()
        (shares / "e/.runvol").touch()
    else:
        mark.unlink()
        if what == "a FIFO":
            os.mkfifo(mark)
    volume = make(fresh(), "two", **APART)
    if what == "nothing":
        assert mark.read_text() == "/records\n/e\n"
    if what != "a file for the directory":
        fresh().delete(volume.volume_id)


def test_a_refused_volume_leaves_no_mark(fresh, shares):  # noqa: F811
    source = ContentSource(kind="volume", source_id="nfs-000000000000-00000000000000000000")
    with pytest.raises(InvalidParameter):
        make(fresh(), "one", source, **{**APART, "recordsPath": "/others"})
    make(fresh(), "one", **APART)


def test_two_names_of_one_directory_are_told(fresh, shares):  # noqa: F811
    (shares / "again").symlink_to("e")
    with pytest.raises(InvalidParameter, match="'/again': leads to the same directory as /e"):
        make(fresh(), "one", **{**REMOVED, "recordsPath": "/again"})
    assert not [name for name in os.listdir(shares / "e/.runvol") if name != "lock"]


def before_marks(shares: Path) -> None:
    """As the share was left by a release that wrote none."""
    for path in (shares / "e/.runvol/records-path", *(shares / "records/.runvol").glob("data-*")):
        path.unlink(missing_ok=True)


def test_volumes_that_were_made_before_the_marks_prove_where_they_are(fresh, shares):  # noqa: F811
    make(fresh(), "one", **APART)
    before_marks(shares)
    planted(shares, "evil", directory="x")
    make(fresh(), "two", **APART)
    assert (shares / "e/.runvol/records-path").read_text() == "/records\n/e\n"
    assert list((shares / "records/.runvol").glob("data-*"))


def test_volumes_of_both_kinds_that_were_made_before_the_marks_are_no_prey_of_each_other(fresh, shares):  # noqa: F811
    outer = make(fresh(), "outer", subDir="p", **APART)
    before_marks(shares)
    inner = make(fresh(), "inner", subDir="p/i", **REMOVED)
    (shares / "e/p/i/precious").write_text("living")
    fresh().delete(outer.volume_id)
    assert (shares / "e/p/i/precious").read_text() == "living"
    fresh().delete(inner.volume_id)


def test_one_directory_has_one_name(fresh, shares):  # noqa: F811
    """As of an NFSv4 server, whose exports have another path for version 3."""
    (shares / "again").symlink_to("e")
    living = make(fresh(), "one", subDir="team", **APART)
    with pytest.raises(InvalidParameter, match="'/again': leads to the same directory as '/e'"):
        make(fresh(), "two", path="/again", subDir="team", **APART)
    fresh().delete(living.volume_id)
