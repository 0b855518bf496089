"""Files to stand loop devices and filesystems on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, loops, mounts

Image = Callable[..., str]


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    """`image(megabytes)`: a sparse file; loop devices that are left on it are detached."""
    made: list[str] = []

    def make(megabytes: int = 64) -> str:
        path = str(tmp_path / f"image-{len(made)}")
        Path(path).touch()
        os.truncate(path, megabytes << 20)
        made.append(path)
        return path

    yield make
    for path in made:
        for device in loops.find(path):
            loops.detach(device, path, Deadline.after(5))


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[str]:
    target = tmp_path / "mnt"
    target.mkdir()
    yield str(target)
    mounts.be_unmounted(str(target), Deadline.after(5))
