"""What a thin pool that is there already tells of itself, looked at without a write to anything.

Its sizes are those of its superblock. What else is asked, the pool's own keeper, is read through a pool that is mapped
read-only, over a read-only mapping of its metadata: the kernel itself then writes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev import Deadline, ioctls
from blockdev.commands import run
from blockdev.devicemapper import Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, Linear, Thin, ThinPool
from blockdev.errors import CommandFailed
from snapshotter import backing
from snapshotter import superblock as superblocks
from snapshotter.errors import PoolRefused
from snapshotter.keeper import HEAD, stamps_in
from snapshotter.metadata import KEEPER, first_block, numbers
from snapshotter.superblock import Superblock

_VERSIONS = (1, 2)
_UUID = "RUNVOL-LOOK"
_NAMES = ("runvol-look-keeper", "runvol-look-pool", "runvol-look-data", "runvol-look-metadata")


def superblock(path: str) -> Superblock:
    """PoolRefused where no thin pool's metadata begin, or such as runvol cannot use."""
    one, size = superblocks.superblock(path), ioctls.size_bytes(path)
    if one is None:
        raise PoolRefused(f"{path} does not begin with the metadata of a thin pool; `runvol pool init` makes a pool")
    if one.version not in _VERSIONS or one.metadata_block != backing.METADATA_BLOCK:
        raise PoolRefused(f"{path}: metadata of version {one.version} with blocks of {one.metadata_block // SECTOR} "
                          "sectors are none that runvol knows")  # fmt: skip
    if not one.data_blocks or not 0 < one.metadata_bytes <= size:
        raise PoolRefused(f"{path}: its metadata tell of {one.metadata_bytes} bytes of themselves and "
                          f"{one.data_blocks} data blocks, and {path} has {size} bytes")  # fmt: skip
    backing.check_block(one.block)
    return one


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is in the pool: its ids, the first page of device 0 and the data block that it lies in, and the stamps of
    the copies of the store in there."""

    ids: frozenset[int]
    page: bytes = b""
    stamps: tuple[int, ...] = ()
    keeper_block: int = -1


def look(mapper: Mapper, metadata: str, data: str, data_at: int, deadline: Deadline) -> Look:
    """Check the metadata all over and read the keeper. `data_at`: byte of `data` at which the data begin.

    PoolRefused for metadata that the check refuses. What a killed process left of this is removed first.
    """
    one = superblock(metadata)
    with contextlib.ExitStack() as stack:
        below = _mapped(stack, mapper, _NAMES[3], Linear(length=one.metadata_bytes // SECTOR, device=metadata))
        _check(below, metadata, deadline)
        ids = frozenset(numbers(run("thin_ls", "--no-headers", "-o", "DEV", below, deadline=deadline)[1]))
        if KEEPER not in ids:
            return Look(ids=ids)
        block = first_block(run("thin_dump", "--dev-id", str(KEEPER), below, deadline=deadline)[1])
        if block is None:
            return Look(ids=ids)
        # The device of the data may have others' write requests refused only as a whole: nothing is sent to it.
        linear = Linear(length=one.data_bytes // SECTOR, device=data, offset=data_at // SECTOR)
        under = _mapped(stack, mapper, _NAMES[2], linear)
        table = ThinPool(length=linear.length, metadata=below, data=under, block=one.block // SECTOR, low_water=1,
                         features=("read_only",))  # fmt: skip
        pool = _mapped(stack, mapper, _NAMES[1], table, read_only=False)
        number = os.stat(pool).st_rdev
        thin = Thin(length=HEAD // SECTOR, pool=f"{os.major(number)}:{os.minor(number)}", thin_id=KEEPER)
        with ioctls.opened(_mapped(stack, mapper, _NAMES[0], thin)) as fd:
            head = os.pread(fd, HEAD, 0)
        return Look(ids=ids, page=head[: backing.MARK], stamps=tuple(stamps_in(head)), keeper_block=block)


def clear(mapper: Mapper) -> None:
    """Remove what a killed process left of a look."""
    for name in _NAMES:
        found = mapper.find(name)
        if found is not None and found.uuid == f"{_UUID}-{name}":
            mapper.remove(name)


def _mapped(
    stack: contextlib.ExitStack, mapper: Mapper, name: str, target: Linear | Thin | ThinPool, *, read_only: bool = True
) -> str:  # fmt: skip
    try:
        mapper.establish(name, [target], uuid=f"{_UUID}-{name}", read_only=read_only)
    except MapperError as error:
        raise PoolRefused(f"the pool cannot be looked into: {error}; the kernel's log has the reason") from None
    stack.callback(mapper.remove, name)
    return node(name)


def _check(metadata: str, named: str, deadline: Deadline) -> None:
    try:
        run("thin_check", "-q", metadata, deadline=deadline)
    except CommandFailed as error:
        raise PoolRefused(
            f"the metadata on {named} do not pass thin_check ({error.output.strip() or f'status {error.code}'}): "
            "repair them first with thin_repair, or clear a mark that waits for this check (thin_check "
            "--clear-needs-check-flag)"
        ) from None


def held_by(mapper: Mapper, numbers: set[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Names and UUIDs, without `prefix`, with which they begin, of mapped devices that stand on one of `numbers`."""
    for entry in mapper.devices():
        found = mapper.find(entry.name)
        if found is not None and found.uuid.startswith(prefix) and numbers & set(mapper.dependencies(entry.name)):
            yield entry.name, found.uuid.removeprefix(prefix)


__all__ = ["Look", "clear", "held_by", "look", "superblock"]
