"""What an earlier release has left on a node and on a share is read, used and deleted. `old/make.py` has made it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, superblocks
from tests.csi.helpers import PODS
from tests.driver import Driver
from volumes import Catalog, SizeRange, exports

OLD = Path(__file__).with_name("old") / "state.tar.gz"
SHARE = {"backend": "nfs", "server": "nas.example", "path": "/export"}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directories `state` and `share`; the second is what the server exports."""
    subprocess.run(["tar", "-C", tmp_path, "-xpzf", OLD], check=True)

    @contextlib.contextmanager
    def opened(_export: object) -> Iterator[int]:
        fd = os.open(tmp_path / "share", os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    monkeypatch.setattr(exports, "opened", opened)
    return tmp_path


def test_all_of_it_is_read_used_and_deleted(old):
    catalog = Catalog.open(str(old / "state"))
    assert len(catalog.recover()) == 1, "one was being deleted"
    assert catalog.unfinished() == []
    assert catalog.unknown_files() == []
    volumes = {volume.name: volume for _place, volume in catalog.list()}
    assert sorted(volumes) == [
        "pvc-below",
        "pvc-clone",
        "pvc-directory",
        "pvc-kept",
        "pvc-loop",
        "pvc-removed",
        "pvc-share",
    ]
    for name in ("pvc-loop", "pvc-clone"):
        block = superblocks.read(catalog.of(volumes[name].volume_id).attach(volumes[name].volume_id).path)
        assert block is not None
        assert block.fstype == "ext4"
    directory = catalog.named("directory").attach(volumes["pvc-directory"].volume_id).path
    assert (Path(directory) / "data").read_text() == "precious"
    snapshots = [snapshot for _place, snapshot in catalog.snapshots()]
    assert {one.source for one in snapshots} == {volumes["pvc-loop"].volume_id, volumes["pvc-kept"].volume_id}

    nfs = catalog.named("nfs")
    attached = nfs.attach(volumes["pvc-below"].volume_id, {})
    assert attached.path == "/export/team/a"
    for name, more in (("pvc-kept", {}), ("pvc-below", {"subDir": "team/a"})):  # asked for again
        assert nfs.create(name, SizeRange(required=1 << 20), SHARE | more, []).volume_id == volumes[name].volume_id
    for one in snapshots:
        catalog.of_snapshot(one.snapshot_id).delete_snapshot(one.snapshot_id)
    for volume in volumes.values():
        catalog.of(volume.volume_id).delete(volume.volume_id)
    assert [volume for _place, volume in catalog.list()] == []
    assert sorted(os.listdir(old / "state/volumes")) == []
    assert os.listdir(old / "state/directories") == []
    assert os.listdir(old / "share/.runvol") == ["lock"]
    # Nothing says who made the directories, so all are kept under another name.
    kept = sorted(path.parent.name.rpartition("-")[0] for path in (old / "share").glob("archived-*/data"))
    assert kept == ["archived-pvc-kept", "archived-pvc-removed", "archived-team-a"]
    catalog.close()


def test_its_snapshots_and_volumes_are_copied_on(old):
    catalog = Catalog.open(str(old / "state"))
    (one,) = [snapshot for _place, snapshot in catalog.snapshots() if snapshot.source.startswith("nfs-")]
    nfs = catalog.named("nfs")
    assert nfs.snapshot(one.snapshot_id).ready
    taken = nfs.take_snapshot("another", one.source, Deadline.after(20))
    nfs.delete_snapshot(taken.snapshot_id)
    catalog.close()


def test_a_driver_serves_it():
    with Driver() as driver:
        driver.stop()
        subprocess.run(["rm", "-rf", driver.state], check=True)
        subprocess.run(["tar", "-C", driver.directory, "-xpzf", OLD, "state"], check=True)
        driver.start()
        listed = {entry.volume.volume_id: entry for entry in driver.client.ListVolumes().entries}
        assert len(listed) == 3, "those of this node; the server nas.example is not there"
        assert not any(entry.status.volume_condition.abnormal for entry in listed.values())
        for volume in (entry.volume for entry in listed.values()):
            driver.stage(volume)
            target = Path(driver.publish(volume, PODS[0], runtime="runc"))
            assert (target / "data").read_text() == "precious"
            driver.unpublish(volume, PODS[0])
            driver.unstage(volume)
            driver.delete(volume)
        for entry in driver.client.ListSnapshots().entries:
            driver.client.DeleteSnapshot(snapshot_id=entry.snapshot.snapshot_id)
        assert not driver.left_over()["files"]
