"""The thin pool: its devices, its messages, its health.

Every message that matters is followed by a look at the pool's status: the kernel throws the result of the commit after
a message away, so a `create_thin` on failing metadata says yes and makes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev import Deadline, flocks, holders
from blockdev.commands import run
from blockdev.devicemapper import Device, Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, PoolStatus, Thin
from snapshotter.errors import PoolFull, SnapshotterError, Unavailable

log = logging.getLogger("runvol.snapshotter")

_BLKROSET, _BLKDISCARD = 0x125D, 0x1277
_DISCARD_STEP = 1 << 30
# Seconds for which a status is good enough to let a snapshot be made.
_FRESH = 0.25
# The id of the device that whoever serves the pool holds; see `keeper`. No snapshot ever has it.
KEEPER = 0
# Of the kernel: what it uses of a metadata device, in blocks of 4 KiB.
LARGEST_METADATA_BLOCKS = 255 << 14
# Mappings in a metadata block, at the least, when they are made here and there.
_MAPPINGS = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When new snapshots are refused, and when the pool is extended. Percent of the whole."""

    data_reserve: int = 3
    extend_above: int = 80
    extend_by: int = 20


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What makes the pool larger: a command that does, or what comes before it."""

    data: str = "`runvol pool extend`"
    metadata: str = "`runvol pool extend --metadata`"


class DeviceMissing(SnapshotterError):
    """The pool has no device of this id."""


class DeviceThere(SnapshotterError):
    """The pool has a device of this id already, which this process has not made."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """One finding about the pool. `state` is ok, warning or broken."""

    state: str
    mode: str
    message: str


class Pool:
    """A pool that is assembled under `name`; `identity` stands in the names of its devices."""

    def __init__(self, mapper: Mapper, name: str, identity: str, metadata: str, limits: Limits | None = None) -> None:
        self.mapper, self.name, self.identity, self.metadata = mapper, name, identity, metadata
        self.limits, self.remedies = limits or Limits(), Remedies()
        self._number = ""
        self._block = 0
        self._seen: tuple[float, PoolStatus] | None = None
        # Devices that nobody can write to who opens them, as long as they are mapped; see `shut`.
        self._shut: set[int] = set()

    # -- devices ----------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """What the names of the pool's devices begin with."""
        return f"runvol-{self.identity[:8]}-"

    def device_name(self, device: int) -> str:
        return f"{self.prefix}{device if device != KEEPER else 'keeper'}"

    def device_of(self, name: str) -> int | None:
        """The thin id in a device's name; None for one that is not of this pool."""
        tail = name.removeprefix(self.prefix)
        return int(tail) if name != tail and tail.isdecimal() else None

    def path(self, device: int) -> str:
        return node(self.device_name(device))

    def find(self, device: int) -> Device | None:
        """The mapped device, if it is there with a live table."""
        found = self.mapper.find(self.device_name(device))
        return found if found is not None and found.active and not found.suspended else None

    def active(self) -> list[int]:
        """Ids of snapshots' devices that are mapped now, whole or not."""
        ids = (self.device_of(entry.name) for entry in self.mapper.devices())
        return [one for one in ids if one is not None]

    def activate(self, device: int, size: int, *, read_only: bool = False, origin: str = "") -> None:
        """Map the device, `size` bytes long, whatever a killed process has left of an earlier try.

        DeviceMissing if the pool has no such id. A longer size than that of a mapped device makes it grow.
        """
        name = self.device_name(device)
        target = Thin(length=size // SECTOR, pool=self._pool_number(), thin_id=device, origin=origin)
        try:
            self.mapper.create(name, self._uuid(device))
            self._shut.discard(device)
        except MapperError as error:
            if error.errno != errno.EBUSY:
                raise
            self._refuse_foreign(name, device)
            if self._is_mapped(name, target):
                return
        try:
            self.mapper.load(name, [target], read_only=read_only)
        except MapperError as error:
            with contextlib.suppress(MapperError):
                self.mapper.remove(name)
            if error.errno in (errno.ENODATA, errno.EINVAL) and self.is_missing(device):
                raise DeviceMissing(f"pool {self.name} has no device {device}") from None
            raise self._explained(error) from error
        self.mapper.resume(name)

    def _refuse_foreign(self, name: str, device: int) -> None:
        found = self.mapper.find(name)
        if found is not None and found.uuid and found.uuid != self._uuid(device):
            raise SnapshotterError(
                f"a mapped device {name} exists that is somebody else's (UUID {found.uuid}); remove it"
            )

    def _uuid(self, device: int) -> str:
        return f"RUNVOL-{self.identity}-{device}"

    def _is_mapped(self, name: str, target: Thin) -> bool:
        found = self.mapper.find(name)
        if found is None or not found.active:
            return False
        if found.suspended:
            self.mapper.resume(name)
        return self._length(name) >= target.length

    def _length(self, name: str) -> int:
        with open(f"/sys/dev/block/{self._checked(name).number}/size") as size:
            return int(size.read())

    def _checked(self, name: str) -> Device:
        found = self.mapper.find(name)
        if found is None:
            raise MapperError("status", name, errno.ENXIO)
        return found

    def is_missing(self, device: int) -> bool:
        """Whether the pool surely has no such id: a snapshot of it cannot be made. Leaves nothing."""
        return device not in self.ids(Deadline.after(30))

    def _pool_number(self) -> str:
        if not self._number:
            self._number = self._checked(self.name).number
        return self._number

    def in_use(self, device: int) -> bool:
        """Whether somebody has the mapped device open."""
        found = self.mapper.find(self.device_name(device))
        return found is not None and found.open_count > 0

    def deactivate(self, device: int) -> bool:
        """Unmap the device if nobody has it open; whether it is unmapped now."""
        name = self.device_name(device)
        found = self.mapper.find(name)
        if found is None:
            return True
        if found.open_count:
            return False
        self._shut.discard(device)
        try:
            self.mapper.remove(name)
        except MapperError as error:
            if error.errno not in (errno.EBUSY, errno.ENXIO):
                raise
            return error.errno == errno.ENXIO
        return True

    def flush(self, device: int) -> None:
        """What was written to the device is on the disk, mappings included; nothing if it is not mapped.

        Hangs where the pool has no room (`writebacks` is for calls).
        """
        try:
            fd = os.open(self.path(device), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # Who has unmapped it has flushed it.
            if self.find(device) is None:
                return
            raise
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def shut(self, device: int) -> bool:
        """Whoever opens the device from now on cannot write to it; whether nobody has it open who could.

        BLKROSET instead of a read-only table: it holds for a write through any descriptor and for each mount that is
        made after it, until the device is unmapped, and needs no suspend. It does not stop a filesystem that is
        mounted for writing, nor a mapped page.
        """
        found = self.mapper.find(self.device_name(device))
        if found is None or not found.active:
            return True
        with self._opened(found) as fd:
            if fd is None:
                return True
            fcntl.ioctl(fd, _BLKROSET, struct.pack("i", 1))
            self._shut.add(device)
            now = self.mapper.find(found.name)
            return now is None or now.open_count <= 1

    def reopen(self, device: int) -> None:
        """Undo `shut` for those who have the device open."""
        self._shut.discard(device)
        found = self.mapper.find(self.device_name(device))
        if found is not None and found.active:
            with self._opened(found) as fd:
                if fd is not None:
                    fcntl.ioctl(fd, _BLKROSET, struct.pack("i", 0))

    @contextlib.contextmanager
    def _opened(self, found: Device) -> Iterator[int | None]:
        """The node of this very device; None if it is unmapped meanwhile."""
        try:
            fd = os.open(node(found.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO):
                raise
            yield None
            return
        try:
            same = os.fstat(fd).st_rdev == os.makedev(found.major, found.minor)
            yield fd if same else None
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def quiet(self, device: int) -> Iterator[None]:
        """Nothing writes to the device inside: it is not mapped; it is shut, and nobody has it open (the last close has
        written all); or it is suspended, its filesystem frozen.

        For one thread a device. A process that is killed inside leaves it suspended; the next start resumes it.
        Unavailable where somebody else has frozen the filesystem.
        """
        # First whether it is shut: who opens it after that cannot write.
        name, shut = self.device_name(device), device in self._shut
        found = self.mapper.find(name)
        if found is None or (shut and not found.open_count):
            yield
            return
        with _unless_gone():
            self._suspend(name)
        try:
            yield
        finally:
            # Its last user may have let go meanwhile, and it was unmapped, or is just now.
            with _unless_gone():
                self.mapper.go_on(name)

    def _suspend(self, name: str) -> None:
        try:
            self.mapper.suspend(name)
        except MapperError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Unavailable(
                f"the filesystem on {node(name)} is frozen by somebody else, so no snapshot of it can be made; thaw it "
                "(fsfreeze -u), and try again"
            ) from None

    def resume_suspended(self) -> list[int]:
        """Let I/O through on devices that a killed process left suspended; which they were."""
        found = []
        for device in self.active():
            one = self.mapper.find(self.device_name(device))
            if one is not None and one.active and one.suspended:
                self.mapper.resume(one.name)
                found.append(device)
        return found

    def holders(self, device: int) -> str:
        """Who has the device open, for a person."""
        found = [*holders.mount_points(self.path(device)), *map(str, holders.processes(self.path(device)))]
        return ", ".join(found) or "nobody that this process can see"

    def is_writable(self, device: int) -> bool:
        """Whether the device is mapped, for writing too; what `shut` refuses is allowed again."""
        self.reopen(device)
        found = self.find(device)
        return found is not None and not found.read_only

    def discard(self, device: int, size: int) -> bool:
        """Give the device's own blocks back, to the disk below too; False if somebody has it open. It must be mapped,
        and mounts of it fail meanwhile."""
        try:
            fd = os.open(self.path(device), os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        try:
            found = self.mapper.find(self.device_name(device))
            if found is not None and found.open_count > 1:
                return False
            for start in range(0, size, _DISCARD_STEP):
                fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", start, min(_DISCARD_STEP, size - start)))
        finally:
            os.close(fd)
        return True

    # -- messages ---------------------------------------------------------------------------------------------------

    def create_thin(self, device: int, *, again: bool = False) -> None:
        """A new, empty device. DeviceThere if the id is taken, unless `again`: an earlier life made it for this row."""
        self._create(f"create_thin {device}", device, again=again)

    def create_snapshot(self, device: int, origin: int, *, again: bool = False) -> None:
        """A snapshot of `origin`, which must be quiet. DeviceMissing without the origin; DeviceThere as above."""
        try:
            self._create(f"create_snap {device} {origin}", device, again=again)
        except MapperError as error:
            if error.errno == errno.ENODATA:
                raise DeviceMissing(f"pool {self.name} has no device {origin}, the origin of {device}") from None
            raise

    def _create(self, message: str, device: int, *, again: bool) -> None:
        """What exists is somebody else's, or another snapshot's: a success would hand out its data."""
        try:
            self._send(message, errno.EEXIST if again else None)
        except MapperError as error:
            if error.errno == errno.EEXIST:
                raise DeviceThere(f"pool {self.name} has a device {device} already that no snapshot has made") from None
            raise
        self._confirm()

    def delete(self, device: int) -> None:
        """Forget the device; one that is not there is no error. MapperError EBUSY while it is mapped."""
        self._send(f"delete {device}", errno.ENODATA)
        self._confirm()

    def set_transaction(self, old: int, new: int) -> None:
        """The pool's generation, compared and swapped."""
        self._send(f"set_transaction_id {old} {new}")
        self._confirm()

    def _send(self, message: str, done: int | None = None) -> None:
        try:
            self.mapper.message(self.name, message)
        except MapperError as error:
            if error.errno == done:
                return
            raise self._explained(error) from error

    def _explained(self, error: MapperError) -> SnapshotterError | MapperError:
        if error.errno in (errno.EOPNOTSUPP, errno.EIO, errno.EINVAL):
            broken = [finding for finding in self.health() if finding.state == "broken"]
            if broken:
                return Unavailable(f"{error}; {broken[0].message}")
        if error.errno == errno.ENXIO:
            return Unavailable(f"pool {self.name} is not there: {error}; `runvol pool status` tells more")
        return error

    def _confirm(self) -> None:
        """Unavailable unless the commit after the last message went through."""
        status = self.status()
        if status.mode in ("fail", "error", "ro") or status.needs_check:
            raise Unavailable(next(finding.message for finding in self.health(status) if finding.state == "broken"))

    # -- health -----------------------------------------------------------------------------------------------------

    def status(self) -> PoolStatus:
        try:
            status = self.mapper.pool_status(self.name)
            self._seen = time.monotonic(), status
            return status
        except MapperError as error:
            if error.errno == errno.ENXIO:
                raise Unavailable(f"pool {self.name} is not assembled; `runvol pool status` tells why") from None
            raise

    def _recent(self) -> PoolStatus:
        """The status as it was a moment ago; each message looks again."""
        seen = self._seen
        return seen[1] if seen is not None and time.monotonic() - seen[0] < _FRESH else self.status()

    def refuse_broken(self) -> PoolStatus:
        """The status a moment ago. PoolFull where the pool has no room, Unavailable where it takes no writes else."""
        status = self._recent()
        if status.mode == "rw" and not status.needs_check:
            return status
        for finding in self.health(status):
            if finding.state == "broken":
                raise (PoolFull if finding.mode in ("out_of_data_space", "out_of_metadata") else Unavailable)(
                    finding.message
                )
        return status

    def admit(self, places: int = 0, each: int = 0) -> None:
        """Return if a new snapshot may be made that writes `each` bytes at so many places at once.

        PoolFull before writes would hang, Unavailable where nothing can be made.
        """
        status = self.refuse_broken()
        if status.data_free * 100 < status.data_total * self.limits.data_reserve:
            raise PoolFull(
                f"pool {self.name} is full: {status.data_free} of {status.data_total} blocks are free, and "
                f"{self.limits.data_reserve}% are kept for what is running. Remove images or containers, or "
                f"{self.remedies.data}"
            )
        if status.metadata_free < metadata_reserve(status):
            raise PoolFull(
                f"the metadata of pool {self.name} is full: {status.metadata_free} of {status.metadata_total} blocks "
                f"are free, and {metadata_reserve(status)} are kept for deletions. What to do: {self.remedies.metadata}"
            )
        if places:
            self._admit_writes(status, places, each)

    def _admit_writes(self, status: PoolStatus, places: int, each: int) -> None:
        """Count what a large filesystem costs before anybody has written to it."""
        blocks = places * max(2, -(-each // self.block_bytes()))
        kept = status.data_total * self.limits.data_reserve // 100
        metadata = blocks // _MAPPINGS + 1
        lacks_data = status.data_free - blocks < kept
        if lacks_data or status.metadata_free - metadata < metadata_reserve(status):
            remedy = self.remedies.data if lacks_data else self.remedies.metadata
            raise PoolFull(
                f"pool {self.name} has no room for a filesystem of this size: its own tables take up to {blocks} data "
                f"and {metadata} metadata blocks, and {max(0, status.data_free - kept)} and "
                f"{max(0, status.metadata_free - metadata_reserve(status))} may be used. Ask for less, or {remedy}"
            )

    def block_bytes(self) -> int:
        """Size of a data block of the pool."""
        if not self._block:
            ((_kind, table),) = self.mapper.lines(self.name, table=True)
            self._block = int(table.split()[2]) * SECTOR
        return self._block

    def data_bytes(self) -> int:
        """What the pool holds, as it was a moment ago."""
        return self._recent().data_total * self.block_bytes()

    def health(self, status: PoolStatus | None = None) -> list[Health]:
        """What is wrong with the pool and what to do; one `ok` if nothing is."""
        status = status or self.status()
        found = []

        def add(state: str, mode: str, message: str) -> None:
            found.append(Health(state=state, mode=mode, message=f"pool {self.name} {message}"))

        if status.mode in ("fail", "error"):
            add("broken", "failed", "has failed: its metadata cannot be read or written. Stop the containers on it, "
                "`runvol pool check --repair`, then check the filesystems")  # fmt: skip
        elif status.needs_check:
            add("broken", "needs_check", "had a metadata error and waits for a check: stop the containers on it, then "
                "`runvol pool check --repair`")  # fmt: skip
        elif status.mode == "ro" and status.metadata_free <= 0:
            add("broken", "out_of_metadata", "is read-only, since its metadata device is full: "
                f"{self.remedies.metadata}")  # fmt: skip
        elif status.mode == "ro":
            add("broken", "read_only", "is read-only: stop the containers on it, then `runvol pool check --repair`")
        elif status.mode == "out_of_data_space":
            waits = "writes wait for space, and fail after a minute" if status.queues else "writes fail"
            add("broken", "out_of_data_space", f"has no free data blocks: {waits}. Remove images, or "
                f"{self.remedies.data}")  # fmt: skip
        else:
            used = status.data_used * 100 // max(1, status.data_total)
            kept = status.metadata_used * 100 // max(1, status.metadata_total)
            state = "warning" if max(used, kept) >= self.limits.extend_above else "ok"
            add(state, status.mode, f"uses {used}% of its data and {kept}% of its metadata blocks")
        return found

    # -- the pool's own truth -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def metadata_snapshot(self, deadline: Deadline) -> Iterator[None]:
        """The tools may read the live pool's metadata inside; a snapshot that a killed process left is dropped.

        A pool has one metadata snapshot: the server and the command line take turns, by a lock on the metadata device
        that goes with its process. WaitExpired at the deadline.
        """
        with self._metadata_turn(deadline):
            if self.status().held_root:
                self._send("release_metadata_snap")
            self._send("reserve_metadata_snap")
            try:
                yield
            finally:
                self._send("release_metadata_snap")

    @contextlib.contextmanager
    def _metadata_turn(self, deadline: Deadline) -> Iterator[None]:
        fd = os.open(self.metadata, os.O_RDONLY | os.O_CLOEXEC)
        try:
            deadline.poll(f"the metadata snapshot of pool {self.name}, which another call or process uses",
                          lambda: _locked(fd))  # fmt: skip
            yield
        finally:
            flocks.release(fd)

    def ids(self, deadline: Deadline) -> set[int]:
        """Every device that the pool has, but for the keeper."""
        with self.metadata_snapshot(deadline):
            _, output = run("thin_ls", "-m", "--no-headers", "-o", "DEV", self.metadata, deadline=deadline)
        return set(numbers(output)) - {KEEPER}

    def mapped_sectors(self, device: int) -> int:
        """What a mapped device has blocks for, shared ones included."""
        return self.mapper.thin_status(self.device_name(device)).mapped

    def keeper_block(self, deadline: Deadline) -> int | None:
        """The data block in which the keeper begins."""
        with self.metadata_snapshot(deadline):
            return first_block(run("thin_dump", "-m", "--dev-id", str(KEEPER), self.metadata, deadline=deadline)[1])

    def check_live(self, deadline: Deadline) -> None:
        """thin_check on the pool as it runs; CommandFailed with its words."""
        with self.metadata_snapshot(deadline):
            run("thin_check", "-q", "-m", self.metadata, deadline=deadline)

    def added(self, device: int, origin: int, deadline: Deadline) -> int:
        """Bytes in blocks of `device` that are not those of `origin`; inside a `metadata_snapshot`."""
        _, output = run(
            "thin_delta", "-m", "--snap1", str(origin), "--snap2", str(device), self.metadata, deadline=deadline
        )
        xml = _document(output)
        return _added_blocks(xml) * int(_attribute(xml, "data_block_size")) * SECTOR

    def listed(self, deadline: Deadline) -> dict[int, tuple[int, int]]:
        """Id to (bytes that only it maps, bytes that it shares); inside a `metadata_snapshot`."""
        _, output = run("thin_ls", "-m", "--no-headers", "-o", "DEV,EXCLUSIVE_BYTES,SHARED_BYTES", self.metadata,
                        deadline=deadline)  # fmt: skip
        rows = (line.split() for line in output.splitlines())
        return {
            int(row[0]): (int(row[1]), int(row[2]))
            for row in rows
            if len(row) == 3 and all(map(str.isdecimal, row)) and int(row[0]) != KEEPER
        }

    def mapped_bytes(self, deadline: Deadline) -> dict[int, tuple[int, int]]:
        """Id to (bytes that only it maps, bytes that it shares)."""
        with self.metadata_snapshot(deadline):
            return self.listed(deadline)

    def mapped(self, device: int) -> int:
        """Bytes in blocks that the mapped device has, those that it shares included. SnapshotterError if it is gone."""
        name = self.device_name(device)
        try:
            return self.mapped_sectors(device) * SECTOR
        except (MapperError, ValueError) as error:
            raise SnapshotterError(f"device {name} says nothing of what it maps: {error}") from None

    def writes(self, device: int) -> int:
        """How many writes and discards the mapped device has had since it was mapped; -1 if it is not mapped."""
        found = self.mapper.find(self.device_name(device))
        try:
            with open(f"/sys/dev/block/{found.number}/stat" if found is not None else os.devnull) as counters:
                words = counters.read().split()
        except FileNotFoundError:
            return -1
        return sum(int(words[at]) for at in (4, 11) if at < len(words)) if words else -1


def first_block(xml: str) -> int | None:
    """The data block that the first block of the device lies in, of what thin_dump says of it; None without one."""
    from xml.etree import ElementTree

    for element in ElementTree.fromstring(_document(xml)).iter():  # noqa: S314  (written by thin_dump, about numbers)
        if element.tag == "single_mapping" and element.attrib["origin_block"] == "0":
            return int(element.attrib["data_block"])
        if element.tag == "range_mapping" and element.attrib["origin_begin"] == "0":
            return int(element.attrib["data_begin"])
    return None


def numbers(output: str) -> Iterator[int]:
    """The lines that are a number. A tool's warning among them is told, and is no device."""
    for line in filter(None, map(str.strip, output.splitlines())):
        if line.isdecimal():
            yield int(line)
        else:
            log.warning("a line of thin_ls is no device", extra={"line": line[:200]})


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except MapperError as error:
        if error.errno != errno.ENXIO:
            raise


def metadata_reserve(status: PoolStatus) -> int:
    """Metadata blocks that deletions may need, as delete too needs some."""
    return min(256, status.metadata_total // 8)


def _attribute(xml: str, name: str) -> str:
    at = xml.index(f'{name}="') + len(name) + 2
    return xml[at : xml.index('"', at)]


def _document(output: str) -> str:
    """The XML without what the tool has warned of around it."""
    return "\n".join(line for line in output.splitlines() if line.lstrip().startswith("<"))


def _added_blocks(xml: str) -> int:
    from xml.etree import ElementTree

    total = 0
    for element in ElementTree.fromstring(xml).iter():  # noqa: S314  (written by thin_delta, about the pool's own blocks)
        if element.tag in ("different", "right_only"):
            total += int(element.attrib["length"])
    return total
