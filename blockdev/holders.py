"""Who has a device open: a look at every process, for naming the holder and for proofs without O_EXCL.

Needs the node's own process table (hostPID in a pod).
"""

from __future__ import annotations

import os
import stat

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
    number = os.stat(device).st_rdev
    try:
        return sorted(os.listdir(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/holders"))
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
