"""The kernel's half of the proof that nobody else uses a device.

A block node is asked with O_EXCL, which mounts and device-mapper hold, and, where the past is unknown, by a look
at every process, since a VMM opens without O_EXCL. A regular file has something better: the kernel grants a
write lease (fcntl(2), F_SETLEASE) only while the inode is open nowhere else in the whole system: not in a VMM of
any namespace, not under a loop device. The lease is given back at once; it is a question, not a lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import time

from blockdev import holders, loops
from blockdev.errors import DeviceBusy
from blockdev.ioctls import opened

# A descriptor of ours lives on for a moment in a child between fork and exec.
_PATIENCE = 0.25
# Programs that outlive a killed driver end by themselves; their volume is worth waiting for, this many seconds.
_HELPERS = frozenset({"resize2fs", "e2fsck"})
_HELPER_PATIENCE = 30.0


def prove_free(path: str, *, past_known: bool) -> None:
    """Return if nobody uses the file or block node `path`; DeviceBusy with the holders' names otherwise.

    `past_known` says that the last release was proved, so that O_EXCL alone is enough for a block node.
    """
    if stat.S_ISREG(os.stat(path).st_mode):
        _prove_file(path, time.monotonic() + _PATIENCE)
    else:
        _prove_node(path, time.monotonic() + _PATIENCE)
        if not past_known and (found := holders.processes(path)):
            raise DeviceBusy(path, "a process has it open", found)


def is_free(path: str, *, past_known: bool = False) -> bool:
    """`prove_free` as an answer."""
    try:
        prove_free(path, past_known=past_known)
    except DeviceBusy:
        return False
    return True


def seems_free(path: str) -> bool:
    """By a look alone, without opening it: for who tells, not for who acts. What another mount namespace has mounted
    counts, a VMM in it too."""
    devices = loops.find(path) if stat.S_ISREG(os.stat(path).st_mode) else [path]
    if any(holders.mount_points(device) or holders.stacked(device) for device in devices if device):
        return False
    return not (devices and devices != [path]) and not holders.processes(path)


def _prove_file(path: str, until: float) -> None:
    helpers_until = until + _HELPER_PATIENCE
    while not _lease_granted(path):
        if time.monotonic() >= until:
            devices = loops.find(path)
            found = [holder for name in (path, *devices) for holder in holders.processes(name)]
            if found and all(one.name in _HELPERS for one in found) and time.monotonic() < helpers_until:
                time.sleep(0.05)
                continue
            if not found and not devices and _lease_granted(path):
                return  # it ended while we looked who it was
            under = [place for device in devices for place in holders.mount_points(device)]
            why = "the file is open elsewhere"
            if devices:
                why += f" (loop device {', '.join(devices)})"
            if under:
                why += f", mounted on {', '.join(under)}"
            raise DeviceBusy(path, why, found)
        time.sleep(0.01)


def _lease_granted(path: str) -> bool:
    with opened(path, os.O_RDWR) as fd:
        # Somebody who opens the file in this moment breaks the lease; the signal for that must not end us.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EBUSY):
                return False
            if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
                return not holders.processes(path) and not loops.find(path)
            raise
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True


def _prove_node(path: str, until: float) -> None:
    while True:
        try:
            with opened(path, os.O_RDWR | os.O_EXCL):
                return
        except OSError as error:
            if error.errno == errno.EROFS:
                with opened(path, os.O_RDONLY | os.O_EXCL):
                    return
            if error.errno != errno.EBUSY:
                raise
        if time.monotonic() >= until:
            places = holders.mount_points(path)
            why = f"mounted on {', '.join(places)}" if places else "the kernel refuses an exclusive open"
            raise DeviceBusy(path, why, holders.processes(path))
        time.sleep(0.01)
