"""Volumes that are directories of the node; what needs project quotas runs in the kernel tier."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockdev import NotRemoved
from blockdev.quotas import QuotaUnavailable
from volumes import (
    Catalog,
    ContentSource,
    InvalidParameter,
    NoSpace,
    SizeNotAllowed,
    SizeRange,
    VolumeConflict,
    VolumeNotFound,
)
from volumes.directory import FIRST_PROJECT, DirectoryBackend

MIB = 1 << 20
FREE = {"backend": "directory", "quota": "none"}


@pytest.fixture
def backend(tmp_path: Path) -> DirectoryBackend:
    return DirectoryBackend(str(tmp_path / "state"))


def make(backend: DirectoryBackend, name: str = "one", size: int = 16 * MIB, **parameters: str):
    return backend.create(name, SizeRange(required=size), FREE | parameters, [])


def test_a_volume_is_an_empty_directory_that_anybody_may_write_to(backend):
    volume = make(backend)
    path = Path(backend.attach(volume.volume_id).path)
    assert list(path.iterdir()) == []
    assert path.stat().st_mode & 0o777 == 0o777
    assert volume.capacity_bytes == 16 * MIB


def test_making_it_again_gives_the_same_and_another_size_is_a_conflict(backend):
    assert make(backend).volume_id == make(backend).volume_id
    with pytest.raises(VolumeConflict, match="16777216 bytes"):
        make(backend, size=32 * MIB)
    with pytest.raises(VolumeConflict, match="parameters"):
        make(backend, runtime="runc")


def test_without_project_quotas_the_class_must_say_so(backend):
    with pytest.raises(QuotaUnavailable, match="prjquota"):
        backend.create("one", SizeRange(required=MIB), {"backend": "directory"}, [])
    assert backend.list() == []
    assert os.listdir(backend.directory) == []


def test_deleting_follows_no_link(backend, tmp_path):
    volume = make(backend)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    path = Path(backend.attach(volume.volume_id).path)
    (path / "link").symlink_to(outside)
    (path / "deep").mkdir()
    (path / "deep/file").write_text("x")
    backend.delete(volume.volume_id)
    backend.delete(volume.volume_id)
    assert (outside / "kept").exists()
    assert os.listdir(backend.directory) == []
    with pytest.raises(VolumeNotFound):
        backend.attach(volume.volume_id)


def nested(path: Path, depth: int) -> None:
    """As a pod does it with `mkdir a; cd a`."""
    there = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("a", dir_fd=there)
        below = os.open("a", os.O_RDONLY, dir_fd=there)
        os.close(there)
        there = below
    os.close(there)


def test_a_volume_is_deleted_however_deep_its_pod_has_nested_directories(backend):
    volume = make(backend)
    nested(Path(backend.attach(volume.volume_id).path), 3000)
    backend.delete(volume.volume_id)
    assert os.listdir(backend.directory) == []


def test_one_volume_that_cannot_be_removed_stops_no_start_and_no_other(backend):
    stays, goes = make(backend), make(backend, "two")
    file = Path(backend.attach(stays.volume_id).path) / "f"
    file.touch()
    for volume in (stays, goes):
        backend._store._execute("UPDATE volumes SET state = 'deleting' WHERE id = ?", (volume.volume_id,))
    subprocess.run(["chattr", "+i", file], check=True)
    try:
        with pytest.raises(NotRemoved, match="'f' cannot be removed: Operation not permitted"):
            backend.delete(stays.volume_id)
        assert backend.recover() == [f"removed volume {goes.volume_id}, which was deleting when the process ended"]
        (left,) = backend.unfinished()
        assert left.name == stays.volume_id
        assert left.why.endswith("but 'f' cannot be removed: Operation not permitted")
        make(backend, "three")
    finally:
        subprocess.run(["chattr", "-R", "-i", backend.directory], check=True)
    backend.delete(stays.volume_id)
    assert backend.unfinished() == []


def test_what_is_promised_counts(tmp_path):
    backend = DirectoryBackend(str(tmp_path / "state"), capacity_limit=40 * MIB)
    make(backend)
    assert backend.available_bytes() == 24 * MIB
    with pytest.raises(NoSpace, match="can still be promised"):
        make(backend, "two", 32 * MIB)
    make(backend, "two", 24 * MIB)
    assert backend.available_bytes() == 0


def test_a_volume_grows_and_never_shrinks(backend):
    volume = make(backend)
    assert backend.expand(volume.volume_id, SizeRange(required=32 * MIB)).capacity_bytes == 32 * MIB
    assert backend.expand(volume.volume_id, SizeRange(required=MIB)).capacity_bytes == 32 * MIB
    with pytest.raises(SizeNotAllowed, match="never shrinks"):
        backend.expand(volume.volume_id, SizeRange(required=MIB, limit=2 * MIB))


def test_content_of_another_volume_is_refused_by_name(backend):
    with pytest.raises(InvalidParameter, match="volume_content_source.*snapshot:s"):
        backend.create("x", SizeRange(), FREE, [], ContentSource(kind="snapshot", source_id="s"))


@pytest.mark.parametrize("state", ["creating", "deleting"])
def test_a_start_removes_what_a_killed_process_left(backend, state):
    volume = make(backend)
    other = make(backend, "two")
    path = Path(backend.attach(volume.volume_id).path)
    (path / "file").write_text("x")
    path.rename(path.parent / ((".new-" if state == "creating" else ".old-") + volume.volume_id))
    backend._store._execute("UPDATE volumes SET state = ? WHERE id = ?", (state, volume.volume_id))
    assert backend.recover() == [f"removed volume {volume.volume_id}, which was {state} when the process ended"]
    assert os.listdir(backend.directory) == [other.volume_id]
    assert backend.recover() == []


def test_what_no_row_knows_is_told_and_kept(backend):
    make(backend)
    stranger = Path(backend.directory) / "stranger"
    stranger.mkdir()
    backend.recover()
    assert backend.unknown_files() == [str(stranger)]


def test_a_project_that_a_lost_stores_directory_has_is_not_given_again(backend, monkeypatch):
    backend.prepare()
    (Path(backend.directory) / "dir-of-a-lost-store").mkdir()
    (Path(backend.directory) / "link").symlink_to("/etc")
    monkeypatch.setattr("blockdev.quotas.project_of", lambda path: FIRST_PROJECT + 7 if "lost" in path else 0)
    make(backend)
    (Path(backend.directory) / "dir-of-a-lost-store").rmdir()
    make(backend, "two")
    assert [seq for seq, _volume in backend.list()] == [8, 9]


def test_a_list_over_all_backends_has_stable_pages(tmp_path):
    catalog = Catalog.open(str(tmp_path))
    made = []
    for number in range(3):
        made.append(catalog.named("loop").create(f"l{number}", SizeRange(required=MIB * 16), {}, []).volume_id)
    directories = catalog.for_parameters(FREE)
    for number in range(3):
        made.append(directories.create(f"d{number}", SizeRange(required=MIB), FREE, []).volume_id)
    found, place = [], 0
    while page := catalog.list(after=place, limit=2):
        found += [volume.volume_id for _place, volume in page]
        place = page[-1][0]
        assert len(str(place)) < 19
    assert found == made
    assert [volume.volume_id for _place, volume in catalog.list()] == made


def test_sizes_that_nothing_counts_stay_promised_besides_what_is_used(backend, monkeypatch):
    """Less is promised to others than there is, and never more."""
    volume = make(backend, size=64 * MIB)
    for used in (0, 32, 64):
        Path(backend.attach(volume.volume_id).path, "file").write_bytes(bytes(used))
        free = SimpleNamespace(f_bavail=(500 - used) * MIB, f_frsize=1)
        monkeypatch.setattr(os, "statvfs", lambda _path, free=free: free)
        assert backend.available_bytes() == (500 - used - 64) * MIB
