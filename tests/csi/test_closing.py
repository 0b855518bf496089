"""A volume that a sandbox has grows while no sandbox of its pod lives, and nothing can take it meanwhile."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from blockdev import superblocks
from tests.cri import NOT_READY, READY, WITNESS, Runtime
from tests.csi.helpers import PODS, has_resource, image, refused, vmm
from tests.driver import Driver, block_capability, mount_capability
from tests.sandbox.shim import GO, RUST, ContainerFailed, Sandbox, Settings

pytestmark = pytest.mark.kernel
A, B = PODS[0], PODS[1]
MIB = 1 << 20


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime() as one:
        yield one


@pytest.fixture
def driver(runtime: Runtime, request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(environment={"RUNVOL_CRI_ENDPOINT": runtime.endpoint, **getattr(request, "param", {})}) as one:
        (one.kubelet / "pods" / WITNESS).mkdir(parents=True)
        yield one
        assert not one.mounts()
        assert one.loop_devices() == []


def expand(driver, volume, target, size=640 * MIB):
    return driver.client.NodeExpandVolume(
        volume_id=volume.volume_id, volume_path=target, capacity_range={"required_bytes": size}
    ).capacity_bytes


def hand_off(driver, target) -> Path:
    return driver.direct_volumes / base64.urlsafe_b64encode(target.encode()).decode() / "mountInfo.json"


def claim(driver, volume):
    return json.loads((driver.records / "claims" / f"{volume.volume_id}.json").read_text())


def total(driver, volume) -> int:
    return superblocks.read(str(image(driver, volume))).total_bytes


def publish(driver, fstype="ext4", group="", size=320 * MIB):
    capability = mount_capability(fstype=fstype, group=group)
    volume = driver.create("pvc", size, capability)
    driver.stage(volume, capability)
    return volume, driver.publish(volume, A, runtime="kata", capability=capability), capability


def end(driver, volume):
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize("asked", ["expand", "start"])
def test_what_its_guest_has_damaged_does_not_grow_and_stays_open_for_it(driver, runtime, asked):
    volume, target, capability = publish(driver)
    before = hand_off(driver, target).read_bytes()
    break_root = ["debugfs", "-w", "-R", "set_inode_field <2> mode 0100644", str(image(driver, volume))]
    subprocess.run(break_root, check=True, capture_output=True)
    for _ in range(2):
        with refused("FAILED_PRECONDITION", "UNEXPECTED INCONSISTENCY"):
            expand(driver, volume, target)
        assert hand_off(driver, target).read_bytes() == before
    if asked == "start":  # the process was killed while it was closed
        old = claim(driver, volume)
        text = json.dumps(old | {"prepared": False}).ljust(4096)
        (driver.records / "claims" / f"{volume.volume_id}.json").write_text(text)
        driver.kill()
        driver.start()
    assert driver.publish(volume, A, runtime="kata", capability=capability) == target
    assert hand_off(driver, target).read_bytes() == before
    driver.unpublish(volume, A)
    for kind in ("runc", "kata"):
        with refused("FAILED_PRECONDITION", "UNEXPECTED INCONSISTENCY"):
            driver.publish(volume, B, runtime=kind, capability=capability)
    driver.unstage(volume)
    driver.delete(volume)


def start_container(driver, target, tmp_path, shim) -> None:
    """As far as a shim comes without a guest: to the device."""
    sandbox = Sandbox(vm=None, settings=Settings(shim=shim, direct_volumes=driver.direct_volumes))
    bundle = tmp_path / f"bundle-{os.urandom(4).hex()}"
    bundle.mkdir()
    mount = {"destination": "/data", "source": target, "type": "bind", "options": ["rbind", "rw"]}
    (bundle / "config.json").write_text(json.dumps({"mounts": [mount]}))
    sandbox.create_container(bundle, "c1")


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
@pytest.mark.parametrize("pods", [[], [(B, READY)], [(A, NOT_READY)]], ids=["none", "another", "ended"])
def test_it_grows_before_its_sandbox_lives(driver, runtime, fstype, pods):
    volume, target, _ = publish(driver, fstype, group="3000")
    before = hand_off(driver, target).read_bytes()
    runtime.pods = pods
    assert expand(driver, volume, target) == 640 * MIB
    assert total(driver, volume) == 640 * MIB
    assert hand_off(driver, target).read_bytes() == before
    assert claim(driver, volume)["prepared"]
    assert claim(driver, volume)["handed_out"]
    asked = runtime.asked
    assert expand(driver, volume, target) == 640 * MIB
    assert runtime.asked == asked, "there was nothing to do"
    end(driver, volume)


def test_a_growth_of_what_a_guest_had_is_noted_as_had_by_a_guest(driver, runtime):
    """The check in the middle clears the note; it stands again before a guest can have the volume."""
    volume, target, capability = publish(driver)
    assert expand(driver, volume, target) == 640 * MIB
    driver.unpublish(volume, A)
    environment = {"RUNVOL_NODE_GUEST_FILESYSTEMS": "never"}
    driver.stop()
    driver.environment.update(environment)
    driver.start()
    with refused("FAILED_PRECONDITION", "a guest may have written"):
        driver.publish(volume, A, runtime="runc", capability=capability)
    driver.unstage(volume)


@pytest.mark.parametrize("held", [False, True], ids=["between two lives", "plugged"])
def test_a_living_sandbox_keeps_it(driver, runtime, held):
    volume, target, _ = publish(driver)
    before, facts = hand_off(driver, target).read_bytes(), hand_off(driver, target).stat()
    runtime.pods = [(A, READY)]
    if held:
        with vmm(image(driver, volume)), refused("FAILED_PRECONDITION", "the pod runs", "only its store grew"):
            expand(driver, volume, target)
    else:
        with refused("FAILED_PRECONDITION", "the pod runs", "only its store grew"):
            expand(driver, volume, target)
    assert total(driver, volume) == 320 * MIB
    assert hand_off(driver, target).read_bytes() == before
    assert hand_off(driver, target).stat().st_ino == facts.st_ino, "it was never closed"
    end(driver, volume)


def test_a_vmm_that_nobody_lists_keeps_it(driver, runtime):
    """A shim that hangs after a forced delete; and one that read the hand-off and has opened the device since."""
    volume, target, _ = publish(driver)
    before = hand_off(driver, target).read_bytes()
    with vmm(image(driver, volume)), refused("FAILED_PRECONDITION", "held by python"):
        expand(driver, volume, target)
    assert total(driver, volume) == 320 * MIB
    assert hand_off(driver, target).read_bytes() == before
    assert expand(driver, volume, target) == 640 * MIB
    end(driver, volume)


def test_a_shim_that_has_read_the_hand_off_and_not_yet_opened(driver, runtime):
    """Its sandbox was listed before it could read: the question after the closing finds it."""
    volume, target, _ = publish(driver)
    before = hand_off(driver, target).read_bytes()

    def arrives(number: int) -> None:
        if number == 2:
            runtime.pods = [(A, READY)]

    runtime.before = arrives
    with refused("FAILED_PRECONDITION", "the pod runs"):
        expand(driver, volume, target)
    assert runtime.asked == 2
    assert total(driver, volume) == 320 * MIB
    assert hand_off(driver, target).read_bytes() == before
    end(driver, volume)


@pytest.mark.parametrize("shim", [GO, RUST])
def test_a_container_that_comes_meanwhile_is_refused_and_comes_again(driver, runtime, tmp_path, shim):
    volume, target, _ = publish(driver)
    closed, go_on = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 2:
            closed.set()
            go_on.wait(20)

    runtime.before = hold
    answers: list[int] = []
    call = threading.Thread(target=lambda: answers.append(expand(driver, volume, target)))
    call.start()
    assert closed.wait(20)
    try:
        with pytest.raises(ContainerFailed, match="No such file or directory"):
            start_container(driver, target, tmp_path, shim)
        # Another call does not open it.
        with refused("ABORTED"):
            driver.publish(volume, A, runtime="kata")
        condition = driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target).volume_condition
        assert condition.abnormal
        assert "closed" in condition.message
        assert "closed" not in driver.cli("gc", "--dry-run", check=False).stdout, "it is at work"
    finally:
        go_on.set()
        call.join()
    assert answers == [640 * MIB]
    info = json.loads(hand_off(driver, target).read_bytes())
    assert info["device"] == str(image(driver, volume))
    assert "runvol.closed" not in info["metadata"]
    end(driver, volume)


@pytest.mark.parametrize("way", ["start", "publish", "gc", "expand"])
def test_a_kill_while_it_is_closed(driver, runtime, tmp_path, way):
    volume, target, capability = publish(driver)
    before = hand_off(driver, target).read_bytes()
    closed, go_on = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 2:
            closed.set()
            go_on.wait(20)

    runtime.before = hold

    def call() -> None:
        with pytest.raises(grpc.RpcError):
            expand(driver, volume, target)

    caller = threading.Thread(target=call)
    caller.start()
    assert closed.wait(20)
    driver.kill()
    go_on.set()
    caller.join()
    with pytest.raises(ContainerFailed):
        start_container(driver, target, tmp_path, GO)
    if way == "gc":
        assert "closed by a call that did not end well" in driver.cli("gc", "--dry-run", check=False).stdout
        driver.cli("gc")
        assert hand_off(driver, target).read_bytes() == before
    driver.start()
    if way == "publish":
        driver.publish(volume, A, runtime="kata", capability=capability)
    if way == "expand":
        assert expand(driver, volume, target) == 640 * MIB
    assert hand_off(driver, target).read_bytes() == before
    end(driver, volume)


def stopped(program: str, path: Path) -> int:
    """The process of this program on the file, once there is one; it goes no further."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(program.encode()) and str(path).encode() in words:
                os.kill(int(entry), signal.SIGSTOP)
                return int(entry)
    raise AssertionError(f"{program} was never seen")


def killed_growing(driver, volume, target, size, program) -> int:
    """The driver is killed while this program, whose pid it is, works on a volume whose hand-off is closed."""

    def call() -> None:
        with pytest.raises(grpc.RpcError):
            expand(driver, volume, target, size)

    caller = threading.Thread(target=call)
    caller.start()
    helper = stopped(program, image(driver, volume))
    assert not claim(driver, volume)["prepared"]
    driver.kill()
    caller.join()
    return helper


@pytest.mark.parametrize("program", ["e2fsck", "resize2fs"])
def test_a_kill_in_the_middle_of_the_growth(driver, runtime, tmp_path, program):
    """The next one finishes it before it opens the hand-off."""
    if program == "resize2fs" and has_resource():
        pytest.skip("the kernel grows a mounted ext4 here, and the program is not used")
    volume, target, _ = publish(driver, size=8 << 30)
    before = hand_off(driver, target).read_bytes()
    helper = killed_growing(driver, volume, target, 16 << 30, program)
    with pytest.raises(ContainerFailed):
        start_container(driver, target, tmp_path, GO)
    with contextlib.suppress(ProcessLookupError):  # a check ends with the driver, a resize goes on
        os.kill(helper, signal.SIGCONT)
    driver.start()
    assert claim(driver, volume)["prepared"]
    assert total(driver, volume) == 16 << 30
    assert hand_off(driver, target).read_bytes() == before
    end(driver, volume)


@pytest.mark.parametrize("driver", [{"RUNVOL_CRI_ENDPOINT": "unix:///nonexistent/cri.sock"}, {"RUNVOL_CRI_ENDPOINT": ""}],
                         indirect=True, ids=["away", "never asked"])  # fmt: skip
def test_what_cannot_be_asked_lives(driver):
    volume, target, _ = publish(driver)
    with refused("FAILED_PRECONDITION", "container runtime", "deleted and made again"):
        expand(driver, volume, target)
    end(driver, volume)


def test_a_runtime_that_does_not_answer_costs_some_seconds(driver, runtime):
    volume, target, _ = publish(driver)
    go_on = threading.Event()
    runtime.before = lambda _n: go_on.wait(30)
    began = time.monotonic()
    try:
        with refused("FAILED_PRECONDITION", "does not tell", "DEADLINE_EXCEEDED"):
            expand(driver, volume, target)
    finally:
        go_on.set()
    assert time.monotonic() - began < 10
    end(driver, volume)


def test_a_raw_volume_takes_its_size_at_once(driver, runtime):
    capability = block_capability()
    volume = driver.create("raw", 64 * MIB, capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    runtime.pods = [(A, READY)]
    with refused("FAILED_PRECONDITION", "the pod runs"):
        expand(driver, volume, target, 128 * MIB)
    runtime.pods = []
    assert expand(driver, volume, target, 128 * MIB) == 128 * MIB
    with open(target, "rb") as node:
        assert node.seek(0, os.SEEK_END) == 128 * MIB
    end(driver, volume)


def test_a_raw_volume_of_several_pods_grows_once_all_of_their_sandboxes_are_gone(driver, runtime):
    capability = block_capability("SINGLE_NODE_MULTI_WRITER")
    volume = driver.create("raw", 64 * MIB, capability)
    driver.stage(volume, capability)
    for pod in (A, B):
        target = driver.publish(volume, pod, runtime="kata", capability=capability)
    for living in (A, B):
        runtime.pods = [(living, READY)]
        with refused("FAILED_PRECONDITION", "the pod runs"):
            expand(driver, volume, target, 128 * MIB)
    runtime.pods = []
    assert expand(driver, volume, target, 128 * MIB) == 128 * MIB
    driver.unpublish(volume, B)
    end(driver, volume)


@pytest.mark.parametrize("driver", [{"RUNVOL_KATA_RUST_SHARED_BLOCK": "allow"}], indirect=True)
def test_where_a_failed_creation_could_hurt_a_sibling_nothing_is_closed(driver):
    volume, target, _ = publish(driver)
    with refused("FAILED_PRECONDITION", "rust_shared_block", "could hurt another"):
        expand(driver, volume, target)
    end(driver, volume)


def test_another_runtimes_answer_is_none(driver, runtime):
    """A second containerd beside kubelet's own knows none of its pods, and would say that none runs."""
    volume, target, _ = publish(driver)
    (driver.kubelet / "pods" / WITNESS).rmdir()
    with refused("FAILED_PRECONDITION", "lists no pod that kubelet has", "cri.endpoint"):
        expand(driver, volume, target)
    end(driver, volume)


@pytest.mark.parametrize("lost", [False, True], ids=["claim kept", "claim lost"])
def test_a_program_that_goes_on_after_a_kill_is_waited_for(driver, runtime, lost):
    """Beside it nothing is checked, grown or opened."""
    if has_resource():
        pytest.skip("the kernel grows a mounted ext4 here, and the program is not used")
    volume, target, _ = publish(driver, size=8 << 30)
    before = hand_off(driver, target).read_bytes()
    helper = killed_growing(driver, volume, target, 16 << 30, "resize2fs")
    if lost:
        (driver.records / "claims" / f"{volume.volume_id}.json").unlink()
    driver.start(repaired=False)
    time.sleep(1.5)
    assert not claim(driver, volume)["prepared"]
    assert hand_off(driver, target).read_bytes() != before
    os.kill(helper, signal.SIGCONT)
    until = time.monotonic() + 40
    while hand_off(driver, target).read_bytes() != before:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert total(driver, volume) == 16 << 30
    end(driver, volume)


def test_a_record_that_is_older_than_its_open_hand_off_has_the_host_do_nothing(driver, runtime):
    """As of a state directory that was restored: the sandbox lives, and takes the volume at any moment."""
    volume, target, capability = publish(driver)
    path = driver.records / "claims" / f"{volume.volume_id}.json"
    older = json.dumps(claim(driver, volume) | {"prepared": False, "handed_out": False}).ljust(4096)
    runtime.pods = [(A, READY)]
    with refused("FAILED_PRECONDITION", "only its store grew"):
        expand(driver, volume, target)
    before = hand_off(driver, target).read_bytes()
    for targets in (None, {}):
        driver.stop()
        path.write_text(older if targets is None else json.dumps(json.loads(older) | {"targets": targets}).ljust(4096))
        driver.start()
        assert driver.publish(volume, A, runtime="kata", capability=capability) == target
        assert total(driver, volume) == 320 * MIB, "the host worked on it"
        assert claim(driver, volume)["prepared"]
        with vmm(image(driver, volume)):
            assert driver.publish(volume, A, runtime="kata", capability=capability) == target
        assert hand_off(driver, target).read_bytes() == before
    end(driver, volume)
