"""Waiting for devices, with or without a udev daemon.

Events are taken from the kernel's own broadcast, which exists in containers and test kernels where no
udevd runs; a look at sysfs between the events catches what came before the socket listened.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable

from blockdev.deadlines import Deadline

_LOOK_AGAIN = 0.2


def wait_for(what: str, ready: Callable[[], bool], deadline: Deadline, *, subsystem: str = "block") -> None:
    """Return once `ready` holds, asked after each event of `subsystem`; WaitExpired, naming `what`, otherwise."""
    if ready():
        return
    # Loaded when something is waited for.
    import pyudev

    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    monitor.filter_by(subsystem)
    monitor.start()
    while not ready():
        deadline.check(what)
        monitor.poll(timeout=min(_LOOK_AGAIN, deadline.remaining()))


def ensure_node(device: str) -> None:
    """Make `/dev/NAME` from sysfs where nobody else does (a container's own /dev)."""
    if os.path.exists(device):
        return
    try:
        with open(f"/sys/class/block/{os.path.basename(device)}/dev") as numbers:
            major, minor = map(int, numbers.read().split(":"))
    except FileNotFoundError:
        return
    with contextlib.suppress(FileExistsError):
        os.mknod(device, stat.S_IFBLK | 0o660, os.makedev(major, minor))
