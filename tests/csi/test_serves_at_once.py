"""A start answers at once; what its last process left is put right beside the calls, or by the first one about it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import grpc
import pytest

from blockdev import superblocks
from tests.cri import WITNESS, Runtime
from tests.csi.helpers import PODS, image, refused
from tests.csi.test_closing import killed_growing, stopped
from tests.driver import Driver, mount_capability
from volumes.store import State, Store

pytestmark = pytest.mark.kernel
A, B = PODS[:2]
MIB = 1 << 20


@pytest.fixture
def runtime():
    with Runtime() as one:
        yield one


@pytest.fixture
def driver(runtime):
    with Driver(environment={"RUNVOL_CRI_ENDPOINT": runtime.endpoint}) as one:
        (one.kubelet / "pods" / WITNESS).mkdir(parents=True)
        yield one


def growing(driver, size):
    """A driver that was killed while a program grew a volume with its hand-off closed; the volume and its target."""
    volume = driver.create("grows", size)
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata")
    helper = killed_growing(driver, volume, target, 2 * size, "e2fsck")
    with contextlib.suppress(ProcessLookupError):
        os.kill(helper, signal.SIGCONT)
    return volume, target


def test_a_repair_that_takes_long_holds_up_nobody_else(driver):
    volume, _target = growing(driver, 8 << 30)
    began = time.monotonic()
    driver.start(repaired=False)
    helper = stopped("e2fsck", image(driver, volume))
    try:
        assert time.monotonic() - began < 10
        other = driver.create("other")
        driver.stage(other)
        driver.publish(other, B, runtime="runc")
        driver.unpublish(other, B)
        driver.unstage(other)
        driver.delete(other)
        with refused("ABORTED"):
            driver.publish(volume, A, runtime="kata")
        assert driver.client.Probe(timeout=3.0).ready.value
    finally:
        os.kill(helper, signal.SIGCONT)
    until = time.monotonic() + 60
    while True:
        try:
            driver.publish(volume, A, runtime="kata")
            break
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.ABORTED
            assert time.monotonic() < until
            time.sleep(0.1)
    assert superblocks.read(str(image(driver, volume))).total_bytes == 16 << 30
    driver.unpublish(volume, A)
    driver.unstage(volume)


@pytest.mark.parametrize("backend", ["loop", "directory"])
def test_the_first_call_puts_its_own_volume_right(driver, backend):
    """Nobody has repaired anything yet: the repairs are held up for ever."""
    parameters = {"backend": backend, **({"quota": "none"} if backend == "directory" else {})}
    capability = mount_capability()
    made = driver.create("made", capability=capability, **parameters)
    gone = driver.create("gone", capability=capability, **parameters)
    driver.stop()
    store = Store(str(driver.state / ("volumes.db" if backend == "loop" else "directories.db")))
    store.set_state(made.volume_id, State.CREATING)
    store.set_state(gone.volume_id, State.DELETING)
    store.close()
    driver.start(repaired=False)
    again = driver.create("made", capability=capability, **parameters)
    assert again.volume_id == made.volume_id
    driver.stage(again, capability)
    driver.unstage(again)
    driver.delete(gone)
    driver.delete(again)
    assert not driver.cli("volumes").stdout.count("made")


def test_an_expansion_that_was_killed_before_its_file_grew(driver):
    volume = driver.create("pvc", 64 * MIB)
    driver.stop()
    store = Store(str(driver.state / "volumes.db"))
    store.set_capacity(volume.volume_id, 128 * MIB)
    store.close()
    driver.start(repaired=False)
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata")
    assert superblocks.read(str(image(driver, volume))).total_bytes == 128 * MIB
    driver.unpublish(volume, A)
    driver.unstage(volume)


def test_an_expansion_that_was_killed_and_finds_no_room_takes_nothing_from_its_pod(driver, tmp_path):
    """A preallocated volume whose file never grew, on a disk that has filled up since: it works at its old size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    driver.stop()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", disk], check=True)
    try:
        driver.state = disk / "state"
        driver.environment["RUNVOL_PATHS_STATE_DIR"] = str(driver.state)
        driver.start()
        volume = driver.create("pvc", 64 * MIB, preallocate="true")
        driver.stage(volume)
        driver.publish(volume, A, runtime="kata")
        driver.stop()
        store = Store(str(driver.state / "volumes.db"))
        store.set_capacity(volume.volume_id, 250 * MIB)
        store.close()
        driver.start()
        driver.stage(volume)
        driver.publish(volume, A, runtime="kata")
        assert image(driver, volume).stat().st_size == 64 * MIB
        driver.unpublish(volume, A)
        driver.unstage(volume)
    finally:
        driver.stop()
        subprocess.run(["umount", disk], check=True)
