"""What somebody still has after its pod is gone, and what took a device's place meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockdev import loops, mountinfo, superblocks
from tests.csi.helpers import PODS, image, refused
from tests.driver import block_capability, mount_capability

pytestmark = pytest.mark.kernel
A, B = PODS[:2]
_KEEPER = "import time; print('here', flush=True); time.sleep(300)"


@pytest.fixture(autouse=True)
def tidy(driver):
    """What a test leaves published goes in the ordinary way."""
    yield
    for one in [entry.volume for entry in driver.client.ListVolumes().entries]:
        for pod in (A, B):
            driver.unpublish(one, pod)
        driver.unstage(one)
        driver.delete(one)


@contextlib.contextmanager
def another_namespace():
    """A process with a private copy of the node's mounts, as a container with `/` bound has."""
    keeper = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", _KEEPER], stdout=subprocess.PIPE
    )
    assert keeper.stdout is not None
    keeper.stdout.readline()
    try:
        yield keeper
    finally:
        keeper.kill()
        keeper.wait()


def raw(driver, name, **options):
    capability = block_capability("SINGLE_NODE_MULTI_WRITER")
    volume = driver.create(name, 16 << 20, capability)
    driver.stage(volume, capability)
    return volume, lambda pod: driver.publish(volume, pod, runtime="runc", capability=capability)


def test_a_mount_namespace_of_somebodys_own_does_not_fail_an_unpublish_or_an_unstage(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    with open(f"{target}/file", "w") as file:
        file.write("kept")
    with another_namespace() as keeper:
        driver.unpublish(volume, A)
        assert not os.path.exists(target) and driver.mounts() == []
        driver.unpublish(volume, A)
        with refused("FAILED_PRECONDITION", volume.volume_id, f"pid {keeper.pid}"):
            driver.publish(volume, B, runtime="kata")
        # The same kernel has it again at once, and fsck, which would mark it clean, does not touch what is mounted.
        assert not superblocks.read(str(image(driver, volume))).clean
        assert open(f"{driver.publish(volume, B, runtime='runc')}/file").read() == "kept"
        assert not superblocks.read(str(image(driver, volume))).clean
        driver.unpublish(volume, B)
        driver.unstage(volume)
        with refused("FAILED_PRECONDITION", volume.volume_id, f"pid {keeper.pid}"):
            driver.delete(volume)
        driver.stage(volume)
        assert open(f"{driver.publish(volume, B, runtime='runc')}/file").read() == "kept"
        driver.unpublish(volume, B)
        driver.unstage(volume)
        assert "is in use" in driver.cli("gc", "--json", check=False).stdout and driver.loop_devices()
    driver.cli("gc")
    left = driver.left_over()
    assert not left["claims and locks"] and not left["loop devices"]
    driver.delete(volume)


def test_a_start_comes_back_to_what_lingered(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="runc")
    with another_namespace():
        driver.unpublish(volume, A)
        driver.unstage(volume)
        driver.stop()
    driver.start()
    assert not driver.left_over()["claims and locks"] and not driver.loop_devices()


def test_a_device_that_a_pod_keeps_open_is_not_given_to_another_volume(driver):
    volume, publish = raw(driver, "one")
    other, publish_other = raw(driver, "two")
    target = publish(A)
    fd = os.open(target, os.O_RDWR)
    try:
        driver.unpublish(volume, A)
        again = publish(B)
        (device,) = loops.find(str(image(driver, volume)))
        assert not loops.backing(device).clears_itself
    finally:
        os.close(fd)
    assert loops.stands_on(device, str(image(driver, volume)))
    theirs = publish_other(A)
    assert os.stat(theirs).st_rdev != os.stat(again).st_rdev
    driver.unpublish(volume, B)
    driver.unpublish(other, A)
    assert driver.loop_devices() == []


def test_a_loop_device_on_top_keeps_the_one_below(driver):
    """kubelet puts one of its own on every raw volume; no process has the lower one open then."""
    volume, publish = raw(driver, "one")
    target = publish(A)
    top = subprocess.run(
        ["losetup", "--find", "--show", target], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        driver.unpublish(volume, A)
        (device,) = loops.find(str(image(driver, volume)))
        assert not loops.backing(device).clears_itself
        with refused("FAILED_PRECONDITION", volume.volume_id):
            driver.unstage(volume)
            driver.delete(volume)
    finally:
        subprocess.run(["losetup", "-d", top], check=True)
    driver.delete(volume)
    assert driver.loop_devices() == []


def test_a_device_marked_to_clear_itself_is_kept(driver):
    """`losetup -d` by somebody, while the pod has it open."""
    _volume, publish = raw(driver, "one")
    target = publish(A)
    fd = os.open(target, os.O_RDWR)
    try:
        device = f"/dev/loop{os.minor(os.stat(target).st_rdev)}"
        subprocess.run(["losetup", "-d", device], check=True)
        assert loops.backing(device).clears_itself
        publish(A)
    finally:
        os.close(fd)
    assert loops.backing(device) is not None


def test_what_is_at_a_target_is_compared_with_the_volumes_device(driver):
    volume, publish = raw(driver, "one")
    _other, publish_other = raw(driver, "two")
    target = publish(A)
    number = os.stat(target).st_rdev
    subprocess.run(["losetup", "-d", f"/dev/loop{os.minor(number)}"], check=True)
    theirs = publish_other(B)
    publish(A)
    assert os.stat(target).st_rdev != os.stat(theirs).st_rdev
    (device,) = loops.find(str(image(driver, volume)))
    assert os.stat(target).st_rdev == os.stat(device).st_rdev


@pytest.mark.parametrize("place", ["staging", "target"])
def test_a_foreign_mount_is_not_taken_for_the_volumes(driver, place):
    volume = driver.create("pvc")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    at = target if place == "target" else driver.staging(volume.volume_id)
    subprocess.run(["mount", "-t", "tmpfs", "foreign", at], check=True)
    try:
        with refused("FAILED_PRECONDITION", "something else is mounted there"):
            driver.publish(volume, A, runtime="runc")
    finally:
        subprocess.run(["umount", at], check=True)
    driver.publish(volume, A, runtime="runc")


def test_a_lost_claim_leaves_no_loop_device(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="runc")
    block, publish = raw(driver, "raw")
    publish(A)
    for one in (volume, block):
        (driver.records / "claims" / f"{one.volume_id}.json").unlink()
    for one in (volume, block):
        driver.unpublish(one, A)
        driver.unstage(one)
        driver.delete(one)
    assert driver.mounts() == [] and driver.loop_devices() == []


def test_with_a_lost_claim_the_device_of_another_pod_stays(driver):
    volume, publish = raw(driver, "raw")
    publish(A)
    second = publish(B)
    number = os.stat(second).st_rdev
    (driver.records / "claims" / f"{volume.volume_id}.json").unlink()
    driver.unpublish(volume, A)
    assert loops.stands_on(f"/dev/loop{os.minor(number)}", str(image(driver, volume)))


def errors_of(device):
    name = os.path.basename(device)
    with open(f"/proc/fs/ext4/{name}/options") as options:
        return [line.strip() for line in options if line.startswith("errors=")]


def test_what_a_guest_wrote_about_errors_is_overruled(driver):
    """A guest says `panic` in its own superblock; the host's kernel must never do as it says."""
    volume = driver.create("pvc")
    driver.stage(volume)
    subprocess.run(["tune2fs", "-e", "panic", str(image(driver, volume))], check=True, capture_output=True)
    driver.publish(volume, A, runtime="runc")
    (device,) = loops.find(str(image(driver, volume)))
    assert errors_of(device) == ["errors=remount-ro"]


@pytest.mark.parametrize("flag", ["errors=panic", "errors=continue", "journal_path=/dev/sda", "logdev=/dev/sda"])
def test_mount_options_that_could_take_the_node_down_are_refused(driver, flag):
    bad = mount_capability(flags=(flag,))
    with refused("INVALID_ARGUMENT", flag.split("=", maxsplit=1)[0]):
        driver.create("pvc", capability=bad)
    volume = driver.create("pvc")
    with refused("INVALID_ARGUMENT", flag.split("=", maxsplit=1)[0]):
        driver.stage(volume, bad)
    driver.create("fine", capability=mount_capability(flags=("errors=remount-ro",)))


def test_an_older_releases_pod_with_such_an_option_goes_on(driver):
    """Refused for new targets only: kubelet repeats stage and publish for running pods."""
    old = mount_capability(flags=("errors=continue",))
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="runc")
    path = driver.records / "claims" / f"{volume.volume_id}.json"
    path.write_bytes(path.read_bytes().replace(b'"mount_flags":[]', b'"mount_flags":["errors=continue"]'))
    driver.stage(volume, old)
    driver.publish(volume, A, runtime="runc", capability=old)
    with refused("INVALID_ARGUMENT", "errors=continue"):
        driver.publish(volume, B, runtime="runc", capability=old)
    assert mountinfo.table()


def test_a_read_only_volume_gets_no_group_and_is_read(driver):
    volume = driver.create("v")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    Path(target, "f").write_text("x")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    before = os.stat(image(driver, volume)).st_blocks
    for capability in (mount_capability(flags=("ro",), group="2000"),
                       mount_capability("SINGLE_NODE_READER_ONLY", group="2000")):  # fmt: skip
        driver.stage(volume, capability)
        for runtime in ("runc", "kata"):
            target = driver.publish(volume, A, runtime=runtime, capability=capability)
            if runtime == "runc":
                assert Path(target, "f").read_text() == "x" and os.stat(Path(target, "f")).st_gid == 0
                with pytest.raises(OSError, match="Read-only"):
                    Path(target, "g").write_text("x")
            driver.unpublish(volume, A)
        driver.unstage(volume)
    assert os.stat(image(driver, volume)).st_blocks == before
    driver.delete(volume)


def test_a_filesystem_that_met_an_error_is_given_to_nobody_who_would_write(driver):
    volume = driver.create("v")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    device = os.path.basename(driver.loop_devices()[0])
    Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("test")
    with pytest.raises(OSError, match="Read-only"):
        Path(target, "g").write_text("x")
    with refused("FAILED_PRECONDITION", "is read-only since", "default/pod"):
        driver.publish(volume, B, runtime="runc")
    assert driver.publish(volume, A, runtime="runc") == target, "a pod that has it keeps it"
    driver.unpublish(volume, B)
    driver.unpublish(volume, A)
    again = driver.publish(volume, B, runtime="runc")
    Path(again, "g").write_text("x")
    driver.unpublish(volume, B)
    driver.unstage(volume)
    driver.delete(volume)
