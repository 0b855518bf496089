"""What pods, guests, processes of the node and silent peers do to volumes, for every backend and façade from one list.

No name that they plant leads anywhere, no byte that they write costs anybody else an answer, and who does not let go
holds up nothing but what would hurt somebody.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.attacks import hostile
from tests.attacks.lives import CsiLife, Failed, pods
from tests.attacks.test_scarcity import LIVES, ROUNDS, SECRET, _marked, _nothing_left, _USELESS
from tests.attacks.test_scarcity import driver as driver  # noqa: PLC0414 - a fixture
from tests.csi.helpers import image

pytestmark = pytest.mark.kernel
FILES = [name for name in LIVES if "raw" not in name]
BLOCKS = [name for name in FILES if "directory" not in name]


@pytest.fixture
def outside(driver):
    """A file of the host's that nobody may reach, below what they hold."""
    place = driver.directory / "outside"
    place.mkdir()
    secret = place / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    facts = [one.lstat() for one in (secret, place)]
    yield secret
    assert secret.read_bytes() == SECRET
    for one, before in zip((secret, place), facts, strict=True):
        now = one.lstat()
        assert (now.st_mode, now.st_uid, now.st_gid, now.st_ino) == (
            before.st_mode, before.st_uid, before.st_gid, before.st_ino,
        ), one  # fmt: skip
    assert sorted(os.listdir(place)) == ["secret"]


def planted(root: Path, outside: Path) -> None:
    names = root / "names"
    names.mkdir()
    hostile.traps(names, outside)
    (root / "swapped").mkdir()
    for number in range(200):
        (root / "swapped" / f"f{number}").write_text("x")
    (root / "deep").mkdir()
    hostile.deep(root / "deep", 300)


@pytest.mark.parametrize("life", FILES)
def test_planted_names_lead_nowhere(driver, outside, life):
    """While a group is given and while all is removed, with names that change under both."""
    first, second = pods()[:2]
    for number in range(ROUNDS):
        one = LIVES[life](driver)
        one.make(f"v-{number}")
        runtime, one.runtime = one.runtime, "runc"
        root = one.mount(first)
        planted(root, outside)
        together = runtime == "runc" or "directory" in one.backend
        if not together:
            one.unmount(first)
        with hostile.swapped(root / "swapped", outside.parent) if together else contextlib.nullcontext():
            one.runtime = runtime
            for group in ("3000", "3001", "3002"):
                one.group = group
                one.mount(second)
                _unmounted(one, second, last=not together)
        one.group = ""
        if together:
            _unmounted(one, first, last=True)
        one.delete()
        if "given" in one.backend:
            assert one.bytes.exists(), "what others described is theirs"
        _nothing_left(driver)
        _stranger_gone(one)


def _unmounted(one, pod, *, last):
    if isinstance(one, CsiLife) and not last:
        one.driver.unpublish(one.volume, pod)
    else:
        one.unmount(pod)


def _stranger_gone(one) -> None:
    """A described directory or device is not runvol's to remove."""
    if "given" in one.backend:
        subprocess.run(["rm", "-rf", str(one.bytes)], check=True)


@pytest.mark.parametrize("life", [name for name in BLOCKS if "kata" in name])
def test_what_a_guest_writes_costs_nobody_else_anything(driver, life):
    """Its superblock, at random: every answer comes soon, in words, and speaks of this volume alone."""
    first, second, third = pods()[:3]
    neighbour, one = LIVES[life](driver), LIVES[life](driver)
    neighbour.make("neighbour")
    neighbour.runtime = "runc"
    mark = _marked(neighbour.mount(first))
    one.make("hostile")
    chance, refused = random.Random(7), 0
    for _ in range(10 * ROUNDS):
        one.runtime = "kata"
        one.mount(second)
        one.unmount(second)
        before = hostile.scribbled(one.bytes, chance)
        for runtime in ("kata", "runc"):
            one.runtime = runtime
            began = time.monotonic()
            try:
                one.mount(third)
            except Failed as error:
                refused += 1
                assert not _USELESS.search(error.sentence), error
                assert error.code not in ("INTERNAL", "UNKNOWN"), error
            assert time.monotonic() - began < 20
            if isinstance(one, CsiLife):
                client = driver.client
                assert len(client.ListVolumes(timeout=10).entries) == 2
                with contextlib.suppress(Exception):
                    client.NodeGetVolumeStats(volume_id=one.volume.volume_id, timeout=5,
                                              volume_path=driver.target(one.volume.volume_id, third))  # fmt: skip
            with contextlib.suppress(Failed):
                one.unmount(third)
            neighbour.mount(first)
            mark()
        with one.bytes.open("r+b") as file:
            file.write(before)
    print(f"{life}: {20 * ROUNDS} mounts, {refused} refused")
    one.runtime = "kata"
    one.delete()
    neighbour.unmount(first)
    neighbour.delete()
    _nothing_left(driver)


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("who", ["a process has it open", "another mount namespace"])
def test_who_does_not_let_go_holds_up_no_pod(driver, life, who):
    """The pod ends, at once and for good; the next one of the same kernel starts; nothing is given to another kernel."""
    first, second = pods()[:2]
    for number in range(ROUNDS):
        one = LIVES[life](driver)
        one.make(f"v-{number}")
        target = one.mount(first)
        path = target if target.is_block_device() else one.bytes
        holder = (
            hostile.held_open(path)
            if who == "a process has it open" and not path.is_dir()
            else hostile.private_mounts()
        )
        with holder as pid:
            began = time.monotonic()
            one.unmount(first)
            assert time.monotonic() - began < 15
            assert not os.path.ismount(target)
            # A private copy of the mounts keeps a filesystem that the host has mounted, no hand-off and no bound node.
            kept = who == "a process has it open" or (one.runtime == "runc" and not one.raw)
            if one.backend == "loop" and kept:
                with pytest.raises((Failed, subprocess.CalledProcessError)) as refused:
                    one.delete()
                said = getattr(refused.value, "sentence", "") or getattr(refused.value, "stderr", "")
                assert f"pid {pid}" in said, said
        until = time.monotonic() + 20
        while True:
            try:
                one.mount(second)
                break
            except Failed:
                assert time.monotonic() < until
                time.sleep(0.2)
        one.unmount(second)
        one.delete()
        _nothing_left(driver)
        _stranger_gone(one)


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("peer", ["deaf", "dripping"])
def test_silent_peers_cost_seconds(driver, tmp_path, life, peer):
    """The Kubernetes API and the container runtime: a pod's whole life goes on without them."""
    first = pods()[0]
    server = hostile.deaf_server() if peer == "deaf" else hostile.dripping_server()
    with server as port, hostile.deaf_socket(tmp_path / "cri.sock") as cri:
        driver.environment |= {
            "RUNVOL_DETECT_API_SERVER": f"http://127.0.0.1:{port}", "RUNVOL_CRI_ENDPOINT": f"unix://{cri}"
        }  # fmt: skip
        one = LIVES[life](driver)
        one.make("v")
        began = time.monotonic()
        one.mount(first)
        one.mount(first)
        if isinstance(one, CsiLife) and one.runtime == "kata":
            with contextlib.suppress(Exception):
                driver.client.NodeExpandVolume(
                    volume_id=one.volume.volume_id, volume_path=driver.target(one.volume.volume_id, first),
                    capacity_range={"required_bytes": 128 << 20},
                )  # fmt: skip
        one.unmount(first)
        assert time.monotonic() - began < 15
        one.delete()
        _nothing_left(driver)


def test_a_frozen_guest_keeps_its_volume_and_nothing_else(driver):
    """The VMM is stopped in the middle: its pod ends, its volume waits for it, others live on."""
    import signal

    first, second = pods()[:2]
    one, other = LIVES["csi-loop-kata"](driver), LIVES["csi-loop-kata"](driver)
    one.make("frozen")
    other.make("other")
    one.mount(first)
    with hostile.held_open(image(driver, one.volume)) as pid:
        os.kill(pid, signal.SIGSTOP)
        one.unmount(first)
        with pytest.raises(Failed, match=str(pid)):
            one.delete()
        other.mount(second)
        other.unmount(second)
        other.delete()
    one.delete()
    _nothing_left(driver)
