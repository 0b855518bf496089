"""An empty store is never taken for a full one: ids and directories say which store they belong to."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess

import pytest

from tests.csi.helpers import PODS, refused
from tests.driver import Driver, mount_capability

pytestmark = pytest.mark.kernel
A = PODS[0]
AWAY = ("FAILED_PRECONDITION", "its filesystem may not be mounted")


@pytest.fixture(params=["loop", "directory"])
def volume(request, driver):
    """One that was made in a store which is then moved away, as by a disk that is not mounted."""
    parameters = {"backend": "directory", "quota": "none"} if request.param == "directory" else {}
    made = driver.create("pvc", **parameters)
    yield made


def leave(driver):
    driver.stop()
    driver.state.rename(driver.directory / "away")
    driver.start()


def come_back(driver):
    driver.stop()
    shutil.rmtree(driver.state)
    (driver.directory / "away").rename(driver.state)
    driver.start()


def test_a_volume_of_another_store_is_neither_there_nor_gone(driver, volume):
    assert re.fullmatch(r"(loop|dir)-[0-9a-f]{8}-[0-9a-f]{32}", volume.volume_id)
    leave(driver)
    for call in (
        lambda: driver.delete(volume),
        lambda: driver.client.ControllerGetVolume(volume_id=volume.volume_id),
        lambda: driver.stage(volume),
        lambda: driver.client.ControllerExpandVolume(
            volume_id=volume.volume_id, capacity_range={"required_bytes": 1 << 30}
        ),
    ):
        with refused(*AWAY, f"runvol volumes forget {volume.volume_id}"):
            call()
    driver.unpublish(volume, A)
    driver.unstage(volume)
    for foreign in ("pvc-1", "loop-x", "dir-", "loop-" + "a" * 31, "vol-0123456789abcdef0"):
        driver.client.DeleteVolume(volume_id=foreign)
    come_back(driver)
    driver.stage(volume)
    driver.unstage(volume)
    driver.delete(volume)
    driver.delete(volume)


def test_what_is_lost_for_good_is_forgotten_by_its_id(driver, volume):
    other = driver.create("other")
    leave(driver)
    with refused(*AWAY):
        driver.delete(volume)
    driver.cli("volumes", "forget", volume.volume_id, "--yes")
    for _ in range(2):
        driver.delete(volume)
    with refused(*AWAY):
        driver.delete(other)
    made = driver.create("here")
    done = driver.cli("volumes", "forget", made.volume_id, "--yes", check=False)
    assert done.returncode == 1 and "delete it instead" in done.stderr
    done = driver.cli("volumes", "forget", "pvc-1", "--yes", check=False)
    assert done.returncode == 1 and "pvc-1" in done.stderr
    driver.delete(made)


def test_snapshots_and_groups_of_another_store_are_not_gone(driver):
    volume = driver.create("pvc")
    snapshot = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="s").snapshot
    group = driver.client.CreateVolumeGroupSnapshot(name="g", source_volume_ids=[volume.volume_id]).group_snapshot
    leave(driver)
    ids = {"snapshot_id": snapshot.snapshot_id}
    for call in (
        lambda: driver.client.DeleteSnapshot(**ids),
        lambda: driver.client.GetSnapshot(**ids),
        lambda: driver.client.DeleteVolumeGroupSnapshot(group_snapshot_id=group.group_snapshot_id),
        lambda: driver.client.GetVolumeGroupSnapshot(group_snapshot_id=group.group_snapshot_id),
    ):
        with refused(*AWAY):
            call()
    for source in ({"snapshot": ids}, {"volume": {"volume_id": volume.volume_id}}):
        # The code with which a provisioner asks the scheduler for another node.
        with refused("RESOURCE_EXHAUSTED", "is not on this node", *AWAY[1:]):
            driver.client.CreateVolume(name="r", volume_capabilities=[mount_capability()], volume_content_source=source)
    driver.client.DeleteSnapshot(snapshot_id="snap-1")
    come_back(driver)
    members = [one.snapshot_id for one in group.snapshots]
    driver.client.DeleteVolumeGroupSnapshot(group_snapshot_id=group.group_snapshot_id, snapshot_ids=members)
    driver.client.DeleteSnapshot(**ids)
    driver.delete(volume)


def test_a_store_with_rows_owns_the_ids_that_older_releases_gave(driver):
    volume, old = driver.create("pvc"), "loop-" + "ab" * 16
    driver.stop()
    with sqlite3.connect(driver.state / "volumes.db") as db:
        db.executescript("DROP TABLE facts; DROP TABLE forgotten;")
        db.execute("UPDATE volumes SET id = ?", (old,))
    db.close()
    (driver.state / "volumes" / f"{volume.volume_id}.img").rename(driver.state / "volumes" / f"{old}.img")
    os.removexattr(driver.state / "volumes", "trusted.runvol.store")
    driver.start()
    assert driver.client.ControllerGetVolume(volume_id=old).volume.capacity_bytes == 64 << 20
    driver.client.DeleteVolume(volume_id="loop-" + "cd" * 16)  # deleted before the upgrade; kubelet's part asks again
    driver.client.DeleteVolume(volume_id=old)
    driver.client.DeleteVolume(volume_id=old)
    with refused(*AWAY):
        driver.client.DeleteVolume(volume_id=volume.volume_id)
    assert not any(driver.left_over().values())


@pytest.mark.parametrize("backend", ["loop", "directory"])
def test_nothing_is_made_or_deleted_where_the_volumes_own_disk_is_not_mounted(driver, backend):
    parameters = {"backend": "directory", "quota": "none"} if backend == "directory" else {}
    volume = driver.create("pvc", **parameters)
    place = driver.state / ("directories" if backend == "directory" else "volumes")
    driver.stop()
    place.rename(driver.directory / "disk")
    driver.start()
    for call in (
        lambda: driver.create("another", **parameters),
        lambda: driver.delete(volume),
        lambda: driver.stage(volume),
    ):
        with refused(*AWAY):
            call()
    assert not place.exists() or not os.listdir(place)
    (driver.directory / "disk").rename(place)
    driver.stage(volume)
    driver.unstage(volume)
    driver.delete(volume)


def test_what_only_looks_makes_nothing(driver):
    driver.stop()
    shutil.rmtree(driver.state)
    shutil.rmtree(driver.run, ignore_errors=True)
    for command in (("volumes", "--json"), ("doctor",), ("gc", "--dry-run", "--json"), ("where",)):
        done = driver.cli(*command, check=False)
        assert "Traceback" not in done.stderr, done.stderr
    assert not driver.state.exists() and not driver.run.exists()


def test_a_state_directory_that_has_to_be_a_mount(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    driver = Driver(environment={"RUNVOL_PATHS_STATE_DIR": str(state), "RUNVOL_PATHS_STATE_DIR_MOUNTED": "true"})
    try:
        with pytest.raises(RuntimeError, match="nothing is mounted there"):
            driver.start()
        assert os.listdir(state) == []
        done = driver.cli("volumes", "create", "x", "--size", "67108864", check=False)
        assert done.returncode == 2 and "nothing is mounted there" in done.stderr and os.listdir(state) == []
        subprocess.run(["mount", "-t", "tmpfs", "none", state], check=True)
        driver.start()
        driver.stop()
    finally:
        driver.remove()
        subprocess.run(["umount", "-l", state], check=False)
