"""What kubelet hears of a volume each minute: the same under runc and in a sandbox, and at the path that it asks with."""

from __future__ import annotations

import os

import pytest

from tests.csi.helpers import PODS, refused
from tests.driver import block_capability, mount_capability

pytestmark = pytest.mark.kernel
A = PODS[0]
MIB = 1 << 20


def figures(driver, volume, path):
    answer = driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=path)
    return {one.unit: (one.total, one.used, one.available) for one in answer.usage}


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
@pytest.mark.parametrize("grown", [False, True])
def test_a_volumes_figures_are_the_same_on_either_side(driver, fstype, grown):
    capability = mount_capability(fstype=fstype)
    volume = driver.create("pvc", (64 if fstype == "ext4" else 320) * MIB, capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="runc", capability=capability)
    for number in range(50):
        with open(os.path.join(target, f"f{number}"), "wb") as file:
            file.write(os.urandom(50_000))
    os.sync()
    on_host = figures(driver, volume, target)
    driver.unpublish(volume, A)
    if grown:
        driver.client.NodeExpandVolume(
            volume_id=volume.volume_id,
            volume_path=driver.staging(volume.volume_id),
            capacity_range={"required_bytes": 640 * MIB},
        )
        target = driver.publish(volume, A, runtime="runc", capability=capability)
        os.sync()
        on_host = figures(driver, volume, target)
        driver.unpublish(volume, A)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    assert figures(driver, volume, target) == on_host
    facts = os.statvfs(target)
    assert facts.f_blocks * facts.f_frsize != on_host[1][0], "the placeholder was not measured"
    driver.unpublish(volume, A)
    driver.unstage(volume)


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_a_raw_volume_is_measured_where_kubelet_asks(driver, runtime):
    """It publishes at `publish/<pv>/<pod uid>`, and asks at a link of its own, `<pv>/dev/<pod uid>`."""
    place = driver.kubelet / "plugins/kubernetes.io/csi/volumeDevices"
    capability = block_capability()
    volume = driver.create("raw", 64 * MIB, capability)
    staging, target = str(place / "staging/pvc-1"), str(place / "publish/pvc-1" / A)
    os.makedirs(os.path.dirname(target))
    driver.client.NodeStageVolume(volume_id=volume.volume_id, staging_target_path=staging, volume_capability=capability)
    context = {**volume.volume_context, "runtime": runtime, "csi.storage.k8s.io/pod.uid": A}
    driver.client.NodePublishVolume(
        volume_id=volume.volume_id, staging_target_path=staging, target_path=target, volume_capability=capability,
        volume_context=context,
    )  # fmt: skip
    asked = place / "pvc-1/dev" / A
    asked.parent.mkdir(parents=True)
    asked.symlink_to(target)
    assert figures(driver, volume, str(asked))[1][0] == 64 * MIB
    assert figures(driver, volume, target) == figures(driver, volume, str(asked))
    if runtime == "runc":
        grown = driver.client.NodeExpandVolume(
            volume_id=volume.volume_id, volume_path=str(asked), capacity_range={"required_bytes": 128 * MIB}
        )
        assert grown.capacity_bytes == 128 * MIB
    with refused("NOT_FOUND"):
        figures(driver, volume, str(place / "pvc-2/dev" / A))
    with refused("NOT_FOUND"):
        figures(driver, volume, str(place / "pvc-1/dev" / PODS[1]))
    driver.client.NodeUnpublishVolume(volume_id=volume.volume_id, target_path=target)
    driver.client.NodeUnstageVolume(volume_id=volume.volume_id, staging_target_path=staging)
