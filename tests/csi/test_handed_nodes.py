"""A shim that takes block nodes only gets a loop device, of this volume and of no other."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from blockdev import loops
from tests.csi.helpers import PODS, image
from tests.driver import Driver, block_capability

pytestmark = pytest.mark.kernel
A, B = PODS[0], PODS[1]
CONTAINERD = """[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
runtime_path = "/opt/kata/bin/containerd-shim-kata-v2"
"""


@pytest.fixture
def driver() -> Iterator[Driver]:
    one = Driver()
    (one.directory / "containerd.toml").write_text(CONTAINERD)
    config = one.directory / "kata/etc/kata-containers/configuration.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\nblock_device_cache_set = true\nblock_device_cache_direct = true\n")
    with one:
        yield one
        assert not one.mounts()
        assert one.loop_devices() == []


def handed(driver, target):
    key = base64.urlsafe_b64encode(target.encode()).decode()
    return json.loads((driver.direct_volumes / key / "mountInfo.json").read_text())["device"]


def publish(driver, name, pod, capability=None):
    volume = driver.create(name, capability=capability)
    driver.stage(volume, capability)
    return volume, driver.publish(volume, pod, runtime="kata", capability=capability)


def test_the_go_shim_with_cache_options_gets_a_loop_device(driver):
    volume, target = publish(driver, "pvc", A)
    device = handed(driver, target)
    assert loops.stands_on(device, str(image(driver, volume)))
    direct = loops.backing(device).direct_io
    with open(os.open(image(driver, volume), os.O_RDONLY | getattr(os, "O_DIRECT", 0)), "rb"):
        assert direct, "the filesystem can, so the device does"
    assert driver.publish(volume, A, runtime="kata") == target
    assert handed(driver, target) == device
    driver.stop()
    driver.start()
    assert driver.publish(volume, A, runtime="kata") == target
    assert handed(driver, target) == device
    driver.unpublish(volume, A)
    driver.unstage(volume)


def test_a_device_that_somebody_unbound_is_given_again_and_the_hand_off_names_it(driver):
    volume, target = publish(driver, "pvc", A)
    old = handed(driver, target)
    subprocess.run(["losetup", "-d", old], check=True)
    driver.publish(volume, A, runtime="kata")
    assert loops.stands_on(handed(driver, target), str(image(driver, volume)))
    driver.unpublish(volume, A)
    driver.unstage(volume)


@pytest.mark.parametrize("kind", ["filesystem", "raw"])
def test_no_other_tenant_gets_the_number_that_a_pod_would_open(driver, kind):
    """Between two containers nobody has the device open, so nothing keeps it bound but our word."""
    capability = block_capability() if kind == "raw" else None
    volume, target = publish(driver, "first", A, capability)
    old = loops.find(str(image(driver, volume)))[0]
    subprocess.run(["losetup", "-d", old], check=True)
    other, theirs = publish(driver, "second", B, capability)
    now = loops.find(str(image(driver, other)))
    assert len(now) == 1
    assert now != [old]
    if kind == "filesystem":
        assert handed(driver, target) == old
        assert handed(driver, theirs) == now[0]
    assert loops.backing(old) is None, "what was passed over is free again"
    driver.publish(volume, A, runtime="kata", capability=capability)
    for one, pod in ((volume, A), (other, B)):
        driver.unpublish(one, pod)
        driver.unstage(one)
    third, _ = publish(driver, "third", A, capability)
    driver.unpublish(third, A)
    driver.unstage(third)
    assert not list((driver.records / "devices").iterdir())
