"""On a disk that is full, to the last byte or the last inode, pods end and volumes and snapshots can be taken away."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.csi.helpers import PODS
from tests.disks import fill_bytes, fill_inodes, mounted
from tests.driver import Driver

pytestmark = pytest.mark.kernel
MIB = 1 << 20
MAKE = {"ext4": ["mkfs.ext4", "-q", "-N", "2000"], "xfs": ["mkfs.xfs", "-q"]}


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    with mounted(tmp_path / "image", tmp_path / "disk", MAKE[request.param], size=600 * MIB) as place:
        (place / "fill").mkdir()
        yield place


@contextlib.contextmanager
def filled_again(place: Path) -> Iterator[None]:
    """As a pod does that writes on: what becomes free is gone in the next moment."""
    over = threading.Event()

    def write() -> None:
        with (place / "fill/f").open("ab", buffering=0) as file:
            while not over.is_set():
                try:
                    file.write(b"x" * 65536)
                except OSError:
                    over.wait(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    yield
    over.set()
    writer.join()


# XFS makes inodes of free blocks.
@pytest.mark.parametrize(
    ("disk", "fill", "restarted", "beside"),
    [
        *((kind, fill_bytes, *more) for kind in MAKE for more in ((False, False), (True, False), (False, True))),
        ("ext4", fill_inodes, True, False),
    ],
    indirect=["disk"],
)
def test_what_is_to_go_goes(disk: Path, tmp_path: Path, fill, restarted: bool, beside: bool) -> None:
    size = 300 * MIB if disk.is_mount() and os.statvfs(disk).f_files > 100_000 else 32 * MIB
    with Driver(tmp_path / "d", {"RUNVOL_PATHS_STATE_DIR": str(disk / "state")}) as driver:
        image = driver.create("image", size)
        snapshot = driver.client.CreateSnapshot(name="s", source_volume_id=image.volume_id).snapshot
        others = [driver.create(f"d{number}", MIB, backend="directory", quota="none") for number in range(3)]
        driver.stage(others[0])
        target = driver.publish(others[0], PODS[0], runtime="runc")
        (Path(target) / "f").write_bytes(b"x" * 4096)
        fill(disk / "fill")
        if restarted:
            driver.stop()
            driver.start()
        with pytest.raises(grpc.RpcError) as caught:
            driver.create("new", 64 * MIB, backend="directory", quota="none")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value.details()
        with filled_again(disk) if beside else contextlib.nullcontext():
            driver.publish(others[0], PODS[0], runtime="runc")
            driver.unpublish(others[0], PODS[0])
            driver.unstage(others[0])
            for volume in others:
                driver.delete(volume)
            driver.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
            driver.delete(image)
        assert not driver.client.ListVolumes().entries
        assert not driver.client.ListSnapshots().entries
        assert not os.listdir(disk / "state/volumes")
        assert not os.listdir(disk / "state/directories")
