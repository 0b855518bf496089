"""Why a filesystem takes nothing: asked by writing and by looking, with one answer and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import disk_troubles, sysfs


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield str(place)
    subprocess.run(["umount", place], check=True)


def both(directory: str) -> set[str]:
    return {
        disk_troubles.by_looking(directory),
        disk_troubles.by_writing(directory),
        disk_troubles.by_writing(directory, flush=True),
    }


@pytest.mark.kernel
def test_one_that_takes_writes_one_that_is_read_only_and_one_that_is_full(disk: str) -> None:
    assert both(disk) == {""} and os.listdir(disk) == []
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert both(disk) == {"Read-only file system"}
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    Path(disk, "file").write_bytes(bytes(1 << 20))
    assert both(disk) == {""}


def test_one_that_is_not_there_is_told_otherwise(tmp_path: Path) -> None:
    assert both(str(tmp_path / "none")) == {""}


def test_where_the_kernel_tells_of_a_device() -> None:
    number = os.makedev(259, 7)
    assert sysfs.place(number) == sysfs.of_number("259:7") == "/sys/dev/block/259:7"
    assert sysfs.name("999:999") == "999:999"
    assert sysfs.stands_on(sysfs.of_number("999:999")) == ""
    for one in sorted(os.listdir("/sys/dev/block"))[:3]:
        assert os.path.exists(f"/sys/class/block/{sysfs.name(one)}")
