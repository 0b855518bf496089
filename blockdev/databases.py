"""SQLite databases that others write to, read without a byte written, a lock taken or a file made.

`readonly_shm` has SQLite read the index of a log that somebody writes, and make one in memory where nobody does
(os_unix.c, walBeginShmUnreliable in wal.c). Without an index a database is whole only if it has no log either.
"""

from __future__ import annotations

import os
import sqlite3
import urllib.parse


def for_reading(path: str, *, timeout: float = 2.0) -> sqlite3.Connection:
    """sqlite3.Error where it cannot be read so. The caller closes it."""
    address = f"file:{urllib.parse.quote(path)}?mode=ro&readonly_shm=1"
    if not os.path.exists(f"{path}-shm"):
        if os.path.exists(f"{path}-wal") and os.path.getsize(f"{path}-wal"):
            raise sqlite3.OperationalError("it has a log without an index: whoever serves it has to open it first")
        address += "&immutable=1"
    return sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)
