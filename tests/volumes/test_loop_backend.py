"""The backend `loop`: its store, its files, and what a killed process leaves."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest

from blockdev import DeviceBusy, NotBlank, WrongFilesystem, loops, superblocks
from volumes import (
    AccessMode,
    Capability,
    InvalidParameter,
    NoSpace,
    SizeNotAllowed,
    SizeRange,
    StoreFailed,
    VolumeConflict,
    VolumeNotFound,
    VolumeUnfinished,
)
from volumes.busy import Busy
from volumes.loop import LoopBackend
from volumes.store import State

pytestmark = pytest.mark.kernel

MIB = 1 << 20
USES = [Capability(mode=AccessMode.SINGLE_NODE_WRITER)]


@pytest.fixture
def backend(tmp_path):
    made = LoopBackend(str(tmp_path))
    yield made
    made.close()


def create(backend, name="pvc-1", required=64 * MIB, limit=0, parameters=None, uses=None):
    return backend.create(
        name, SizeRange(required=required, limit=limit), parameters or {}, USES if uses is None else uses
    )


def path_of(backend, volume):
    return Path(backend.attach(volume.volume_id).path)


def test_a_new_volume_is_a_sparse_file_of_its_size(backend):
    volume = create(backend)
    facts = path_of(backend, volume).stat()
    assert (facts.st_size, facts.st_blocks, facts.st_mode & 0o777) == (64 * MIB, 0, 0o600)
    assert backend.get(volume.volume_id) == volume


def test_a_preallocated_volume_has_its_blocks(backend):
    volume = create(backend, parameters={"preallocate": "true"})
    assert path_of(backend, volume).stat().st_blocks * 512 >= 64 * MIB


def test_the_same_name_with_the_same_arguments_is_the_same_volume(backend):
    first = create(backend, required=64 * MIB, limit=128 * MIB)
    assert create(backend, required=64 * MIB, limit=128 * MIB) == first
    assert create(backend, required=0, limit=64 * MIB) == first
    assert create(backend, required=1, limit=0) == first
    assert len(backend.list()) == 1


@pytest.mark.parametrize(
    ("required", "limit", "parameters"), [(65 * MIB, 0, {}), (1, 63 * MIB, {}), (64 * MIB, 0, {"preallocate": "true"})]
)
def test_the_same_name_with_other_arguments_is_a_conflict(backend, required, limit, parameters):
    create(backend)
    with pytest.raises(VolumeConflict, match="pvc-1"):
        create(backend, required=required, limit=limit, parameters=parameters)


@pytest.mark.parametrize(
    ("required", "limit", "got"),
    [
        (0, 0, 1 << 30),
        (0, 100 * MIB, 100 * MIB),
        (1, 0, 8 * MIB),
        (64 * MIB + 1, 0, 65 * MIB),
        (64 * MIB + 1, 64 * MIB + 4096, 64 * MIB + 4096),
    ],
)
def test_sizes_are_chosen_inside_the_range(backend, required, limit, got):
    assert create(backend, required=required, limit=limit).capacity_bytes == got


@pytest.mark.parametrize(
    ("required", "limit"), [(-1, 0), (0, -5), (2, 1), (0, 4096), (64 * MIB + 1, 64 * MIB + 2), (2**63 - 1, 0)]
)
def test_a_range_that_no_size_satisfies_is_refused_with_the_field(backend, required, limit):
    with pytest.raises(SizeNotAllowed, match="_bytes"):
        create(backend, required=required, limit=limit)
    assert not backend.list()


def test_an_xfs_volume_is_at_least_as_large_as_mkfs_wants(backend):
    uses = [Capability(mode=AccessMode.SINGLE_NODE_WRITER, fstype="xfs")]
    assert create(backend, required=1, uses=uses).capacity_bytes == 300 * MIB
    with pytest.raises(SizeNotAllowed):
        create(backend, "small", required=1, limit=200 * MIB, uses=uses)


def test_what_is_promised_counts_as_well_as_what_is_used(tmp_path):
    backend = LoopBackend(str(tmp_path), capacity_limit=100 * MIB)
    assert backend.available_bytes() == 100 * MIB
    create(backend, "a", 60 * MIB)
    assert backend.available_bytes() == 40 * MIB
    with pytest.raises(NoSpace, match="can still be promised"):
        create(backend, "b", 41 * MIB)
    create(backend, "c", 40 * MIB)
    assert [volume.name for _, volume in backend.list()] == ["a", "c"]
    backend.close()


def test_a_refusal_for_want_of_room_stays_the_same_while_others_write(tmp_path, monkeypatch):
    said = set()
    backend = LoopBackend(str(tmp_path))
    for free in (12 << 30, (12 << 30) + 5 * MIB + 17, (13 << 30) - 1):
        monkeypatch.setattr(backend, "available_bytes", lambda free=free: free)
        with pytest.raises(NoSpace) as refused:
            create(backend, "a", 20 << 30)
        said.add(str(refused.value))
    assert len(said) == 1 and "about 12 GiB can still be promised" in said.pop()
    backend.close()


def test_the_disk_itself_is_the_limit_otherwise(backend):
    with pytest.raises(NoSpace):
        create(backend, required=1 << 50)
    assert not backend.list()
    assert len(os.listdir(path_of(backend, create(backend)).parent)) == 1


def test_a_disk_that_fills_during_preallocation_leaves_nothing(tmp_path, soon):
    from blockdev import mounts

    small = tmp_path / "small"
    small.mkdir()
    mounts.mount("none", str(small), "tmpfs", ["size=40m"], soon)
    backend = LoopBackend(str(small))
    try:
        backend.available_bytes = lambda: 1 << 40  # somebody else took the space after the check
        with pytest.raises(NoSpace, match="disk cannot take"):
            create(backend, required=64 * MIB, parameters={"preallocate": "true"})
        assert not backend.list() and not os.listdir(small / "volumes")
    finally:
        backend.close()
        mounts.be_unmounted(str(small), soon)


def test_delete_can_be_repeated_and_refuses_a_volume_in_use(backend, soon):
    volume = create(backend)
    path = str(path_of(backend, volume))
    device = loops.attach(path, deadline=soon)
    with pytest.raises(DeviceBusy):
        backend.delete(volume.volume_id)
    assert os.path.exists(path)
    loops.detach(device, path, soon)
    backend.delete(volume.volume_id)
    backend.delete(volume.volume_id)
    backend.delete("loop-unknown")
    assert not os.path.exists(path) and not backend.list()


def test_growth_changes_row_and_file_and_never_shrinks(backend):
    volume = create(backend)
    assert backend.check_expand(volume.volume_id, SizeRange(required=100 * MIB)) == 100 * MIB
    assert path_of(backend, volume).stat().st_size == 64 * MIB
    assert backend.expand(volume.volume_id, SizeRange(required=100 * MIB)).capacity_bytes == 100 * MIB
    assert backend.expand(volume.volume_id, SizeRange(required=10 * MIB)).capacity_bytes == 100 * MIB
    assert path_of(backend, volume).stat().st_size == 100 * MIB
    with pytest.raises(SizeNotAllowed, match="never shrinks"):
        backend.expand(volume.volume_id, SizeRange(limit=64 * MIB))
    with pytest.raises(VolumeNotFound):
        backend.expand("loop-unknown", SizeRange(required=1))


def test_pages_are_stable_while_volumes_come_and_go(backend):
    volumes = [create(backend, f"v{n}", 8 * MIB) for n in range(6)]
    seq, first = backend.list(limit=2)[-1]
    assert first.name == "v1"
    backend.delete(volumes[0].volume_id)
    backend.delete(volumes[2].volume_id)
    create(backend, "v9", 8 * MIB)
    assert [volume.name for _, volume in backend.list(after=seq)] == ["v3", "v4", "v5", "v9"]


def test_formatting_happens_once_and_leaves_data_alone(backend, soon):
    volume = create(backend)
    backend.format(volume.volume_id, "ext4", soon)
    uuid = superblocks.read(str(path_of(backend, volume))).uuid
    backend.format(volume.volume_id, "ext4", soon)
    assert superblocks.read(str(path_of(backend, volume))).uuid == uuid
    with pytest.raises(WrongFilesystem, match="holds ext4, but xfs"):
        backend.format(volume.volume_id, "xfs", soon)


def test_data_without_a_filesystem_is_never_formatted_over(backend, soon):
    volume = create(backend)
    path_of(backend, volume).write_bytes(b"my precious database" + bytes(64 * MIB - 20))
    with pytest.raises(NotBlank):
        backend.format(volume.volume_id, "ext4", soon)
    assert path_of(backend, volume).read_bytes()[:20] == b"my precious database"
    assert not backend.get(volume.volume_id).formatting


def test_an_interrupted_mkfs_is_finished_by_the_next_attempt(backend, soon):
    volume = create(backend)
    backend._store.set_formatting(volume.volume_id, True)
    with open(path_of(backend, volume), "r+b") as file:
        file.write(b"half a filesystem" * 1000)
    backend.format(volume.volume_id, "ext4", soon)
    assert superblocks.read(str(path_of(backend, volume))).clean
    assert not backend.get(volume.volume_id).formatting


@pytest.mark.parametrize("state", [State.CREATING, State.DELETING])
@pytest.mark.parametrize("file", ["none", "new", "whole"])
def test_recovery_undoes_what_was_half_made_and_finishes_what_was_half_deleted(backend, state, file):
    volume = create(backend)
    path = path_of(backend, volume)
    backend._store.set_state(volume.volume_id, state)
    if file != "whole":
        path.unlink()
    if file == "new":
        path.with_suffix(".new").touch()
    assert backend.get(volume.volume_id) is None
    assert not backend.list()
    assert backend.recover()
    assert not backend.recover()
    # A whole file is never taken for half a one: where the row is an older store's, pods have it.
    kept = state is State.CREATING and file == "whole"
    assert os.listdir(path.parent) == ([path.name] if kept else [])
    assert (create(backend).volume_id == volume.volume_id) is kept


def test_a_volume_that_is_not_whole_yet_cannot_be_used(backend):
    volume = create(backend)
    backend._store.set_state(volume.volume_id, State.DELETING)
    with pytest.raises(VolumeUnfinished):
        backend.attach(volume.volume_id)


def test_a_creation_that_was_killed_is_settled_by_the_same_name(backend):
    volume = create(backend)
    backend._store.set_state(volume.volume_id, State.CREATING)
    assert create(backend).volume_id == volume.volume_id
    path = path_of(backend, volume)
    backend._store.set_state(volume.volume_id, State.CREATING)
    path.unlink()
    again = create(backend, required=128 * MIB)
    assert again.capacity_bytes == 128 * MIB and len(os.listdir(path_of(backend, again).parent)) == 1


def test_recovery_finishes_a_growth(backend):
    volume = create(backend)
    backend._store.set_capacity(volume.volume_id, 128 * MIB)
    assert any("growing" in said for said in backend.recover())
    assert path_of(backend, volume).stat().st_size == 128 * MIB


def test_an_adopted_image_keeps_its_data_also_if_adoption_was_interrupted(backend, tmp_path, soon):
    image = tmp_path / "old.img"
    image.write_bytes(b"old data" + bytes(16 * MIB - 8))
    volume = backend.adopt(str(image), "static")
    assert not image.exists() and path_of(backend, volume).read_bytes()[:8] == b"old data"
    backend._store.set_state(volume.volume_id, State.ADOPTING)
    backend.recover()
    assert path_of(backend, volume).read_bytes()[:8] == b"old data"
    with pytest.raises(VolumeConflict):
        image.write_bytes(bytes(MIB))
        backend.adopt(str(image), "static")
    assert image.exists()


def test_an_image_that_is_in_use_or_odd_is_not_adopted(backend, tmp_path):
    odd = tmp_path / "odd.img"
    odd.write_bytes(b"x" * 513)
    with pytest.raises(SizeNotAllowed, match="512"):
        backend.adopt(str(odd), "odd")
    used = tmp_path / "used.img"
    used.write_bytes(bytes(MIB))
    with open(used, "rb"), pytest.raises(DeviceBusy):
        backend.adopt(str(used), "used")
    if os.path.isdir("/dev/shm"):
        far = Path("/dev/shm/runvol-test-far.img")
        far.write_bytes(bytes(MIB))
        with pytest.raises(InvalidParameter, match="same filesystem"):
            backend.adopt(str(far), "far")
        far.unlink()


def test_files_that_nobody_knows_are_reported_and_never_removed(backend):
    create(backend)
    stranger = path_of(backend, create(backend)).parent / "loop-stranger.img"
    stranger.write_bytes(b"data")
    backend.recover()
    assert backend.unknown_files() == [str(stranger)] and stranger.read_bytes() == b"data"


def test_recovery_meets_no_creation_of_another_process(tmp_path):
    """What somebody is at work on is left to him, and nothing else waits for him."""
    backend = LoopBackend(str(tmp_path))
    busy, left = create(backend, name="busy"), create(backend, name="left")
    for volume in (busy, left):
        backend._store.set_state(volume.volume_id, State.DELETING)
    with backend._busy("volume busy"):
        other = LoopBackend(str(tmp_path))
        assert [one.name for one in other.unfinished()] == [left.volume_id]
        assert other.recover() == [f"removed volume {left.volume_id}, which was deleting when the process ended"]
        assert other.unfinished() == []
        with pytest.raises(VolumeUnfinished, match="at work on volume busy"), other._busy("volume busy", seconds=0):
            pass
        create(other, name="left")
        other.close()
    assert backend.recover() == [f"removed volume {busy.volume_id}, which was deleting when the process ended"]
    backend.close()


def test_threads_and_children_of_one_process_exclude_each_other_too(tmp_path):
    busy = Busy(str(tmp_path / "lock"))
    with busy("a"):
        child = subprocess.Popen(["sleep", "60"])  # which inherits nothing that would keep the lock
        answers = []

        def other(what):
            try:
                with busy(what, seconds=0):
                    answers.append(f"{what} is free")
            except VolumeUnfinished:
                answers.append(f"{what} is busy")

        for what in ("a", "b"):
            thread = threading.Thread(target=other, args=(what,))
            thread.start()
            thread.join()
        assert answers == ["a is busy", "b is free"]
    try:
        other("a")
        assert answers[-1] == "a is free"
    finally:
        child.kill()
        child.wait()


def test_a_store_of_a_newer_release_is_refused(tmp_path):
    LoopBackend(str(tmp_path)).close()
    subprocess.run(
        [  # as a newer release would leave it
            "python3",
            "-c",
            f"import sqlite3; d=sqlite3.connect('{tmp_path}/volumes.db'); d.execute('PRAGMA user_version=99'); d.commit()",
        ],
        check=True,
    )
    with pytest.raises(StoreFailed, match="newer runvol"):
        LoopBackend(str(tmp_path))


def test_a_damaged_store_is_an_error_of_what_needs_it_and_stops_no_start(tmp_path):
    (tmp_path / "volumes.db").write_bytes(b"this is no database" * 1000)
    backend = LoopBackend(str(tmp_path))
    assert backend.recover() == []
    assert [one.name for one in backend.unfinished()] == [f"{tmp_path}/volumes.db"]
    for call in (
        backend.list,
        lambda: create(backend),
        lambda: backend.delete("loop-1"),
        lambda: backend.get("loop-1"),
    ):
        with pytest.raises(StoreFailed, match=r"volumes\.db"):
            call()
    (tmp_path / "volumes.db").unlink()
    assert create(backend), "it is opened once it can be"
    backend.close()


def test_a_store_on_a_filesystem_that_takes_no_writes_is_read_and_written_again_once_it_does(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "none", disk], check=True)
    try:
        first = LoopBackend(str(disk / "state"))
        volume = create(first)
        first._store.set_state(create(first, "two").volume_id, State.DELETING)
        first.close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        backend = LoopBackend(str(disk / "state"))
        assert backend.recover() == []
        assert [one.volume_id for _seq, one in backend.list()] == [volume.volume_id]
        assert backend.attach(volume.volume_id).path
        with pytest.raises((StoreFailed, OSError)):
            backend.delete(volume.volume_id)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert len(backend.recover()) == 1
        backend.delete(volume.volume_id)
        assert backend.list() == []
        backend.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_one_volume_that_cannot_be_recovered_stops_no_other(backend):
    """The disk has filled up since the first was to grow; the second was being deleted."""
    grown, deleted = create(backend, parameters={"preallocate": "true"}), create(backend, "two")
    backend._store.set_capacity(grown.volume_id, 1 << 50)
    backend._store.set_state(deleted.volume_id, State.DELETING)
    assert [one.name for one in backend.unfinished()] == [deleted.volume_id]
    said = backend.recover()
    assert said == [f"removed volume {deleted.volume_id}, which was deleting when the process ended"]
    (left,) = backend.unfinished()
    assert left.name == grown.volume_id
    assert "the disk cannot take a volume of" in left.why


@pytest.mark.parametrize("name", ["mine.new", "loop-mine.new", "mine.snap-new", "mine"])
def test_a_start_removes_no_file_that_no_row_knows(backend, name):
    stranger = path_of(backend, create(backend)).parent / name
    stranger.write_bytes(b"data")
    assert backend.unknown_files() == [str(stranger)]
    assert backend.recover() == []
    assert backend.unknown_files() == [str(stranger)]
    assert stranger.read_bytes() == b"data"


def test_a_transaction_that_the_disk_refuses_is_taken_back(backend):
    class Full:
        """A connection whose disk fills up at the end."""

        def __init__(self, real):
            self.real = real

        def execute(self, statement, *values):
            if statement == "COMMIT":
                raise sqlite3.OperationalError("database or disk is full")
            return self.real.execute(statement, *values)

        @property
        def in_transaction(self):
            return self.real.in_transaction

    backend.prepare()
    store = backend._store
    real, store._db = store._db, Full(store._db)
    with pytest.raises(StoreFailed, match="full"):
        create(backend)
    store._db = real
    assert not real.in_transaction
    assert store.rows() == []


def test_creations_run_beside_each_other(tmp_path):
    backend = LoopBackend(str(tmp_path), capacity_limit=20 * 8 * MIB)
    results = []

    def work(number):
        try:
            results.append(create(backend, f"v{number}", 8 * MIB).volume_id)
        except NoSpace:
            results.append(None)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [one for one in results if one]
    assert len(results) == 30 and len(made) == len(set(made)) == 20 == len(backend.list())
    backend.close()


@pytest.mark.parametrize(
    "volume_id", ["../../etc/passwd", "loop-../x", "LOOP-A", "", "loop-" + "a" * 200, "loop-a\n", "loop-a/b"]
)
def test_an_id_is_never_a_path(backend, volume_id):
    assert backend.get(volume_id) is None
    with pytest.raises(VolumeNotFound):
        backend.attach(volume_id)
