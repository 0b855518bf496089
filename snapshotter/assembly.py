"""Making, assembling, checking and extending a pool; the one module that changes pools as a whole."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev import Deadline, blankness, durable, ioctls, loops
from blockdev.commands import run
from blockdev.devicemapper import Device, Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, PoolStatus
from blockdev.errors import CommandFailed
from snapshotter import backing
from snapshotter.backing import Backing, Description
from snapshotter.errors import BadRequest, PoolRefused, Unavailable
from snapshotter.pool import Limits, Pool
from snapshotter.store import Store

UUID = "RUNVOL-POOL-"
_SMALLEST_DATA = 64 << 20
_NO_POOL = "no pool is described in {}; make one with `runvol pool init`"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What `runvol pool init` was asked for. One of `device`, `group` and `directory`; sizes in bytes.

    `metadata_device` goes with `device`: the pool then lies on both as they are, without a mapping in between.
    """

    name: str
    device: str = ""
    metadata_device: str = ""
    group: str = ""
    directory: str = ""
    size: int = 0
    metadata_size: int = 0
    block: int = 64 << 10


def init(mapper: Mapper, state_dir: str, wish: Wish, deadline: Deadline) -> Pool:
    """Make a pool and assemble it. PoolRefused if there is one already, BadRequest for what cannot be a pool.

    A device must be provably blank. Interrupted, the same call goes on where it stopped.
    """
    backing.check_name(wish.name)
    backing.check_block(wish.block)
    if sum(map(bool, (wish.device, wish.group, wish.directory))) != 1:
        raise BadRequest("--device, --vg, --loop", "", "takes exactly one of them")
    existing = backing.load(state_dir)
    if existing is not None and os.path.exists(_made(state_dir)):
        raise PoolRefused(f"{state_dir} already has pool {existing.name} (on {existing.data}); `runvol pool status`")
    description = existing or _describe(wish, deadline)
    if existing is None:
        backing.save(state_dir, description)
    _make_backing(description, wish, deadline)
    below = Backing(mapper, state_dir, description)
    if not description.data_bytes:
        below.mark()
    metadata, _data = below.attach(deadline)
    if _found(mapper, description) is None:
        backing.format_metadata(metadata)
    pool = _assemble(mapper, below, deadline, check=False)
    if pool.status().transaction == 0:
        # The identity of the pool itself: a number that no other pool has.
        pool.set_transaction(0, int.from_bytes(os.urandom(5), "big") << 16 | 1)
    durable.replace(_made(state_dir), f"{description.identity}\n".encode())
    return pool


def _made(state_dir: str) -> str:
    return os.path.join(state_dir, "pool.made")


def _describe(wish: Wish, deadline: Deadline) -> Description:
    identity = backing.new_identity()
    if wish.device:
        return _describe_devices(wish, identity, deadline)
    if wish.metadata_device:
        raise BadRequest("--metadata-device", wish.metadata_device, "goes with --device only")
    if wish.size < _SMALLEST_DATA:
        raise BadRequest("--size", wish.size, "a pool has at least 64 MiB")
    metadata = wish.metadata_size or backing.metadata_size(wish.size, wish.block)
    if metadata < backing.SMALLEST_METADATA:
        raise BadRequest("--metadata-size", metadata, "the kernel wants at least 2 MiB")
    if wish.group:
        return Description(name=wish.name, identity=identity, kind="lvm", group=wish.group, data=f"{wish.name}_data",
                           metadata=f"{wish.name}_meta", metadata_bytes=metadata, block=wish.block)  # fmt: skip
    directory = os.path.abspath(wish.directory)
    data, tables = (os.path.join(directory, f"{wish.name}.{part}") for part in ("data", "metadata"))
    return Description(name=wish.name, identity=identity, kind="loop", data=data, metadata=tables,
                       metadata_bytes=metadata, block=wish.block)  # fmt: skip


def _describe_devices(wish: Wish, identity: str, deadline: Deadline) -> Description:
    """Names stay as they were given: `/dev/disk/by-id/…` is the same disk after a reboot, `/dev/sdb` may not be."""
    size = _blank("--device", wish.device, deadline)
    metadata = wish.metadata_size or backing.metadata_size(size, wish.block)
    if wish.metadata_device:
        if wish.metadata_size:
            raise BadRequest("--metadata-size", wish.metadata_size, "the metadata takes all of --metadata-device")
        metadata = _blank("--metadata-device", wish.metadata_device, deadline)
        if metadata < backing.SMALLEST_METADATA:
            raise BadRequest("--metadata-device", wish.metadata_device, f"has {metadata} bytes; the kernel wants 2 MiB")
        if os.stat(wish.metadata_device).st_rdev == os.stat(wish.device).st_rdev:
            raise BadRequest("--metadata-device", wish.metadata_device, "is the device of the data")
    needed = _SMALLEST_DATA + (0 if wish.metadata_device else metadata)
    if size < needed:
        raise BadRequest("--device", wish.device, f"has {size} bytes; {needed} are needed")
    return Description(name=wish.name, identity=identity, kind="device", data=os.path.abspath(wish.device),
                       metadata=os.path.abspath(wish.metadata_device) if wish.metadata_device else "",
                       metadata_bytes=metadata, block=wish.block)  # fmt: skip


def _blank(field: str, device: str, deadline: Deadline) -> int:
    """The size of a block device that has nothing on it."""
    if not ioctls.is_block(device):
        raise BadRequest(field, device, "is no block device")
    blankness.prove_blank(device, deadline)
    return ioctls.size_bytes(device)


def _make_backing(description: Description, wish: Wish, deadline: Deadline) -> None:
    if description.kind == "loop":
        os.makedirs(os.path.dirname(description.data), mode=0o700, exist_ok=True)
        for path, size in ((description.data, wish.size), (description.metadata, description.metadata_bytes)):
            with open(path, "ab") as opened:
                os.fchmod(opened.fileno(), 0o600)
                if os.fstat(opened.fileno()).st_size == 0:
                    opened.truncate(size)
    elif description.kind == "lvm":
        for volume, size in ((description.metadata, description.metadata_bytes), (description.data, wish.size)):
            try:
                run("lvs", "--noheadings", f"{description.group}/{volume}", deadline=deadline)
            except CommandFailed:
                run("lvcreate", "-Wn", "-Zn", "-an", "-n", volume, "-L", f"{size}b", description.group,
                    deadline=deadline)  # fmt: skip


def assemble(mapper: Mapper, state_dir: str, deadline: Deadline, limits: Limits | None = None) -> tuple[Pool, Backing]:
    """The described pool, assembled if it is not yet; after a reboot its metadata is checked before use.

    Unavailable if something below it is absent or damaged, PoolRefused if none is described.
    """
    description = backing.load(state_dir)
    if description is None or not os.path.exists(_made(state_dir)):
        raise PoolRefused(_NO_POOL.format(state_dir))
    below = Backing(mapper, state_dir, description)
    return _assemble(mapper, below, deadline, check=True, limits=limits), below


def _found(mapper: Mapper, it: Description) -> Device | None:
    """The mapped pool. One that a killed process left without a live table is removed, as it holds the metadata.

    PoolRefused if the name is somebody else's.
    """
    found = mapper.find(it.name)
    if found is None:
        return None
    if found.uuid != UUID + it.identity:
        raise PoolRefused(
            f"a mapped device {it.name} exists that is not this pool (its UUID is {found.uuid or 'empty'}); rename "
            "it, or describe this pool under another name"
        )
    if found.active:
        return found
    mapper.remove(it.name)
    return None


def _assemble(
    mapper: Mapper, below: Backing, deadline: Deadline, *, check: bool, limits: Limits | None = None
) -> Pool:  # fmt: skip
    it = below.description
    found = _found(mapper, it)
    metadata, data = below.attach(deadline)
    if found is None:
        if check:
            check_metadata(it.name, metadata, deadline)
        mapper.create(it.name, UUID + it.identity)
        try:
            mapper.load(it.name, [below.table(metadata, data)])
        except MapperError as error:
            mapper.remove(it.name)
            raise Unavailable(f"{error}, on {metadata} and {data}; the kernel's log has the reason") from None
        mapper.resume(it.name)
    elif found.suspended:
        mapper.resume(it.name)
    return Pool(mapper, it.name, it.identity, metadata, limits)


def check_metadata(name: str, metadata: str, deadline: Deadline) -> None:
    """thin_check, as far as a start can wait for it: the structures, not every mapping."""
    try:
        run("thin_check", "-q", "--skip-mappings", metadata, deadline=deadline)
    except CommandFailed as error:
        raise Unavailable(
            f"the metadata of pool {name} is damaged ({error.output.strip() or f'status {error.code}'}); "
            "`runvol pool check --repair`, then check the filesystems on it"
        ) from None


def disassemble(mapper: Mapper, pool: Pool, below: Backing, deadline: Deadline) -> None:
    """Unmap the pool and everything of ours on it; DeviceBusy-like Unavailable while something is open."""
    for device in pool.active():
        if not pool.deactivate(device):
            raise Unavailable(f"device {pool.path(device)} is open: {pool.holders(device)}")
    if mapper.find(pool.name) is not None:
        mapper.remove(pool.name)
    below.detach(deadline)


def repair(mapper: Mapper, state_dir: str, deadline: Deadline) -> str:
    """Bring a pool back that needs a check: clear the mark, or rebuild the metadata. What was done, as a sentence."""
    description = backing.load(state_dir)
    if description is None:
        raise PoolRefused(_NO_POOL.format(state_dir))
    below = Backing(mapper, state_dir, description)
    metadata, _ = below.attach(deadline)
    pool = Pool(mapper, description.name, description.identity, metadata)
    for device in pool.active():
        if not pool.deactivate(device):
            raise Unavailable(f"device {pool.path(device)} is open: {pool.holders(device)}; stop that first")
    if mapper.find(pool.name) is not None:
        mapper.remove(pool.name)
    try:
        run("thin_check", "-q", "--clear-needs-check-flag", metadata, deadline=deadline)
        done = "the metadata is sound; the mark was cleared"
    except CommandFailed:
        done = _rebuild(state_dir, metadata, deadline)
    assemble(mapper, state_dir, deadline)
    return f"pool {pool.name}: {done}. Check the filesystems of the snapshots that were in use"


def _rebuild(state_dir: str, metadata: str, deadline: Deadline) -> str:
    """The device is written only once thin_repair has ended well; CommandFailed, and nothing is changed, otherwise."""
    kept = os.path.join(state_dir, f"metadata-{time.strftime('%Y%m%dT%H%M%S')}.bin")
    rebuilt = f"{kept}.rebuilt"
    _copy(metadata, kept)
    try:
        with open(rebuilt, "wb") as opened:
            opened.truncate(os.path.getsize(kept))
        with _as_device(kept, deadline) as damaged, _as_device(rebuilt, deadline) as sound:
            run("thin_repair", "-i", damaged, "-o", sound, deadline=deadline)
        _copy(rebuilt, metadata)
    finally:
        os.unlink(rebuilt)
    return f"the metadata was rebuilt from what could be read; the damaged one is kept as {kept}"


@contextlib.contextmanager
def _as_device(path: str, deadline: Deadline) -> Iterator[str]:
    """The file as a loop device: the tools open what they work on with O_DIRECT, which not every filesystem takes."""
    device, keeper = loops.open_private(path, deadline=deadline)
    try:
        yield device
        os.fsync(keeper)
    finally:
        os.close(keeper)


def _copy(source: str, target: str) -> None:
    size = ioctls.size_bytes(source)
    with ioctls.opened(source) as read, ioctls.opened(target, os.O_RDWR | os.O_CREAT) as write:
        for at in range(0, size, 1 << 20):
            os.pwrite(write, os.pread(read, min(1 << 20, size - at), at), at)
        os.fsync(write)


class Extender:
    """Makes the pool larger; one extension at a time."""

    def __init__(self, mapper: Mapper, pool: Pool, below: Backing) -> None:
        self._mapper, self._pool, self._below = mapper, pool, below
        self._lock = threading.Lock()

    def extend(self, part: str, more: int, deadline: Deadline) -> PoolStatus:
        """`more` bytes for `part` (data or metadata); the status afterwards."""
        with self._lock:
            self._below.extend(part, more, deadline)
            return self._reload(deadline)

    def _reload(self, deadline: Deadline) -> PoolStatus:
        it = self._below.description
        metadata, data = self._below.attach(deadline)
        table = self._below.table(metadata, data)
        self._mapper.load(it.name, [table])
        try:
            self._mapper.suspend(it.name)
            self._mapper.resume(it.name)
        except MapperError:
            # A resume that failed leaves every device of the pool hanging: back to the table as it was.
            self._mapper.clear(it.name)
            self._mapper.resume(it.name)
            raise
        return self._pool.status()

    def as_needed(self, deadline: Deadline) -> list[str]:
        """Extend what has passed its threshold; what was done, as sentences."""
        status = self._pool.status()
        done: list[str] = []
        limits = self._pool.limits
        if status.mode in ("fail", "error") or not limits.extend_by:
            return done
        block = self._below.description.block
        for part, used, total, unit in (
            ("data", status.data_used, status.data_total, block),
            ("metadata", status.metadata_used, status.metadata_total, backing.METADATA_BLOCK),
        ):
            if used * 100 >= total * limits.extend_above:
                more = max(unit, -(-total * unit * limits.extend_by // 100 // block) * block)
                after = self.extend(part, more, deadline)
                done.append(f"extended the {part} of pool {self._pool.name} by {more} bytes (now {after.mode})")
        return done


def bind(pool: Pool, store: Store) -> list[int]:
    """Prove that store and pool belong together, and open a new generation; ids that must not be touched.

    The pool's transaction id is the generation: it starts at a random number and moves by one with each bind, so an
    older copy of the database, or another pool, is recognised. A store without a pool adopts this one; the devices that
    it finds there are somebody's, and are quarantined. PoolRefused where they do not fit.
    """
    status = pool.status()
    known, pending = store.read_fact("generation"), store.read_fact("generation_next")
    foreign: list[int] = []
    if known is None:
        foreign = sorted(pool.ids(Deadline.after(120)) - store.devices())
        with store.transaction():
            store.quarantine(foreign, time.time_ns())
            store.raise_devices(max(foreign, default=0))
            store.set_fact("pool", pool.identity)
            store.set_fact("generation", str(status.transaction))
    elif store.read_fact("pool") != pool.identity or str(status.transaction) not in (known, pending):
        raise PoolRefused(
            f"the store {store.path} belongs to pool {store.read_fact('pool')}, generation {known}, {pool.name} "
            f"is {pool.identity}, generation {status.transaction}. If the store is an old copy, restore the newest; "
            "to go on with this pool and an empty store, move the store away: its devices are then quarantined"
        )
    if status.mode not in ("rw", "out_of_data_space") or status.needs_check:
        return foreign
    following = status.transaction + 1
    with store.transaction():
        store.set_fact("generation_next", str(following))
    pool.set_transaction(status.transaction, following)
    with store.transaction():
        store.set_fact("generation", str(following))
    return foreign


__all__ = ["SECTOR", "Extender", "Wish", "assemble", "bind", "check_metadata", "disassemble", "init", "node", "repair"]
