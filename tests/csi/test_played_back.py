"""Stores that are older than their disks, records that cannot be read, locks that were taken away: what a reviewer did."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess

import pytest

from blockdev import Deadline, filesystems
from guestmount import Busy as ClaimBusy
from guestmount.claims import Claim, Claims, Use
from tests.csi.helpers import PODS, image, refused
from tests.driver import block_capability, mount_capability
from volumes import AccessMode, Capability, Catalog, SizeRange, marks
from volumes.busy import Busy, of_volume

pytestmark = pytest.mark.kernel
A, B = PODS[:2]


def older(driver, statement=""):
    """A copy of the store as it is now, with a change, to be played back."""
    copy = driver.directory / "older.db"
    with contextlib.closing(sqlite3.connect(driver.state / "volumes.db")) as store:
        with contextlib.closing(sqlite3.connect(copy)) as to:
            store.backup(to)
            to.execute("PRAGMA journal_mode=DELETE")
            if statement:
                to.execute(statement)
            to.commit()
    return copy


def play_back(driver, copy):
    driver.stop()
    for name in ("volumes.db", "volumes.db-wal", "volumes.db-shm"):
        (driver.state / name).unlink(missing_ok=True)
    shutil.copy(copy, driver.state / "volumes.db")
    driver.start()


def test_a_store_from_within_the_mkfs_wipes_nothing(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    copy = older(driver, "UPDATE volumes SET formatting=1")
    target = driver.publish(volume, A, runtime="runc")
    with open(f"{target}/data", "w") as file:
        file.write("precious")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    play_back(driver, copy)
    driver.stage(volume)
    assert "data" in os.listdir(driver.publish(volume, A, runtime="runc"))
    driver.unpublish(volume, A)
    driver.unstage(volume)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_store_from_within_the_mkfs_wipes_nothing_that_was_used_without_a_mark_either(driver, fstype):
    """As an older release has made it, or on a filesystem that takes no attributes."""
    capability = mount_capability(fstype=fstype)
    volume = driver.create("pvc", 320 << 20, capability)
    driver.stage(volume, capability)
    copy = older(driver, "UPDATE volumes SET formatting=1")
    target = driver.publish(volume, A, runtime="runc", capability=capability)
    with open(f"{target}/data", "w") as file:
        file.write("precious")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    os.removexattr(image(driver, volume), marks.FORMATTED)
    play_back(driver, copy)
    driver.stage(volume, capability)
    assert "data" in os.listdir(driver.publish(volume, A, runtime="runc", capability=capability))
    assert marks.is_marked(str(image(driver, volume)), marks.FORMATTED)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    with image(driver, volume).open("r+b") as file:
        file.truncate(0)
        file.truncate(320 << 20)
    subprocess.run(["mkswap", str(image(driver, volume))], check=True, capture_output=True)
    os.removexattr(image(driver, volume), marks.FORMATTED)
    play_back(driver, copy)
    with refused("FAILED_PRECONDITION", "swap"):
        driver.stage(volume, capability)


def test_a_pod_that_wiped_its_filesystem_and_a_killed_mkfs_leave_no_mark(tmp_path, soon, monkeypatch):
    catalog = Catalog.open(str(tmp_path))
    use = Capability(mode=AccessMode.SINGLE_NODE_WRITER)
    volume = catalog.loop.create("v", SizeRange(required=64 << 20), {}, [use])
    path = catalog.loop.attach(volume.volume_id).path
    catalog.loop.format(volume.volume_id, "ext4", soon)
    assert marks.is_marked(path, marks.FORMATTED)
    os.truncate(path, 0)
    os.truncate(path, 64 << 20)

    def killed(path, *_):
        with open(path, "r+b") as file:
            file.seek(8192)
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(filesystems, "make", killed)
        catalog.loop.format(volume.volume_id, "ext4", soon)
    catalog.loop.format(volume.volume_id, "ext4", soon)
    assert filesystems.found_on(path, soon) == "ext4"
    catalog.close()


def test_an_attach_grows_no_file_that_somebody_is_at_work_on(tmp_path, monkeypatch):
    """It has read what that one may have changed, and would make the file smaller again."""
    catalog = Catalog.open(str(tmp_path))
    use = Capability(mode=AccessMode.SINGLE_NODE_WRITER)
    volume = catalog.loop.create("v", SizeRange(required=64 << 20), {}, [use])
    path = catalog.loop.attach(volume.volume_id).path
    catalog.loop.expand(volume.volume_id, SizeRange(required=128 << 20))
    os.truncate(path, 64 << 20)
    with Busy(str(tmp_path / "volumes.lock"))(of_volume("v")):
        catalog.loop.attach(volume.volume_id)
        assert os.stat(path).st_size == 64 << 20
    catalog.loop.attach(volume.volume_id)
    assert os.stat(path).st_size == 128 << 20
    catalog.close()


def test_a_repeated_group_keeps_what_an_older_store_calls_unfinished(tmp_path, soon):
    catalog = Catalog.open(str(tmp_path))
    use = Capability(mode=AccessMode.SINGLE_NODE_WRITER, raw=True)
    ids = [catalog.loop.create(name, SizeRange(required=1 << 20), {}, [use]).volume_id for name in ("a", "b")]
    group = catalog.grouping.create_group("g", ids, soon)
    files = {os.path.join(tmp_path, "volumes", f"{one.snapshot_id}.snap") for one in group.snapshots}
    inodes = {os.stat(one).st_ino for one in files}

    def as_older():
        with contextlib.closing(sqlite3.connect(tmp_path / "volumes.db")) as store:
            store.execute("UPDATE snapshots SET state='creating'")
            store.commit()

    as_older()
    assert catalog.grouping.create_group("g", ids, soon).group_id == group.group_id
    assert {os.stat(one).st_ino for one in files} == inodes
    as_older()
    os.unlink(sorted(files)[0])
    catalog.recover()  # one of it is missing: none is ready, whichever is looked at first
    assert not [one for one in files if os.path.exists(one)] and not catalog.snapshots()
    catalog.close()


def test_a_store_from_within_a_snapshot_keeps_it(driver):
    volume = driver.create("pvc")
    made = driver.client.CreateSnapshot(name="s", source_volume_id=volume.volume_id).snapshot
    play_back(driver, older(driver, "UPDATE snapshots SET state='creating'"))
    listed = driver.client.ListSnapshots().entries
    assert [one.snapshot.snapshot_id for one in listed] == [made.snapshot_id]
    driver.client.DeleteSnapshot(snapshot_id=made.snapshot_id)
    driver.delete(volume)


def test_a_store_from_before_a_guest_and_before_a_volume(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    copy = older(driver)
    later = driver.create("later")
    driver.publish(volume, A, runtime="kata")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.environment["RUNVOL_NODE_GUEST_FILESYSTEMS"] = "never"
    play_back(driver, copy)
    driver.stage(volume)
    with refused("FAILED_PRECONDITION", "a guest may have written"):
        driver.publish(volume, A, runtime="runc")
    driver.unstage(volume)
    with refused("ALREADY_EXISTS", "the store does not know it"):
        driver.delete(later)
    assert image(driver, later).exists()


@pytest.mark.parametrize("kind", ["snapshot", "volume"])
def test_a_copy_inherits_what_the_file_says_where_the_store_forgot(driver, kind):
    volume = driver.create("pvc")
    driver.stage(volume)
    copy = older(driver)
    driver.publish(volume, A, runtime="kata")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.environment["RUNVOL_NODE_GUEST_FILESYSTEMS"] = "never"
    play_back(driver, copy)
    source = volume.volume_id
    if kind == "snapshot":
        source = driver.client.CreateSnapshot(name="s", source_volume_id=source).snapshot.snapshot_id
        play_back(driver, older(driver, "UPDATE snapshots SET foreign_written=0"))
    content = {kind: {f"{kind}_id": source}}
    clone = driver.client.CreateVolume(
        name="clone",
        capacity_range={"required_bytes": 64 << 20},
        volume_capabilities=[mount_capability()],
        volume_content_source=content,
    ).volume
    driver.stage(clone)
    with refused("FAILED_PRECONDITION", "a guest may have written"):
        driver.publish(clone, A, runtime="runc")
    driver.unstage(clone)
    if kind == "snapshot":
        driver.client.DeleteSnapshot(snapshot_id=source)
    for one in (clone, volume):
        driver.delete(one)


def test_a_guest_that_an_older_release_served_is_noted_at_the_upgrade(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    copy = older(driver)
    driver.publish(volume, A, runtime="kata")
    os.removexattr(image(driver, volume), marks.FOREIGN)
    record = driver.records / "claims" / f"{volume.volume_id}.json"
    record.write_text(record.read_text().replace('"handed_out":true,', ""))
    driver.environment["RUNVOL_NODE_GUEST_FILESYSTEMS"] = "never"
    play_back(driver, copy)
    driver.unpublish(volume, A)
    with refused("FAILED_PRECONDITION", "a guest may have written"):
        driver.publish(volume, A, runtime="runc")
    driver.unstage(volume)


def test_each_guest_is_noted_although_the_volume_stays_staged(driver):
    volume = driver.create("pvc")
    driver.stage(volume)
    for _ in range(2):
        driver.publish(volume, A, runtime="kata")
        driver.unpublish(volume, A)
        subprocess.run(
            ["debugfs", "-w", "-R", "clri <11>", str(image(driver, volume))], check=True, capture_output=True
        )
        driver.publish(volume, B, runtime="runc")
        driver.unpublish(volume, B)
    assert driver.log.read_text().count("a filesystem that a guest has had was checked") == 2
    driver.unstage(volume)


def test_a_raw_volume_of_a_guest_whose_claim_was_lost_goes_to_nobody_else(driver):
    capability = block_capability("SINGLE_NODE_MULTI_WRITER")
    volume = driver.create("raw", capability=capability)
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime="kata", capability=capability)
    driver.stop()
    shutil.rmtree(driver.records)
    driver.start()
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime="kata", capability=capability)
    with refused("FAILED_PRECONDITION", A):
        driver.publish(volume, B, runtime="runc", capability=capability)
    driver.unpublish(volume, A)
    driver.publish(volume, B, runtime="runc", capability=capability)
    driver.unpublish(volume, B)
    driver.unstage(volume)


def test_claims_lost_under_a_living_plugin_come_back_with_the_publish(driver):
    """kubelet stages nothing again that it has staged; the hand-off keeps the group that the guest gives."""
    capability = mount_capability(group="2000")
    volume = driver.create("pvc", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="kata", capability=capability)
    shutil.rmtree(driver.records)
    assert driver.publish(volume, A, runtime="kata", capability=capability) == target
    with refused("FAILED_PRECONDITION", "belongs to the guest"):
        driver.publish(volume, B, runtime="kata", capability=capability)
    driver.unpublish(volume, A)
    driver.unstage(volume)


def test_a_lock_that_was_taken_away_writes_nothing(tmp_path):
    claims = Claims(str(tmp_path))
    claim = Claim(volume="v", source="/x", staging_path="/s", use=Use(mode=AccessMode.SINGLE_NODE_WRITER.value))
    with claims.locked("v", Deadline.after(5)) as one:
        shutil.rmtree(tmp_path / "locks")
        with claims.locked("v", Deadline.after(5)) as other:
            other.write(claim)
        for change in (lambda: one.write(claim.but(staging_path="/t")), one.remove):
            with pytest.raises(ClaimBusy):
                change()
    assert claims.peek("v") == claim


def test_a_claim_that_cannot_be_read_stops_neither_others_nor_the_end_of_its_pod(driver):
    volume, other = driver.create("pvc"), driver.create("other")
    for one, pod in ((volume, A), (other, B)):
        driver.stage(one)
        driver.publish(one, pod, runtime="runc")
    record = driver.records / "claims" / f"{volume.volume_id}.json"
    record.unlink()
    record.mkdir()  # EISDIR, as EUCLEAN and EIO of a damaged disk
    assert other.volume_id in driver.cli("where", check=False).stdout + driver.cli("volumes").stdout
    driver.unpublish(volume, A)
    assert not os.path.ismount(driver.target(volume.volume_id, A))
    driver.publish(other, B, runtime="runc")
    for _ in range(3):
        driver.unpublish(other, B)
    damaged = driver.records / "damaged"
    assert not damaged.exists() or len(list(damaged.iterdir())) == 1
    driver.unstage(volume)
    driver.unstage(other)
