"""Project quotas that hold: the backend `directory` on ext4 and XFS, through the real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from blockdev import quotas
from blockdev.quotas import QuotaUnavailable
from tests.driver import POD, Driver
from volumes import SizeRange
from volumes.directory import FIRST_PROJECT, DirectoryBackend

pytestmark = pytest.mark.short
MIB = 1 << 20
MAKE = {
    "ext4": (["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota"], "prjquota"),
    "xfs": (["mkfs.xfs", "-q"], "prjquota"),
    "ext4, counted only": (["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota"], "noquota"),
}


@pytest.fixture(params=["ext4", "xfs"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    yield from mounted(tmp_path, request.param)


def mounted(directory: Path, kind: str) -> Iterator[Path]:
    image, place = directory / "image", directory / "disk"
    place.mkdir()
    with open(image, "wb") as opened:
        opened.truncate(512 * MIB)
    make, option = MAKE[kind]
    subprocess.run([*make, str(image)], check=True)
    subprocess.run(["mount", "-o", f"loop,{option}", str(image), str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def driver(disk: Path, tmp_path: Path) -> Iterator[Driver]:
    settings = {"RUNVOL_DIRECTORY_PATH": str(disk / "volumes"), "RUNVOL_VOLUMES_BACKENDS": "directory"}
    with Driver(tmp_path / "driver", environment=settings) as running:
        yield running


def fill(path: Path, size: int) -> int:
    """Bytes that a container could write: without CAP_SYS_RESOURCE, which no quota of ext4 binds."""
    subprocess.run(
        ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "dd", "if=/dev/zero", f"of={path}", "bs=64k",
         f"count={size >> 16}"], check=False, capture_output=True)  # fmt: skip
    return path.stat().st_size


def test_a_volume_holds_its_size_and_no_more(driver: Driver) -> None:
    one, two = (driver.create(name, 16 * MIB) for name in ("one", "two"))
    targets = {}
    for volume in (one, two):
        driver.stage(volume)
        targets[volume.volume_id] = Path(driver.publish(volume, POD.format(1), runtime="runc"))
    first, second = targets[one.volume_id], targets[two.volume_id]
    facts = os.statvfs(first)
    assert facts.f_blocks * facts.f_frsize == 16 * MIB, "the pod sees its quota as the filesystem's size"
    held = fill(first / "f", 64 * MIB)
    assert 15 * MIB <= held <= 16 * MIB, held
    assert fill(second / "f", 8 * MIB) == 8 * MIB, "another volume has its own"
    usage = driver.client.NodeGetVolumeStats(volume_id=one.volume_id, volume_path=str(first)).usage
    assert next(entry.total for entry in usage if entry.unit == 1) == 16 * MIB
    driver.client.NodeExpandVolume(
        volume_id=one.volume_id, volume_path=str(first), capacity_range={"required_bytes": 32 * MIB}
    )
    assert 30 * MIB <= fill(first / "f", 64 * MIB) <= 32 * MIB
    for volume in (one, two):
        driver.unpublish(volume, POD.format(1))
        driver.unstage(volume)
        driver.delete(volume)
    assert not any(driver.left_over().values())


def test_what_is_promised_is_not_promised_twice(driver: Driver) -> None:
    free = driver.client.GetCapacity().available_capacity
    volume = driver.create("one", 128 * MIB)
    assert abs(free - driver.client.GetCapacity().available_capacity - 128 * MIB) < 4 * MIB
    driver.stage(volume)
    target = Path(driver.publish(volume, POD.format(1), runtime="runc"))
    fill(target / "f", 64 * MIB)
    os.sync()
    assert abs(free - driver.client.GetCapacity().available_capacity - 128 * MIB) < 8 * MIB
    with pytest.raises(grpc.RpcError, match="can still be promised"):
        driver.create("two", 500 * MIB)
    driver.unpublish(volume, POD.format(1))
    driver.unstage(volume)
    driver.delete(volume)


def test_a_project_is_never_given_twice_and_its_limit_goes_with_it(disk: Path, tmp_path: Path) -> None:
    backend = DirectoryBackend(str(tmp_path / "state"), directory=str(disk / "v"))
    parameters = {"backend": "directory"}
    first = backend.create("a", SizeRange(required=MIB), parameters, [])
    project = quotas.project_of(backend.attach(first.volume_id).path)
    assert project == FIRST_PROJECT + 1
    backend.delete(first.volume_id)
    assert quotas.read(str(disk / "v"), project).limit == 0
    second = backend.create("a", SizeRange(required=MIB), parameters, [])
    assert quotas.project_of(backend.attach(second.volume_id).path) == project + 1
    backend.delete(second.volume_id)
    backend.close()


def test_a_filesystem_that_only_counts_is_refused(tmp_path: Path) -> None:
    for place in mounted(tmp_path, "ext4, counted only"):
        backend = DirectoryBackend(str(tmp_path / "state"), directory=str(place / "v"))
        with pytest.raises(QuotaUnavailable, match="prjquota"):
            backend.create("a", SizeRange(required=MIB), {"backend": "directory"}, [])
        assert not os.listdir(place / "v")
        backend.close()


LEAVES = """
import fcntl, os, struct, sys
os.setgroups([]); os.setgid(1000); os.setuid(1000)
for path in sys.argv[2:]:
    with open(path, "wb") as file:
        state = bytearray(28)
        fcntl.ioctl(file, 0x801C581F, state)
        words = list(struct.unpack("=IIIII8x", state))
        words[3] = int(sys.argv[1])
        fcntl.ioctl(file, 0x401C5820, struct.pack("=IIIII8x", *words))
        file.write(b"x" * 4096)
"""


def leave(project: int, place: Path, *names: str) -> None:
    """As a pod's process without any capability does it, which sees its volume alone."""
    subprocess.run([sys.executable, "-c", LEAVES, str(project), *names], check=True, cwd=place)


def test_files_that_leave_their_volumes_quota_are_seen(driver: Driver) -> None:
    one, two = (driver.create(name, 16 * MIB) for name in ("one", "two"))
    targets = []
    for volume in (one, two):
        driver.stage(volume)
        targets.append(Path(driver.publish(volume, POD.format(1), runtime="runc")))
    (targets[0] / "deep").mkdir(mode=0o777)
    (targets[0] / "deep").chmod(0o777)
    os.mkfifo(targets[0] / "fifo")
    (targets[0] / "link").symlink_to("/etc/passwd")
    asked = [partial(driver.client.NodeGetVolumeHealth, volume_id=volume.volume_id, volume_publish_path=str(target))
             for volume, target in zip((one, two), targets, strict=True)]  # fmt: skip

    def reasons(number: int) -> dict[str, str]:
        return {one.reason: one.message for one in asked[number]().volume_health.health_statuses}

    assert not reasons(1)
    leave(0, targets[0], "mine", "deep/mine")
    reasons(0)
    until = time.monotonic() + 20
    while "OutsideItsLimits" not in reasons(0):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "'mine'" in reasons(0)["OutsideItsLimits"] and "hostUsers: false" in reasons(0)["OutsideItsLimits"]
    condition = driver.client.NodeGetVolumeStats(volume_id=one.volume_id, volume_path=str(targets[0])).volume_condition
    assert condition.abnormal and "'mine'" in condition.message
    assert not reasons(1)
    for volume in (one, two):
        driver.unpublish(volume, POD.format(1))
        driver.unstage(volume)
        driver.delete(volume)


def test_a_project_that_has_files_elsewhere_is_never_given(disk: Path, tmp_path: Path) -> None:
    """A pod may choose the number that the next volume would have."""
    backend = DirectoryBackend(str(tmp_path / "state"), directory=str(disk / "v"))
    first = backend.create("a", SizeRange(required=MIB), {"backend": "directory"}, [])
    place = Path(backend.attach(first.volume_id).path)
    project = quotas.project_of(str(place))
    for number in range(1, 6):
        leave(project + number, place, f"f{number}")
    os.sync()
    second = backend.create("b", SizeRange(required=MIB), {"backend": "directory"}, [])
    given = backend.attach(second.volume_id).path
    assert quotas.project_of(given) == project + 6
    backend.delete(first.volume_id)
    backend.delete(second.volume_id)
    backend.close()


def test_a_limit_that_no_volume_has_is_found_and_taken_back(driver: Driver, disk: Path) -> None:
    """As a row that was lost with its directory leaves it; what files count for stays, whoever has them."""
    driver.create("kept", size=16 * MIB)
    driver.create("lost", size=16 * MIB)
    gone, other = FIRST_PROJECT + 3, FIRST_PROJECT + 4
    for name in ("third", "fourth"):
        driver.delete(driver.create(name, size=16 * MIB))
    quotas.limit(str(disk / "volumes"), gone, 32 * MIB)
    quotas.limit(str(disk / "volumes"), other, 32 * MIB)
    stray = disk / "volumes" / "stray"
    stray.mkdir()
    quotas.assign(str(stray), other)
    (stray / "file").write_bytes(b"x" * 65536)

    def left() -> list[str]:
        rows = json.loads(driver.cli("doctor", "--json", check=False).stdout)
        found = rows if isinstance(rows, list) else next(one for one in rows.values() if isinstance(one, list))
        return [one["finding"] for one in found if one["id"] == "left.quota"]

    assert left() == [f"project {gone} of {disk}/volumes: no volume has its limit"]
    assert quotas.read(str(disk / "volumes"), gone).limit == 32 * MIB
    driver.cli("gc", check=False)
    assert left() == []
    assert quotas.read(str(disk / "volumes"), gone).limit == 0
    assert quotas.read(str(disk / "volumes"), other).limit == 32 * MIB
