"""Expansion: on the host online, for a sandbox before its VMM has the device or at the next publish."""

from __future__ import annotations

import contextlib
import os

import pytest

from blockdev import superblocks
from tests.csi.helpers import PODS, has_resource, image, refused, vmm
from tests.driver import block_capability, mount_capability

pytestmark = pytest.mark.kernel
A = PODS[0]
MIB = 1 << 20


def expand(driver, volume, path, size):
    return driver.client.NodeExpandVolume(
        volume_id=volume.volume_id, volume_path=path, capacity_range={"required_bytes": size}
    ).capacity_bytes


def a_volume(driver, fstype, runtime):
    capability = mount_capability(fstype=fstype)
    volume = driver.create("pvc", 320 * MIB, capability)
    driver.stage(volume, capability)
    return volume, driver.publish(volume, A, runtime=runtime, capability=capability), capability


def test_the_controller_validates_and_leaves_the_work_to_the_node(driver):
    volume = driver.create("pvc")
    answer = driver.client.ControllerExpandVolume(
        volume_id=volume.volume_id, capacity_range={"required_bytes": 100 * MIB}
    )
    assert (answer.capacity_bytes, answer.node_expansion_required) == (100 * MIB, True)
    assert image(driver, volume).stat().st_size == 64 * MIB
    with refused("RESOURCE_EXHAUSTED", "can still be promised"):
        driver.client.ControllerExpandVolume(volume_id=volume.volume_id, capacity_range={"required_bytes": 1 << 50})
    with refused("OUT_OF_RANGE", "never shrinks"):
        driver.client.ControllerExpandVolume(volume_id=volume.volume_id, capacity_range={"limit_bytes": MIB})
    with refused("NOT_FOUND"):
        driver.client.ControllerExpandVolume(volume_id="loop-none", capacity_range={"required_bytes": MIB})


def test_a_mounted_xfs_grows_online(driver):
    volume, target, _ = a_volume(driver, "xfs", "runc")
    before = os.statvfs(target)
    assert expand(driver, volume, target, 640 * MIB) == 640 * MIB
    after = os.statvfs(target)
    assert after.f_blocks * after.f_frsize > before.f_blocks * before.f_frsize + 300 * MIB
    assert expand(driver, volume, target, 640 * MIB) == 640 * MIB
    driver.unpublish(volume, A)


def test_a_mounted_ext4_grows_online(driver):
    if not has_resource():
        pytest.skip("the kernel lets only CAP_SYS_RESOURCE grow a mounted ext4, and this machine's root has it not")
    volume, target, _ = a_volume(driver, "ext4", "runc")
    assert expand(driver, volume, target, 640 * MIB) == 640 * MIB
    assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize > 560 * MIB
    driver.unpublish(volume, A)


def test_without_the_capability_a_mounted_ext4_says_so_and_grows_at_the_next_publish(driver):
    volume, target, capability = a_volume(driver, "ext4", "runc")
    if has_resource():
        expand(driver, volume, target, 640 * MIB)
    else:
        with refused("FAILED_PRECONDITION", "CAP_SYS_RESOURCE"):
            expand(driver, volume, target, 640 * MIB)
    driver.unpublish(volume, A)
    driver.publish(volume, A, runtime="kata", capability=capability)
    assert superblocks.read(str(image(driver, volume))).total_bytes == 640 * MIB
    driver.unpublish(volume, A)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_what_a_sandbox_has_grows_with_the_next_pod_whether_a_vmm_has_it_open_or_not(driver, fstype):
    volume, target, capability = a_volume(driver, fstype, "kata")
    before = superblocks.read(str(image(driver, volume))).total_bytes
    for held in (contextlib.nullcontext(), vmm(image(driver, volume))):
        with held, refused("FAILED_PRECONDITION", "deleted and made again", "default/pod"):
            expand(driver, volume, target, 640 * MIB)
        assert driver.loop_devices() == []
        assert superblocks.read(str(image(driver, volume))).total_bytes == before
    driver.unpublish(volume, A)
    driver.publish(volume, A, runtime="kata", capability=capability)
    assert superblocks.read(str(image(driver, volume))).total_bytes == 640 * MIB
    with vmm(image(driver, volume)):
        assert expand(driver, volume, target, 640 * MIB) == 640 * MIB
    driver.unpublish(volume, A)


def test_a_raw_volume_of_a_sandbox_grows_with_the_next_pod(driver):
    capability = block_capability()
    volume = driver.create("raw", 64 * MIB, capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    with refused("FAILED_PRECONDITION", "deleted and made again"):
        expand(driver, volume, target, 128 * MIB)
    with open(target, "rb") as node:
        assert node.seek(0, os.SEEK_END) == 64 * MIB
    driver.unpublish(volume, A)
    driver.publish(volume, A, runtime="kata", capability=capability)
    assert expand(driver, volume, target, 128 * MIB) == 128 * MIB
    with open(target, "rb") as node:
        assert node.seek(0, os.SEEK_END) == 128 * MIB
    driver.unpublish(volume, A)


def test_a_raw_volume_grows_with_its_device(driver):
    capability = block_capability()
    volume = driver.create("raw", 64 * MIB, capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="runc", capability=capability)
    assert expand(driver, volume, target, 128 * MIB) == 128 * MIB
    with open(target, "rb") as node:
        assert node.seek(0, os.SEEK_END) == 128 * MIB
    driver.unpublish(volume, A)


def test_a_staged_volume_grows_without_a_pod(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    assert expand(driver, volume, driver.staging(volume.volume_id), 128 * MIB) == 128 * MIB
    assert superblocks.read(str(image(driver, volume))).total_bytes == 128 * MIB
    with refused("NOT_FOUND", "not at"):
        expand(driver, volume, str(driver.kubelet / "elsewhere"), 256 * MIB)
    driver.unstage(volume)
