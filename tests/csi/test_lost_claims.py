"""Claims lie where they can be lost while pods run: "no claim" is never "no pod"."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess

import pytest

from blockdev import flocks
from tests.csi.helpers import PODS, has_resource, image, refused, vmm
from tests.driver import block_capability, mount_capability

pytestmark = pytest.mark.kernel
A, B, C = PODS[:3]


def lose_run(driver):
    """With the records of this boot, which no longer lie there."""
    driver.stop()
    shutil.rmtree(driver.run)
    shutil.rmtree(driver.records)
    driver.start()


@pytest.mark.parametrize("alive", [False, True])
def test_a_lost_run_directory_costs_nothing(driver, alive):
    """Emptied under a plugin that serves, too; the pod's name is still known."""
    volume, mounted = driver.create("pvc"), driver.create("mounted")
    driver.stage(volume)
    driver.stage(mounted)
    target = driver.publish(volume, A, runtime="kata", name="web-0")
    file = driver.publish(mounted, A, runtime="runc") + "/file"
    before = driver.left_over()
    if not alive:
        driver.stop()
    shutil.rmtree(driver.run)
    if not alive:
        driver.start()
    with refused("FAILED_PRECONDITION", "default/web-0"):
        driver.publish(volume, B, runtime="kata")
    with refused("FAILED_PRECONDITION", "in use by the host's kernel"):
        driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=[mounted.volume_id])
    driver.cli("gc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata", name="web-0")
    open(file, "w").close()
    assert has_placeholder(target) and driver.left_over() == before
    for one in (volume, mounted):
        driver.unpublish(one, A)
        driver.unstage(one)
        driver.delete(one)
    assert not any(driver.left_over().values())


def test_a_damaged_claim_is_made_again_from_what_stands(driver):
    """A sandbox's from its hand-off; a mounted one's pods go on, and the record is laid aside for people."""
    volume, mounted = driver.create("pvc"), driver.create("mounted")
    for one in (volume, mounted):
        driver.stage(one)
    target = driver.publish(volume, A, runtime="kata")
    file = driver.publish(mounted, A, runtime="runc") + "/file"
    for one in (volume, mounted):
        path = driver.records / "claims" / f"{one.volume_id}.json"
        path.write_bytes(path.read_bytes()[:40])
    with refused("FAILED_PRECONDITION", A):
        driver.stage(volume)
        driver.publish(volume, B, runtime="kata")
    with refused("FAILED_PRECONDITION", "mounted by the host's kernel", A):
        driver.stage(mounted)
        driver.publish(mounted, B, runtime="kata")
    assert has_placeholder(target) and len(os.listdir(driver.records / "damaged")) == 2
    open(file, "w").close()
    for one, runtime in ((volume, "kata"), (mounted, "runc")):
        driver.stage(one)
        driver.publish(one, A, runtime=runtime)
        driver.unpublish(one, A)
        driver.unstage(one)
        driver.delete(one)
    assert not any(driver.left_over().values())


def has_placeholder(target):
    return os.path.exists(f"{target}/RUNVOL-PLACEHOLDER")


@pytest.mark.parametrize("opened", [False, True])
def test_a_sandboxed_pod_keeps_its_volume_through_a_lost_run_directory(driver, opened):
    volume = driver.create("pvc")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata")
    handed = driver.left_over()["hand-off files"]
    fd = os.open(image(driver, volume), os.O_RDWR) if opened else -1
    lose_run(driver)
    driver.cli("gc")
    assert driver.left_over()["hand-off files"] == handed and has_placeholder(target)
    # Nobody else gets it, staged or not, and nothing works on it.
    with refused("FAILED_PRECONDITION", volume.volume_id, A):
        driver.stage(volume)
        driver.publish(volume, B, runtime="kata")
    with refused("FAILED_PRECONDITION", volume.volume_id):
        driver.delete(volume)
    with refused("FAILED_PRECONDITION", volume.volume_id):
        driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="snap")
    # kubelet has restarted too, and repeats what it did.
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata")
    if fd >= 0:
        os.close(fd)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
    assert not any(driver.left_over().values())


def test_an_unpublish_needs_no_claim_that_was_filled_in(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata")
    lose_run(driver)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
    assert not any(driver.left_over().values())


def test_a_runc_pod_keeps_its_mount_and_device_through_a_lost_run_directory(driver):
    volume, block = driver.create("pvc"), driver.create("raw", 16 << 20, block_capability())
    driver.stage(volume)
    driver.stage(block, block_capability())
    target = driver.publish(volume, A, runtime="runc")
    node = driver.publish(block, A, runtime="runc", capability=block_capability())
    number = os.stat(node).st_rdev
    lose_run(driver)
    driver.cli("gc")
    open(f"{target}/file", "w").close()
    with open(node, "r+b", buffering=0) as file:
        file.write(b"mine".ljust(4096))
    assert os.stat(node).st_rdev == number and image(driver, block).read_bytes()[:4] == b"mine"
    with refused("FAILED_PRECONDITION", target):
        driver.delete(volume)
    for one in (volume, block):
        driver.unpublish(one, A)
        driver.unstage(one)
        driver.delete(one)
    assert not any(driver.left_over().values())


def test_a_hand_off_whose_pod_is_gone_is_kept_while_its_device_is_open(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata")
    subprocess.run(["umount", target], check=True)
    shutil.rmtree(driver.kubelet / "pods" / A)
    (driver.records / "claims" / f"{volume.volume_id}.json").unlink()
    with vmm(image(driver, volume)):
        driver.cli("gc")
        assert driver.left_over()["hand-off files"]
    driver.cli("gc")
    assert not driver.left_over()["hand-off files"]


def test_a_damaged_claim_is_told_and_stops_nothing_else(driver):
    volume, other = driver.create("pvc"), driver.create("other")
    for one in (volume, other):
        driver.stage(one)
    target = driver.publish(volume, A, runtime="kata")
    path = driver.records / "claims" / f"{volume.volume_id}.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    for command in (("gc", "--dry-run", "--json"), ("volumes", "--json"), ("doctor", "--json")):
        done = driver.cli(*command, check=False)
        assert str(path) in done.stdout + done.stderr, command
        assert done.returncode in (0, 1, 3) and "Traceback" not in done.stderr
    driver.cli("gc")
    assert has_placeholder(target) and driver.left_over()["hand-off files"]
    assert {row["volume"] for row in json.loads(driver.cli("volumes", "--json").stdout)["items"]} == {
        volume.volume_id,
        other.volume_id,
    }
    driver.stop()
    driver.start()
    driver.publish(other, B, runtime="runc")
    driver.unpublish(other, B)
    driver.unpublish(volume, A)


@pytest.mark.parametrize("kind", ["mounted", "raw", "directory"])
def test_a_running_pod_whose_claim_alone_was_lost_is_adopted(driver, kind):
    """kubelet repeats what it did; then all of it is taken back as ever."""
    use = block_capability() if kind == "raw" else None
    parameters = {"backend": "directory", "quota": "none"} if kind == "directory" else {}
    volume = driver.create("pvc", 64 << 20, use, **parameters)
    driver.stage(volume, use)
    target = driver.publish(volume, A, runtime="runc", capability=use)
    before = driver.left_over()
    (driver.records / "claims" / f"{volume.volume_id}.json").unlink()
    if kind != "directory":
        with refused("FAILED_PRECONDITION", "in use"):
            driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=[volume.volume_id])
    for _ in range(2):
        driver.stage(volume, use)
        driver.publish(volume, A, runtime="runc", capability=use)
    assert driver.left_over() == before
    if kind == "raw":
        open(target, "r+b").close()
    else:
        open(f"{target}/file", "w").close()
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
    assert not any(driver.left_over().values())


def test_gc_keeps_the_claim_of_a_volume_whose_store_is_away(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    driver.stop()
    (driver.state / "volumes.db").rename(driver.state / "away.db")
    for suffix in ("-wal", "-shm"):
        (driver.state / f"volumes.db{suffix}").unlink(missing_ok=True)
    driver.start()
    driver.cli("gc", check=False)
    assert (driver.records / "claims" / f"{volume.volume_id}.json").exists() and os.path.ismount(target)
    driver.stop()
    for name in ("volumes.db", "volumes.db-wal", "volumes.db-shm"):
        (driver.state / name).unlink(missing_ok=True)
    (driver.state / "away.db").rename(driver.state / "volumes.db")
    driver.start()
    driver.unpublish(volume, A)


def test_a_loop_device_that_a_hand_off_names_stays_its_guests(driver):
    volume, other = driver.create("pvc"), driver.create("other")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runv")
    devices = driver.loop_devices()
    lose_run(driver)
    driver.cli("gc")
    # Claims lost once more, with nobody who could make them again: gc alone.
    shutil.rmtree(driver.records / "claims")
    (driver.records / "claims").mkdir()
    driver.cli("gc")
    assert driver.loop_devices() == devices and has_placeholder(target)
    driver.stop()
    driver.start()
    driver.stage(other)
    driver.publish(other, B, runtime="runc")
    driver.unpublish(other, B)
    with refused("FAILED_PRECONDITION", volume.volume_id, A):
        driver.stage(volume)
        driver.publish(volume, B, runtime="runc")
    driver.publish(volume, A, runtime="runv")
    driver.unpublish(volume, A)
    for one in (volume, other):
        driver.unstage(one)
        driver.delete(one)
    assert not any(driver.left_over().values())


def test_gc_keeps_the_claim_of_a_volume_whose_store_cannot_be_read(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.stop()
    store, away = driver.state / "volumes.db", driver.state / "away.db"
    store.rename(away)
    for suffix in ("-wal", "-shm"):
        (driver.state / f"volumes.db{suffix}").unlink(missing_ok=True)
    store.write_bytes(b"no database at all".ljust(8192, b"x"))
    driver.cli("gc", check=False)
    assert (driver.records / "claims" / f"{volume.volume_id}.json").exists()
    store.unlink()
    away.rename(store)
    driver.start()
    driver.publish(volume, A, runtime="runc")
    driver.unpublish(volume, A)


@pytest.mark.parametrize("backend", ["loop", "directory"])
def test_an_older_store_that_calls_a_volume_half_made_loses_it_nothing(driver, backend):
    more = {} if backend == "loop" else {"backend": "directory", "quota": "none"}
    volume = driver.create("pvc", **more)
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    with open(f"{target}/file", "w") as file:
        file.write("mine")
    driver.stop()
    name = "volumes.db" if backend == "loop" else "directories.db"
    with contextlib.closing(sqlite3.connect(driver.state / name)) as store, store:
        store.execute("UPDATE volumes SET state = 'creating'")
    driver.start()
    with open(f"{target}/file") as file:
        assert file.read() == "mine"
    assert driver.create("pvc", **more).volume_id == volume.volume_id
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


def test_a_row_that_cannot_be_read_stops_nobody_else(driver):
    volume, other = driver.create("pvc"), driver.create("other")
    driver.stop()
    with contextlib.closing(sqlite3.connect(driver.state / "volumes.db")) as store, store:
        store.execute("UPDATE volumes SET state = 'paused' WHERE id = ?", (volume.volume_id,))
    driver.start()
    assert [one.volume.volume_id for one in driver.client.ListVolumes().entries] == [other.volume_id]
    with refused("UNAVAILABLE", volume.volume_id, "cannot be read"):
        driver.delete(volume)
    driver.stage(other)
    driver.publish(other, B, runtime="runc")
    driver.unpublish(other, B)
    assert volume.volume_id not in driver.cli("gc").stdout  # its file is not offered to anybody


@pytest.mark.parametrize("before", ["staged", "runc"])
def test_a_state_directory_that_was_restored_gives_no_guests_volume_away(driver, before):
    """The claims in it are older than the hand-off, and the guest is between two containers: nothing is open."""
    volume = driver.create("pvc")
    driver.stage(volume)
    if before == "runc":
        driver.publish(volume, B, runtime="runc")
    shutil.copytree(driver.records, driver.directory / "backup")
    if before == "runc":
        driver.unpublish(volume, B)
        driver.unstage(volume)
        driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata")
    driver.stop()
    shutil.rmtree(driver.records)
    shutil.copytree(driver.directory / "backup", driver.records)
    driver.start()
    for runtime in ("kata", "runc"):
        with refused("FAILED_PRECONDITION", A):
            driver.stage(volume)
            driver.publish(volume, B, runtime=runtime)
    with refused("FAILED_PRECONDITION", volume.volume_id):
        driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="s")
    assert has_placeholder(target)
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
    assert not any(driver.left_over().values())


def lose_records(driver, alive=False):
    if not alive:
        driver.stop()
    shutil.rmtree(driver.records)
    if not alive:
        driver.start()


@pytest.mark.parametrize("how", ["lost", "garbage"])
def test_a_directory_of_a_pod_is_not_deleted_although_its_claim_was_lost(driver, how):
    volume = driver.create("pvc", backend="directory", quota="none")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    with open(f"{target}/data", "w") as file:
        file.write("x")
    if how == "lost":
        lose_records(driver)
    else:
        (driver.records / "claims" / f"{volume.volume_id}.json").write_text("garbage")
    for call in (
        lambda: driver.delete(volume),
        lambda: driver.client.NodeUnstageVolume(
            volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id)
        ),
    ):
        with refused("FAILED_PRECONDITION", "still published", A):
            call()
    assert os.listdir(target) == ["data"]
    second = driver.publish(volume, B, runtime="runc")
    assert os.listdir(second) == ["data"]
    for pod in (A, B):
        driver.unpublish(volume, pod)
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize("mode", ["SINGLE_NODE_WRITER", "SINGLE_NODE_SINGLE_WRITER", "SINGLE_NODE_MULTI_WRITER"])
@pytest.mark.parametrize("runtime", ["runc", "kata"])
@pytest.mark.parametrize("first", ["publish", "stage"])
def test_what_was_lost_is_as_kubelet_says_when_it_comes_again(driver, mode, runtime, first):
    capability = mount_capability(mode, flags=("noatime", "nosuid"))
    volume = driver.create("pvc", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime=runtime, capability=capability)
    lose_records(driver)
    calls = [lambda: driver.publish(volume, A, runtime=runtime, capability=capability),
             lambda: driver.stage(volume, capability)]  # fmt: skip
    for call in calls if first == "publish" else calls[::-1]:
        call()
    record = json.loads((driver.records / "claims" / f"{volume.volume_id}.json").read_text())
    assert record["use"] == {
        "mode": mode.lower(),
        "raw": False,
        "fstype": "ext4",
        "mount_flags": ["noatime", "nosuid"],
    }
    if mode == "SINGLE_NODE_SINGLE_WRITER":
        with refused("FAILED_PRECONDITION", "ReadWriteOncePod"):
            driver.publish(volume, B, runtime=runtime, capability=capability)
    elif runtime == "runc":
        driver.publish(volume, B, runtime=runtime, capability=capability)
        driver.unpublish(volume, B)
    with refused("ALREADY_EXISTS", "capability"):
        driver.stage(volume, block_capability(mode))
    assert driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target).usage
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


def test_a_volume_whose_claim_was_lost_is_measured_and_grows(driver):
    volume = driver.create("pvc", 64 << 20)
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    lose_records(driver, alive=True)
    assert driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target).usage
    size = {"required_bytes": 128 << 20}
    call = {"volume_id": volume.volume_id, "volume_path": target, "capacity_range": size}
    if has_resource():
        assert driver.client.NodeExpandVolume(**call).capacity_bytes == 128 << 20
    else:
        with refused("FAILED_PRECONDITION", "CAP_SYS_RESOURCE"):
            driver.client.NodeExpandVolume(**call)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


def test_a_raw_volume_whose_claim_was_lost_is_nobody_elses_until_its_kernel_is_known(driver):
    capability = block_capability("SINGLE_NODE_MULTI_WRITER")
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    for pod in (A, B):
        driver.publish(volume, pod, runtime="runc", capability=capability)
    lose_records(driver)
    driver.stage(volume, capability)
    for runtime in ("runc", "kata"):
        with refused("FAILED_PRECONDITION", "its record was lost", "NodePublishVolume"):
            driver.publish(volume, C, runtime=runtime, capability=capability)
    driver.publish(volume, B, runtime="runc", capability=capability)
    with refused("FAILED_PRECONDITION", "mounted by the host's kernel"):
        driver.publish(volume, C, runtime="kata", capability=capability)
    driver.unpublish(volume, A)
    driver.publish(volume, C, runtime="runc", capability=capability)
    for pod in (B, C):
        driver.unpublish(volume, pod)
    driver.unstage(volume)
    driver.delete(volume)


def test_a_device_number_that_a_pods_node_still_has_goes_to_nobody_else_without_any_record(driver):
    capability = block_capability()
    one, two = (driver.create(name, capability=capability) for name in ("one", "two"))
    driver.stage(one, capability)
    driver.publish(one, A, runtime="kata", capability=capability)
    device = driver.loop_devices()[0]
    lose_records(driver, alive=True)
    subprocess.run(["losetup", "-d", device], check=True)
    driver.stage(two, capability)
    driver.publish(two, B, runtime="kata", capability=capability)
    assert device not in driver.loop_devices()
    for volume, pod in ((one, A), (two, B)):
        driver.unpublish(volume, pod)
        driver.unstage(volume)
        driver.delete(volume)


@pytest.mark.parametrize("busy", ["another", "itself", "nobody"])
@pytest.mark.parametrize("running", [False, True], ids=["at a start", "under a running driver"])
def test_an_older_claim_is_never_believed_over_a_hand_off(driver, busy, running):
    """Whoever holds one volume's lock in that moment keeps no other one's claim from being put right."""
    first, second = (driver.create(name) for name in ("one", "two"))
    for volume in (first, second):
        driver.stage(volume)
    records = [driver.records / "claims" / f"{one.volume_id}.json" for one in (first, second)]
    older = [record.read_bytes() for record in records]
    for volume in (first, second):
        driver.publish(volume, A, runtime="kata")
    if not running:
        driver.stop()
    for record, content in zip(records, older, strict=True):
        record.write_bytes(content)
    held = {"another": first, "itself": second}.get(busy)
    lock = flocks.take(str(driver.run / "locks" / held.volume_id), 5) if held is not None else None
    if not running:
        driver.start(repaired=False)
    if lock is not None:
        flocks.release(lock)
    for runtime in ("runc", "kata"):
        with refused("FAILED_PRECONDITION", A):
            driver.publish(second, B, runtime=runtime)
    assert not any(driver.staging(one.volume_id) in driver.mounts() for one in (first, second))
    driver.publish(second, A, runtime="kata")
    for volume in (first, second):
        driver.unpublish(volume, A)
    driver.publish(second, B, runtime="runc")
    driver.unpublish(second, B)
    for volume in (first, second):
        driver.unstage(volume)
        driver.delete(volume)
    assert os.listdir(driver.run / "handed") == [".all"]


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_filesystem_that_takes_no_writes_lets_its_pods_end(driver, fstype):
    capability = mount_capability(fstype=fstype)
    volume = driver.create("v", 320 << 20, capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="runc", capability=capability)
    if fstype == "ext4":
        device = os.path.basename(driver.loop_devices()[0])
        with open(f"/sys/fs/ext4/{device}/trigger_fs_error", "w") as file:
            file.write("test")
    else:
        subprocess.run(["xfs_io", "-x", "-c", "shutdown", target], check=True)
    with refused("FAILED_PRECONDITION", "is read-only since"):
        driver.publish(volume, B, runtime="runc", capability=capability)
    lose_records(driver)
    driver.unpublish(volume, B)
    driver.unpublish(volume, A)
    again = driver.publish(volume, B, runtime="runc", capability=capability)
    open(f"{again}/file", "w").close()
    driver.unpublish(volume, B)
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize(("mode", "flags"), [("SINGLE_NODE_WRITER", ("ro",)), ("SINGLE_NODE_READER_ONLY", ()),
                                             ("SINGLE_NODE_WRITER", ())])  # fmt: skip
@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_what_only_reads_is_kubelets_to_say_where_it_was_lost(driver, mode, flags, runtime):
    capability = mount_capability(mode, flags=flags)
    volume = driver.create("v", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime=runtime, capability=capability)
    lose_records(driver)
    for _ in range(2):
        assert driver.publish(volume, A, runtime=runtime, capability=capability) == target
        driver.stage(volume, capability)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


def test_a_subpath_that_kubelet_has_bound_is_no_staging_path(driver):
    volume = driver.create("v")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    place = driver.kubelet / "pods" / A / "volume-subpaths/pv/c/0"
    place.mkdir(parents=True)
    subprocess.run(["mount", "--bind", target, place], check=True)
    try:
        lose_records(driver)
        driver.stage(volume)
        driver.publish(volume, A, runtime="runc")
        record = json.loads((driver.records / "claims" / f"{volume.volume_id}.json").read_text())
        assert record["staging_path"] == driver.staging(volume.volume_id)
        driver.publish(volume, B, runtime="runc")
        driver.unpublish(volume, A)
        assert str(place) in driver.mounts()
    finally:
        subprocess.run(["umount", place], check=True)
    driver.unpublish(volume, B)
    driver.unstage(volume)
    driver.delete(volume)


def test_a_kernel_that_could_not_be_told_is_asked_for_at_each_repeat(driver):
    capability = block_capability("SINGLE_NODE_MULTI_WRITER")
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime="runc", capability=capability)
    lose_records(driver)
    driver.stage(volume, capability)
    driver.publish(volume, A, capability=capability)  # without a word of the class's, nobody can tell
    with refused("FAILED_PRECONDITION", "its record was lost"):
        driver.publish(volume, B, runtime="runc", capability=capability)
    driver.publish(volume, A, runtime="runc", capability=capability)
    driver.publish(volume, B, runtime="runc", capability=capability)
    for pod in (A, B):
        driver.unpublish(volume, pod)
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize("kind", ["directory", "socket", "link"])
def test_something_else_in_the_place_of_a_lock_keeps_nobody_out(driver, kind):
    volume = driver.create("v")
    place = driver.run / "locks" / volume.volume_id
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "directory":
        (place / "inner").mkdir(parents=True)
    elif kind == "link":
        place.symlink_to("/etc/passwd")
    else:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
            one.bind(str(place))
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
