"""What a guest has written is checked, whole, before the host's kernel mounts it; by a program, under limits."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time

import pytest

from blockdev import Deadline, DeviceBusy, exclusivity, filesystems
from blockdev.commands import Limits
from blockdev.errors import FilesystemDamaged
from guestmount import written as room
from guestmount.claims import Claim, Use
from guestmount.errors import Refused
from guestmount.written import Trust, Written
from tests.csi.helpers import PODS, image, refused
from tests.driver import Driver, block_capability, mount_capability
from volumes import AccessMode, Capability, Catalog, SizeRange, VolumeUnfinished

pytestmark = pytest.mark.kernel
A, B = PODS[:2]
MIB = 1 << 20


def checks(driver) -> int:
    return driver.log.read_text().count("a filesystem that a guest has had was checked")


def had(driver, volume, runtime="kata", capability=None):
    """A pod of that runtime has had the volume."""
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime=runtime, capability=capability)
    driver.unpublish(volume, A)
    driver.unstage(volume)


def ruin(path) -> None:
    """The root directory's inode is gone, and the superblock says that all is well."""
    subprocess.run(["debugfs", "-w", "-R", "clri <2>", str(path)], check=True, capture_output=True)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_the_host_checks_once_after_each_guest_and_never_else(driver, fstype):
    volume = driver.create("pvc", 320 * MIB, mount_capability(fstype=fstype))
    use = mount_capability(fstype=fstype)
    for runtime, expected in (("runc", 0), ("runc", 0), ("kata", 0), ("kata", 0), ("runc", 1), ("runc", 1), ("kata", 1),
                              ("runc", 2)):  # fmt: skip
        had(driver, volume, runtime, use)
        assert checks(driver) == expected, runtime
    driver.delete(volume)


def test_what_a_guest_has_ruined_is_not_mounted_by_the_host(driver):
    volume = driver.create("pvc")
    had(driver, volume)
    ruin(image(driver, volume))
    driver.stage(volume)
    with refused("FAILED_PRECONDITION", str(image(driver, volume))):
        driver.publish(volume, A, runtime="runc")
    assert not driver.mounts() and not driver.loop_devices()
    driver.unstage(volume)
    driver.delete(volume)


def test_a_file_of_a_guests_is_still_there_after_the_check(driver):
    volume = driver.create("pvc")
    had(driver, volume)
    with (driver.directory / "text").open("w") as file:
        file.write("of the guest")
    subprocess.run(
        ["debugfs", "-w", "-R", f"write {driver.directory}/text file", str(image(driver, volume))],
        check=True, capture_output=True,
    )  # fmt: skip
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc")
    assert open(f"{target}/file").read() == "of the guest"
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize("by", ["clone", "snapshot", "raw pod"])
def test_copies_inherit_who_has_written_them(driver, by):
    volume = driver.create("pvc", capability=mount_capability())
    if by == "raw pod":  # an ordinary pod, too, writes what it likes to a raw device
        had(driver, volume)
        had(driver, volume, "runc")
        before = checks(driver)
        driver.stage(volume, block_capability())
        driver.publish(volume, A, runtime="runc", capability=block_capability())
        driver.unpublish(volume, A)
        driver.unstage(volume)
        had(driver, volume, "runc")
        assert checks(driver) == before + 1
        return
    had(driver, volume)
    content = {"volume": {"volume_id": volume.volume_id}}
    if by == "snapshot":
        taken = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="s").snapshot
        content = {"snapshot": {"snapshot_id": taken.snapshot_id}}
        had(driver, volume, "runc")
    copy = driver.client.CreateVolume(
        name="copy", volume_capabilities=[mount_capability()], volume_content_source=content
    ).volume
    before = checks(driver)
    ruin(image(driver, copy))
    driver.stage(copy)
    with refused("FAILED_PRECONDITION", str(image(driver, copy))):
        driver.publish(copy, A, runtime="runc")
    assert checks(driver) == before
    driver.unstage(copy)


def test_a_volume_of_an_older_release_counts_as_a_guests(driver):
    import sqlite3

    volume = driver.create("pvc")
    driver.stop()
    with sqlite3.connect(driver.state / "volumes.db") as db:
        for table in ("volumes", "snapshots"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN foreign_written")
        db.execute("ALTER TABLE volumes DROP COLUMN mount_group")
    db.close()
    driver.start()
    had(driver, volume, "runc")
    assert checks(driver) == 1


def test_trusted_is_as_it_was(soon):
    with Driver(environment={"RUNVOL_NODE_GUEST_FILESYSTEMS": "trusted"}) as driver:
        volume = driver.create("pvc")
        had(driver, volume)
        had(driver, volume, "runc")
        assert checks(driver) == 0


def test_never_keeps_the_hosts_kernel_away(soon):
    with Driver(environment={"RUNVOL_NODE_GUEST_FILESYSTEMS": "never"}) as driver:
        xfs = mount_capability(fstype="xfs")
        ext4, other, fresh = driver.create("ext4"), driver.create("xfs", 320 * MIB, xfs), driver.create("fresh")
        had(driver, fresh, "runc")
        had(driver, ext4)
        had(driver, other, capability=xfs)
        for volume, use in ((ext4, None), (other, xfs)):
            driver.stage(volume, use)
            with refused("FAILED_PRECONDITION", "node.guest_filesystems = never", "a runc pod"):
                driver.publish(volume, A, runtime="runc", capability=use)
            larger = {"required_bytes": 512 * MIB}
            call = {"volume_id": volume.volume_id, "volume_path": driver.staging(volume.volume_id)}
            if use is None:  # ext4's own program needs no mount
                assert driver.client.NodeExpandVolume(capacity_range=larger, **call).capacity_bytes == 512 * MIB
            else:
                with refused("FAILED_PRECONDITION", "its growth", "never"):
                    driver.client.NodeExpandVolume(capacity_range=larger, **call)
            driver.unstage(volume)
        grouped = mount_capability(group="2000")
        driver.stage(ext4, grouped)
        with refused("FAILED_PRECONDITION", "giving its files to group 2000"):
            driver.publish(ext4, A, runtime="kata", capability=grouped)
        driver.unstage(ext4)


KATA_GO = '[hypervisor.qemu]\npath = "/usr/bin/qemu"\n[runtime]\n'
CONTAINERD = """
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]
ConfigPath = "{path}"
"""


@pytest.mark.parametrize(("config", "in_guest"), [
    (KATA_GO, True),
    (KATA_GO + 'name = "virt_container"\n', False),
    (KATA_GO + 'hypervisor_name = "qemu"\n', False),
    (None, False),
])  # fmt: skip
def test_the_go_shims_agent_gives_the_group_and_the_host_mounts_nothing(config, in_guest):
    with Driver() as driver:
        if config is not None:
            (driver.directory / "kata").mkdir()
            (driver.directory / "kata/configuration.toml").write_text(config)
            (driver.directory / "containerd.toml").write_text(CONTAINERD.format(path="/configuration.toml"))
        use = mount_capability(group="2000")
        volume = driver.create("pvc")
        driver.stage(volume, use)
        driver.publish(volume, A, runtime="kata", capability=use)
        (info,) = driver.direct_volumes.glob("*/mountInfo.json")
        handed = json.loads(info.read_text())["metadata"]
        assert handed == ({"fsGroup": "2000", "fsGroupChangePolicy": "OnRootMismatch"} if in_guest else {})
        shown = subprocess.run(
            ["debugfs", "-R", "stat <2>", str(image(driver, volume))], capture_output=True, text=True
        )
        assert ("Group:  2000" in shown.stdout) is not in_guest
        driver.publish(volume, A, runtime="kata", capability=use)
        driver.unpublish(volume, A)
        # The same group again: nothing is mounted for it, and so nothing checked.
        driver.publish(volume, A, runtime="kata", capability=use)
        driver.unpublish(volume, A)
        assert checks(driver) == 0
        driver.unstage(volume)
        driver.delete(volume)


# -- the room itself


@pytest.fixture
def one(tmp_path, soon):
    catalog = Catalog.open(str(tmp_path / "state"))
    use = Capability(mode=AccessMode.SINGLE_NODE_WRITER)
    volume = catalog.loop.create("v", SizeRange(required=64 * MIB), {}, [use])
    path = catalog.loop.attach(volume.volume_id).path
    catalog.loop.format(volume.volume_id, "ext4", soon)
    catalog.loop.note(volume.volume_id, foreign_written=True)
    claim = Claim(
        volume=volume.volume_id, source=path, staging_path="/s", use=Use(mode="single_node_writer", fstype="ext4")
    )
    yield Written(catalog=catalog), claim
    catalog.close()


def test_a_check_that_takes_long_goes_on_behind_and_keeps_everybody_away(one, monkeypatch):
    written, claim = one
    go, real = threading.Event(), filesystems.verify

    def slow(path, fstype):
        go.wait(20)
        real(path, fstype)

    monkeypatch.setattr(room.filesystems, "verify", slow)
    with pytest.raises(VolumeUnfinished, match="the check of volume"):
        written.be_safe(claim, "a runc pod", Deadline.after(1.2))
    with pytest.raises(DeviceBusy):
        exclusivity.prove_free(claim.source, past_known=False)
    assert written.past(claim).foreign_written
    go.set()
    until = time.monotonic() + 20
    while written.past(claim).foreign_written:
        assert time.monotonic() < until
        time.sleep(0.05)
    written.be_safe(claim, "a runc pod", Deadline.after(5))
    time.sleep(0.1)
    exclusivity.prove_free(claim.source, past_known=False)


def test_a_check_that_never_began_keeps_nothing_open(one, monkeypatch):
    written, claim = one
    monkeypatch.setattr(written._checks, "finished", lambda *_: (_ for _ in ()).throw(VolumeUnfinished("others")))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(VolumeUnfinished):
            written.be_safe(claim, "a runc pod", Deadline.after(5))
    assert len(os.listdir("/proc/self/fd")) == before
    exclusivity.prove_free(claim.source, past_known=False)


@pytest.mark.parametrize("limits", [Limits(memory=2 << 20, cpu=100), Limits(memory=1 << 30, cpu=0)])
def test_a_check_that_needs_too_much_is_ended_and_mounts_nothing(one, monkeypatch, limits):
    written, claim = one
    monkeypatch.setattr(filesystems, "_limits", lambda _path: limits)
    if limits.cpu == 0:
        monkeypatch.setattr(filesystems, "_WAITING", 1000)
        # A program that uses up a processor stands for one that a crafted tree keeps busy.
        real = filesystems.run
        monkeypatch.setattr(filesystems, "run", lambda *_, **more: real("sh", "-c", "while :; do :; done", **{
            **more, "deadline": Deadline.after(30)}))  # fmt: skip
    with pytest.raises(FilesystemDamaged):
        written.be_safe(claim, "a runc pod", Deadline.after(20))
    assert written.past(claim).foreign_written


def test_never_is_told_in_words(one):
    written, claim = one
    strict = Written(catalog=written.catalog, trust=Trust.NEVER)
    assert not strict.is_mountable(claim)
    with pytest.raises(Refused, match="a runc pod would have the host mount volume"):
        strict.be_safe(claim, "a runc pod", Deadline.after(1))


def test_what_others_describe_is_checked_and_never_formatted(tmp_path):
    """A device of somebody's: its past is the worst, and a stage neither claims nor makes anything on it."""
    from volumes.backend import BlockBackend, DeviceBackend
    from volumes.given import GivenDevice

    given = GivenDevice(allowed=["/dev"], held=str(tmp_path))
    assert isinstance(given, DeviceBackend) and not isinstance(given, BlockBackend)
    assert given.past("given-dev-x").foreign_written
