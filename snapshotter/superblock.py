"""The superblock of a thin pool's metadata, as it stands on a device.

It is that of the kernel's drivers/md/dm-thin-metadata.c (struct thin_disk_superblock, little-endian). Anybody may have
written it: nothing is done by a number of it that was not held against what is known otherwise.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from blockdev import ioctls
from blockdev.dm_targets import SECTOR

_PAGE, _MAGIC = 4096, 27022010
_FIELDS = {"magic": ("<Q", 32), "version": ("<I", 40), "transaction": ("<Q", 48), "data_blocks": ("<Q", 64),
           "metadata_blocks": ("<Q", 192), "block": ("<I", 336), "metadata_block": ("<I", 340)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Superblock:
    """What it says of a pool: `data_blocks` of `block` bytes, and `metadata_blocks` of `metadata_block` bytes."""

    version: int
    transaction: int
    block: int
    data_blocks: int
    metadata_block: int
    metadata_blocks: int

    @property
    def data_bytes(self) -> int:
        return self.data_blocks * self.block

    @property
    def metadata_bytes(self) -> int:
        return self.metadata_blocks * self.metadata_block


def superblock(path: str) -> Superblock | None:
    """None where no thin pool's metadata begin. What is cut off is zero in it."""
    with ioctls.opened(path) as fd:
        # What another process has written past the page cache is what counts.
        os.posix_fadvise(fd, 0, _PAGE, os.POSIX_FADV_DONTNEED)
        raw = os.pread(fd, _PAGE, 0).ljust(_PAGE, b"\0")
    found = {name: int(struct.unpack_from(form, raw, at)[0]) for name, (form, at) in _FIELDS.items()}
    if found["magic"] != _MAGIC:
        return None
    return Superblock(
        version=found["version"], transaction=found["transaction"], block=found["block"] * SECTOR,
        data_blocks=found["data_blocks"], metadata_block=found["metadata_block"] * SECTOR,
        metadata_blocks=found["metadata_blocks"],
    )  # fmt: skip
