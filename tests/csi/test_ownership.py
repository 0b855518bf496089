"""Who may have a volume: the claim and the kernel together, through the real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest

from blockdev import loops, superblocks
from tests.csi.helpers import PODS, image, refused, vmm
from tests.driver import block_capability, mount_capability

pytestmark = pytest.mark.kernel
A, B = PODS[:2]


@pytest.fixture
def volume(driver):
    made = driver.create("pvc-1")
    driver.stage(made)
    yield made
    for pod in PODS:
        driver.unpublish(made, pod)
    driver.unstage(made)
    driver.delete(made)
    left = driver.left_over()
    assert not any(left.values()), left


def test_stage_formats_and_mounts_nothing(driver, volume):
    assert superblocks.read(str(image(driver, volume))).fstype == "ext4"
    assert driver.mounts() == [] and driver.loop_devices() == []


def test_a_runc_pod_has_the_filesystem_mounted_once_and_bound(driver, volume):
    target = driver.publish(volume, A, runtime="runc")
    open(f"{target}/file", "w").close()
    assert driver.mounts() == [driver.staging(volume.volume_id), target]
    assert len(driver.loop_devices()) == 1
    assert not driver.direct_volumes.exists()


def test_a_sandbox_has_a_read_only_placeholder_and_a_hand_off(driver, volume):
    target = driver.publish(volume, A, runtime="kata")
    assert driver.mounts() == [target] and driver.loop_devices() == []
    with pytest.raises(OSError, match="Read-only"):
        open(f"{target}/file", "w").close()
    (handed,) = json.loads(driver.cli("handoffs", "--json").stdout)["items"]
    assert (handed["device"], handed["options"]) == (str(image(driver, volume)), ["rw"])


def test_the_same_publish_again_changes_nothing(driver, volume):
    for runtime in ("kata", "runc"):
        target = driver.publish(volume, A, runtime=runtime)
        before = os.stat(target).st_dev, driver.mounts(), driver.left_over()["hand-off files"]
        driver.publish(volume, A, runtime=runtime)
        assert before == (os.stat(target).st_dev, driver.mounts(), driver.left_over()["hand-off files"])
        driver.unpublish(volume, A)


def test_a_lost_hand_off_or_placeholder_is_made_again_by_a_repeated_publish(driver, volume):
    target = driver.publish(volume, A, runtime="kata")
    shutil.rmtree(driver.direct_volumes)
    subprocess.run(["umount", target], check=True)
    driver.publish(volume, A, runtime="kata")
    assert driver.mounts() == [target] and len(driver.left_over()["hand-off files"]) == 1


def test_a_second_pod_of_the_host_shares_the_mount(driver, volume):
    first, second = driver.publish(volume, A, runtime="runc"), driver.publish(volume, B, runtime="runc", read_only=True)
    open(f"{first}/file", "w").close()
    assert os.listdir(second).count("file") == 1
    with pytest.raises(OSError, match="Read-only"):
        open(f"{second}/other", "w").close()
    driver.unpublish(volume, A)
    assert os.path.exists(f"{second}/file")


@pytest.mark.parametrize(("first", "second"), [("kata", "kata"), ("kata", "runc"), ("runc", "kata")])
def test_a_second_kernel_is_refused_with_the_holders_name(driver, volume, first, second):
    driver.publish(volume, A, runtime=first, name="holder")
    with refused("FAILED_PRECONDITION", "default/holder", volume.volume_id):
        driver.publish(volume, B, runtime=second, name="latecomer")
    assert not os.path.exists(driver.target(volume.volume_id, B))


def test_a_deployment_with_surge_is_told_what_to_change(driver, volume):
    driver.publish(volume, A, runtime="kata")
    with refused("FAILED_PRECONDITION", "Recreate", "maxSurge 0"):
        driver.publish(volume, B, runtime="kata")


def test_runc_then_sandbox_then_runc_without_an_unstage_between(driver, volume):
    target = driver.publish(volume, A, runtime="runc")
    with open(f"{target}/file", "w") as file:
        file.write("from runc")
    driver.unpublish(volume, A)
    assert driver.mounts() == [] and driver.loop_devices() == []
    driver.publish(volume, B, runtime="kata")
    driver.unpublish(volume, B)
    target = driver.publish(volume, A, runtime="runc")
    with open(f"{target}/file") as file:
        assert file.read() == "from runc"


def test_the_same_pod_may_have_two_targets_in_a_sandbox(driver, volume):
    driver.publish(volume, A, runtime="kata")
    other = driver.kubelet / "pods" / A / "volumes" / "other" / "mount"
    other.parent.mkdir(parents=True)
    context = {
        "runtime": "kata",
        "csi.storage.k8s.io/pod.uid": A,
        "csi.storage.k8s.io/pod.name": "pod",
        "csi.storage.k8s.io/pod.namespace": "default",
    }
    driver.client.NodePublishVolume(
        volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id), target_path=str(other),
        volume_capability=mount_capability(), volume_context=context,
    )  # fmt: skip
    assert len(driver.left_over()["hand-off files"]) == 2
    driver.client.NodeUnpublishVolume(volume_id=volume.volume_id, target_path=str(other))
    assert len(driver.left_over()["hand-off files"]) == 1


def test_read_write_once_pod_means_one_target(driver):
    capability = mount_capability("SINGLE_NODE_SINGLE_WRITER")
    volume = driver.create("rwop", capability=capability)
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime="runc", capability=capability)
    with refused("FAILED_PRECONDITION", "ReadWriteOncePod", "default/pod"):
        driver.publish(volume, B, runtime="runc", capability=capability)
    driver.unpublish(volume, A)


def test_a_published_target_with_other_arguments_is_a_conflict(driver, volume):
    driver.publish(volume, A, runtime="kata")
    with refused("ALREADY_EXISTS", "readonly"):
        driver.publish(volume, A, runtime="kata", read_only=True)
    with refused("ALREADY_EXISTS", "another capability"):
        driver.publish(volume, B, runtime="kata", capability=block_capability("SINGLE_NODE_MULTI_WRITER"))
    with refused("ALREADY_EXISTS", "another capability"):
        driver.stage(volume, mount_capability(flags=("noatime",)))


# -- a guest that lives longer than its pod


def test_the_claim_stays_until_the_vmm_has_let_go(driver, volume):
    driver.publish(volume, A, runtime="kata", name="zombie")
    with vmm(image(driver, volume)) as guest:
        driver.unpublish(volume, A)
        assert driver.left_over()["hand-off files"] == [] and driver.mounts() == []
        named = (f"pid {guest.pid}", "default/zombie")
        with refused("FAILED_PRECONDITION", *named):
            driver.publish(volume, B, runtime="kata")
        with refused("FAILED_PRECONDITION", *named):
            driver.publish(volume, B, runtime="runc")
        with refused("FAILED_PRECONDITION", *named):
            driver.client.NodeExpandVolume(
                volume_id=volume.volume_id,
                volume_path=driver.staging(volume.volume_id),
                capacity_range={"required_bytes": 128 << 20},
            )
        for _again in range(2):
            driver.unstage(volume)
            with refused("FAILED_PRECONDITION", *named):
                driver.delete(volume)
        driver.stage(volume)
        with refused("FAILED_PRECONDITION", *named):
            driver.publish(volume, B, runtime="runc")
        assert image(driver, volume).stat().st_size == 64 << 20
    driver.publish(volume, B, runtime="runc")


def test_the_same_pod_comes_back_although_its_guest_never_let_go(driver, volume):
    driver.publish(volume, A, runtime="kata")
    with vmm(image(driver, volume)):
        driver.unpublish(volume, A)
        driver.publish(volume, A, runtime="kata")
        driver.unpublish(volume, A)


def test_a_volume_that_a_stranger_has_open_is_not_handed_over(driver, volume):
    with vmm(image(driver, volume)) as stranger:
        for runtime in ("kata", "runc"):
            with refused("FAILED_PRECONDITION", f"pid {stranger.pid}"):
                driver.publish(volume, A, runtime=runtime)
            assert not os.path.exists(driver.target(volume.volume_id, A))
        assert driver.loop_devices() == []
    driver.publish(volume, A, runtime="kata")


def test_a_restarted_kubelet_repeats_everything_while_a_guest_writes(driver, volume):
    target = driver.publish(volume, A, runtime="kata")
    with vmm(image(driver, volume)):
        before = image(driver, volume).stat().st_mtime_ns
        for _ in range(3):
            driver.stage(volume)
            assert driver.publish(volume, A, runtime="kata") == target
        driver.kill()
        driver.start()
        driver.stage(volume)
        driver.publish(volume, A, runtime="kata")
        assert image(driver, volume).stat().st_mtime_ns == before, "something was written to a device that a guest has"


def test_a_repeated_publish_needs_nobody_to_tell_the_runtime(driver, volume):
    """kubelet repeats publishes while the API server is away; the claim knows the owner."""
    target = driver.publish(volume, A, runtime="kata")
    assert driver.publish(volume, A, runtime="") == target
    with refused("UNAVAILABLE", "not known"):
        driver.publish(volume, B, runtime="")


def test_a_pod_that_is_gone_without_an_unpublish_does_not_hold_the_volume(driver, volume):
    for runtime in ("kata", "runc"):
        target = driver.publish(volume, A, runtime=runtime)
        subprocess.run(["umount", target], check=True)
        shutil.rmtree(driver.direct_volumes, ignore_errors=True)
        shutil.rmtree(driver.kubelet / "pods" / A)
        driver.publish(volume, B, runtime="kata")
        driver.unpublish(volume, B)


def test_after_a_reboot_everything_is_published_again(driver, volume):
    target = driver.publish(volume, A, runtime="kata")
    driver.kill()
    subprocess.run(["umount", target], check=True)  # what a reboot takes: mounts and /run
    shutil.rmtree(driver.run)
    shutil.rmtree(driver.records)
    shutil.rmtree(driver.direct_volumes)
    driver.start()
    with refused("FAILED_PRECONDITION", "not staged"):
        driver.publish(volume, A, runtime="kata")
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata")


def test_an_unstage_before_the_unpublish_is_refused(driver, volume):
    target = driver.publish(volume, A, runtime="kata")
    with refused("FAILED_PRECONDITION", "still published", target):
        driver.unstage(volume)
    with refused("FAILED_PRECONDITION", "still published"):
        driver.delete(volume)


def test_unpublish_and_unstage_know_nothing_but_the_disk_and_the_kernel(driver, volume):
    """The claims are lost, as if somebody had emptied /run while pods ran."""
    for runtime in ("kata", "runc"):
        driver.publish(volume, A, runtime=runtime)
        shutil.rmtree(driver.records / "claims")
        (driver.records / "claims").mkdir()
        for _ in range(2):
            driver.unpublish(volume, A)
        driver.unstage(volume)
        driver.stage(volume)
        assert (
            driver.left_over()["loop devices"]
            == driver.left_over()["mounts"]
            == driver.left_over()["hand-off files"]
            == []
        )


def test_a_hand_off_that_the_shim_left_its_id_in_is_withdrawn_whole(driver, volume):
    driver.publish(volume, A, runtime="kata")
    (place,) = driver.direct_volumes.iterdir()
    (place / ("f" * 64)).touch()
    driver.unpublish(volume, A)
    assert list(driver.direct_volumes.iterdir()) == []


def test_a_start_withdraws_its_own_hand_offs_that_no_claim_knows_and_no_others(driver, volume):
    """A shim would hot-plug the device of a hand-off that nobody remembers; a pod that kubelet still has is remembered."""
    target = driver.publish(volume, A, runtime="kata")
    (place,) = driver.direct_volumes.iterdir()
    foreign = driver.direct_volumes / "L290aGVy"
    foreign.mkdir()
    (foreign / "mountInfo.json").write_text('{"volume-type":"blk","device":"/other/disk.img","fstype":"ext4"}')
    driver.kill()
    driver.start()
    assert place.exists()  # claimed: a running pod's
    driver.kill()
    shutil.rmtree(driver.records / "claims")
    driver.start()
    assert place.exists()
    driver.kill()
    shutil.rmtree(driver.records / "claims")
    subprocess.run(["umount", target], check=True)
    shutil.rmtree(driver.kubelet / "pods" / A)
    driver.start()
    assert not place.exists() and (foreign / "mountInfo.json").exists()
    shutil.rmtree(foreign)


def test_a_damaged_claim_stops_neither_the_driver_nor_the_pod_that_it_speaks_of(driver, volume):
    driver.publish(volume, A, runtime="kata")
    claim = driver.records / "claims" / f"{volume.volume_id}.json"
    whole = claim.read_text()
    claim.write_text(whole[:40])
    driver.kill()
    driver.start()
    assert len(driver.left_over()["hand-off files"]) == 1
    driver.stage(volume)
    with refused("FAILED_PRECONDITION", A):
        driver.publish(volume, B, runtime="kata")


def test_gc_beside_publishing_takes_nothing_that_was_just_made(driver, volume):
    import threading

    stop = threading.Event()

    def collect():
        while not stop.is_set():
            driver.cli("gc", check=False)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for _ in range(25):
            for runtime in ("kata", "runc"):
                for attempt in range(200):
                    try:
                        target = driver.publish(volume, A, runtime=runtime)
                        break
                    except Exception as error:
                        assert "under way" in str(error), error  # gc holds the volume for a moment
                        time.sleep(0.01)
                time.sleep(0.02)
                assert os.path.ismount(target)
                assert runtime == "runc" or len(driver.left_over()["hand-off files"]) == 1
                for attempt in range(200):
                    try:
                        driver.unpublish(volume, A)
                        break
                    except Exception as error:
                        assert "under way" in str(error), error
                        time.sleep(0.01)
    finally:
        stop.set()
        collector.join()


# -- raw block


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_a_raw_volume_is_a_device_node_at_the_target(driver, runtime):
    capability = block_capability()
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime=runtime, capability=capability)
    with open(target, "r+b", buffering=0) as node:
        node.write(b"raw" + bytes(509))
    assert loops.find(str(image(driver, volume))) == driver.loop_devices() != []
    driver.unpublish(volume, A)
    driver.unpublish(volume, A)
    assert driver.loop_devices() == [] and not os.path.exists(target)
    assert image(driver, volume).read_bytes()[:3] == b"raw"


def test_a_raw_volume_that_a_guest_still_has_is_not_given_away(driver):
    capability = block_capability()
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    with vmm(target) as guest:
        driver.unpublish(volume, A)
        with refused("FAILED_PRECONDITION", f"pid {guest.pid}"):
            driver.publish(volume, B, runtime="kata", capability=capability)
        driver.unstage(volume)
        assert len(driver.loop_devices()) == 1
        with refused("FAILED_PRECONDITION", f"pid {guest.pid}"):
            driver.delete(volume)
    driver.delete(volume)
    assert driver.loop_devices() == []


@pytest.mark.parametrize("runtime", ["runc", "kata"])
@pytest.mark.parametrize("mode", ["SINGLE_NODE_MULTI_WRITER", "MULTI_NODE_MULTI_WRITER"])
def test_a_raw_volume_of_several_writers_goes_to_several_pods(driver, runtime, mode):
    capability = block_capability(mode)
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    first, second = (driver.publish(volume, pod, runtime=runtime, capability=capability) for pod in (A, B))
    assert os.stat(first).st_rdev == os.stat(second).st_rdev and len(driver.loop_devices()) == 1
    driver.unpublish(volume, A)
    with open(second, "r+b", buffering=0) as node:
        node.write(bytes(512))
    driver.unpublish(volume, B)
    assert driver.loop_devices() == []


def test_a_raw_volume_of_one_writer_goes_to_one_guest(driver):
    capability = block_capability("SINGLE_NODE_WRITER")
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime="kata", capability=capability)
    with refused("FAILED_PRECONDITION", "one kernel at a time"):
        driver.publish(volume, B, runtime="kata", capability=capability)
    driver.unpublish(volume, A)


def test_a_read_only_raw_volume_refuses_writes(driver):
    capability = block_capability()
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="runc", capability=capability, read_only=True)
    with pytest.raises(OSError), open(target, "r+b", buffering=0) as node:
        node.write(bytes(512))
    driver.unpublish(volume, A)


# -- what the host cannot do


def test_a_runtime_that_ignores_block_devices_is_refused_with_the_setting(driver):
    (driver.directory / "containerd.toml").write_text(
        '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
    )
    config = driver.directory / "kata" / "etc/kata-containers/configuration.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\ndisable_block_device_use = true\n")
    volume = driver.create("pvc-2")
    driver.stage(volume)
    with refused("FAILED_PRECONDITION", "disable_block_device_use", str(config)):
        driver.publish(volume, A, runtime="kata")
    assert driver.mounts() == []
    config.write_text("[hypervisor.qemu]\ndisable_block_device_use = false\n")
    driver.publish(volume, A, runtime="kata")
    driver.unpublish(volume, A)


def test_a_dialect_that_carries_no_block_volumes_is_refused_by_name(driver, volume):
    with refused("INVALID_ARGUMENT", "rund2"):
        driver.publish(volume, A, runtime="rund")


def test_a_target_path_that_kata_would_not_find_is_refused(driver, volume):
    deep = driver.kubelet / "pods" / ("x" * 120) / ("y" * 60)
    deep.mkdir(parents=True)
    context = {"runtime": "kata"}
    with refused("INVALID_ARGUMENT", "target_path", "189"):
        driver.client.NodePublishVolume(
            volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id), target_path=str(deep / "mount"),
            volume_capability=mount_capability(), volume_context=context,
        )  # fmt: skip


def test_calls_for_one_volume_beside_each_other_are_aborted_and_not_piled_up(driver, volume):
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def publish(number):
        try:
            driver.publish(volume, A, runtime="runc" if number % 2 else "kata")
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(publish, range(12)))
    assert "OK" in answers and set(answers) <= {"OK", "ABORTED"}, answers


@pytest.mark.parametrize("runtime", ["kata", "runc"])
def test_a_damaged_filesystem_is_not_published(driver, runtime):
    volume = driver.create("broken")
    driver.stage(volume)
    with open(image(driver, volume), "r+b") as file:
        file.seek(1024 + 0x3A)
        file.write(b"\x02\x00")
        file.seek(8192)
        file.write(b"\xff" * 300_000)
    with refused("FAILED_PRECONDITION", "needs a person", "fsck"):
        driver.publish(volume, A, runtime=runtime)
    assert driver.mounts() == [] and driver.loop_devices() == []
    driver.unstage(volume)


@pytest.mark.parametrize("runtime", ["kata", "runc"])
def test_a_volume_whose_file_is_gone_is_not_found_and_can_still_be_taken_back(driver, runtime):
    volume = driver.create("gone")
    driver.stage(volume)
    image(driver, volume).unlink()
    with refused("NOT_FOUND", "is gone"):
        driver.publish(volume, A, runtime=runtime)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
    assert not any(driver.left_over().values())


def test_publish_to_a_sandbox_stays_quick(driver, volume):
    """No measurement, only a guard against an exec or a sleep on the way."""
    times = []
    for _ in range(20):
        started = time.monotonic()
        driver.publish(volume, A, runtime="kata")
        times.append(time.monotonic() - started)
        driver.unpublish(volume, A)
    assert sorted(times)[10] < 0.1


def test_pods_of_one_name_are_told_apart_by_uid_and_nothing_is_said_twice(driver):
    """A StatefulSet's pod that was made again has the name of the one that still ends."""
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, PODS[0], runtime="kata", name="web-0")
    for runtime in ("kata", "runc"):
        with refused(
            "FAILED_PRECONDITION", f"with the uid {PODS[0]}", f"of that name with the uid {PODS[1]}"
        ) as caught:
            driver.publish(volume, PODS[1], runtime=runtime, name="web-0")
        assert caught.value.details().count("web-0") == 1
    with refused("FAILED_PRECONDITION", "default/web-0", "default/other") as caught:
        driver.publish(volume, PODS[1], runtime="kata", name="other")
    assert "uid" not in caught.value.details()
    with vmm(image(driver, volume)) as process:
        driver.unpublish(volume, PODS[0])
        with refused("FAILED_PRECONDITION", f"pid {process.pid}") as caught:
            driver.publish(volume, PODS[1], runtime="runc")
    said = caught.value.details()
    assert said.count(str(image(driver, volume))) == 1
    assert said.count(f"pid {process.pid}") == 1
    driver.unstage(volume)


@pytest.mark.parametrize("known", [False, True])
def test_what_is_mounted_by_others_stays(driver, known):
    """kubelet's own, or a person's: an unpublish or unstage that finds no claim takes nothing of it away."""
    volume_id = driver.create("pvc").volume_id if known else "loop-nonexistent"
    target, staging = driver.target(volume_id, PODS[0]), driver.staging(volume_id)
    for path in (target, staging):
        os.makedirs(path, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "somebody", path], check=True)
    try:
        driver.client.NodeUnpublishVolume(volume_id=volume_id, target_path=target)
        driver.client.NodeUnstageVolume(volume_id=volume_id, staging_target_path=staging)
        assert all(os.path.ismount(path) for path in (target, staging))
    finally:
        for path in (target, staging):
            subprocess.run(["umount", path], check=True)
    driver.client.NodeUnpublishVolume(volume_id=volume_id, target_path=target)
    assert not os.path.exists(target)
