"""Snapshots, clones and groups of file-backed volumes: contents, not only codes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from concurrent import futures

import grpc
import pytest

from blockdev import Deadline, DeviceBusy, mounts
from tests.csi.helpers import PODS, image, refused, vmm
from tests.driver import Driver, mount_capability
from volumes import copies

pytestmark = pytest.mark.kernel
A = PODS[0]
MIB = 1 << 20


def write(driver, volume, text):
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    with open(f"{target}/file", "w") as file:
        file.write(text)
    driver.unpublish(volume, A)


def read(driver, volume, runtime="runc"):
    driver.stage(volume)
    target = driver.publish(volume, A, runtime=runtime)
    with open(f"{target}/file") as file:
        text = file.read()
    driver.unpublish(volume, A)
    driver.unstage(volume)
    return text


def restore(driver, name, size=64 * MIB, **source):
    content = {"volume_content_source": source} if source else {}
    return driver.client.CreateVolume(
        name=name, capacity_range={"required_bytes": size}, volume_capabilities=[mount_capability()], **content
    ).volume


def test_a_snapshot_keeps_what_was_and_can_be_restored_larger(driver):
    volume = driver.create("pvc")
    write(driver, volume, "before")
    snapshot = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap").snapshot
    assert snapshot.ready_to_use and snapshot.size_bytes == 64 * MIB and snapshot.creation_time.seconds
    write(driver, volume, "after")
    driver.unstage(volume)
    driver.delete(volume)
    restored = restore(driver, "restored", 128 * MIB, snapshot={"snapshot_id": snapshot.snapshot_id})
    assert restored.content_source.snapshot.snapshot_id == snapshot.snapshot_id
    assert read(driver, restored) == "before"
    from blockdev import superblocks

    assert superblocks.read(str(image(driver, restored))).total_bytes == 128 * MIB
    driver.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
    driver.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
    driver.delete(restored)
    assert not any(driver.left_over().values())


def test_a_clone_is_independent_of_its_volume(driver):
    volume = driver.create("pvc")
    write(driver, volume, "one")
    driver.unstage(volume)
    clone = restore(driver, "clone", volume={"volume_id": volume.volume_id})
    assert restore(driver, "clone", volume={"volume_id": volume.volume_id}).volume_id == clone.volume_id
    with refused("ALREADY_EXISTS", "was made from"):
        restore(driver, "clone")
    write(driver, clone, "two")
    driver.unstage(clone)
    assert (read(driver, volume), read(driver, clone)) == ("one", "two")


def test_both_the_volume_and_its_copy_can_be_mounted_at_once_also_xfs(driver):
    capability = mount_capability(fstype="xfs")
    volume = driver.create("pvc", 320 * MIB, capability)
    driver.stage(volume, capability)
    clone = driver.client.CreateVolume(
        name="clone", capacity_range={"required_bytes": 320 * MIB}, volume_capabilities=[capability],
        volume_content_source={"volume": {"volume_id": volume.volume_id}},
    ).volume  # fmt: skip
    driver.stage(clone, capability)
    for one in (volume, clone):
        driver.publish(one, A, runtime="runc", capability=capability)
    for one in (volume, clone):
        driver.unpublish(one, A)


def test_what_cannot_be_copied_is_refused_and_leaves_nothing(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata", name="db-0")
    # Open or not: between two containers the runtime has the device nowhere, and takes it again without asking.
    for held in (contextlib.nullcontext(), vmm(image(driver, volume))):
        with held:
            with refused("FAILED_PRECONDITION", "default/db-0", "delete the pod"):
                driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap")
            with refused("FAILED_PRECONDITION", "default/db-0", "delete the pod"):
                restore(driver, "clone", volume={"volume_id": volume.volume_id})
            with refused("FAILED_PRECONDITION", "default/db-0"):
                driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=[volume.volume_id])
    assert len(driver.left_over()["files"]) == 1 and not driver.client.ListSnapshots().entries
    with refused("NOT_FOUND", "snap-none"):
        restore(driver, "x", snapshot={"snapshot_id": "snap-none"})
    with refused("NOT_FOUND", "loop-none"):
        driver.client.CreateSnapshot(source_volume_id="loop-none", name="snap")
    with refused("OUT_OF_RANGE"):
        driver.client.CreateVolume(name="y", volume_capabilities=[mount_capability()], capacity_range={"limit_bytes": 32 * MIB},
                                   volume_content_source={"volume": {"volume_id": volume.volume_id}})  # fmt: skip
    driver.unpublish(volume, A)


def test_a_runc_pod_that_keeps_a_volume_from_being_copied_is_named(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="runc", name="db-0")
    with refused("FAILED_PRECONDITION", "in use by pod default/db-0", "delete the pod", "XFS, btrfs"):
        driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap")
    driver.unpublish(volume, A)


def test_on_a_filesystem_with_reflinks_a_volume_in_use_is_snapshot_in_one_step(soon):
    """XFS under the state directory: the copy is what a power cut would have left."""
    with Driver() as driver:
        driver.stop()
        disk = driver.directory / "disk.img"
        subprocess.run(["truncate", "-s", "1G", disk], check=True)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True)
        place = driver.directory / "fast"
        place.mkdir()
        subprocess.run(["mount", "-o", "loop", disk, place], check=True)
        try:
            driver.environment["RUNVOL_PATHS_STATE_DIR"] = str(place / "state")
            driver.state = place / "state"
            driver.start()
            volume = driver.create("pvc")
            write(driver, volume, "live")
            driver.publish(volume, A, runtime="kata")
            with vmm(image(driver, volume)):
                snapshot = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap").snapshot
            driver.unpublish(volume, A)
            assert read(driver, restore(driver, "r", snapshot={"snapshot_id": snapshot.snapshot_id})) == "live"
            driver.unstage(volume)
        finally:
            driver.stop()
            mounts.be_unmounted(str(place), soon)


def test_names_lists_and_pages(driver):
    volumes = [driver.create(f"v{n}", 8 * MIB) for n in range(2)]
    taken = [
        driver.client.CreateSnapshot(source_volume_id=volumes[n % 2].volume_id, name=f"s{n}").snapshot for n in range(4)
    ]
    assert driver.client.CreateSnapshot(source_volume_id=volumes[0].volume_id, name="s0").snapshot == taken[0]
    with refused("ALREADY_EXISTS", "s0"):
        driver.client.CreateSnapshot(source_volume_id=volumes[1].volume_id, name="s0")
    first = driver.client.ListSnapshots(max_entries=3)
    second = driver.client.ListSnapshots(max_entries=3, starting_token=first.next_token)
    assert [entry.snapshot for page in (first, second) for entry in page.entries] == taken and not second.next_token
    only = driver.client.ListSnapshots(source_volume_id=volumes[1].volume_id)
    assert [entry.snapshot.snapshot_id for entry in only.entries] == [taken[1].snapshot_id, taken[3].snapshot_id]
    assert driver.client.GetSnapshot(snapshot_id=taken[2].snapshot_id).snapshot == taken[2]
    with refused("INVALID_ARGUMENT", "'speed'"):
        driver.client.CreateSnapshot(source_volume_id=volumes[0].volume_id, name="p", parameters={"speed": "fast"})


def test_a_group_is_taken_whole_read_back_and_deleted_whole(driver):
    volumes = [driver.create(f"v{n}", 64 * MIB) for n in range(2)]
    for number, volume in enumerate(volumes):
        write(driver, volume, f"text {number}")
    ids = [volume.volume_id for volume in volumes]
    group = driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=ids).group_snapshot
    assert driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=reversed(ids)).group_snapshot == group
    assert {one.source_volume_id for one in group.snapshots} == set(ids) and group.ready_to_use
    with refused("ALREADY_EXISTS", "group of the volumes"):
        driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=ids[:1])
    with refused("INVALID_ARGUMENT", "snapshot_ids"):
        driver.client.GetVolumeGroupSnapshot(group_snapshot_id=group.group_snapshot_id, snapshot_ids=["snap-x"])
    with refused("INVALID_ARGUMENT", "belongs to the group"):
        driver.client.DeleteSnapshot(snapshot_id=group.snapshots[0].snapshot_id)
    restored = restore(driver, "r", snapshot={"snapshot_id": group.snapshots[0].snapshot_id})
    assert read(driver, restored).startswith("text ")
    members = [one.snapshot_id for one in group.snapshots]
    driver.client.DeleteVolumeGroupSnapshot(group_snapshot_id=group.group_snapshot_id, snapshot_ids=members)
    assert not driver.client.ListSnapshots().entries
    for volume in volumes:
        driver.unstage(volume)


def test_a_server_killed_in_the_middle_leaves_no_half_snapshot(driver):
    volume = driver.create("pvc")
    snapshot = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap").snapshot
    driver.kill()
    import sqlite3

    with sqlite3.connect(driver.state / "volumes.db") as store:
        store.execute("UPDATE snapshots SET state = 'creating'")
    store.close()
    whole = driver.state / "volumes" / f"{snapshot.snapshot_id}.snap"
    whole.rename(whole.with_suffix(".snap-new"))
    driver.start()
    assert not driver.client.ListSnapshots().entries and len(driver.left_over()["files"]) == 1
    again = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap").snapshot
    assert again.snapshot_id != snapshot.snapshot_id


def test_one_snapshot_is_restored_many_times_at_once(driver):
    volume = driver.create("pvc")
    write(driver, volume, "many")
    taken = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap").snapshot
    with futures.ThreadPoolExecutor(8) as several:
        made = list(several.map(
            lambda number: restore(driver, f"r{number}", snapshot={"snapshot_id": taken.snapshot_id}), range(8)
        ))  # fmt: skip
    assert len({one.volume_id for one in made}) == 8


def test_what_is_written_in_the_middle_of_a_copy_is_no_snapshot(tmp_path, monkeypatch):
    """Opened and closed again between the two looks: only the file's time of change tells."""
    source = tmp_path / "image"
    source.write_bytes(bytes(1 << 20))

    def written(_reader, _writer, path, _deadline, _progress):
        with open(path, "r+b") as file:
            file.write(b"later")

    monkeypatch.setattr(copies, "_copy_data", written)
    monkeypatch.setattr(copies, "_reflink", lambda _source, _writer: False)
    with pytest.raises(DeviceBusy, match="written to while"):
        with copies.being_made(str(tmp_path / "copy")) as writer:
            copies.copy(str(source), writer, Deadline.after(5), check=lambda: None)


@pytest.fixture
def slow_copies(tmp_path_factory):
    """A driver whose copies take a second for each 8 MiB."""
    place = tmp_path_factory.mktemp("slow")
    (place / "sitecustomize.py").write_text(
        "import os, time\n"
        "real = os.copy_file_range\n"
        "def slow(one, other, count, *more):\n"
        "    time.sleep(0.125)\n"
        "    return real(one, other, min(count, 1 << 20), *more)\n"
        "os.copy_file_range = slow\n"
    )
    with Driver(environment={"PYTHONPATH": str(place)}) as driver:
        yield driver
        assert not [*driver.mounts(), *driver.loop_devices()]


def filled(driver, volume, mebibytes):
    with image(driver, volume).open("r+b") as file:
        for number in range(mebibytes):
            file.write(bytes([number % 250 + 1]) * MIB)


@pytest.mark.parametrize("by", ["the same plugin", "another process"])
def test_a_creation_of_the_same_name_leaves_a_running_copy_alone(slow_copies, by):
    driver = slow_copies
    size = 100 if by == "the same plugin" else 16  # longer than a call waits, or not
    source = driver.create("source", 128 * MIB)
    filled(driver, source, size)
    content = {"volume_content_source": {"volume": {"volume_id": source.volume_id}}}
    asked = {"name": "c", "volume_capabilities": [mount_capability()]}
    with futures.ThreadPoolExecutor(1) as one:
        copying = one.submit(driver.client.CreateVolume, timeout=60.0, **asked, **content)
        while not list((driver.state / "volumes").glob("*.new")):
            time.sleep(0.02)
        if by == "the same plugin":
            with refused("ABORTED", "is under way"):
                copying.result()
            with refused("ALREADY_EXISTS", "was made from"):
                driver.client.CreateVolume(**asked)
            copying = one.submit(driver.client.CreateVolume, timeout=60.0, **asked, **content)
        else:
            done = driver.cli("volumes", "create", "c", "--size", str(64 * MIB), check=False)
            assert done.returncode == 1, "it waits a while, and is then told of the one or of the other"
            assert "at work on volume c" in done.stderr or "was made from" in done.stderr
        made = copying.result().volume
    assert image(driver, made).read_bytes()[: size * MIB] == image(driver, source).read_bytes()[: size * MIB]
    with refused("ALREADY_EXISTS", "was made from"):
        driver.client.CreateVolume(**asked)
    assert len(driver.left_over()["files"]) == 2
    for volume in (made, source):
        driver.delete(volume)
    assert not driver.left_over()["files"]


def test_snapshots_at_once_do_not_spend_the_same_room(slow_copies, tmp_path):
    driver = slow_copies
    driver.stop()
    driver.environment["RUNVOL_PATHS_STATE_DIR"] = str(tmp_path / "disk/state")
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=180m", "none", tmp_path / "disk"], check=True)
    try:
        driver.state = tmp_path / "disk/state"
        driver.start()
        volumes = [driver.create(f"v{number}", 32 * MIB) for number in range(3)]
        for volume in volumes:
            filled(driver, volume, 30)
        with futures.ThreadPoolExecutor(3) as several:

            def taken(volume):
                for _ in range(60):
                    try:
                        return driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name=volume.volume_id)
                    except grpc.RpcError as error:
                        if error.code() is not grpc.StatusCode.ABORTED:
                            return error.code().name
                        time.sleep(0.3)
                return "never"

            answers = list(several.map(taken, volumes))
        # Some 84 MiB can be promised: the third has no room, and is told so before a byte of it is written.
        assert answers.count("RESOURCE_EXHAUSTED") == 1 and "never" not in answers
        assert "could not be written" not in driver.log.read_text()
        driver.stop()
    finally:
        driver.stop()
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("kind", ["clone", "group"])
def test_a_copy_gives_way_to_a_pod_that_waits(slow_copies, kind):
    driver = slow_copies
    driver.stop()
    driver.environment["RUNVOL_LOOP_COPY_GIVES_WAY_SECONDS"] = "1"
    driver.start()
    volume = driver.create("v", 128 * MIB)
    driver.stage(volume)
    filled(driver, volume, 76)  # of no filesystem any more: the volume is only taken, not mounted
    asked = {
        "clone": lambda: driver.client.CreateVolume(
            name="c",
            volume_capabilities=[mount_capability()],
            volume_content_source={"volume": {"volume_id": volume.volume_id}},
            timeout=30.0,
        ),
        "group": lambda: driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=[volume.volume_id]),
    }[kind]
    with refused("ABORTED", "under way"):
        asked()
    codes = set()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            driver.publish(volume, A, runtime="kata")
            break
        except grpc.RpcError as error:
            codes.add(error.code().name)
            if error.code() is not grpc.StatusCode.ABORTED:
                break
        time.sleep(0.2)
    assert codes == {"ABORTED", "FAILED_PRECONDITION"}, "it came to the volume, in which there is nothing any more"
    files = set(driver.left_over()["files"])
    assert len(files) == 1, "nothing of the copy is left"
    driver.unpublish(volume, A)
    driver.unstage(volume)
    until = time.monotonic() + 60
    while True:  # once nobody waits, it is made
        try:
            made = asked()
            break
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.ABORTED and time.monotonic() < until
            time.sleep(0.3)
    if kind == "clone":
        driver.delete(made.volume)
    else:
        group = made.group_snapshot
        members = [one.snapshot_id for one in group.snapshots]
        driver.client.DeleteVolumeGroupSnapshot(group_snapshot_id=group.group_snapshot_id, snapshot_ids=members)
    driver.delete(volume)
