"""Why the filesystem of a directory takes nothing any more, in the kernel's words: asked by who may write there, and by
who only looks.

A filesystem that is merely full is no trouble of this kind.
"""

from __future__ import annotations

import errno
import os

from blockdev import sysfs

# Without files that have no name, or full: neither says anything.
_NO_ANSWER = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.ENOSPC, errno.EDQUOT)


def by_writing(directory: str, *, flush: bool = False) -> str:
    """Empty where it takes a byte, into a file that never has a name and leaves nothing. With `flush` the disk is asked
    too, which may take its time."""
    try:
        fd = os.open(directory or ".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\0")
            if flush:
                os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return "" if error.errno in _NO_ANSWER else str(error.strerror)
    return ""


def by_looking(directory: str) -> str:
    """Empty where nothing is seen: it is not mounted read-only, and a flush ends well, which tells also of one that has
    given up and is mounted `rw` all the same. Nothing is written that was not to be; only an ext4 that has counted
    errors is asked by a file without a name, since where its journal has failed nothing else tells."""
    try:
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return "Read-only file system"
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return str(error.strerror)
    return by_writing(directory, flush=True) if _has_counted_errors(directory) else ""


def _has_counted_errors(directory: str) -> bool:
    """Whether the directory's ext4 has met errors since it was last checked (`/sys/fs/ext4/DEVICE/errors_count`)."""
    try:
        device = os.stat(directory).st_dev
        name = sysfs.name(f"{os.major(device)}:{os.minor(device)}")
        with open(f"/sys/fs/ext4/{name}/errors_count") as file:
            return int(file.read()) > 0
    except (OSError, ValueError):
        return False
