"""Whether a filesystem's mounts can have other owners is asked of the kernel that runs, in a copy that nobody sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockdev import Deadline, filesystems, idmapped, isolated, loops, mountinfo, mounts
from tests import runc
from tests.kernel.__main__ import ROOT
from tests.units import confined


def possible(path: str | Path) -> bool:
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        return idmapped.is_possible(directory, Deadline.after(20))
    finally:
        os.close(directory)


@pytest.mark.parametrize(("fstype", "megabytes"), [("ext4", 64), ("xfs", 320)])
def test_the_filesystems_of_block_volumes_can(image, mount_point, soon, fstype, megabytes):
    path = image(megabytes)
    filesystems.make(path, fstype, soon)
    mounts.mount(loops.attach(path, deadline=soon), mount_point, fstype, [], soon)
    before = mountinfo.table()
    assert possible(mount_point)
    assert mountinfo.table() == before


@pytest.mark.parametrize(("fstype", "can"), [("tmpfs", True), ("ramfs", False)])
def test_each_filesystem_is_what_this_kernel_makes_of_it(mount_point, fstype, can):
    """tmpfs can since Linux 6.3."""
    runc.mounted("none", Path(mount_point), fstype)
    assert possible(mount_point) is can


def test_the_rights_of_the_unit_are_enough(mount_point):
    """It has no right to change to other users."""
    script = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from blockdev import Deadline, idmapped\n"
        "print([idmapped.is_possible(os.open(p, os.O_PATH | os.O_DIRECTORY), Deadline.after(20)) for p in sys.argv[1:]])"
    )
    runc.mounted("none", Path(mount_point), "ramfs")
    words = [*confined("runvol-csi.service"), sys.executable, "-c", script, mount_point, "/dev/shm"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[False, True]\n"


def test_what_cannot_be_tried_is_left_to_the_runtime(mount_point, monkeypatch):
    runc.mounted("none", Path(mount_point), "ramfs")

    def no_namespaces(*_: object, **_more: object) -> None:
        raise OSError(255, "not tried")

    monkeypatch.setattr(isolated, "run", no_namespaces)
    assert possible(mount_point)
    monkeypatch.undo()
    assert not possible(mount_point)


def test_nothing_of_the_trial_is_left(mount_point):
    runc.mounted("none", Path(mount_point), "ramfs")
    before = {path.name for path in Path("/proc").glob("[0-9]*") if b"idmap_probe" in _command(path)}
    possible(mount_point)
    assert {path.name for path in Path("/proc").glob("[0-9]*") if b"idmap_probe" in _command(path)} <= before


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
