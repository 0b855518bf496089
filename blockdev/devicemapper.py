"""Device-mapper by ioctl on /dev/mapper/control: nothing is executed, nothing is read out of a text of dmsetup's.

Structures and numbers are linux/dm-ioctl.h's (interface 4.x). Every refusal is a `MapperError` with the kernel's
errno. The ioctls are made through ctypes: fcntl.ioctl keeps the GIL for a buffer of more than 1024 bytes, and one
suspend of a busy device would stop the whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blockdev.dm_targets import PoolStatus, Target, ThinStatus
from blockdev.errors import BlockdevError

CONTROL = "/dev/mapper/control"
DIRECTORY = "/dev/mapper"

_HEADER = struct.Struct("=3I I I I i I I I Q 128s 129s 7s")
_SPEC = struct.Struct("=QQiI16s")
_IOCTL = 0xC138FD00
_VERSION, _LIST, _CREATE, _REMOVE, _RENAME, _SUSPEND, _STATUS = 0, 2, 3, 4, 5, 6, 7
_LOAD, _CLEAR, _DEPS, _TABLE_STATUS, _VERSIONS, _MESSAGE, _ARM_POLL = 9, 10, 11, 12, 13, 14, 16
_READ_ONLY, _SUSPENDED, _PERSISTENT, _WANT_TABLE = 0x1, 0x2, 0x8, 0x10
_ACTIVE, _INACTIVE, _BUFFER_FULL = 0x20, 0x40, 0x100
_SKIP_LOCKFS, _NOFLUSH, _DATA_OUT, _DEFERRED = 0x400, 0x800, 0x10000, 0x20000
# libdevmapper's flags for udev, without a cookie: no rule opens the device, and nobody waits for udev.
_UDEV_HANDS_OFF = (0x1 | 0x2 | 0x4 | 0x8 | 0x20) << 16
_FIRST_BUFFER, _LARGEST_BUFFER = 16384, 64 << 20

# What to do where the control node cannot be opened.
_LOAD_IT = "the kernel has no device-mapper, or it is not loaded: `modprobe dm_mod`; a container needs the host's /dev"
_BE_ROOT = "only root of the host may"
_WITHOUT = {**dict.fromkeys((errno.ENOENT, errno.ENODEV, errno.ENXIO), _LOAD_IT),
            **dict.fromkeys((errno.EACCES, errno.EPERM), _BE_ROOT)}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


class MapperError(BlockdevError):
    """Device-mapper refused; `errno` is the kernel's. `hint`: what to do, where that is known."""

    def __init__(self, operation: str, name: str, number: int, hint: str = "") -> None:
        self.errno = number
        super().__init__(f"device-mapper: {operation} {name}: {os.strerror(number)}" + (f": {hint}" if hint else ""))


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the kernel says of a mapped device."""

    name: str
    uuid: str
    major: int
    minor: int
    open_count: int
    event: int
    suspended: bool
    read_only: bool
    active: bool
    loaded: bool
    removal_waits: bool

    @property
    def number(self) -> str:
        """`253:7`: how a table names it."""
        return f"{self.major}:{self.minor}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the list of all devices."""

    name: str
    major: int
    minor: int
    event: int


def available() -> bool:
    """Whether this kernel offers device-mapper to this process."""
    try:
        os.close(os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def node(name: str) -> str:
    """The path of a device's node."""
    return f"{DIRECTORY}/{name}"


class Mapper:
    """An open control node. Safe to use from several threads; close it, or use it as a context manager."""

    def __init__(self) -> None:
        try:
            self._fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or errno.ENXIO
            raise MapperError("open", CONTROL, number, _WITHOUT.get(number, "")) from None

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def version(self) -> tuple[int, int, int]:
        """The interface's version."""
        header, _ = self._call(_VERSION, "version", "")
        return header[0], header[1], header[2]

    def targets(self) -> dict[str, tuple[int, int, int]]:
        """The target types that are loaded, with their versions."""
        _, payload = self._call(_VERSIONS, "list of targets", "")
        found, at = {}, 0
        while True:
            following, *version = struct.unpack_from("=4I", payload, at)
            found[_text(payload, at + 16)] = (version[0], version[1], version[2])
            if not following:
                return found
            at += following

    def devices(self) -> list[Entry]:
        """Every mapped device of the machine."""
        _, payload = self._call(_LIST, "list", "")
        found: list[Entry] = []
        at = 0
        while True:
            device, following = struct.unpack_from("=QI", payload, at)
            if device == 0:
                return found
            name = _text(payload, at + 12)
            event = struct.unpack_from("=I", payload, (at + 12 + len(name.encode()) + 1 + 7) & ~7)[0]
            found.append(Entry(name=name, major=_major(device), minor=_minor(device), event=event))
            if not following:
                return found
            at += following

    def create(self, name: str, uuid: str = "", minor: int | None = None) -> Device:
        """An empty device; EBUSY if the name or the UUID exists. Its node appears with the first table."""
        if len(name.encode()) > 127 or len(uuid.encode()) > 128 or "/" in name or not name:
            # The kernel would cut a longer name off, and somebody else's device might be meant then.
            raise MapperError("create", name, errno.ENAMETOOLONG)
        if minor is None:
            header, _ = self._call(_CREATE, "create", name, uuid=uuid)
        else:
            header, _ = self._call(_CREATE, "create", name, uuid=uuid, flags=_PERSISTENT, device=_pack(0, minor))
        return _device(header)

    def load(self, name: str, targets: Sequence[Target], *, read_only: bool = False) -> None:
        """Put a table into the inactive slot; EINVAL for one that the target refuses (the reason is in dmesg)."""
        payload, start = b"", 0
        for target in targets:
            line = target.parameters().encode() + b"\0"
            line += bytes(-len(line) % 8)
            payload += _SPEC.pack(start, target.length, 0, _SPEC.size + len(line), target.kind.encode()) + line
            start += target.length
        self._call(_LOAD, "load", name, flags=_READ_ONLY if read_only else 0, payload=payload, count=len(targets))

    def clear(self, name: str) -> None:
        """Drop the inactive table."""
        self._call(_CLEAR, "clear", name)

    def establish(self, name: str, targets: Sequence[Target], *, uuid: str = "", read_only: bool = False) -> Device:
        """A new device with this table; nothing is left of one whose table is refused."""
        self.create(name, uuid)
        try:
            self.load(name, targets, read_only=read_only)
            return self.resume(name)
        except MapperError:
            self.remove(name)
            raise

    def resume(self, name: str) -> Device:
        """Swap the inactive table in, if there is one, and let I/O through; the device has a node afterwards.

        A resume that fails leaves the device suspended: load a good table and resume again.
        """
        header, _ = self._call(_SUSPEND, "resume", name, event=_UDEV_HANDS_OFF)
        device = _device(header)
        make_node(device)
        return device

    def go_on(self, name: str) -> None:
        """Let I/O through that `suspend` has held back. The node stays as it is: who removes the device beside this
        removes that too, and one made after it would be left, of a number that another device gets."""
        self._call(_SUSPEND, "resume", name, event=_UDEV_HANDS_OFF)

    def suspend(self, name: str, *, flush: bool = True, freeze: bool = True) -> None:
        """Hold I/O back. Ordinarily a mounted filesystem is frozen and its data written first."""
        flags = _SUSPENDED | (0 if flush else _NOFLUSH) | (0 if freeze else _SKIP_LOCKFS)
        self._call(_SUSPEND, "suspend", name, flags=flags, event=_UDEV_HANDS_OFF)

    def remove(self, name: str, *, deferred: bool = False) -> None:
        """Remove device and node; EBUSY while it is open, unless `deferred` lets it go with its last user."""
        self._call(_REMOVE, "remove", name, flags=_DEFERRED if deferred else 0, event=_UDEV_HANDS_OFF)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(node(name))

    def rename(self, name: str, new: str) -> None:
        if len(new.encode()) > 127 or "/" in new or not new:
            raise MapperError("rename to", new, errno.ENAMETOOLONG)
        header, _ = self._call(_RENAME, "rename", name, payload=new.encode() + b"\0", event=_UDEV_HANDS_OFF)
        make_node(_device(header), new)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(node(name))

    def find(self, name: str) -> Device | None:
        """The device, or None if there is none of that name."""
        try:
            header, _ = self._call(_STATUS, "status", name)
        except MapperError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        return _device(header)

    def lines(self, name: str, *, table: bool = False, flush: bool = False) -> list[tuple[str, str]]:
        """(target type, text) for each line of the status, or of the table.

        Unless `flush`, a pool does not commit its metadata for the question.
        """
        flags = (_WANT_TABLE if table else 0) | (0 if flush else _NOFLUSH)
        header, payload = self._call(_TABLE_STATUS, "table", name, flags=flags)
        found, at = [], 0
        for _ in range(header[5]):
            _start, _length, _status, following, kind = _SPEC.unpack_from(payload, at)
            found.append((kind.rstrip(b"\0").decode(), _text(payload, at + _SPEC.size)))
            at = following
        return found

    def pool_status(self, name: str, *, flush: bool = False) -> PoolStatus:
        """ValueError if `name` is no thin-pool."""
        for kind, text in self.lines(name, flush=flush):
            if kind == "thin-pool":
                return PoolStatus.parse(text)
        raise ValueError(f"{name} is no thin-pool")

    def thin_status(self, name: str) -> ThinStatus:
        """ValueError if `name` is no thin device, or its pool has failed."""
        for kind, text in self.lines(name):
            if kind == "thin":
                return ThinStatus.parse(text)
        raise ValueError(f"{name} is no thin device")

    def message(self, name: str, text: str, sector: int = 0) -> str:
        """Send a message to the target at `sector`; what it answers, mostly nothing."""
        payload = struct.pack("=Q", sector) + text.encode() + b"\0"
        header, answer = self._call(_MESSAGE, f"message `{text}` to", name, payload=payload)
        return _text(answer, 0) if header[7] & _DATA_OUT else ""

    def dependencies(self, name: str) -> list[str]:
        """The devices below, as `major:minor`."""
        _, payload = self._call(_DEPS, "dependencies of", name)
        count = struct.unpack_from("=I", payload, 0)[0]
        return [f"{_major(one)}:{_minor(one)}" for one in struct.unpack_from(f"={count}Q", payload, 8)]

    def _call(
        self, number: int, operation: str, name: str, *, uuid: str = "", flags: int = 0, event: int = 0,
        device: int = 0, payload: bytes = b"", count: int = 0,
    ) -> tuple[tuple[int, ...], bytes]:  # fmt: skip
        size = max(_HEADER.size + len(payload), _FIRST_BUFFER if number in _ANSWERS else _HEADER.size)
        while True:
            buffer = ctypes.create_string_buffer(bytes(_HEADER.size) + payload, size)
            _HEADER.pack_into(buffer, 0, 4, 0, 0, size, _HEADER.size, count, 0, flags, event, 0, device, name.encode(),
                              uuid.encode(), b"")  # fmt: skip
            control(self._fd, _IOCTL | number, buffer, operation, name)
            header = _HEADER.unpack_from(buffer, 0)
            if not header[7] & _BUFFER_FULL:
                return header, buffer.raw[header[4] :] if number in _ANSWERS else b""
            size *= 4
            if size > _LARGEST_BUFFER:
                raise MapperError(operation, name, errno.EOVERFLOW)


_ANSWERS = frozenset({_LIST, _VERSIONS, _TABLE_STATUS, _DEPS, _MESSAGE})


def control(fd: int, request: int, buffer: ctypes.Array[ctypes.c_char], operation: str, name: str) -> None:
    """The one ioctl(2) of this module; MapperError with the errno. An interrupted one is made again."""
    while _libc.ioctl(fd, ctypes.c_ulong(request), buffer) < 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise MapperError(operation, name, number)


class Events:
    """Waits for an event on any mapped device; a control node of its own, as the kernel keeps one mark for each."""

    def __init__(self) -> None:
        self._mapper = Mapper()
        self._poll = select.poll()
        self._poll.register(self._mapper._fd, select.POLLIN)

    def close(self) -> None:
        self._mapper.close()

    def wait(self, seconds: float) -> bool:
        """Whether something happened on some device since the last time."""
        happened = bool(self._poll.poll(seconds * 1000))
        if happened:
            self._mapper._call(_ARM_POLL, "arm", "")
        return happened


def make_node(device: Device, name: str = "") -> None:
    """/dev/mapper/<name> as a block node; nobody else makes it without udev, and udev is told not to."""
    path, number = node(name or device.name), os.makedev(device.major, device.minor)
    try:
        os.mknod(path, 0o600 | stat.S_IFBLK, number)
    except FileExistsError:
        facts = os.stat(path)
        if stat.S_ISBLK(facts.st_mode) and facts.st_rdev == number:
            return
        beside = f"{path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        os.mknod(beside, 0o600 | stat.S_IFBLK, number)
        os.rename(beside, path)


def stale_nodes(mapper: Mapper, prefix: str) -> Iterator[str]:
    """Nodes under /dev/mapper whose device is gone."""
    alive = {entry.name for entry in mapper.devices()}
    for name in os.listdir(DIRECTORY):
        if name.startswith(prefix) and name not in alive:
            yield node(name)


def _device(header: tuple[int, ...]) -> Device:
    flags = header[7]
    return Device(
        name=_cut(header[11]),
        uuid=_cut(header[12]),
        major=_major(header[10]),
        minor=_minor(header[10]),
        open_count=header[6],
        event=header[8],
        suspended=bool(flags & _SUSPENDED),
        read_only=bool(flags & _READ_ONLY),
        active=bool(flags & _ACTIVE),
        loaded=bool(flags & _INACTIVE),
        removal_waits=bool(flags & _DEFERRED),
    )


def _cut(raw: object) -> str:
    return bytes(raw).split(b"\0", 1)[0].decode("utf-8", "replace")  # type: ignore[call-overload, no-any-return]


def _text(payload: bytes, at: int) -> str:
    return payload[at : payload.index(b"\0", at)].decode("utf-8", "replace")


def _major(device: int) -> int:
    return (device >> 8) & 0xFFF


def _minor(device: int) -> int:
    return (device & 0xFF) | ((device >> 12) & ~0xFF)


def _pack(major: int, minor: int) -> int:
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
