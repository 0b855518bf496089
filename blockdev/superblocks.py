"""What ext4 and XFS write about themselves, read without a mount and without running anything.

Layouts: the kernel's Documentation/filesystems/ext4 (super.rst, group_descr.rst) and XFS's
"Filesystem Structure" (sb_*). Sizes are in bytes. Publish reads this instead of running fsck and
dumpe2fs, each of which costs more than the whole rest of a publish.

A guest writes these bytes, so each number is held against the device and against the format's own limits before
anything is computed or read by it: what cannot be is FilesystemDamaged, at a cost that the bytes have no say in.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from blockdev import xfs_space
from blockdev.errors import FilesystemDamaged
from blockdev.ioctls import bytes_of, opened

_EXT4_MAGIC, _XFS_MAGIC = 0xEF53, b"XFSB"
_EXT4_CLEAN, _EXT4_ERRORS = 1, 2
_EXT4_NEEDS_RECOVERY, _EXT4_64BIT = 0x4, 0x80
_EXT4_EXTENTS_OR_64BIT_OR_FLEX = 0x40 | 0x80 | 0x200
_EXT3_JOURNAL = 0x4
_EXT4_EXTENTS, _EXT4_BIGALLOC = 0x40, 0x200
# Clusters that the kernel keeps for what it has promised already (a fiftieth of all, if that is less).
_EXT4_KEPT = 4096
_HEAD = 4096
# A filesystem with a foreign journal, or one that is a journal, names another device; one with multi-mount protection
# keeps the kernel waiting for hours, as long as it says itself. No mkfs makes one unless it is told to.
_EXT4_NEVER = {0x8: "it is another filesystem's journal", 0x100: "multi-mount protection (mmp)"}
# Block sizes run from 1 KiB (2^0) to 64 KiB (2^6) in ext4, and from 512 bytes to 64 KiB in XFS.
_EXT4_LARGEST_LOG, _XFS_BLOCKS = 6, tuple(512 << shift for shift in range(8))
_EXT4_DESCRIPTORS = (32, 64, 128, 256, 512, 1024)
_SMALLEST_INODE = 128
# Descriptors are summed for filesystems of up to 2 TiB; beyond it the superblock's own totals have to do.
_MOST_DESCRIPTORS = 1 << 20
# mkfs makes no smaller groups; very many of them would cost very many descriptors.
_SMALLEST_GROUP = 256


@dataclass(frozen=True, kw_only=True)
class Superblock:
    """What the filesystem is. `clean` is false if a journal waits or errors were recorded. `used`: it was mounted some
    time (ext4), or its mkfs came to its end (XFS): there may be something in it."""

    fstype: str
    uuid: str
    clean: bool
    errors: bool
    used: bool
    block_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """How full it is, as statfs(2) says where it is mounted: without what the filesystem needs for itself.

    `available_bytes`: without what is kept back from everybody but root.
    """

    total_bytes: int
    free_bytes: int
    available_bytes: int
    inodes: int
    free_inodes: int


def read(path: str) -> Superblock | None:
    """The superblock of the ext2/3/4 or XFS filesystem on a file or block node; None if there is none.

    FilesystemDamaged where it says of itself what cannot be on this device.
    """
    with opened(path) as fd:
        return _read(fd, os.pread(fd, _HEAD, 0), path)


def space(path: str) -> Space | None:
    """How full the filesystem is; None if there is none. FilesystemDamaged as for `read`.

    Of one that is mounted somewhere, a guest included, it is what was last written back.
    """
    with opened(path) as fd:
        head = os.pread(fd, _HEAD, 0)
        block = _read(fd, head, path)
        if block is None:
            return None
        return _xfs_space(fd, head, block) if block.fstype == "xfs" else _ext4_space(fd, head[1024:2048], block)


def _read(fd: int, head: bytes, path: str) -> Superblock | None:
    found = None
    if head[:4] == _XFS_MAGIC and len(head) >= 512:
        found = _xfs(head, path)
    elif len(head) >= 2048 and struct.unpack_from("<H", head, 1024 + 0x38)[0] == _EXT4_MAGIC:
        found = _ext4(head[1024:2048], path)
    if found is not None:
        _must(found.total_bytes <= bytes_of(fd), path, f"{found.total_bytes} bytes, more than the device has")
    return found


def _must(true: bool, path: str, claim: str) -> None:
    if not true:
        raise FilesystemDamaged(path, f"its superblock says {claim}, which cannot be")


def _uuid(raw: bytes) -> str:
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _xfs(block: bytes, path: str) -> Superblock:
    block_bytes, data_blocks = struct.unpack_from(">IQ", block, 4)
    _must(block_bytes in _XFS_BLOCKS, path, f"blocks of {block_bytes} bytes")
    return Superblock(
        fstype="xfs",
        uuid=_uuid(block[32:48]),
        # XFS replays its log when it is mounted and has no flag for it in the superblock.
        clean=True,
        errors=False,
        used=not block[126],
        block_bytes=block_bytes,
        total_bytes=block_bytes * data_blocks,
    )


def _xfs_space(fd: int, head: bytes, block: Superblock) -> Space:
    found, one = xfs_space.read(fd, head), block.block_bytes
    if found is not None:
        free = found.free * one
        return Space(total_bytes=found.blocks * one, free_bytes=free, available_bytes=free, inodes=found.inodes,
                     free_inodes=found.free_inodes)  # fmt: skip
    # The superblock's own figures are written back now and then; no more than there is.
    inodes, free_inodes, free_blocks = struct.unpack_from(">QQQ", head, 128)
    most = block.total_bytes // _SMALLEST_INODE
    free = min(free_blocks * one, block.total_bytes)
    return Space(total_bytes=block.total_bytes, free_bytes=free, available_bytes=free, inodes=min(inodes, most),
                 free_inodes=min(free_inodes, inodes, most))  # fmt: skip


def _ext4(block: bytes, path: str) -> Superblock:
    _inodes, blocks, _reserved, _free, _free_inodes, first_block, log_size = struct.unpack_from("<7I", block, 0)
    blocks_per_group = struct.unpack_from("<I", block, 0x20)[0]
    mounted_at, _written_at, mounts, _most_mounts, _magic, state = struct.unpack_from("<2I4H", block, 0x2C)
    compatible, incompatible = struct.unpack_from("<II", block, 0x5C)
    for bit, what in _EXT4_NEVER.items():
        _must(not incompatible & bit, path, what)
    journal_device = struct.unpack_from("<I", block, 0xE4)[0]
    _must(not (compatible & _EXT3_JOURNAL and journal_device), path, "a journal on another device")
    _must(log_size <= _EXT4_LARGEST_LOG, path, f"blocks of 2^{10 + log_size} bytes")
    block_bytes = 1024 << log_size
    descriptor_bytes = 32
    if incompatible & _EXT4_64BIT:
        blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
        descriptor_bytes = struct.unpack_from("<H", block, 0xFE)[0] or 32
    _must(descriptor_bytes in _EXT4_DESCRIPTORS, path, f"group descriptors of {descriptor_bytes} bytes")
    _must(first_block <= 1 and first_block < blocks, path, f"a first block {first_block} of {blocks}")
    _must(blocks_per_group >= _SMALLEST_GROUP, path, f"{blocks_per_group} blocks in a group")
    if incompatible & _EXT4_EXTENTS_OR_64BIT_OR_FLEX:
        fstype = "ext4"
    else:
        fstype = "ext3" if compatible & _EXT3_JOURNAL else "ext2"
    return Superblock(
        fstype=fstype,
        uuid=_uuid(block[0x68:0x78]),
        clean=bool(state & _EXT4_CLEAN) and not state & _EXT4_ERRORS and not incompatible & _EXT4_NEEDS_RECOVERY,
        errors=bool(state & _EXT4_ERRORS),
        used=bool(mounted_at or mounts),
        block_bytes=block_bytes,
        total_bytes=blocks * block_bytes,
    )


def _ext4_space(fd: int, block: bytes, known: Superblock) -> Space:
    inodes, _blocks, reserved, free, free_inodes, first_block, log_size, log_cluster = struct.unpack_from(
        "<8I", block, 0
    )
    incompatible, read_only = struct.unpack_from("<II", block, 0x60)
    descriptor_bytes = 32
    if incompatible & _EXT4_64BIT:
        free |= struct.unpack_from("<I", block, 0x158)[0] << 32
        reserved |= struct.unpack_from("<I", block, 0x154)[0] << 32
        descriptor_bytes = struct.unpack_from("<H", block, 0xFE)[0] or 32
    blocks = known.total_bytes // known.block_bytes
    groups = -(-(blocks - first_block) // struct.unpack_from("<I", block, 0x20)[0])
    summed = _ext4_groups(fd, (first_block + 1) * known.block_bytes, groups, descriptor_bytes)
    if summed is not None:
        free, free_inodes = summed
    # Free space is counted in clusters, which are blocks but in a filesystem with bigalloc.
    cluster = log_cluster - log_size if read_only & _EXT4_BIGALLOC and 0 <= log_cluster - log_size <= 16 else 0
    overhead = struct.unpack_from("<I", block, 0x248)[0] << cluster
    usable = blocks - overhead if overhead < blocks else blocks
    free = min(free << cluster, usable)
    kept = min((blocks >> cluster) // 50, _EXT4_KEPT) << cluster if incompatible & _EXT4_EXTENTS else 0
    one = known.block_bytes
    return Space(
        total_bytes=usable * one,
        free_bytes=free * one,
        available_bytes=max(0, free - reserved - kept) * one,
        inodes=inodes,
        free_inodes=min(free_inodes, inodes),
    )


def _ext4_groups(fd: int, offset: int, groups: int, size: int) -> tuple[int, int] | None:
    """Free blocks and inodes summed over the group descriptors.

    The totals in the superblock itself are written back only at unmount; the descriptors go through the journal.
    """
    if groups * size > _MOST_DESCRIPTORS:
        return None
    raw = os.pread(fd, groups * size, offset)
    if len(raw) < groups * size:
        return None
    # Low halves of both, and from 64 bytes on high ones; a byte of all descriptors at a time, which is much faster.
    halves = (0,) if size < 64 else (0, 2)
    blocks = sum(_column(raw, 0x0C + 0x10 * half + at, size) << 8 * (half + at) for half in halves for at in (0, 1))
    inodes = sum(_column(raw, 0x0E + 0x10 * half + at, size) << 8 * (half + at) for half in halves for at in (0, 1))
    return blocks, inodes


def _column(raw: bytes, at: int, size: int) -> int:
    """The sum of one byte of each descriptor."""
    return sum(raw[at::size])
