"""The whole way with the real driver: a guest writes, kubelet and the driver restart, the guest is killed."""

from __future__ import annotations

import subprocess
import time

import pytest

from blockdev import exclusivity
from tests.csi.helpers import PODS, image, refused
from tests.cri import READY, WITNESS, Runtime
from tests.driver import Driver, block_capability, mount_capability
from tests.sandbox.shim import GO, RUST, Sandbox, Settings, volume_mount, write_bundle
from tests.sandbox.vm import VM

pytestmark = [pytest.mark.guest, pytest.mark.kernel]
A, B = PODS[:2]

VERIFY = ["fio", "--name=verify", "--filename=/mnt/data/fio.dat", "--size=24M", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio",
          "--iodepth=16", "--verify=crc32c", "--verify_state_save=0", "--randseed=7", "--output-format=json"]  # fmt: skip


def a_sandbox(vm, driver, shim=GO):
    settings = Settings(shim=shim, direct_volumes=driver.direct_volumes, shared=None, block_device_driver="virtio-blk")
    return Sandbox(vm=vm, settings=settings).start()


def test_restarts_while_a_guest_writes_and_then_the_guest_is_killed(driver):
    """Stage and publish repeated, the driver killed and started, under fio; then SIGKILL of the guest; then every block is there."""
    volume = driver.create("db", 64 << 20)
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata", name="db-0")
    with VM() as vm:
        sandbox = a_sandbox(vm, driver)
        sandbox.create_container(write_bundle(driver.directory / "b1", [volume_mount(target)]), "c1")
        code, output = sandbox.run("c1", *VERIFY, "--do_verify=0", "--end_fsync=1")
        assert code == 0, output
        churn = sandbox.spawn(
            "c1", "sh", "-c", "i=0; while true; do i=$((i+1)); echo $i > /mnt/data/churn.$((i%50)); done"
        )
        assert churn
        until, restarts = time.monotonic() + 6, 0
        while time.monotonic() < until:
            driver.kill()
            driver.start()
            driver.stage(volume)
            assert driver.publish(volume, A, runtime="kata", name="db-0") == target
            with refused("FAILED_PRECONDITION", "default/db-0"):
                driver.publish(volume, B, runtime="runc")
            restarts += 1
        assert restarts >= 3
        code, output = sandbox.run("c1", *VERIFY, "--verify_only=1")
        assert code == 0, output
        vm.process.kill()
        vm.process.wait()

    driver.unpublish(volume, A)
    # What a killed guest leaves needs its journal, and nothing else: the next publish replays it.
    driver.publish(volume, B, runtime="kata")
    checked = subprocess.run(
        ["e2fsck", "-f", "-n", str(image(driver, volume))], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    with VM() as vm:
        sandbox = a_sandbox(vm, driver)
        target = driver.target(volume.volume_id, B)
        sandbox.create_container(write_bundle(driver.directory / "b2", [volume_mount(target)]), "c2")
        code, output = sandbox.run("c2", *VERIFY, "--verify_only=1")
        assert code == 0, output
        driver.unpublish(volume, B)  # a forced delete: the guest still runs
        with refused("FAILED_PRECONDITION", f"pid {vm.pid}", "qemu"):
            driver.publish(volume, A, runtime="runc")
        sandbox.remove_container("c2")
        assert exclusivity.is_free(str(image(driver, volume)))
        target = driver.publish(volume, A, runtime="runc")
        assert (driver.kubelet / "pods" / A).exists()
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
    assert not any(driver.left_over().values())


@pytest.mark.parametrize("shim", [GO, RUST])
def test_what_the_driver_hands_over_both_shims_take(driver, shim, vm):
    """Mount options, a group, growth with the next pod, xfs; and a raw volume, in the shared guest."""
    capability = mount_capability(fstype="xfs", group="2000", flags=("noatime",))
    volume = driver.create("pvc", 320 << 20, capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    with refused("FAILED_PRECONDITION", "deleted and made again"):
        driver.client.NodeExpandVolume(
            volume_id=volume.volume_id, volume_path=target, capacity_range={"required_bytes": 512 << 20}
        )
    driver.unpublish(volume, A)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    sandbox = Sandbox(vm=vm, settings=Settings(shim=shim, direct_volumes=driver.direct_volumes))
    name = f"both-{shim}"
    sandbox.create_container(write_bundle(driver.directory / "b", [volume_mount(target)]), name)
    try:
        _, text = sandbox.run(
            name, "sh", "-c", "stat -c '%g' /mnt/data; df -m /mnt/data | tail -1; grep /mnt/data /proc/self/mountinfo"
        )
        lines = text.splitlines()
        assert lines[0] == "2000"
        assert int(lines[1].split()[1]) > 400
        assert "noatime" in lines[2] and "xfs" in lines[2]
    finally:
        sandbox.remove_container(name)
    driver.unpublish(volume, A)
    driver.unstage(volume)


def test_a_raw_volume_goes_into_the_guest_as_a_device(driver, vm):
    import os

    capability = block_capability()
    volume = driver.create("raw", 32 << 20, capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    number = os.stat(target).st_rdev
    sandbox = Sandbox(vm=vm, settings=Settings(direct_volumes=driver.direct_volumes))
    devices = [{"path": "/dev/data", "type": "b", "major": os.major(number), "minor": os.minor(number)}]
    sandbox.create_container(write_bundle(driver.directory / "b", [], devices), "raw")
    code, output = sandbox.run("raw", "sh", "-c", "echo from-the-guest | dd of=/dev/data bs=512 conv=sync,fsync")
    assert code == 0, output
    driver.unpublish(volume, A)
    driver.unstage(volume)
    with refused("FAILED_PRECONDITION", f"pid {vm.pid}"):
        driver.delete(volume)
    sandbox.remove_container("raw")
    driver.cli("gc")
    assert image(driver, volume).read_bytes()[:14] == b"from-the-guest" and driver.loop_devices() == []


@pytest.mark.parametrize("shim", [GO, RUST])
def test_a_volume_grows_before_its_guest_has_it_and_never_between_two_containers(vm, shim):
    """Nobody has the disk open between them, and the next container plugs it in from the hand-off."""
    with Runtime() as runtime, Driver(environment={"RUNVOL_CRI_ENDPOINT": runtime.endpoint}) as driver:

        def expand(size):
            driver.client.NodeExpandVolume(
                volume_id=volume.volume_id, volume_path=target, capacity_range={"required_bytes": size << 20}
            )

        (driver.kubelet / "pods" / WITNESS).mkdir(parents=True)
        volume = driver.create("pvc", 64 << 20)
        driver.stage(volume)
        target = driver.publish(volume, A, runtime="kata")
        expand(256)  # as kubelet does for a claim that was enlarged meanwhile
        sandbox = Sandbox(vm=vm, settings=Settings(shim=shim, direct_volumes=driver.direct_volumes))
        runtime.pods = [(A, READY)]
        for life in range(3):
            name = f"grow-{shim}-{life}"
            sandbox.create_container(write_bundle(driver.directory / name, [volume_mount(target)]), name)
            code, text = sandbox.run(
                name, "sh", "-c", f"echo {life} > /mnt/data/f{life}; sync; df -m /mnt/data | tail -1"
            )
            assert code == 0, text
            assert 200 < int(text.split()[1]) < 300
            sandbox.remove_container(name)
            assert exclusivity.is_free(str(image(driver, volume)))
            with refused("FAILED_PRECONDITION", "the pod runs"):
                expand(512)
        sandbox.destroy()
        runtime.pods = []
        expand(512)
        checked = subprocess.run(
            ["e2fsck", "-f", "-n", str(image(driver, volume))], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout
        name = f"grow-{shim}-again"
        sandbox.create_container(write_bundle(driver.directory / name, [volume_mount(target)]), name)
        _, text = sandbox.run(name, "sh", "-c", "cat /mnt/data/f?; df -m /mnt/data | tail -1")
        assert text.splitlines()[:3] == ["0", "1", "2"]
        assert int(text.splitlines()[3].split()[1]) > 400
        sandbox.remove_container(name)
        sandbox.destroy()
        driver.unpublish(volume, A)
        driver.unstage(volume)
