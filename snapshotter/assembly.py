"""Making, assembling, checking and extending a pool; the one module that changes pools as a whole."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator

from blockdev import Deadline, durable, ioctls, loops
from blockdev.commands import run
from blockdev.devicemapper import Device, Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, PoolStatus
from blockdev.errors import BlockdevError, CommandFailed
from snapshotter import backing, making
from snapshotter.backing import Backing, Description
from snapshotter.errors import PoolRefused, SnapshotterError, Unavailable
from snapshotter.making import Wish
from snapshotter.pool import KEEPER, Limits, Pool, numbers
from snapshotter.store import STORE, Store

log = logging.getLogger("runvol.snapshotter")

UUID = "RUNVOL-POOL-"
_NO_POOL = "no pool is described in {}; make one with `runvol pool init`"


def init(mapper: Mapper, state_dir: str, wish: Wish, deadline: Deadline) -> Pool:
    """Make a pool and assemble it. PoolRefused if there is one already, BadRequest for what cannot be a pool.

    Nothing that may be anybody's is written to (`making`). Interrupted, the same call goes on where it stopped.
    """
    making.check(wish)
    existing = backing.load(state_dir)
    if existing is None:
        description = making.describe(wish, deadline)
        _refuse_taken_names(mapper, state_dir, description)
        backing.save(state_dir, description)
    else:
        different = making.difference(existing, wish, state_dir)
        # Without its mark a pool may be made all the same, and then nobody is told to remove what describes it.
        if os.path.exists(_made(state_dir)) or (different and _seems_made(mapper, state_dir, existing, deadline)):
            raise PoolRefused(
                f"{state_dir} already has pool {existing.name} (on {existing.data}); `runvol pool status`"
            )
        if different:
            raise PoolRefused(different)
        _refuse_taken_names(mapper, state_dir, existing)
        description = existing
    return _make(mapper, Backing(mapper, state_dir, description), wish, deadline, fresh=existing is None)


def _refuse_taken_names(mapper: Mapper, state_dir: str, description: Description) -> None:
    """Before anything is written: a mapped device of the name is somebody else's."""
    _found(mapper, description)
    Backing(mapper, state_dir, description).refuse_taken_names()


def _make(mapper: Mapper, below: Backing, wish: Wish, deadline: Deadline, *, fresh: bool) -> Pool:
    state_dir, maker = below.state_dir, making.Maker(below, wish, deadline)
    if _found(mapper, below.description) is None:
        try:
            maker.make(fresh=fresh)
        except BaseException:
            if fresh and not maker.begun:
                # Nothing stands yet, so the next call may ask for something else.
                os.unlink(os.path.join(state_dir, backing.FILE))
            raise
        if not below.description.data_bytes:
            below.mark()
    pool = _assemble(mapper, below, deadline, check=False)
    status = pool.status()
    if status.transaction == 0 or fresh:
        if status.data_used or (fresh and status.transaction):
            disassemble(mapper, pool, below, deadline)
            raise PoolRefused(
                f"the metadata of pool {pool.name} on {pool.metadata} is not what `runvol pool init` makes: it has "
                f"{status.data_used} blocks of data. If nobody needs it, clear it (`wipefs --all`, and its first 4 KiB)"
            )
        # The identity of the pool itself: a number that no other pool has.
        pool.set_transaction(0, int.from_bytes(os.urandom(5), "big") << 16 | 1)
    _write_made(below)
    return pool


def _made(state_dir: str) -> str:
    return os.path.join(state_dir, "pool.made")


def _write_made(below: Backing) -> None:
    durable.replace(_made(below.state_dir), f"{below.description.identity}\n".encode())


def _is_made(mapper: Mapper, below: Backing, deadline: Deadline) -> bool:
    """Whether the pool's making ended. A mark that is lost is written again: the pool itself tells."""
    if os.path.exists(_made(below.state_dir)):
        return True
    it = below.description
    mapped = _found(mapper, it) is not None
    if not (mapper.pool_status(it.name).transaction if mapped else making.transaction(below, deadline)):
        return False
    log.warning("the mark of a pool that was made is lost; it is written again", extra={"pool": it.name})
    _write_made(below)
    return True


def _seems_made(mapper: Mapper, state_dir: str, description: Description, deadline: Deadline) -> bool:
    """`_is_made`; not if what it stands on is absent."""
    with contextlib.suppress(Unavailable, CommandFailed):
        return _is_made(mapper, Backing(mapper, state_dir, description), deadline)
    return False


def assemble(mapper: Mapper, state_dir: str, deadline: Deadline, limits: Limits | None = None) -> tuple[Pool, Backing]:
    """The described pool, assembled if it is not yet; after a reboot its metadata is checked before use.

    Unavailable if something below it is absent or damaged, PoolRefused if none is described.
    """
    description = backing.load(state_dir)
    if description is None:
        raise PoolRefused(_NO_POOL.format(state_dir))
    below = Backing(mapper, state_dir, description)
    if not _is_made(mapper, below, deadline):
        raise PoolRefused(
            f"the making of pool {description.name}, described in {state_dir}/{backing.FILE}, did not end: repeat "
            "`runvol pool init` with the arguments that it had, or remove the file"
        )
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
        _prove_free(it, metadata, data)
        if check:
            check_metadata(it.name, metadata, deadline)
        try:
            mapper.create(it.name, UUID + it.identity)
        except MapperError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Unavailable(f"another process is assembling pool {it.name} just now; try again") from None
        try:
            mapper.load(it.name, [below.table(metadata, data)])
        except MapperError as error:
            mapper.remove(it.name)
            raise Unavailable(f"{error}, on {metadata} and {data}; the kernel's log has the reason") from None
        mapper.resume(it.name)
    elif found.suspended:
        mapper.resume(it.name)
    return Pool(mapper, it.name, it.identity, metadata, limits)


def _prove_free(it: Description, metadata: str, data: str) -> None:
    """Unavailable where anybody has one of the devices: what is mapped over it, mounted from it or swapped to.

    Let go of at once, as the kernel takes them for the table: who came first is decided by the pool's name then.
    """
    for device in (metadata, data):
        try:
            os.close(os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Unavailable(
                f"{device}, on which pool {it.name} stands, is in use by somebody else: it is mounted, or another "
                "device is mapped over it; end that first"
            ) from None


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
    for device in (*pool.active(), KEEPER):
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
    for device in (*pool.active(), KEEPER):
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
            found = numbers(run("thin_ls", "--no-headers", "-o", "DEV", sound, deadline=deadline)[1])
        missing = _missing(state_dir, set(found))
        _copy(rebuilt, metadata)
    finally:
        os.unlink(rebuilt)
    return f"the metadata was rebuilt from what could be read{missing}; the damaged one is kept as {kept}"


def _missing(state_dir: str, found: set[int]) -> str:
    """What a rebuilt pool lacks of the snapshots' devices. PoolRefused if it has none of them: thin_repair calls that a
    success too, and the damaged metadata may still tell somebody more."""
    path = os.path.join(state_dir, STORE)
    if not os.path.exists(path):
        return ""
    store = Store(path)
    try:
        known = store.fulfilled()
    finally:
        store.close()
    if known and not known & found:
        raise PoolRefused(
            f"thin_repair found none of the {len(known)} devices that the store {path} knows; the pool is left as it is"
        )
    return f" ({len(known - found)} of {len(known)} devices could not be)" if known - found else ""


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
        """Extend what has passed its threshold, each part whatever becomes of the other; what was done, as sentences.

        Unavailable with what could not be extended, once all was tried.
        """
        status = self._pool.status()
        done: list[str] = []
        limits = self._pool.limits
        if status.mode in ("fail", "error") or not limits.extend_by:
            return done
        block, failed = self._below.description.block, []
        for part, used, total, unit in (
            ("metadata", status.metadata_used, status.metadata_total, backing.METADATA_BLOCK),
            ("data", status.data_used, status.data_total, block),
        ):
            if used * 100 >= total * limits.extend_above:
                more = max(unit, -(-total * unit * limits.extend_by // 100 // block) * block)
                try:
                    after = self.extend(part, more, deadline)
                except (SnapshotterError, BlockdevError, OSError) as error:
                    failed.append(f"the {part}: {error}")
                    continue
                done.append(f"extended the {part} of pool {self._pool.name} by {more} bytes (now {after.mode})")
                log.warning("pool", extra={"extended": done[-1]})
        if failed:
            raise Unavailable("; ".join(failed))
        return done


__all__ = ["SECTOR", "Extender", "Wish", "assemble", "check_metadata", "disassemble", "init", "node", "repair"]
