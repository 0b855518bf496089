"""Claims as 0.1.0 wrote them, of pods that run through the upgrade. `old/` holds its files, paths left open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.csi.helpers import PODS, image, refused
from tests.driver import block_capability, mount_capability

pytestmark = pytest.mark.kernel
A, B = PODS[:2]
OLD = Path(__file__).with_name("old")
KINDS = {
    "runc": ("runc", mount_capability(group="2000"), {}),
    "kata": ("kata", mount_capability(), {}),
    "raw": ("runc", block_capability(), {}),
    "raw-kata": ("kata", block_capability(), {}),
    "directory": ("runc", mount_capability(), {"backend": "directory", "quota": "none"}),
}


def test_every_recorded_claim_is_tried():
    assert {path.stem for path in OLD.glob("*.json")} == set(KINDS)


WAYS = {"runc": "mounted", "kata": "guest-device", "raw": "device-node", "raw-kata": "device-node",
        "directory": "shared"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_of_an_older_release_goes_on(driver, kind):
    runtime, capability, parameters = KINDS[kind]
    volume = driver.create(kind, 64 << 20, capability, **parameters)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime=runtime, capability=capability, name="web-0")
    devices = driver.loop_devices()
    claim = (OLD / f"{kind}.json").read_text()
    device = devices[0] if devices else ""
    paths = {"volume": volume.volume_id, "kubelet": driver.kubelet, "state": driver.state, "device": device}
    for key, value in paths.items():
        claim = claim.replace(f"{{{key}}}", str(value))
    before = driver.left_over()["hand-off files"], driver.mounts(), devices
    driver.stop()
    (driver.records / "claims" / f"{volume.volume_id}.json").unlink()
    (driver.run / "claims").mkdir()
    (driver.run / "claims" / f"{volume.volume_id}.json").write_text(claim)
    driver.start()
    assert not os.listdir(driver.run / "claims")
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime=runtime, capability=capability, name="web-0")
    assert before == (driver.left_over()["hand-off files"], driver.mounts(), driver.loop_devices())
    known = json.loads((driver.records / "claims" / f"{volume.volume_id}.json").read_text())
    assert known["targets"][target]["way"] == WAYS[kind]
    driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target)
    if kind == "kata":
        with refused("FAILED_PRECONDITION", "default/web-0"):
            driver.publish(volume, B, runtime="runc")
        assert image(driver, volume).exists()
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
    assert not any(driver.left_over().values())
