"""Why the store failed, in words: those of SQLite or the kernel, and those of the filesystem below, which often knows
better.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator

from blockdev import disk_troubles
from snapshotter.errors import StoreFailed

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """What the kernel says of the store at `path` is StoreFailed."""
    try:
        yield
    except OSError as error:
        raise _failed(path, str(error.strerror), full=error.errno in _NO_ROOM) from error


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """What SQLite says of the store at `path` is StoreFailed."""
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        raise _failed(path, str(error), full=full) from error


def _failed(path: str, why: str, *, full: bool) -> StoreFailed:
    failed = StoreFailed(f"the store {path}: {why}{_of_disk(path)}; see `runvol doctor`")
    failed.full = full
    return failed


def _of_disk(path: str) -> str:
    """What is wrong with the filesystem: the database takes much for its own trouble, damage even."""
    why = disk_troubles.by_writing(os.path.dirname(path))
    return f" (its filesystem says: {why})" if why else ""
