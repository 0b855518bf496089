"""What a guest writes into its superblock costs the node nothing, and takes nobody else with it."""

from __future__ import annotations

import itertools
import random
import resource
import struct
import subprocess
import time
from pathlib import Path

import pytest

from blockdev import Deadline, filesystems, superblocks
from blockdev.errors import BlockdevError, FilesystemDamaged

EXT4, XFS = 64 << 20, 320 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, bytes]:
    made = {}
    for fstype, size in (("ext4", EXT4), ("xfs", XFS)):
        path = tmp_path_factory.mktemp("image") / fstype
        with path.open("wb") as file:
            file.truncate(size)
        filesystems.make(str(path), fstype, Deadline.after(60))
        with path.open("rb") as file:
            made[fstype] = file.read(1 << 20)
    return made


def written(tmp_path: Path, head: bytes, size: int) -> str:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return str(path)


def put(head: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(head)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


# Offsets in the file: ext4's superblock begins at 1024.
EXT4_FIELDS = {
    "blocks": (1024 + 0x04, "<I"), "free blocks": (1024 + 0x0C, "<I"), "first block": (1024 + 0x14, "<I"),
    "block size": (1024 + 0x18, "<I"), "blocks in a group": (1024 + 0x20, "<I"), "descriptor": (1024 + 0xFE, "<H"),
    "blocks, high": (1024 + 0x150, "<I"), "free blocks, high": (1024 + 0x158, "<I"), "free inodes": (1024 + 0x10, "<I"),
    "features": (1024 + 0x60, "<I"),
}  # fmt: skip
XFS_FIELDS = {"block size": (4, ">I"), "blocks": (8, ">Q"), "inodes": (128, ">Q"), "free inodes": (136, ">Q"),
              "free blocks": (144, ">Q")}  # fmt: skip


@pytest.mark.parametrize(("fstype", "field", "value"), [
    ("ext4", "block size", 0xF0000000), ("ext4", "block size", 7), ("ext4", "first block", 1 << 31),
    ("ext4", "blocks", 0xFFFFFFFF), ("ext4", "blocks, high", 1), ("ext4", "blocks in a group", 0),
    ("ext4", "descriptor", 31), ("ext4", "descriptor", 0xFFFF), ("xfs", "block size", 0), ("xfs", "block size", 3 << 30),
    ("xfs", "blocks", 1 << 63),
])  # fmt: skip
def test_what_cannot_be_is_damage(tmp_path, images, fstype, field, value):
    at, form = (EXT4_FIELDS if fstype == "ext4" else XFS_FIELDS)[field]
    path = written(tmp_path, put(images[fstype], at, form, value), EXT4 if fstype == "ext4" else XFS)
    with pytest.raises(FilesystemDamaged, match="superblock says"):
        superblocks.read(path)
    with pytest.raises(FilesystemDamaged):
        filesystems.check(path, fstype, Deadline.after(5))


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_no_number_in_it_costs_time_or_memory_or_comes_out_as_nonsense(tmp_path, images, fstype):
    fields = EXT4_FIELDS if fstype == "ext4" else XFS_FIELDS
    size = EXT4 if fstype == "ext4" else XFS
    chance = random.Random(7)
    values = [0, 1, 2, 31, 64, 0x7FFF, 0xFFFF, 1 << 25, 0x7FFFFFFF, 0xF0000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    tried = 0
    for (one, other), _again in itertools.product(itertools.product(fields, repeat=2), range(6)):
        head = images[fstype]
        for name in (one, other):
            at, form = fields[name]
            head = put(head, at, form, chance.choice(values) & (1 << 8 * struct.calcsize(form)) - 1)
        try:
            block = superblocks.space(written(tmp_path, head, size))
        except BlockdevError:
            block = None
        if block is not None:
            assert 0 <= block.available_bytes <= block.free_bytes <= block.total_bytes <= size
            assert 0 <= block.free_inodes <= block.inodes
        tried += 1
    assert tried > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert time.monotonic() - began < 60


def test_a_large_filesystem_is_still_measured(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(4 << 40)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1", "-O", "^has_journal,^resize_inode,meta_bg",
                    path], check=True)  # fmt: skip
    block = superblocks.read(str(path))
    assert block is not None and block.total_bytes > 3 << 40


@pytest.mark.parametrize(("arguments", "words"), [
    (["-O", "mmp"], "multi-mount protection"),
    (["-O", "journal_dev"], "another filesystem's journal"),
])  # fmt: skip
def test_what_would_keep_the_kernel_waiting_or_look_elsewhere_is_never_mounted(tmp_path, soon, arguments, words):
    """Made by mkfs itself, as a guest can: a mount of the first may wait for hours, whatever the deadline."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(EXT4)
    subprocess.run(["mkfs.ext4", "-q", "-F", *arguments, str(path)], check=True)
    with pytest.raises(FilesystemDamaged, match=words):
        superblocks.read(str(path))
    started = time.monotonic()
    with pytest.raises(FilesystemDamaged, match=words):
        filesystems.check(str(path), "ext4", soon)
    assert time.monotonic() - started < 5


def test_a_journal_on_another_device_is_never_asked_for(tmp_path, images):
    path = written(tmp_path, put(images["ext4"], 1024 + 0xE4, "<I", 0x0801), EXT4)
    with pytest.raises(FilesystemDamaged, match="a journal on another device"):
        superblocks.read(path)
