"""How many volumes a node may have, and how many a guest has places for."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from blockdev import Deadline
from guestmount import Claims
from tests.csi.helpers import PODS, refused
from tests.driver import Driver, block_capability, mount_capability
from tests.flexvolume.test_driver import Flex
from tests.until import until

FIRECRACKER = """
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
  runtime_type = "io.containerd.kata-fc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata.options]
    ConfigPath = "/kata.toml"
"""
PLACES = 8
RAW = block_capability()


@pytest.fixture
def few():
    """A node that may have two volumes."""
    with Driver(environment={"RUNVOL_CSI_MAX_VOLUMES": "2", "RUNVOL_DETECT_DEFAULT_RUNTIME": "runc"}) as one:
        yield one
        # A loop device goes with its last holder, and a program that another call has just started may be one.
        until(lambda: not [*one.mounts(), *one.loop_devices()])


def limit(driver: Driver) -> int:
    return driver.client.NodeGetInfo().max_volumes_per_node


def test_without_the_setting_no_limit_is_told(shared_driver):
    assert limit(shared_driver) == 0


def test_a_node_that_is_full_says_so_as_csi_has_it(few):
    assert limit(few) == 2
    with few.as_nfs() as nfs:
        assert limit(nfs) == 0, "volumes on NFS are not counted"
    volumes = [few.create(f"v{n}", 8 << 20) for n in range(3)]
    for volume in volumes[:2]:
        few.stage(volume)
    with refused("RESOURCE_EXHAUSTED", volumes[2].volume_id, "2 volumes", "csi.max_volumes"):
        few.stage(volumes[2])
    few.stage(volumes[0])  # kubelet has restarted
    few.publish(volumes[0], PODS[1])
    few.publish(volumes[0], PODS[2])  # a second pod's is no second volume
    assert limit(few) == 2, "what CSI has is the scheduler's to count"
    context = {"backend": "nfs", "server": "192.0.2.1", "share": "/srv/one"}
    rwx = mount_capability("MULTI_NODE_MULTI_WRITER")
    staging = few.staging("share")
    few.client.NodeStageVolume(
        volume_id="static-1", staging_target_path=staging, volume_capability=rwx, volume_context=context
    )
    few.client.NodeUnstageVolume(volume_id="static-1", staging_target_path=staging)
    few.unstage(volumes[1])
    few.stage(volumes[2])
    for pod in PODS[1:3]:
        few.unpublish(volumes[0], pod)
    few.unstage(volumes[0])
    few.unstage(volumes[2])


def test_what_flexvolume_has_is_taken_off_what_the_scheduler_may_count(few):
    """kubelet asks again now and then (nodeAllocatableUpdatePeriodSeconds)."""
    flex, volumes = Flex(few), [few.create(f"v{n}", 8 << 20) for n in range(3)]
    few.stage(volumes[0])
    assert limit(few) == 2
    target = flex.target("data")
    flex.ok("mount", target, flex.options(volumes[1].volume_id))
    assert limit(few) == 1
    few.unstage(volumes[0])
    other = flex.target("more")
    flex.ok("mount", other, flex.options(volumes[0].volume_id))
    assert limit(few) == 1, "0 would be no limit; the stage refuses what comes all the same"
    with refused("RESOURCE_EXHAUSTED", "csi.max_volumes"):
        few.stage(volumes[2])
    assert "csi.max_volumes" in flex.fails("mount", flex.target("third"), flex.options(volumes[2].volume_id))
    for path in (target, other):
        flex.ok("unmount", path)
    assert limit(few) == 2


@pytest.mark.parametrize("use", [mount_capability(), RAW], ids=["filesystem", "raw"])
def test_a_pod_with_more_disks_than_its_guest_has_places_is_refused_in_words(driver, use):
    (driver.directory / "containerd.toml").write_text(FIRECRACKER)
    (driver.directory / "kata").mkdir()
    (driver.directory / "kata/kata.toml").write_text("[hypervisor.firecracker]\n")
    volumes = [driver.create(f"v{n}", 8 << 20, use) for n in range(PLACES + 1)]
    for volume in volumes:
        driver.stage(volume, use)
    for volume in volumes[:PLACES]:
        driver.publish(volume, PODS[1], runtime="kata", capability=use)
    last = volumes[PLACES]
    for _ in range(2):
        with refused(
            "FAILED_PRECONDITION", last.volume_id, "default/pod", "'kata'", f"at most {PLACES} disks", "fewer"
        ):
            driver.publish(last, PODS[1], runtime="kata", capability=use)
    driver.publish(volumes[0], PODS[1], runtime="kata", capability=use)  # what it has it keeps
    driver.publish(last, PODS[2], runtime="kata", capability=use)  # another guest has places of its own
    for volume in volumes[:PLACES]:
        driver.unpublish(volume, PODS[1])
    driver.unpublish(last, PODS[2])
    driver.publish(last, PODS[1], runtime="kata", capability=use)
    driver.unpublish(last, PODS[1])
    for volume in volumes:
        driver.unstage(volume)


def test_stages_of_one_moment_do_not_pass_the_limit_together(few):
    volumes = [few.create(f"v{n}", 8 << 20) for n in range(6)]

    def staged(volume) -> str:
        try:
            few.stage(volume)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

    with ThreadPoolExecutor(len(volumes)) as callers:
        codes = list(callers.map(staged, volumes))
    assert sorted(codes) == ["OK"] * 2 + ["RESOURCE_EXHAUSTED"] * 4
    assert not any((few.run / "places").iterdir())
    has = [volume for volume, code in zip(volumes, codes, strict=True) if code == "OK"]
    few.unstage(has[0])
    late = next(volume for volume, code in zip(volumes, codes, strict=True) if code != "OK")
    few.stage(late)
    few.unstage(late)
    few.unstage(has[1])


def test_volumes_that_a_pod_gets_in_one_moment_do_not_pass_its_guests_places_together(driver):
    """kubelet publishes all of a pod's volumes at once."""
    (driver.directory / "containerd.toml").write_text(FIRECRACKER)
    (driver.directory / "kata").mkdir()
    (driver.directory / "kata/kata.toml").write_text("[hypervisor.firecracker]\n")
    volumes = [driver.create(f"v{n}", 8 << 20) for n in range(PLACES + 4)]
    for volume in volumes:
        driver.stage(volume)

    def published(volume) -> str:
        try:
            driver.publish(volume, PODS[1], runtime="kata")
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

    with ThreadPoolExecutor(len(volumes)) as callers:
        codes = list(callers.map(published, volumes))
    assert sorted(codes) == ["FAILED_PRECONDITION"] * 4 + ["OK"] * PLACES
    for volume, code in zip(volumes, codes, strict=True):
        if code == "OK":
            driver.unpublish(volume, PODS[1])
        driver.unstage(volume)


def test_a_place_of_a_process_that_was_killed_is_nobodys(tmp_path):
    claims = Claims(str(tmp_path))
    code = (
        "import os, signal, sys; from blockdev import Deadline; from guestmount import Claims\n"
        f"with Claims({str(tmp_path)!r}).placed('node', 'a', lambda _others: None, Deadline.after(5)):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    seen: list[frozenset[str]] = []
    with claims.placed("node", "b", seen.append, Deadline.after(5)), \
            claims.placed("node", "c", seen.append, Deadline.after(5)), \
            claims.placed("pod x", "d", seen.append, Deadline.after(5)):  # fmt: skip
        pass
    assert seen == [frozenset(), {"b"}, frozenset()]
    assert not any((tmp_path / "places").iterdir())
