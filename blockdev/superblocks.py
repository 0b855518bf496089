"""What ext4 and XFS write about themselves, read without a mount and without running anything.

Layouts: the kernel's Documentation/filesystems/ext4 (super.rst, group_descr.rst) and XFS's
"Filesystem Structure" (sb_*). Sizes are in bytes. Publish reads this instead of running fsck and
dumpe2fs, each of which costs more than the whole rest of a publish.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from blockdev.ioctls import opened

_EXT4_MAGIC, _XFS_MAGIC = 0xEF53, b"XFSB"
_EXT4_CLEAN, _EXT4_ERRORS = 1, 2
_EXT4_NEEDS_RECOVERY, _EXT4_64BIT = 0x4, 0x80
_EXT4_EXTENTS_OR_64BIT_OR_FLEX = 0x40 | 0x80 | 0x200
_EXT3_JOURNAL = 0x4


@dataclass(frozen=True, kw_only=True)
class Superblock:
    """The part that a driver needs. `clean` is false if a journal waits or errors were recorded."""

    fstype: str
    uuid: str
    clean: bool
    errors: bool
    block_bytes: int
    total_bytes: int
    free_bytes: int
    inodes: int
    free_inodes: int


def read(path: str) -> Superblock | None:
    """The superblock of the ext2/3/4 or XFS filesystem on a file or block node; None if there is none.

    Of a filesystem that is mounted somewhere, a guest included, free space is what was last written back.
    """
    with opened(path) as fd:
        head = os.pread(fd, 4096, 0)
        if head[:4] == _XFS_MAGIC:
            return _xfs(head)
        if len(head) >= 2048 and struct.unpack_from("<H", head, 1024 + 0x38)[0] == _EXT4_MAGIC:
            return _ext4(fd, head[1024:2048])
    return None


def _uuid(raw: bytes) -> str:
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _xfs(block: bytes) -> Superblock:
    block_bytes, data_blocks = struct.unpack_from(">IQ", block, 4)
    inodes, free_inodes, free_blocks = struct.unpack_from(">QQQ", block, 128)
    return Superblock(
        fstype="xfs",
        uuid=_uuid(block[32:48]),
        # XFS replays its log when it is mounted and has no flag for it in the superblock.
        clean=True,
        errors=False,
        block_bytes=block_bytes,
        total_bytes=block_bytes * data_blocks,
        free_bytes=block_bytes * free_blocks,
        inodes=inodes,
        free_inodes=free_inodes,
    )


def _ext4(fd: int, block: bytes) -> Superblock:
    inodes, blocks, _reserved, free_blocks, free_inodes, first_block, log_size = struct.unpack_from("<7I", block, 0)
    blocks_per_group = struct.unpack_from("<I", block, 0x20)[0]
    state = struct.unpack_from("<H", block, 0x3A)[0]
    compatible, incompatible = struct.unpack_from("<II", block, 0x5C)
    block_bytes = 1024 << log_size
    descriptor_bytes = 32
    if incompatible & _EXT4_64BIT:
        blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
        free_blocks |= struct.unpack_from("<I", block, 0x158)[0] << 32
        descriptor_bytes = struct.unpack_from("<H", block, 0xFE)[0] or 32
    groups = -(-(blocks - first_block) // blocks_per_group) if blocks_per_group else 0
    summed = _ext4_groups(fd, (first_block + 1) * block_bytes, groups, descriptor_bytes)
    if summed is not None:
        free_blocks, free_inodes = summed
    if incompatible & _EXT4_EXTENTS_OR_64BIT_OR_FLEX:
        fstype = "ext4"
    else:
        fstype = "ext3" if compatible & _EXT3_JOURNAL else "ext2"
    return Superblock(
        fstype=fstype,
        uuid=_uuid(block[0x68:0x78]),
        clean=bool(state & _EXT4_CLEAN) and not state & _EXT4_ERRORS and not incompatible & _EXT4_NEEDS_RECOVERY,
        errors=bool(state & _EXT4_ERRORS),
        block_bytes=block_bytes,
        total_bytes=blocks * block_bytes,
        free_bytes=free_blocks * block_bytes,
        inodes=inodes,
        free_inodes=free_inodes,
    )


def _ext4_groups(fd: int, offset: int, groups: int, size: int) -> tuple[int, int] | None:
    """Free blocks and inodes summed over the group descriptors.

    The totals in the superblock itself are written back only at unmount; the descriptors go through the journal.
    """
    raw = os.pread(fd, groups * size, offset)
    if len(raw) < groups * size or size < 32:
        return None
    blocks = inodes = 0
    for at in range(0, groups * size, size):
        low_blocks, low_inodes = struct.unpack_from("<HH", raw, at + 0x0C)
        blocks += low_blocks
        inodes += low_inodes
        if size >= 64:
            high_blocks, high_inodes = struct.unpack_from("<HH", raw, at + 0x2C)
            blocks += high_blocks << 16
            inodes += high_inodes << 16
    return blocks, inodes
