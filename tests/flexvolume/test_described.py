"""Volumes that nobody has made: a directory, a device or an NFS export, described by the options alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, loops
from tests.driver import Driver
from tests.flexvolume.test_driver import Flex


@pytest.fixture
def flex(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flex]:
    driver = Driver()
    (driver.directory / "data").mkdir()
    (driver.directory / "disks").mkdir()
    driver.environment |= {
        "RUNVOL_FLEXVOLUME_DIRECTORIES": str(driver.directory / "data"),
        "RUNVOL_FLEXVOLUME_DEVICES": str(driver.directory / "disks"),
    }
    one = Flex(driver)
    yield one
    left = [*driver.mounts(), *driver.loop_devices()]
    places = [driver.records / "claims", driver.run / "given"]
    records = [name for place in places if place.exists() for name in os.listdir(place)]
    driver.remove()
    assert not left, left
    assert not records, records


def described(**options: str) -> str:
    return json.dumps({"kubernetes.io/pod.uid": "u", "kubernetes.io/readwrite": "rw", "runtime": "runc", **options})


def image(flex: Flex, name: str = "disk.img", fstype: str = "ext4") -> Path:
    path = flex.driver.directory / "disks" / name
    with path.open("wb") as file:
        file.truncate(64 << 20)
    if fstype:
        subprocess.run([f"mkfs.{fstype}", "-q", str(path)], check=True)
    return path


def test_a_directory_is_bound_and_two_pods_share_it(flex):
    place = flex.driver.directory / "data" / "files"
    place.mkdir()
    one, two = flex.target("v", 10), flex.target("v", 11)
    flex.ok("mount", one, described(directory=str(place)))
    flex.ok("mount", two, described(directory=str(place), **{"kubernetes.io/pod.uid": "w"}))
    (Path(one) / "f").write_text("x")
    assert (Path(two) / "f").read_text() == "x"
    assert (place / "f").read_text() == "x"
    flex.ok("unmount", one)
    flex.ok("unmount", one)
    assert (Path(two) / "f").exists()
    flex.ok("unmount", two)
    assert (place / "f").read_text() == "x"


def test_a_device_that_a_guest_has_goes_to_nobody_although_its_claim_was_lost(flex):
    path = str(image(flex))
    target, other = flex.target("v", 10), flex.target("v", 11)
    flex.ok("mount", target, described(device=path, runtime="kata"))
    for record in (flex.driver.records / "claims").iterdir():
        record.unlink()
    for runtime in ("runc", "kata"):
        options = described(device=path, runtime=runtime, **{"kubernetes.io/pod.uid": "w"})
        assert "handed to the guest of the pod at" in flex.fails("mount", other, options)
    flex.ok("unmount", target)
    flex.ok("mount", other, described(device=path, **{"kubernetes.io/pod.uid": "w"}))
    flex.ok("unmount", other)


def test_a_sandbox_gets_a_directory_as_a_share(flex):
    place = flex.driver.directory / "data" / "files"
    place.mkdir()
    target = flex.target("v")
    flex.ok("mount", target, described(directory=str(place), runtime="kata"))
    (Path(target) / "f").write_text("x")
    assert (place / "f").exists()
    assert json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"] == []
    flex.ok("unmount", target)


def test_a_device_with_a_filesystem_goes_to_either_kernel(flex):
    disk = image(flex)
    target = flex.target("v")
    flex.ok("mount", target, described(device=str(disk)))
    (Path(target) / "f").write_text("x")
    busy = flex.fails("mount", flex.target("v", 11), described(device=str(disk), runtime="kata"))
    assert "mounted by the host's kernel" in busy
    flex.ok("unmount", target)
    flex.ok("mount", target, described(device=str(disk), runtime="kata"))
    (one,) = json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"]
    assert (os.path.samefile(one["device"], disk), one["fstype"]) == (True, "ext4")
    flex.ok("unmount", target)
    flex.ok("mount", target, described(device=str(disk)))
    assert (Path(target) / "f").read_text() == "x"
    flex.ok("unmount", target)


def test_the_same_disk_under_another_name_is_the_same_volume(flex):
    disk = image(flex)
    link = disk.with_name("by-id")
    link.symlink_to(disk)
    names = [flex.ok("getvolumename", described(device=str(path)))["volumeName"] for path in (disk, link)]
    assert names[0] == names[1]
    target = flex.target("v")
    flex.ok("mount", target, described(device=str(link)))
    flex.ok("mount", target, described(device=str(disk)))
    flex.ok("unmount", target)


def test_a_disk_by_its_name_of_udevs(flex):
    disk = image(flex)
    device = loops.attach(str(disk), deadline=Deadline.after(10))
    names = Path(f"/dev/runvol-test-{os.getpid()}/by-id")
    names.mkdir(parents=True)
    try:
        (names / "data-1").symlink_to(device)
        flex.environment["RUNVOL_FLEXVOLUME_DEVICES"] = f"{names},{flex.driver.directory}/disks"
        target = flex.target("v")
        for runtime in ("runc", "kata"):
            flex.ok("mount", target, described(device=str(names / "data-1"), runtime=runtime))
            flex.ok("unmount", target)
        # A link in a directory that others may write to is not believed.
        (flex.driver.directory / "disks/link").symlink_to(device)
        said = flex.fails("mount", target, described(device=str(flex.driver.directory / "disks/link")))
        assert f"it leads to {device}" in said
        assert "must lie below" in flex.fails("mount", target, described(device=device))
    finally:
        shutil.rmtree(names.parent)
        loops.detach(device, str(disk), Deadline.after(10))


@pytest.mark.parametrize("fstype", ["", "vfat"])
def test_a_disk_without_a_filesystem_of_ours_is_never_formatted(flex, fstype):
    disk = image(flex, fstype="")
    if fstype:
        with disk.open("r+b") as file:  # enough of a FAT for libblkid
            file.write(b"\xeb<\x90mkfs.fat\x00\x02\x04\x04\x00\x02\x00\x02\x00\x00\xf8\x80\x00 \x00\x40\x00" + b"\x00" * 8
                       + b"\x80\x00)\xab\xcd\xef\x12NO NAME    FAT16   ")  # fmt: skip
            file.seek(510)
            file.write(b"\x55\xaa")
    before = disk.read_bytes()
    said = flex.fails("mount", flex.target("v"), described(device=str(disk)))
    assert "mkfs.ext4" in said
    assert disk.read_bytes() == before


def test_another_filesystem_than_the_one_asked_for_is_told(flex):
    disk = image(flex)
    said = flex.fails("mount", flex.target("v"), described(device=str(disk), **{"kubernetes.io/fsType": "xfs"}))
    assert "ext4" in said
    assert "xfs" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"directory": "/etc"}, "must lie below"),
        ({"directory": "{data}/../../etc"}, "plain path"),
        ({"directory": "{data}"}, "must lie below"),
        ({"directory": "{data}/out"}, "it leads to /etc"),
        ({"directory": "{data}/out/ssh"}, "it leads to /etc/ssh"),
        ({"directory": "{data}/none"}, "No such file"),
        ({"directory": "{data}/file"}, "is no directory"),
        ({"device": "/dev/null"}, "must lie below"),
        ({"device": "{disks}/pipe"}, "neither a block device nor an image file"),
        ({"device": "{disks}/x", "directory": "{data}/x"}, "describes another volume"),
        ({"device": "{disks}/x", "volume": "loop-1"}, "describes another volume"),
        ({"server": "nas"}, "'path' = '': must be given"),
        ({"server": "nas", "path": "/e", "vers": "5"}, "vers"),
        ({"server": "nas", "path": "/e;id"}, "does not answer"),
        ({"server": "$(id)", "path": "/e"}, "server"),
        ({"server": "nas", "path": "/e", "options": "addr=1.2.3.4"}, "options"),
        ({}, "must name a volume"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_by_name(flex, options, words):
    data, disks = flex.driver.directory / "data", flex.driver.directory / "disks"
    (data / "out").symlink_to("/etc")
    (data / "file").touch()
    os.mkfifo(disks / "pipe")
    filled = {key: value.format(data=data, disks=disks) for key, value in options.items()}
    assert words in flex.fails("mount", flex.target("v"), described(**filled))


def test_without_the_setting_no_path_is_allowed(flex):
    flex.environment["RUNVOL_FLEXVOLUME_DIRECTORIES"] = ""
    place = flex.driver.directory / "data" / "files"
    place.mkdir()
    assert "flexvolume.directories" in flex.fails("mount", flex.target("v"), described(directory=str(place)))


def test_nfs_is_described_by_the_names_of_its_backend(flex):
    described_name = flex.ok("getvolumename", described(server="nas", path="/e"))["volumeName"]
    assert str(described_name).startswith("nfs-given-")
    other = flex.ok("getvolumename", described(server="nas", path="/e", vers="4.2"))["volumeName"]
    assert other != described_name


def test_the_nas_driver_of_alicloud_is_understood(flex):
    flex.program = flex.program.rename(flex.program.with_name("nas"))
    options = {"server": "127.0.0.1", "path": "/k8s", "vers": "4.0", "options": "noresvport", "mode": "755"}
    target = flex.target("v")
    said = flex.fails("mount", target, described(**options))
    assert "127.0.0.1" in said  # nothing serves NFS here: what it asks for is tried, and the server is named
    assert "option 'volume'" in flex.fails("mount", target, described(volume="loop-1"))
    names = {vers: flex.ok("getvolumename", described(server="nas", path="/e", **vers_of(vers)))["volumeName"]
             for vers in ("", "3", "4.0")}  # fmt: skip
    assert names[""] == names["3"] != names["4.0"]


def vers_of(value: str) -> dict[str, str]:
    return {"vers": value} if value else {}
