"""Who has a device open: a look at every process, for naming the holder and for proofs without O_EXCL.

Needs the node's own process table (hostPID in a pod).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockdev import sysfs
from blockdev.errors import Holder
from blockdev.mountinfo import mounted_elsewhere, mounts_of


def processes(path: str) -> list[Holder]:
    """Processes with `path` open, this one left out. A block node is found under every name that it has."""
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        return []
    me = os.getpid()
    return [
        Holder(pid=pid, name=_name(pid))
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit())
        if pid != me and _has_open(pid, wanted)
    ]


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    block = stat.S_ISBLK(wanted.st_mode)
    try:
        descriptors = os.scandir(f"/proc/{pid}/fd")
    except OSError:
        return False
    with descriptors:
        for entry in descriptors:
            try:
                facts = os.stat(entry.path)
            except OSError:
                continue
            if block and stat.S_ISBLK(facts.st_mode) and facts.st_rdev == wanted.st_rdev:
                return True
            if not block and (facts.st_dev, facts.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as comm:
            return comm.read().strip()
    except OSError:
        return "a process that has just ended"


def stacked(device: str) -> list[str]:
    """Devices that stand on a block device, by their names in /sys."""
    place = sysfs.place(os.stat(device).st_rdev)
    try:
        return sorted(os.listdir(f"{place}/holders"))
    except FileNotFoundError:
        return []


def mount_points(device: str) -> list[str]:
    """Where a block device is mounted, other mount namespaces told apart by a process in them."""
    try:
        number = os.stat(device).st_rdev
    except FileNotFoundError:
        return []
    key = (os.major(number), os.minor(number))
    own = [mount.target for mount in mounts_of(key)]
    return own + [f"{mount.target} (in the mount namespace of pid {pid})" for pid, mount in mounted_elsewhere(key)]


@dataclass(frozen=True, kw_only=True)
class Io:
    """Bytes that a process has had read from disks, and has given to be written, all files together (proc(5), `io`)."""

    read_bytes: int
    written_bytes: int


def io_of(pid: int) -> Io | None:
    """None for a process that has ended, or may not be looked at."""
    try:
        with open(f"/proc/{pid}/io") as file:
            facts = {key: int(value) for key, _, value in (line.partition(":") for line in file)}
        return Io(read_bytes=facts["read_bytes"], written_bytes=facts["write_bytes"] - facts["cancelled_write_bytes"])
    except (OSError, ValueError, KeyError):
        return None


def has_open(pid: int, path: str) -> bool:
    """Whether the process still has the file open."""
    return any(True for _ in _open_of(pid, {os.path.basename(path): [path]}))


def openers(paths: Iterable[str]) -> dict[str, int]:
    """Of each of these files a process that has it open, this one left out: one look for all of them. Those that nobody
    has are left out.

    Only what has the file's name is looked at more closely: others may lie on a server that is dead.
    """
    wanted: dict[str, list[str]] = {}
    for path in paths:
        wanted.setdefault(os.path.basename(path), []).append(path)
    found: dict[str, int] = {}
    me = os.getpid()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()) if wanted else ():
        for path in _open_of(pid, wanted) if pid != me else ():
            found.setdefault(path, pid)
    return found


def _open_of(pid: int, wanted: Mapping[str, Sequence[str]]) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
        for entry in descriptors:
            with contextlib.suppress(OSError):
                for path in wanted.get(os.path.basename(os.readlink(entry.path)), ()):
                    if os.path.samestat(os.stat(entry.path), os.stat(path)):
                        yield path
