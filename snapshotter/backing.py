"""What a pool stands on, described in one file, assembled from it at start, extended while it runs.

`pool.json` in the state directory is written by `runvol pool init`, before anything is formatted. Kinds: `loop` (two
files, for trials), `device` (one block device, split by two linear mappings, or one for the data and one for the
metadata, as they are), `lvm` (two logical volumes of a volume group: the pool itself is ours, never LVM's, as two
owners of one pool destroy it).

A device that has the data alone says nothing about whose it is, and after a reboot its name may be another disk's. So
its last page is a mark with the pool's identity, which is not given to the pool, and without which it is not touched.
Where a pool that was adopted leaves no page for it, the first page of the pool's keeper is that mark.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Literal

import msgspec

from blockdev import Deadline, durable, ioctls, loops
from blockdev.commands import run
from blockdev.devicemapper import Device, Mapper, MapperError, make_node, node
from blockdev.dm_targets import BLOCK_STEP, LARGEST_BLOCK, SECTOR, SMALLEST_BLOCK, Linear, PoolStatus, ThinPool
from snapshotter.errors import BadRequest, PoolRefused, Unavailable
from snapshotter.metadata import LARGEST_METADATA_BLOCKS
from snapshotter.watermarks import Remedies

FILE = "pool.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,50}\Z")
# Of the kernel: metadata beyond this is not used, below this it is refused. Bytes.
SMALLEST_METADATA, LARGEST_METADATA = 2 << 20, 16 << 30
METADATA_BLOCK = 4096
_METADATA_PER_BLOCK = 48
MARK = 4096
_KEEPER = re.compile(rb"runvol keeper\nidentity ([0-9a-f]{16})\n(?:pool ([a-z0-9_.-]{1,51})\n)?\0*\Z")
_MARKED = re.compile(rb"runvol pool ([a-z0-9_.-]{1,51}), data\nidentity ([0-9a-f]{16})\n\0*\Z")
_GRAIN = 4 << 20
_ABSENT = "the pool's file {} does not exist; mount the filesystem that it lies on"


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`pool.json`. Sizes are bytes; `block` is the pool's block in bytes. `data` and `metadata` are paths (loop),
    devices (without one for the metadata it lies at the start of `data`), or names of logical volumes (lvm).
    `data_bytes` is where the mark of a device for data alone ends; `keeper_at` where that of an adopted one begins.
    What a pool does not need is not written, so that an earlier release still reads it."""

    name: str
    identity: str
    kind: Literal["loop", "device", "lvm"]
    data: str
    metadata: str
    metadata_bytes: int
    block: int
    group: str = ""
    data_bytes: int = 0
    keeper_at: int = 0


def remedies(it: Description) -> Remedies:
    """What makes this pool larger, for its errors."""
    if it.kind != "device":
        return Remedies()
    data = f"make {it.data} larger, then `runvol pool extend`"
    if it.metadata:
        return Remedies(data=data, metadata=f"make {it.metadata} larger, then `runvol pool extend --metadata`")
    metadata = f"remove images or containers: the metadata lies at the start of {it.data} and cannot grow"
    return Remedies(data=data, metadata=f"{metadata} (a pool that is made with a larger `--metadata-size` has more)")


def metadata_size(data_bytes: int, block: int) -> int:
    """Bytes of metadata that a pool of this size wants, with room to grow to twice its size."""
    wanted = max(2 * _METADATA_PER_BLOCK * (data_bytes // block), 4 * SMALLEST_METADATA)
    return min(-(-wanted // _GRAIN) * _GRAIN, LARGEST_METADATA)


def check_name(name: str) -> None:
    if not _NAME.match(name):
        raise BadRequest("--pool", name, "takes lower-case letters, digits, dots and dashes, 51 at most")


def check_block(block: int) -> None:
    sectors, rest = divmod(block, SECTOR)
    if rest or sectors % BLOCK_STEP or not SMALLEST_BLOCK <= sectors <= LARGEST_BLOCK:
        raise BadRequest("--block-size", block, "takes multiples of 64 KiB up to 1 GiB, in bytes")


def load(state_dir: str) -> Description | None:
    """The description, or None where no pool was made yet. PoolRefused if it cannot be read."""
    path = os.path.join(state_dir, FILE)
    try:
        return msgspec.json.decode(durable.read(path), type=Description)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror}"
        if error.errno in durable.NO_RECORD:
            raise PoolRefused(f"{why}; put the file back that belongs there") from None
        raise PoolRefused(f"{why}; its disk or its filesystem is not well") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PoolRefused(
            f"{path}: {error}. Restore it, or use the release that has written it; without it the pool is not found"
        ) from None


def save(state_dir: str, description: Description) -> None:
    os.makedirs(state_dir, mode=0o700, exist_ok=True)
    path = os.path.join(state_dir, FILE)
    durable.replace(path, msgspec.json.format(msgspec.json.encode(description), indent=2) + b"\n")
    durable.sweep(f"{path}.")


def new_identity() -> str:
    return os.urandom(8).hex()


class Backing:
    """The devices below the pool. Every verb may be repeated."""

    def __init__(self, mapper: Mapper, state_dir: str, description: Description) -> None:
        self._mapper, self.state_dir, self.description = mapper, state_dir, description

    def attach(self, deadline: Deadline) -> tuple[str, str]:
        """The nodes of metadata and data; Unavailable, naming what is absent."""
        it = self.description
        if it.kind == "loop":
            return _loop(it.metadata, deadline), _loop(it.data, deadline)
        if it.kind == "lvm":
            run("lvchange", "-ay", "-K", f"{it.group}/{it.metadata}", f"{it.group}/{it.data}", deadline=deadline)
            return self._logical(it.metadata), self._logical(it.data)
        return self._devices() if it.metadata else self._split(it.data)

    def _devices(self) -> tuple[str, str]:
        it = self._refreshed()
        for device in (it.metadata, it.data):
            self._expect_device(device)
        place = f"begins at byte {it.keeper_at}" if it.keeper_at else f"ends at byte {it.data_bytes}"
        if not (self._is_kept(it) if it.keeper_at else self.is_marked(it.data, it.data_bytes)):
            raise Unavailable(
                f"{it.data} is not the data device of pool {it.name}: no mark of it {place}. Name "
                f"the right one in {os.path.join(self.state_dir, FILE)}"
            )
        return it.metadata, it.data

    def _is_kept(self, it: Description) -> bool:
        return keeper_of(_read_mark(it.data, it.keeper_at + MARK)) == it.identity

    def is_marked(self, device: str, end: int) -> bool:
        """Whether this pool's mark ends at this byte."""
        return _read_mark(device, end) == self._mark()

    def first_of_metadata(self, deadline: Deadline) -> str:
        """What begins with the metadata, without mapping anything that is not there; Unavailable where it is absent."""
        it = self.description
        if it.kind == "lvm":
            run("lvchange", "-ay", "-K", f"{it.group}/{it.metadata}", deadline=deadline)
            return self._logical(it.metadata)
        path = it.metadata or it.data
        if it.kind == "device":
            self._expect_device(path)
        elif not os.path.isfile(path):
            raise Unavailable(_ABSENT.format(path))
        return path

    def _refreshed(self) -> Description:
        """As it stands in the file: another process may have extended the pool."""
        self.description = load(self.state_dir) or self.description
        return self.description

    def mark(self, *, exclusive: bool = False) -> None:
        """Say on a device that has the data alone whose it is, at its end as it is now. `exclusive`: nobody has it."""
        it = self.description
        if it.kind == "device" and it.metadata and not it.keeper_at:
            size = ioctls.size_bytes(it.data)
            with ioctls.opened(it.data, os.O_RDWR | (os.O_EXCL if exclusive else 0)) as fd:
                os.pwrite(fd, self._mark(), size - MARK)
                os.fsync(fd)
            if it.data_bytes != size:
                self.description = msgspec.structs.replace(it, data_bytes=size)
                save(self.state_dir, self.description)

    def _mark(self) -> bytes:
        it = self.description
        return f"runvol pool {it.name}, data\nidentity {it.identity}\n".encode().ljust(MARK, b"\0")

    def table(self, metadata: str, data: str) -> ThinPool:
        """The pool over all of the data device but the mark."""
        it = self.description
        return pool_table(
            metadata, data, it.block, (it.data_bytes - MARK) if it.data_bytes else ioctls.size_bytes(data)
        )

    def _expect_device(self, device: str) -> None:
        if not ioctls.is_block(device):
            raise Unavailable(f"pool {self.description.name} stands on {device}, which is no block device now")

    def _logical(self, volume: str) -> str:
        # LVM doubles the dashes of both names. Without udev, nobody has made the node.
        name = f"{self.description.group.replace('-', '--')}-{volume.replace('-', '--')}"
        device = self._mapper.find(name)
        if device is None:
            raise Unavailable(f"the logical volume {self.description.group}/{volume} is not active")
        if not ioctls.is_block(node(name)):
            make_node(device)
        return node(name)

    def _split(self, device: str) -> tuple[str, str]:
        self._expect_device(device)
        metadata = self.description.metadata_bytes // SECTOR
        rest = ioctls.size_bytes(device) // SECTOR - metadata
        parts = (("meta", Linear(length=metadata, device=device)),
                 ("data", Linear(length=rest, device=device, offset=metadata)))  # fmt: skip
        nodes = []
        for part, target in parts:
            name = f"{self.description.name}-{part}"
            self._be_mapped(name, target)
            nodes.append(node(name))
        return nodes[0], nodes[1]

    def _be_mapped(self, name: str, target: Linear) -> None:
        found = self._mapper.find(name)
        if found is None:
            self._mapper.create(name, self._part_uuid(name))
        elif (
            self._refuse_foreign(found)
            and found.active
            and not found.suspended
            and ioctls.size_bytes(node(name)) == target.length * SECTOR
        ):
            return
        self._mapper.load(name, [target])
        self._mapper.resume(name)

    def _refuse_foreign(self, found: Device) -> bool:
        if found.uuid != self._part_uuid(found.name):
            raise PoolRefused(
                f"a mapped device {found.name} exists that is not part of this pool (its UUID is "
                f"{found.uuid or 'empty'}); rename it, or describe this pool under another name"
            )
        return True

    def _part_uuid(self, name: str) -> str:
        return f"RUNVOL-PART-{self.description.identity}-{name}"

    def parts(self) -> frozenset[str]:
        """The kernel's names of the two parts of a device, as far as they are mapped."""
        found = (self._mapper.find(f"{self.description.name}-{part}") for part in ("meta", "data"))
        return frozenset(f"dm-{one.minor}" for one in found if one is not None)

    def refuse_taken_names(self) -> None:
        """PoolRefused if the parts' names are those of somebody else's mapped devices."""
        it = self.description
        if it.kind == "device" and not it.metadata:
            for part in ("meta", "data"):
                name = f"{it.name}-{part}"
                found = self._mapper.find(name)
                if found is not None:
                    self._refuse_foreign(found)

    def beyond(self, part: str, status: PoolStatus) -> int:
        """Bytes that the data or the metadata device has, in whole blocks, beyond what the pool uses of it."""
        it = self._refreshed()
        if part == "metadata":
            blocks = min(self._size(part) // METADATA_BLOCK, LARGEST_METADATA_BLOCKS)
            return max(0, blocks - status.metadata_total) * METADATA_BLOCK
        size = self._size(part) - (MARK if it.kind == "device" and it.metadata and not it.keeper_at else 0)
        return max(0, size // it.block - status.data_total) * it.block

    def _size(self, part: str) -> int:
        it = self.description
        if it.kind == "lvm":
            return ioctls.size_bytes(self._logical(it.data if part == "data" else it.metadata))
        if it.kind == "device" and not it.metadata:
            return ioctls.size_bytes(it.data) - it.metadata_bytes if part == "data" else it.metadata_bytes
        return ioctls.size_bytes(it.data if part == "data" else it.metadata)

    def extend(self, part: str, more: int, status: PoolStatus, deadline: Deadline) -> None:
        """Make the data or the metadata device `more` bytes larger, in whole blocks; without `more`, and for devices,
        the pool takes what there is beyond it. Unavailable where there is nothing. Inside the turn for it (`turns`).

        Killed, it leaves a device that is larger than the pool, of which the next one takes what there is.
        """
        it = self._refreshed()
        if more < 0:
            raise BadRequest("--by", more, "a pool only grows")
        unit = it.block if part == "data" else METADATA_BLOCK
        if part == "metadata" and status.metadata_total >= LARGEST_METADATA_BLOCKS:
            raise Unavailable(f"the metadata of pool {it.name} is as large as the kernel uses")
        if it.kind == "device" or not more:
            self._take_growth(part, status)
        elif it.kind == "loop":
            _grow(it.data if part == "data" else it.metadata, -(-more // unit) * unit)
        else:
            volume = f"{it.group}/{it.data if part == 'data' else it.metadata}"
            run("lvextend", "-L", f"+{-(-more // unit) * unit}b", volume, deadline=deadline)
        if it.kind == "loop":
            for device in loops.find(it.data if part == "data" else it.metadata):
                loops.resize(device)

    def _take_growth(self, part: str, status: PoolStatus) -> None:
        """Devices of a pool are made larger by whoever owns them; the pool takes all that there is."""
        it = self.description
        if it.kind == "device" and not it.metadata and part == "metadata":
            raise Unavailable(f"the metadata of pool {it.name} cannot be extended: {remedies(it).metadata}")
        if not self.beyond(part, status):
            what = it.data if part == "data" else it.metadata
            raise Unavailable(
                f"{what} has not grown beyond what pool {it.name} uses; make it larger first, then `runvol pool extend"
                f"{' --metadata' if part == 'metadata' else ''}`"
            )
        if it.kind == "device" and not it.metadata:
            self._split(it.data)
        elif part == "data":
            self.mark()

    def others(self, *ours: str) -> list[str]:
        """Loop devices on the pool's files besides these, as somebody may have made them to look inside."""
        it = self.description
        found = [one for path in (it.metadata, it.data) for one in loops.find(path)] if it.kind == "loop" else []
        return [one for one in found if one not in ours]

    def detach(self, deadline: Deadline) -> None:
        """Let go of what `attach` bound; logical volumes stay active."""
        it = self.description
        if it.kind == "loop":
            for path in (it.metadata, it.data):
                for device in loops.find(path):
                    loops.detach(device, path, deadline)
        elif it.kind == "device" and not it.metadata:
            for part in ("meta", "data"):
                with contextlib.suppress(MapperError):
                    self._mapper.remove(f"{it.name}-{part}")


def _loop(path: str, deadline: Deadline) -> str:
    if not os.path.isfile(path):
        raise Unavailable(_ABSENT.format(path))
    return loops.whole(path, writable=True) or loops.attach(path, deadline=deadline)


def _grow(path: str, more: int) -> None:
    """Never less than it is: what counts is its length while nobody else changes it. A file is longer or as it was."""
    with ioctls.opened(path, os.O_RDWR) as fd:
        facts = os.fstatvfs(fd)
        if facts.f_bavail * facts.f_frsize < more:
            raise Unavailable(f"{path} cannot grow by {more} bytes: its filesystem has no room for that")
        os.ftruncate(fd, os.fstat(fd).st_size + more)
        os.fsync(fd)


def format_metadata(path: str) -> None:
    """Make the metadata device one that the kernel formats at the first load: 4 KiB of zeros, past the page cache.

    A cached write could be written back over the superblock that the kernel has made meanwhile.
    """
    with ioctls.opened(path, os.O_RDWR | os.O_EXCL) as fd:
        os.pwrite(fd, bytes(METADATA_BLOCK), 0)
        os.fsync(fd)


def keeper_page(name: str, identity: str) -> bytes:
    """The first page of the pool's keeper; it tells whose pool that is."""
    return f"runvol keeper\nidentity {identity}\npool {name}\n".encode().ljust(MARK, b"\0")


def keeper_of(page: bytes) -> str:
    """The identity that the first page of a keeper tells; empty for anybody else's."""
    found = _KEEPER.match(page)
    return found[1].decode() if found else ""


def pool_of(page: bytes) -> tuple[str, str]:
    """Name and identity of the pool that a keeper's page or a device's mark tells of; each empty where it does not."""
    if found := _MARKED.match(page):
        return found[1].decode(), found[2].decode()
    found = _KEEPER.match(page)
    return ((found[2] or b"").decode(), found[1].decode()) if found else ("", "")


def read_mark(device: str) -> tuple[str, str]:
    """Name and identity of the pool whose mark is at the end of this device; empty without one."""
    return pool_of(_read_mark(device, ioctls.size_bytes(device)))


def _read_mark(device: str, end: int) -> bytes:
    with ioctls.opened(device) as fd:
        return os.pread(fd, MARK, max(0, end - MARK))


def pool_table(metadata: str, data: str, block: int, size: int, *, queue: bool = True) -> ThinPool:
    """The pool over `size` bytes of the data device. Blocks are zeroed: a guest must never see another's data."""
    sectors = block // SECTOR
    blocks = size // block
    return ThinPool(
        length=blocks * sectors,
        metadata=metadata,
        data=data,
        block=sectors,
        low_water=max(1, blocks // 10),
        features=() if queue else ("error_if_no_space",),
    )
