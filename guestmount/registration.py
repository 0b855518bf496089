"""Whether the NRI plugin is registered with the container runtime now: it holds a lock as long as it is.

Publish, another process, asks this before it leaves an NFS volume to the plugin.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from blockdev import flocks

# Seconds in which a question, which takes microseconds, has passed.
_PATIENCE = 0.5
_FILE = "nri.alive"


def is_alive(run_dir: str) -> bool:
    """Whether a plugin is registered."""
    try:
        fd = os.open(os.path.join(run_dir, _FILE), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(run_dir: str) -> Iterator[int]:
    """The file that `begun` and `ended` lock and unlock; a process that is killed lets go of it."""
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    fd = os.open(os.path.join(run_dir, _FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def stands(fd: int, run_dir: str) -> bool:
    """Whether who asks still finds this file: the run directory may be emptied under a plugin that lives."""
    return flocks.is_still(fd, os.path.join(run_dir, _FILE))


def begun(fd: int) -> None:
    """Registered from now on. BlockingIOError if another plugin of this node is.

    Who asks in this moment has the file for an instant too, so one refusal says nothing.
    """
    if not flocks.locked(fd, fcntl.LOCK_EX, _PATIENCE):
        raise BlockingIOError(errno.EWOULDBLOCK, "another plugin of this node is registered")


def ended(fd: int) -> None:
    """Not registered any more."""
    fcntl.flock(fd, fcntl.LOCK_UN)
