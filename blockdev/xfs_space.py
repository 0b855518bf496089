"""How full an XFS is, from the headers of its allocation groups, as statfs(2) says once it is mounted.

What the kernel keeps back from everybody it counts only while the filesystem is mounted: the room that the trees of an
allocation group may need (fs/xfs/libxfs/xfs_ag_resv.c), the pool for its own needs, the last blocks of each group.
Formats: fs/xfs/libxfs/xfs_format.h.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

_AGF, _AGI = b"XAGF", b"XAGI"
_FINOBT, _RMAPBT, _REFLINK, _COUNTED = 1, 2, 4, 8
# More groups than this are no reading for one look; mkfs makes four of a volume's size, and growth more of them.
_MOST_GROUPS = 64
_HEADER = 56
_REFCOUNT_RECORD, _FINOBT_RECORD, _RMAP_RECORD = 12, 16, 24
_KEY_AND_POINTER, _RMAP_KEYS_AND_POINTER = 8, 44
_INODES_IN_CHUNK = 64
_POOL = 8192
_LAST_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Space:
    """In blocks and inodes, as statfs has them."""

    blocks: int
    free: int
    inodes: int
    free_inodes: int


def read(fd: int, block: bytes) -> Space | None:
    """`block`: the superblock, which is sane as far as its sizes go. None where the groups do not tell."""
    block_bytes, data_blocks = struct.unpack_from(">IQ", block, 4)
    log_start = struct.unpack_from(">Q", block, 48)[0]
    group_blocks, groups = struct.unpack_from(">II", block, 84)
    log_blocks = struct.unpack_from(">I", block, 96)[0] if log_start else 0
    sector_bytes, _inode_bytes, per_block = struct.unpack_from(">HHH", block, 102)
    group_log, percent = block[124], block[127]
    features = struct.unpack_from(">I", block, 212)[0]
    if not 0 < groups <= _MOST_GROUPS or group_blocks * groups < data_blocks or group_log > 31:
        return None
    if sector_bytes not in (512, 1024, 2048, 4096) or not 0 < per_block <= 128 or log_blocks > data_blocks:
        return None
    has_log = log_start >> group_log
    free = kept = inodes = unused = 0
    for number in range(groups):
        headers = os.pread(fd, 2 * sector_bytes, number * group_blocks * block_bytes + sector_bytes)
        agf, agi = headers[:sector_bytes], headers[sector_bytes:]
        if agf[:4] != _AGF or agi[:4] != _AGI:
            return None
        length, in_list, free_blocks, in_trees = (struct.unpack_from(">I", agf, at)[0] for at in (12, 48, 52, 60))
        if length > group_blocks or free_blocks > length or in_list > length or in_trees > length:
            return None
        free += free_blocks + in_list + in_trees
        count, free_count = struct.unpack_from(">I", agi, 16)[0], struct.unpack_from(">I", agi, 28)[0]
        inodes += count
        unused += min(free_count, count)
        usable = length - (log_blocks if number == has_log and log_start else 0)
        kept += _kept(usable, block_bytes, per_block, features, agf, agi)
    kept += min(data_blocks // 20, _POOL) + groups * _LAST_BLOCKS
    free = max(0, min(free, data_blocks) - kept)
    inodes = min(inodes, data_blocks * per_block)
    most = data_blocks * percent // 100 * per_block if percent else data_blocks * per_block
    files = max(inodes, min(inodes + free * per_block, most))
    return Space(
        blocks=data_blocks - log_blocks,
        free=min(free, data_blocks - log_blocks),
        inodes=files,
        free_inodes=files - (inodes - min(unused, inodes)),
    )


def _kept(usable: int, block_bytes: int, per_block: int, features: int, agf: bytes, agi: bytes) -> int:
    """Blocks that a group's trees may still need."""
    kept = 0
    if features & _REFLINK:
        most = _tree(usable, block_bytes, _REFCOUNT_RECORD, _KEY_AND_POINTER)
        kept += max(0, most - struct.unpack_from(">I", agf, 84)[0])
    if features & _FINOBT:
        chunks = usable * per_block // _INODES_IN_CHUNK
        used = struct.unpack_from(">I", agi, 340)[0] if features & _COUNTED else 1
        kept += max(0, _tree(chunks, block_bytes, _FINOBT_RECORD, _KEY_AND_POINTER) - used)
    if features & _RMAPBT:
        kept += max(usable // 100, _tree(usable, block_bytes, _RMAP_RECORD, _RMAP_KEYS_AND_POINTER))
    return kept


def _tree(records: int, block_bytes: int, record: int, key: int) -> int:
    """Blocks of a tree whose every block is half full."""
    room = block_bytes - _HEADER
    leaf, node = max(1, room // record // 2), max(2, room // key // 2)
    level = -(-records // leaf)
    total = level
    while level > 1:
        level = -(-level // node)
        total += level
    return total
