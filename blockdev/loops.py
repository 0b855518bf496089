"""Loop devices by ioctl: attach, find one's own again, grow, detach.

Structures and flags are linux/loop.h's. LOOP_CONFIGURE (Linux 5.8) sets file and flags in one step, so no
moment exists in which a device is bound without its flags.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from blockdev import holders
from blockdev.deadlines import Deadline
from blockdev.errors import DeviceBusy
from blockdev.ioctls import opened
from blockdev.udev import ensure_node

_LOOP_CLR_FD, _LOOP_SET_CAPACITY, _LOOP_CONFIGURE = 0x4C01, 0x4C07, 0x4C0A
_LOOP_SET_STATUS64, _LOOP_GET_STATUS64, _LOOP_CTL_GET_FREE = 0x4C04, 0x4C05, 0x4C82
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
MAJOR = 7
_SECTOR = 512


class _Info64(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("rdevice", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("sizelimit", ctypes.c_uint64),
        ("number", ctypes.c_uint32),
        ("encrypt_type", ctypes.c_uint32),
        ("encrypt_key_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("file_name", ctypes.c_ubyte * 64),
        ("crypt_name", ctypes.c_ubyte * 64),
        ("encrypt_key", ctypes.c_ubyte * 32),
        ("init", ctypes.c_uint64 * 2),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _Info64),
        ("reserved", ctypes.c_uint64 * 8),
    ]


@dataclass(frozen=True, kw_only=True)
class Backing:
    """What a bound loop device stands on."""

    device: int
    inode: int
    read_only: bool
    direct_io: bool
    # It unbinds itself when its last user lets go, and its number is then anybody's.
    clears_itself: bool = False
    # A window on the file, as `losetup --offset` makes it.
    partial: bool = False

    def is_file(self, facts: os.stat_result) -> bool:
        """Whether it is this very file, whatever its name is now."""
        return (self.device, self.inode) == (facts.st_dev, facts.st_ino)


def backing(device: str) -> Backing | None:
    """What `device` stands on; None if nothing is bound to it or it does not exist."""
    try:
        with opened(device) as fd:
            info = _status(fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return None
        raise
    return _backing(info) if info is not None else None


def _status(fd: int) -> _Info64 | None:
    """What the kernel says of an open device; None if it is no loop device or nothing is bound to it."""
    info = _Info64()
    if os.major(os.fstat(fd).st_rdev) != MAJOR:
        return None
    try:
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None
    return info


def _backing(info: _Info64) -> Backing:
    return Backing(
        device=info.device,
        inode=info.inode,
        read_only=bool(info.flags & _READ_ONLY),
        direct_io=bool(info.flags & _DIRECT_IO),
        clears_itself=bool(info.flags & _AUTOCLEAR),
        partial=bool(info.offset or info.sizelimit),
    )


def bound() -> list[str]:
    """Every loop device that has a file, as sysfs lists them."""
    names = (name for name in os.listdir("/sys/block") if name.startswith("loop"))
    return sorted(f"/dev/{name}" for name in names if os.path.exists(f"/sys/block/{name}/loop"))


def find(path: str) -> list[str]:
    """The loop devices that stand on the file `path`, by inode: a restarted process finds its own.

    Costs a look at every bound device; who remembers a name asks `stands_on` instead.
    """
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return []
    found = []
    for device in bound():
        ensure_node(device)
        under = backing(device)
        if under is not None and under.is_file(facts):
            found.append(device)
    return found


def whole(path: str, *, writable: bool = False, through_cache: bool = False) -> str | None:
    """A loop device on the whole file `path` that goes on standing on it, of several one that others are mapped over;
    None if there is none. One with an offset shows the file shifted, and one that is read-only takes no writes: those
    are left to whoever has made them to look inside. `through_cache`: one that takes reads of 512 bytes, as `cached`
    makes it."""
    there = sorted(find(path), key=lambda device: not _holders(device))
    fit = (one for one in there if not (writable and _is_read_only(one)) and not (through_cache and _is_direct(one)))
    return next((one for one in fit if be_kept(one, path)), None)


def _holders(device: str) -> list[str]:
    try:
        return os.listdir(f"/sys/block/{os.path.basename(device)}/holders")
    except FileNotFoundError:
        return []


def _is_read_only(device: str) -> bool:
    under = backing(device)
    return under is None or under.read_only


def _is_direct(device: str) -> bool:
    """Whether it goes past the page cache, or has blocks of more than 512 bytes."""
    under = backing(device)
    try:
        block = int(Path(f"/sys/block/{os.path.basename(device)}/queue/logical_block_size").read_text())
    except FileNotFoundError:
        return True
    return under is None or under.direct_io or block != 512


def stands_on(device: str, path: str) -> bool:
    """Whether `device` stands on the file `path` now."""
    under = backing(device)
    try:
        return under is not None and under.is_file(os.stat(path))
    except FileNotFoundError:
        return False


def be_kept(device: str, path: str) -> bool:
    """Whether `device` stands on the whole file `path` and goes on doing so until it is detached.

    One that is about to clear itself (the kernel marks a device so when it is asked to unbind it while somebody has it
    open) has the mark taken off, on the descriptor that its identity was read from: while that is open it cannot go.
    """
    try:
        with opened(device) as fd:
            info = _status(fd)
            if info is None or not (under := _backing(info)).is_file(os.stat(path)) or under.partial:
                return False
            return not under.clears_itself or _unmark(fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return False
        raise


def _unmark(fd: int) -> bool:
    """The device does not clear itself any more; False if nothing is bound to it by now."""
    info = _status(fd)
    if info is None:
        return False
    info.flags &= ~_AUTOCLEAR
    fcntl.ioctl(fd, _LOOP_SET_STATUS64, info)
    return True


def attach(path: str, *, deadline: Deadline, read_only: bool = False, autoclear: bool = False) -> str:
    """Bind a free loop device to the file `path`, with direct I/O where its filesystem can; its node.

    Other allocators race for the same number: the kernel answers EBUSY to the slower one, which takes the next.
    With `autoclear` the device goes by itself when its last user does; keep a descriptor or a mount on it.
    """
    with opened(path, os.O_RDONLY if read_only else os.O_RDWR) as file:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise DeviceBusy(path, "a loop device stands on a regular file only")
        flags = _DIRECT_IO | (_READ_ONLY if read_only else 0) | (_AUTOCLEAR if autoclear else 0)
        device, fd = _bind(file, path, flags, deadline)
    os.close(fd)
    return device


def open_private(path: str, *, deadline: Deadline, read_only: bool = False) -> tuple[str, int]:
    """Like `attach` with autoclear; the node and a descriptor that keeps it alive until it is closed."""
    with opened(path, os.O_RDONLY if read_only else os.O_RDWR) as file:
        return _bind(file, path, _DIRECT_IO | _AUTOCLEAR | (_READ_ONLY if read_only else 0), deadline)


def cached(path: str, *, deadline: Deadline) -> str:
    """A read-only loop device with blocks of 512 bytes on the block node `path`, through the page cache.

    It turns small reads into those that the device below takes, and its users share one cache.
    """
    with opened(path) as below:
        device, fd = _bind(below, path, _READ_ONLY, deadline)
    os.close(fd)
    return device


def _bind(file: int, path: str, flags: int, deadline: Deadline) -> tuple[str, int]:
    """A free loop device, bound, with an open descriptor of it; another one's race for the number is run again."""
    while True:
        deadline.check(f"finding a free loop device for {path}")
        device = _free()
        try:
            fd = os.open(device, (os.O_RDONLY if flags & _READ_ONLY else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENXIO, errno.ENOENT):
                raise
            continue
        try:
            fcntl.ioctl(fd, _LOOP_CONFIGURE, _config(file, path, flags))
            return device, fd
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EBUSY, errno.ENXIO):
                raise


def _config(file: int, path: str, flags: int) -> _Config:
    # Without a size of ours the kernel takes the alignment that direct I/O needs, which grows to 4096 once a file is
    # reflinked on XFS; an ext4 with smaller blocks could then not be mounted any more.
    config = _Config(fd=file, block_size=_SECTOR)
    config.info.flags = flags
    name = os.fsencode(path)[-63:]
    ctypes.memmove(config.info.file_name, name, len(name))
    return config


def _free() -> str:
    with opened("/dev/loop-control", os.O_RDWR) as control:
        device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
    ensure_node(device)
    return device


def resize(device: str) -> None:
    """Let the device take the size that its file has now."""
    with opened(device) as fd:
        fcntl.ioctl(fd, _LOOP_SET_CAPACITY)


def clear(device: str) -> bool:
    """Unbind `device` from whatever it stands on, unless somebody uses it; whether it is unbound.

    O_EXCL keeps away from what is mounted. Who has it open without that (a pod, a VMM, a loop device on top of this
    one) only shows in what the kernel does: it then unbinds nothing and marks the device to clear itself later, and the
    mark is taken off again before our descriptor, which holds the device, is closed.
    """
    try:
        with opened(device, os.O_RDONLY | os.O_EXCL) as fd:
            before = _status(fd)
            if before is None:
                return True
            fcntl.ioctl(fd, _LOOP_CLR_FD)
            after = _status(fd)
            if after is None or not after.flags & _AUTOCLEAR:
                return after is None
            # One that was made to go by itself still does.
            if not before.flags & _AUTOCLEAR:
                with contextlib.suppress(FileNotFoundError):
                    _unmark(fd)
            return False
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno not in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
            raise
    return True


def detach(device: str, path: str, deadline: Deadline) -> None:
    """Unbind `device` from the file `path`; nothing happens if it stands on something else by now.

    The kernel would accept this for a device that is in use, and let go later. It is asked with an exclusive
    descriptor instead, so a mounted device is DeviceBusy, with the places; a probe of udev's passes in a moment.
    """
    waiting = Deadline.after(min(deadline.remaining(), 2.0))
    while stands_on(device, path):
        clear(device)
        if waiting.remaining() <= 0:
            places = holders.mount_points(device)
            why = f"mounted on {', '.join(places)}" if places else "its last user has not let go"
            raise DeviceBusy(device, why, holders.processes(device))
        time.sleep(0.002)
