"""Taking a flock(2) on a file that goes with its holder, and letting go of one in a process that forks."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

from blockdev import durable

_STEP = 0.005


def take(path: str, seconds: float) -> int | None:
    """A descriptor that holds the lock file `path` alone; None if somebody else has it for so many seconds.

    The file is made where it is absent, and its holder may unlink it before it lets go.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO) or time.monotonic() > until + _STEP:
                raise
            durable.clear(path)  # something else lies in its place, and would keep everybody out
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file: a lock on a name that is gone locks nothing.
            if is_still(fd, path):
                return fd
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(fd)
                return None
            time.sleep(_STEP)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def locked(fd: int, operation: int, seconds: float) -> bool:
    """Whether the descriptor has the lock (LOCK_EX or LOCK_SH) within so many seconds; it is tried at once."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_STEP)


def taken(path: str) -> bool:
    """Whether somebody holds the lock file alone at this moment; it is not made. OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, and only for this moment: others who look are not in its way, and who takes it tries again.
        return not locked(fd, fcntl.LOCK_SH, 0)
    finally:
        os.close(fd)


def byte(fd: int, at: int, kind: int) -> bool:
    """Whether this open file has that lock (F_WRLCK, F_RDLCK, or F_UNLCK for none) on one byte of its file; it is not
    waited for. Open file description locks of fcntl(2): threads exclude each other as processes do. OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_still(fd: int, path: str, *, dir_fd: int | None = None, through_links: bool = True) -> bool:
    """Whether the name is still that of the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, dir_fd=dir_fd, follow_symlinks=through_links))
    except FileNotFoundError:
        return False


def release(fd: int) -> None:
    """Unlock and close. Said, not left to close(2): a child between fork and exec has a copy of the descriptor, and
    would hold the lock with it."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
