"""A thin pool's superblock, as the one reader has it: for what may be wiped, and for what may be adopted."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from blockdev import Deadline
from blockdev.errors import NotBlank
from snapshotter import existing, making
from snapshotter.errors import PoolRefused
from snapshotter.superblock import superblock


def page(**fields: int) -> bytearray:
    """As the kernel writes it, of a pool with 64 KiB blocks: 1000 of data, 2048 of 4 KiB for metadata."""
    said = {"magic": 27022010, "version": 2, "transaction": 7, "data_blocks": 1000, "metadata_blocks": 2048,
            "block": 128, "metadata_block": 8} | fields  # fmt: skip
    places = {"magic": ("<Q", 32), "version": ("<I", 40), "transaction": ("<Q", 48), "data_blocks": ("<Q", 64),
              "metadata_blocks": ("<Q", 192), "block": ("<I", 336), "metadata_block": ("<I", 340)}  # fmt: skip
    made = bytearray(4096)
    for name, (form, at) in places.items():
        struct.pack_into(form, made, at, said[name])
    return made


def device(tmp_path: Path, begins: bytes, size: int = 8 << 20) -> str:
    path = tmp_path / "metadata"
    path.write_bytes(begins)
    with path.open("r+b") as opened:
        opened.truncate(size)
    return str(path)


def test_a_pool_is_read_with_its_sizes(tmp_path: Path) -> None:
    path = device(tmp_path, page())
    one = superblock(path)
    assert one == existing.superblock(path)
    assert one is not None
    assert (one.transaction, one.data_bytes, one.metadata_bytes) == (7, 1000 << 16, 8 << 20)


@pytest.mark.parametrize(
    ("begins", "size", "words"),
    [
        (bytes(4096), 8 << 20, "does not begin"),
        (b"", 0, "does not begin"),
        (page()[:35], 35, "does not begin"),
        (page(version=3), 8 << 20, "version 3 with blocks of 8 sectors"),
        (page(metadata_block=16), 8 << 20, "version 2 with blocks of 16 sectors"),
        (page(data_blocks=0), 8 << 20, "0 data blocks"),
        (page(metadata_blocks=2049), 8 << 20, "8392704 bytes of themselves"),
        (page()[:64], 64, "version 2 with blocks of 0 sectors"),
    ],
)
def test_what_runvol_cannot_use_is_refused_in_words(tmp_path: Path, begins: bytes, size: int, words: str) -> None:
    with pytest.raises(PoolRefused, match=words):
        existing.superblock(device(tmp_path, begins, size))


@pytest.mark.parametrize("begins", [page(), page(version=3), page(data_blocks=0), page()[:64]])
def test_whatever_else_it_says_it_is_not_blank(tmp_path: Path, begins: bytes) -> None:
    with pytest.raises(NotBlank, match="metadata of a thin pool"):
        making.prove_unused(device(tmp_path, begins, len(begins)), Deadline.after(10))
