"""Making, assembling and repairing a pool: what brings it into the kernel and takes it out again."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence

from blockdev import Deadline, durable, ioctls, loops
from blockdev.commands import run
from blockdev.devicemapper import Device, Mapper, MapperError, node
from blockdev.dm_targets import SECTOR
from blockdev.errors import CommandFailed
from snapshotter import backing, making, turns
from snapshotter.backing import Backing, Description
from snapshotter.errors import PoolRefused, Unavailable
from snapshotter.extending import Extender
from snapshotter.making import Wish
from snapshotter.metadata import KEEPER, numbers
from snapshotter.pool import Limits, Pool
from snapshotter.store import STORE, Store

log = logging.getLogger("runvol.snapshotter")

UUID = "RUNVOL-POOL-"
NO_POOL = "no pool is described in {}; make one with `runvol pool init`"


def init(mapper: Mapper, state_dir: str, wish: Wish, deadline: Deadline) -> Pool:
    """Make a pool and assemble it. PoolRefused if there is one already, BadRequest for what cannot be a pool.

    Nothing that may be anybody's is written to (`making`). Interrupted, the same call goes on where it stopped.
    """
    making.check(wish)
    existing = backing.load(state_dir)
    if existing is not None and os.path.exists(_made(state_dir)):
        raise already(state_dir, existing)
    with turns.whole(state_dir):
        return _init(mapper, state_dir, wish, deadline)


def already(state_dir: str, it: Description) -> PoolRefused:
    return PoolRefused(f"{state_dir} already has pool {it.name} (on {it.data}); `runvol pool status`")


def _init(mapper: Mapper, state_dir: str, wish: Wish, deadline: Deadline) -> Pool:
    existing = backing.load(state_dir)
    if existing is None:
        description = making.describe(wish, deadline)
        _refuse_taken_names(mapper, state_dir, description)
        making.wipe(wish, description, deadline)
        backing.save(state_dir, description)
    else:
        if is_adopted_half(state_dir, existing):
            raise PoolRefused(
                f"the adoption of pool {existing.name}, described in {state_dir}/{backing.FILE}, did not end: repeat "
                "`runvol pool adopt` with the arguments that it had"
            )
        different = making.difference(existing, wish, state_dir)
        # Without its mark a pool may be made all the same, and then nobody is told to remove what describes it.
        if os.path.exists(_made(state_dir)) or (different and _seems_made(mapper, state_dir, existing, deadline)):
            raise already(state_dir, existing)
        if different:
            raise PoolRefused(different)
        _refuse_taken_names(mapper, state_dir, existing)
        description = existing
    return _make(mapper, Backing(mapper, state_dir, description), wish, deadline, fresh=existing is None)


def _refuse_taken_names(mapper: Mapper, state_dir: str, description: Description) -> None:
    """Before anything is written: a mapped device of the name is somebody else's."""
    find_mapped(mapper, description)
    Backing(mapper, state_dir, description).refuse_taken_names()


def _make(mapper: Mapper, below: Backing, wish: Wish, deadline: Deadline, *, fresh: bool) -> Pool:
    state_dir, maker = below.state_dir, making.Maker(below, wish, deadline)
    if find_mapped(mapper, below.description) is None:
        try:
            maker.make(fresh=fresh)
        except BaseException:
            if fresh and not maker.begun:
                # Nothing stands yet, so the next call may ask for something else.
                os.unlink(os.path.join(state_dir, backing.FILE))
            raise
        if not below.description.data_bytes:
            below.mark(exclusive=True)
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


def _adopting(state_dir: str) -> str:
    return os.path.join(state_dir, "pool.adopting")


def is_adopted_half(state_dir: str, it: Description) -> bool:
    """Whether the adoption of this pool was begun here and did not end."""
    try:
        return durable.read(_adopting(state_dir)) == f"{it.identity}\n".encode()
    except FileNotFoundError:
        return False


def begin_adoption(state_dir: str, it: Description) -> None:
    """The pool is described, and not used until `end_adoption`."""
    durable.replace(_adopting(state_dir), f"{it.identity}\n".encode())
    backing.save(state_dir, it)


def end_adoption(below: Backing) -> None:
    """The pool counts as made from now on."""
    _write_made(below)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_adopting(below.state_dir))
    durable.sync_directory(below.state_dir)


def _made(state_dir: str) -> str:
    return os.path.join(state_dir, "pool.made")


def _write_made(below: Backing) -> None:
    durable.replace(_made(below.state_dir), f"{below.description.identity}\n".encode())


def _is_made(mapper: Mapper, below: Backing, deadline: Deadline) -> bool:
    """Whether the pool's making ended. A mark that is lost is written again: the pool itself tells."""
    if os.path.exists(_made(below.state_dir)):
        return True
    if is_adopted_half(below.state_dir, below.description):
        return False
    it = below.description
    mapped = find_mapped(mapper, it) is not None
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
        raise PoolRefused(NO_POOL.format(state_dir))
    below = Backing(mapper, state_dir, description)
    if not _is_made(mapper, below, deadline):
        half = is_adopted_half(state_dir, description)
        raise PoolRefused(
            f"the {'adoption' if half else 'making'} of pool {description.name}, described in {state_dir}/"
            f"{backing.FILE}, did not end: repeat `runvol pool {'adopt' if half else 'init'}` with the arguments that "
            "it had, or remove the file"
        )
    return _assemble(mapper, below, deadline, check=True, limits=limits), below


def unfinished(state_dir: str, it: Description) -> tuple[str, str] | None:
    """What was begun with the pool and has to be ended before it is assembled, and the command that does; None for
    nothing."""
    if is_adopted_half(state_dir, it):
        return "its adoption", "`runvol pool adopt` with the arguments that it had"
    if os.path.exists(_replacing(state_dir)):
        return "its repair", "`runvol pool check --repair`"
    return None


def find_mapped(mapper: Mapper, it: Description) -> Device | None:
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
    found = find_mapped(mapper, it)
    if found is None and os.path.exists(_replacing(below.state_dir)):
        raise Unavailable(f"the repair of pool {it.name} did not end: repeat `runvol pool check --repair`")
    metadata, data = below.attach(deadline)
    if found is None:
        _prove_free(it, metadata, data, below.others(metadata, data))
        if check:
            check_metadata(it.name, metadata, deadline)
        map_pool(mapper, below, metadata, data)
    elif found.suspended:
        _resume(mapper, it.name, metadata, data)
    pool = Pool(mapper, it.name, it.identity, metadata, limits)
    pool.remedies = backing.remedies(it)
    return pool


def map_pool(mapper: Mapper, below: Backing, metadata: str, data: str) -> None:
    """Map the pool over its devices. Unavailable where it cannot be, or another process does so just now."""
    it = below.description
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
    _resume(mapper, it.name, metadata, data)


def _resume(mapper: Mapper, name: str, metadata: str, data: str) -> None:
    """Let the pool go on. One that cannot, as its devices are not what its metadata say, is unmapped: it would keep
    them from whoever puts them right. Unavailable."""
    try:
        mapper.resume(name)
    except MapperError as error:
        with contextlib.suppress(MapperError):
            mapper.remove(name)
        raise Unavailable(
            f"{error}, on {metadata} and {data}: one of them is smaller than the pool says, or cannot be read; the "
            "kernel's log has the reason"
        ) from None


def _prove_free(it: Description, metadata: str, data: str, others: Sequence[str]) -> None:
    """Unavailable where anybody has one of the devices: what is mapped over it, mounted from it or swapped to.

    Let go of at once, as the kernel takes them for the table: who came first is decided by the pool's name then.
    """
    for device in (metadata, data, *others):
        flags = os.O_RDONLY if device in others else os.O_RDWR
        with _alone_on(device, f", on which pool {it.name} stands,", flags):
            pass


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
    """Bring a pool back that needs a check: clear the mark, or rebuild the metadata. What was done, as a sentence.

    PoolRefused beside a server or another command. May be interrupted and repeated.
    """
    description = backing.load(state_dir)
    if description is None:
        raise PoolRefused(NO_POOL.format(state_dir))
    with turns.whole(state_dir, description.identity):
        below = Backing(mapper, state_dir, description)
        metadata, data = below.attach(deadline)
        pool = Pool(mapper, description.name, description.identity, metadata)
        _unmap(mapper, pool)
        # Without its data the pool is mapped by nobody; the tools want the metadata for themselves.
        with _alone_on(data):
            done = _repair(state_dir, metadata, deadline)
        assemble(mapper, state_dir, deadline)
    return f"pool {pool.name}: {done}. Check the filesystems of the snapshots that were in use"


def _repair(state_dir: str, metadata: str, deadline: Deadline) -> str:
    if os.path.exists(_replacing(state_dir)):
        _replace(state_dir, metadata)
        return "the metadata was rebuilt from what could be read, by a repair that had not ended"
    try:
        run("thin_check", "-q", "--clear-needs-check-flag", metadata, deadline=deadline)
    except CommandFailed:
        return _rebuild(state_dir, metadata, deadline)
    return "the metadata is sound; the mark was cleared"


def _unmap(mapper: Mapper, pool: Pool) -> None:
    """Unmap the pool and what is on it; the keeper first, which nobody may have open. Unavailable, PoolRefused."""
    if not pool.deactivate(KEEPER):
        raise PoolRefused(
            f"another process serves or changes pool {pool.name} (it has {pool.path(KEEPER)} open); stop that first"
        )
    for device in pool.active():
        if not pool.deactivate(device):
            raise Unavailable(f"device {pool.path(device)} is open: {pool.holders(device)}; stop that first")
    if mapper.find(pool.name) is not None:
        mapper.remove(pool.name)


@contextlib.contextmanager
def _alone_on(device: str, which: str = "", flags: int = os.O_RDWR) -> Iterator[None]:
    """Nobody maps the device, mounts it or writes to it alone inside; Unavailable where somebody does."""
    try:
        fd = os.open(device, flags | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise Unavailable(
            f"{device}{which} is in use by somebody else: it is mounted, or another device is mapped over it; end that "
            "first"
        ) from None
    try:
        yield
    finally:
        os.close(fd)


def _replacing(state_dir: str) -> str:
    """Rebuilt metadata, whole, that are being put in the place of the damaged ones."""
    return os.path.join(state_dir, "metadata.replacing")


def _rebuild(state_dir: str, metadata: str, deadline: Deadline) -> str:
    """The device is written only once thin_repair has ended well; CommandFailed, and nothing is changed, otherwise."""
    kept = os.path.join(state_dir, f"metadata-{time.strftime('%Y%m%dT%H%M%S')}.bin")
    rebuilt = os.path.join(state_dir, "metadata.rebuilt")
    _copy(metadata, kept)
    try:
        with open(rebuilt, "wb") as opened:
            opened.truncate(os.path.getsize(kept))
        with _as_device(kept, deadline) as damaged, _as_device(rebuilt, deadline) as sound:
            run("thin_repair", "-i", damaged, "-o", sound, deadline=deadline)
            found = numbers(run("thin_ls", "--no-headers", "-o", "DEV", sound, deadline=deadline)[1])
        missing = _missing(state_dir, set(found))
        os.rename(rebuilt, _replacing(state_dir))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(rebuilt)
        raise
    durable.sync_directory(state_dir)
    _replace(state_dir, metadata)
    return f"the metadata was rebuilt from what could be read{missing}; the damaged one is kept as {kept}"


def _replace(state_dir: str, metadata: str) -> None:
    with _alone_on(metadata):
        _copy(_replacing(state_dir), metadata)
    os.unlink(_replacing(state_dir))
    durable.sync_directory(state_dir)


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
            os.lseek(write, at, os.SEEK_SET)
            durable.write_all(write, os.pread(read, min(1 << 20, size - at), at))
        os.fsync(write)


__all__ = [
    "SECTOR", "Extender", "Wish", "already", "assemble", "begin_adoption", "check_metadata", "disassemble",
    "end_adoption", "find_mapped", "init", "is_adopted_half", "map_pool", "node", "repair",
    "unfinished",
]  # fmt: skip
