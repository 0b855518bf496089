"""The thin pool of a node, and its devices: mapped and unmapped, shut to writers, brought to rest, given back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import struct
import time
from collections.abc import Iterator

from blockdev import Deadline, holders, sysfs
from blockdev.devicemapper import Device, Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, Thin
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.messages import DeviceMissing, DeviceThere
from snapshotter.metadata import KEEPER, ReadPool
from snapshotter.watermarks import Limits

_BLKROSET, _BLKDISCARD = 0x125D, 0x1277
_DISCARD_STEP = 1 << 30
# Seconds for which a pool may be suspended while it is made larger, between two looks at it, and how often a table is
# tried for the moment in which nobody has seen it so.
_EXTENDED, _MOMENT, _TRIES = 2.0, 0.02, 5


class Pool(ReadPool):
    """A pool that is assembled under `name`; `identity` stands in the names of its devices."""

    def __init__(self, mapper: Mapper, name: str, identity: str, metadata: str, limits: Limits | None = None) -> None:
        super().__init__(mapper, name, metadata, limits)
        self.identity = identity
        self._number = ""
        # Devices that nobody can write to who opens them, as long as they are mapped; see `shut`.
        self._shut: set[int] = set()

    # -- their names ------------------------------------------------------------------------------------------------

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

    # -- mapping ----------------------------------------------------------------------------------------------------

    def activate(self, device: int, size: int, *, read_only: bool = False, origin: str = "") -> None:
        """Map the device, `size` bytes long, whatever a killed process has left of an earlier try.

        DeviceMissing if the pool has no such id. A longer size than that of a mapped device makes it grow. While the
        pool is made larger the kernel refuses tables (EINVAL), so that is waited for; Unavailable if it does not end.
        """
        until = time.monotonic() + _EXTENDED
        for tried in itertools.count():
            try:
                self._activate(device, size, read_only=read_only, origin=origin)
            except MapperError as error:
                if error.errno != errno.EINVAL:
                    raise
                if not self._is_suspended():
                    if tried >= _TRIES:
                        raise
                elif time.monotonic() > until:
                    raise Unavailable(
                        f"pool {self.name} is suspended: it is made larger just now, or was when that was killed; the "
                        "snapshotter lets it go on in some seconds"
                    ) from None
                time.sleep(_MOMENT)
            else:
                return

    def _is_suspended(self) -> bool:
        found = self.mapper.find(self.name)
        return found is not None and found.suspended

    def _activate(self, device: int, size: int, *, read_only: bool, origin: str) -> None:
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
        with open(f"{sysfs.of_number(self._checked(name).number)}/size") as size:
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

        Hangs where the pool has no room (`writebacks` is for calls). OSError says that some of it is lost, Unavailable
        that nobody knows.
        """
        try:
            fd = os.open(self.path(device), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            # Who has unmapped it has flushed it.
            if self.find(device) is None:
                return
            raise Unavailable(f"{self.path(device)} cannot be opened to flush it: {error.strerror}") from None
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # -- writers ----------------------------------------------------------------------------------------------------

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

    # -- what the kernel counts -------------------------------------------------------------------------------------

    def mapped_sectors(self, device: int) -> int:
        """What a mapped device has blocks for, shared ones included."""
        return self.mapper.thin_status(self.device_name(device)).mapped

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
            with open(f"{sysfs.of_number(found.number)}/stat" if found is not None else os.devnull) as counters:
                words = counters.read().split()
        except FileNotFoundError:
            return -1
        return sum(int(words[at]) for at in (4, 11) if at < len(words)) if words else -1


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except MapperError as error:
        if error.errno != errno.ENXIO:
            raise


__all__ = ["KEEPER", "DeviceMissing", "DeviceThere", "Limits", "Pool"]
