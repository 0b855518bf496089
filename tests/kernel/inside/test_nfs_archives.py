"""Snapshots and clones of NFS volumes: archives on the share, made by whoever asks again, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockdev import Deadline, syscalls
from blockdev.nfs import Export, opened
from volumes import StoreFailed, archives, export_ids, share
from volumes.jobs import Progress
from tests.driver import POD, Driver, mount_capability
from tests.kernel.inside.nfs import ROOT, Drivers, KernelNfs

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
SHARE = ROOT / "share"


@pytest.fixture(scope="module")
def nfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelNfs]:
    server = KernelNfs(tmp_path_factory.mktemp("nfs") / "exported", size=512 << 20)
    server.start()
    for name in ("share", "other"):
        (ROOT / name).mkdir(mode=0o777)
    yield server
    server.close()


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    made = Drivers(tmp_path_factory.mktemp("d"))
    yield made
    made.end()


@pytest.fixture
def driver(nfs: KernelNfs, drivers: Drivers) -> Iterator[Driver]:
    for running in drivers.lent():
        yield running
        for entry in running.client.ListSnapshots().entries:
            running.client.DeleteSnapshot(snapshot_id=entry.snapshot.snapshot_id)
        for entry in running.client.ListVolumes().entries:
            running.delete(entry.volume)
        assert not running.mounts(), "left mounted"
        assert os.listdir(SHARE / ".runvol") == ["lock"] if (SHARE / ".runvol").exists() else True
    for name in os.listdir(SHARE):
        if name.startswith("archived-"):
            subprocess.run(["rm", "-rf", SHARE / name], check=True)


def create(
    driver: Driver,
    name: str,
    size: int = 64 << 20,
    share: str = "share",
    timeout: float = 60,
    limit: int = 0,
    **more: Any,
) -> Any:
    content = {"volume_content_source": more.pop("source")} if "source" in more else {}
    parameters = {"backend": "nfs", "server": "127.0.0.1", "path": str(ROOT / share), **more}
    return driver.client.CreateVolume(
        timeout=timeout, name=name, capacity_range={"required_bytes": size, "limit_bytes": limit}, volume_capabilities=[RWX], parameters=parameters,
        **content,
    ).volume  # fmt: skip


def snapshot(driver: Driver, name: str, volume: Any) -> Any:
    return driver.client.CreateSnapshot(name=name, source_volume_id=volume.volume_id).snapshot


def fill(volume: Any, mib: int = 0) -> Path:
    place = Path(volume.volume_context["path"])
    (place / "d").mkdir()
    (place / "d/f").write_text("old")
    (place / "link").symlink_to("/etc/passwd")
    os.chown(place / "d/f", 1000, 2000)
    for number in range(mib):
        (place / f"big-{number}").write_bytes(os.urandom(1 << 20))
    return place


def same(place: Path) -> None:
    assert (place / "d/f").read_text() == "old"
    assert ((place / "d/f").stat().st_uid, (place / "d/f").stat().st_gid) == (1000, 2000)
    assert os.readlink(place / "link") == "/etc/passwd"


def test_a_snapshot_outlives_its_volume_and_becomes_a_new_one(driver):
    volume = create(driver, "one")
    place = fill(volume)
    taken = snapshot(driver, "s", volume)
    assert taken.ready_to_use
    assert taken.size_bytes == volume.capacity_bytes
    assert not taken.accessible_topology
    assert snapshot(driver, "s", volume) == taken
    (place / "d/f").write_text("new")
    driver.delete(volume)
    restored = create(driver, "two", source={"snapshot": {"snapshot_id": taken.snapshot_id}})
    same(Path(restored.volume_context["path"]))
    assert restored.content_source.snapshot.snapshot_id == taken.snapshot_id
    driver.stage(restored, RWX)
    target = driver.publish(restored, POD.format(1), runtime="runc", capability=RWX)
    assert (Path(target) / "d/f").read_text() == "old"
    driver.unpublish(restored, POD.format(1))
    driver.unstage(restored)
    again = create(driver, "two", source={"snapshot": {"snapshot_id": taken.snapshot_id}})
    assert again == restored


def test_a_clone_has_its_own_content(driver):
    volume = create(driver, "one")
    place = fill(volume)
    cloned = create(driver, "two", source={"volume": {"volume_id": volume.volume_id}})
    same(Path(cloned.volume_context["path"]))
    (place / "d/f").write_text("new")
    same(Path(cloned.volume_context["path"]))


def test_a_whole_share_is_copied_without_our_records(driver):
    share = create(driver, "whole", volumeAs="sharepath")
    (SHARE / "f").write_text("x")
    cloned = create(driver, "two", source={"volume": {"volume_id": share.volume_id}})
    assert os.listdir(cloned.volume_context["path"]) == ["f"]
    (SHARE / "f").unlink()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"size": 4096, "limit": 8192}, "OUT_OF_RANGE", "bytes"),
        ({"share": "other"}, "INVALID_ARGUMENT", "another share"),
        ({"volumeAs": "sharepath"}, "INVALID_ARGUMENT", "volumeAs"),
        ({"source": {"snapshot": {"snapshot_id": "nfssnap-0123456789ab-0"}}}, "INVALID_ARGUMENT", "another share"),
        ({"source": {"snapshot": {"snapshot_id": "snap-1"}}}, "NOT_FOUND", "snap-1"),
        ({"source": {"volume": {"volume_id": "loop-1"}}}, "NOT_FOUND", "loop-1"),
    ],
)
def test_what_a_source_cannot_become(driver, change, code, words):
    volume = create(driver, "one")
    taken = snapshot(driver, "s", volume)
    asked = {"source": {"snapshot": {"snapshot_id": taken.snapshot_id}}} | change
    with pytest.raises(grpc.RpcError) as refused:
        create(driver, "two", **asked)
    assert refused.value.code().name == code, refused.value.details()
    assert words in refused.value.details()
    with pytest.raises(grpc.RpcError) as refused:
        driver.client.CreateSnapshot(name="s", source_volume_id=create(driver, "three").volume_id)
    assert refused.value.code().name == "ALREADY_EXISTS"


def test_a_directory_of_somebody_else_is_not_taken(driver):
    volume = create(driver, "one")
    (SHARE / "two").mkdir()
    (SHARE / "two/theirs").write_text("x")
    with pytest.raises(grpc.RpcError) as refused:
        create(driver, "two", source={"volume": {"volume_id": volume.volume_id}})
    assert refused.value.code().name == "ALREADY_EXISTS"
    assert (SHARE / "two/theirs").read_text() == "x"
    subprocess.run(["rm", "-rf", SHARE / "two"], check=True)


def test_a_link_in_a_volumes_place_leads_nowhere(driver):
    """Pods that have the whole share can put one there."""
    volume = create(driver, "one")
    place = Path(volume.volume_context["path"])
    place.rmdir()
    place.symlink_to("/etc")
    with pytest.raises(grpc.RpcError):
        snapshot(driver, "s", volume)
    place.unlink()
    place.mkdir()
    assert snapshot(driver, "s", volume).ready_to_use


def test_the_controllers_own_mount_follows_no_link(nfs, tmp_path):
    (SHARE / "out").symlink_to(tmp_path)
    export = Export(server="127.0.0.1", path=str(SHARE))
    with opened(export, Deadline.after(20)) as root, pytest.raises(OSError, match="symbolic links"):
        os.mkdir("out/new", dir_fd=root)
    (SHARE / "out").unlink()
    assert os.listdir(tmp_path) == []


def test_a_tar_on_the_share_changes_nothing_of_this_machine(nfs, tmp_path):
    """Whether or not the kernel can mount a directory of the export's mount alone."""
    outside = tmp_path / "outside"
    (outside / "d").mkdir(parents=True)
    (SHARE / "packed/d").mkdir(parents=True)
    for number in range(200):
        (SHARE / "packed/d" / str(number)).write_text("root")
        (SHARE / "packed/d" / str(number)).chmod(0o4755)
    before = [(path.lstat().st_mode, path.lstat().st_ctime_ns) for path in (outside, outside / "d")]
    stop, export = threading.Event(), Export(server="127.0.0.1", path=str(SHARE))
    (SHARE / "link").symlink_to(outside / "d")

    def swap() -> None:
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                syscalls.exchange(str(SHARE / "new/d"), str(SHARE / "link"))

    hostile = threading.Thread(target=swap)
    hostile.start()
    until = time.monotonic() + 8
    try:
        while time.monotonic() < until:
            (SHARE / "new").mkdir()
            with opened(export, Deadline.after(20)) as root, share.opened(root, "packed") as source:
                with share.opened(root, "new") as target, contextlib.suppress(StoreFailed):
                    archives.copy(source, target, Progress("c"))
            assert [(path.lstat().st_mode, path.lstat().st_ctime_ns) for path in (outside, outside / "d")] == before
            (SHARE / "new").rename(SHARE / f"done-{time.monotonic()}")
    finally:
        stop.set()
        hostile.join()
        subprocess.run(
            ["rm", "-rf", SHARE / "packed", SHARE / "link", SHARE / "new", *SHARE.glob("done-*")], check=True
        )
    assert os.listdir(outside / "d") == []


def test_nothing_is_deleted_that_is_being_copied_and_a_killed_copy_is_begun_again(driver):
    volume = create(driver, "one")
    place = fill(volume, 50)
    for number in range(4):
        asked = {"name": f"s{number}", "source_volume_id": volume.volume_id}
        try:
            driver.client.CreateSnapshot(timeout=0.15 + 0.15 * number, **asked)
        except grpc.RpcError as error:
            assert error.code().name in ("DEADLINE_EXCEEDED", "ABORTED"), error
        driver.process.send_signal(signal.SIGKILL)
        driver.process.wait()
        driver.start()
        listed = {one.snapshot.snapshot_id: one.snapshot.ready_to_use for one in driver.client.ListSnapshots().entries}
        if not all(listed.values()):
            with pytest.raises(grpc.RpcError) as refused:
                driver.delete(volume)
            assert refused.value.code().name == "ABORTED"
            assert "being copied" in refused.value.details()
        until = time.monotonic() + 60
        while not driver.client.CreateSnapshot(timeout=30, **asked).snapshot.ready_to_use:
            assert time.monotonic() < until
    snapshots = [one.snapshot for one in driver.client.ListSnapshots().entries]
    assert len(snapshots) == 4
    (SHARE / ".runvol" / f"{export_ids.short(snapshots[0].snapshot_id)}.0.new.tar").write_text("left by a kill")
    source = {"snapshot": {"snapshot_id": snapshots[-1].snapshot_id}}
    for number in range(3):
        try:
            create(driver, f"r{number}", source=source, timeout=0.2 + 0.2 * number)
        except grpc.RpcError as error:
            assert error.code().name in ("DEADLINE_EXCEEDED", "ABORTED"), error
        driver.process.send_signal(signal.SIGKILL)
        driver.process.wait()
        driver.start()
        until = time.monotonic() + 60
        while True:
            try:
                restored = create(driver, f"r{number}", source=source)
                break
            except grpc.RpcError as error:
                assert error.code().name == "ABORTED"
                assert time.monotonic() < until
        new = Path(restored.volume_context["path"])
        same(new)
        assert (new / "big-49").read_bytes() == (place / "big-49").read_bytes()
        assert sorted(os.listdir(new)) == sorted(os.listdir(place))
        driver.delete(restored)
        subprocess.run(["rm", "-rf", *SHARE.glob("archived-r*")], check=True)


@pytest.mark.long
def test_a_long_copy_says_how_far_it_is(driver, nfs):
    """The server stops in the middle: the call answers all the same, and the copy ends once the server is back."""
    volume = create(driver, "one")
    fill(volume, 100)
    nfs.stop()
    try:
        with pytest.raises(grpc.RpcError) as refused:
            create(driver, "two", source={"volume": {"volume_id": volume.volume_id}}, timeout=20)
        assert "127.0.0.1" in refused.value.details()
    finally:
        nfs.start()
    until = time.monotonic() + 60
    while True:
        try:
            cloned = create(driver, "two", source={"volume": {"volume_id": volume.volume_id}})
            break
        except grpc.RpcError as error:
            assert time.monotonic() < until, error
            time.sleep(0.5)
    same(Path(cloned.volume_context["path"]))


def end_of(call: Any) -> str:
    """The code of a copy that fails. On a slow machine it is not ready at first, and is asked for again."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            assert not getattr(call(), "ready_to_use", True)
        except grpc.RpcError as error:
            if error.code().name != "ABORTED":
                return error.code().name
        time.sleep(0.5)
    raise AssertionError("the copy has no end")


def test_a_full_share_leaves_nothing_half(driver):
    volume = create(driver, "one")
    fill(volume, 150)
    filler = ROOT / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(ROOT)
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - (60 << 20)))
    try:
        for call in (lambda: snapshot(driver, "s", volume),
                     lambda: create(driver, "two", source={"volume": {"volume_id": volume.volume_id}})):  # fmt: skip
            assert end_of(call) == "RESOURCE_EXHAUSTED"
            assert not [name for name in os.listdir(SHARE / ".runvol") if "new" in name]
    finally:
        filler.unlink()
    assert snapshot(driver, "s", volume).ready_to_use
    same(Path(create(driver, "two", source={"volume": {"volume_id": volume.volume_id}}).volume_context["path"]))


def test_two_controllers_may_make_the_same(driver, tmp_path):
    volume = create(driver, "one")
    place = fill(volume, 30)
    with Driver(tmp_path / "other") as other, futures.ThreadPoolExecutor(2) as callers:
        # The other one has heard of the share once, as every controller has that made a volume there.
        assert create(other, "one").volume_id == volume.volume_id

        def taken(one: Driver) -> Any:
            until = time.monotonic() + 60
            while True:
                found = snapshot(one, "s", volume)
                if found.ready_to_use:
                    return found
                assert time.monotonic() < until

        first, second = callers.map(taken, (driver, other))
        assert first.snapshot_id == second.snapshot_id
        source = {"snapshot": {"snapshot_id": first.snapshot_id}}

        def restored(one: Driver) -> Any:
            until = time.monotonic() + 60
            while True:
                try:
                    return create(one, "two", source=source)
                except grpc.RpcError as error:
                    assert time.monotonic() < until, error

        made = list(callers.map(restored, (driver, other)))
        assert made[0].volume_id == made[1].volume_id
    new = Path(made[0].volume_context["path"])
    same(new)
    assert sorted(os.listdir(new)) == sorted(os.listdir(place))
    assert not [name for name in os.listdir(SHARE / ".runvol") if "new" in name]


def test_a_damaged_record_stops_no_list_and_is_never_taken_for_nothing(driver):
    volume, other = create(driver, "one"), create(driver, "two", archiveOnDelete="false")
    record = SHARE / ".runvol" / f"{export_ids.short(volume.volume_id)}.json"
    good = record.read_bytes()
    record.write_bytes(b'{"volume_id": ')
    assert [entry.volume.volume_id for entry in driver.client.ListVolumes().entries] == [other.volume_id]
    (SHARE / "two/data").write_text("x")
    driver.delete(other)
    (archived,) = SHARE.glob("archived-two-*")
    assert (archived / "data").exists(), "a bad record stops itself, and lets nothing be removed"
    for call in (lambda: create(driver, "one"), lambda: driver.delete(volume)):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code().name == "ABORTED"
        assert record.name in refused.value.details()
    record.write_bytes(good)


def test_content_that_vanished_before_it_was_in_place_is_copied_again(driver):
    volume = create(driver, "one")
    fill(volume)
    cloned = create(driver, "two", source={"volume": {"volume_id": volume.volume_id}})
    record = SHARE / ".runvol" / f"{export_ids.short(cloned.volume_id)}.json"
    # As if the controller had been killed between the copy and its end, and somebody had tidied up.
    record.write_text(record.read_text().replace('"ready":true', '"ready":false'))
    subprocess.run(["rm", "-rf", cloned.volume_context["path"]], check=True)
    same(Path(create(driver, "two", source={"volume": {"volume_id": volume.volume_id}}).volume_context["path"]))
