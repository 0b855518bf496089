"""SQLite databases that others write to, read without a byte written, a lock taken or a file made.

SQLite itself, asked to read only, opens the log (`-wal`) for writing all the same, and makes it. So the pages of the
file and those that its log has committed are put together in memory (sqlite.org/fileformat2.html, "The Write-Ahead
Log"), once nobody has changed either meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import struct

_MAGIC = (0x377F0682, 0x377F0683)
_HEADER, _FRAME = struct.Struct(">8I"), struct.Struct(">6I")
# What says in a database's header that it has a log: it has none in memory.
_FORMS, _ROLLBACK = slice(18, 20), b"\x01\x01"
# Tries, and bytes: what is larger than any store of ours is none.
_TRIES, _LARGEST = 20, 1 << 30


def for_reading(path: str) -> sqlite3.Connection:
    """A copy of what is committed now. sqlite3.Error, OSError where it cannot be had. The caller closes it."""
    content = _copied(path)
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        db.deserialize(content)
        db.execute("PRAGMA query_only = ON")
        db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        db.close()
        raise
    return db


def _copied(path: str) -> bytes:
    for _ in range(_TRIES):
        before, log = _stamp(path), _read(f"{path}-wal")
        content = _read(path)
        if _stamp(path) == before:
            return _together(content, log)
    raise sqlite3.OperationalError("it is being written to all the time")


def _stamp(path: str) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    for name in (path, f"{path}-wal"):
        try:
            facts = os.stat(name)
        except FileNotFoundError:
            found.append((0,))
            continue
        if facts.st_size > _LARGEST:
            raise sqlite3.OperationalError(f"it has {facts.st_size} bytes, more than a store can have")
        found.append((facts.st_ino, facts.st_size, facts.st_mtime_ns))
    return tuple(found)


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise sqlite3.OperationalError("it is no regular file")
            return file.read(_LARGEST)
    except FileNotFoundError:
        if path.endswith("-wal"):
            return b""
        raise


def _together(content: bytes, log: bytes) -> bytes:
    pages = bytearray(content)
    if len(log) >= _HEADER.size:
        magic, _, page, _, *salts, _, _ = _HEADER.unpack_from(log)
        if magic in _MAGIC and 512 <= page <= 65536:
            _apply(pages, log, page, salts)
    if len(pages) >= 100 and pages[_FORMS] == b"\x02\x02":
        pages[_FORMS] = _ROLLBACK
    return bytes(pages)


def _apply(pages: bytearray, log: bytes, page: int, salts: list[int]) -> None:
    """The frames up to the last commit; those of an earlier round of the log have other salts."""
    waiting: dict[int, int] = {}
    for at in range(_HEADER.size, len(log) - _FRAME.size - page + 1, _FRAME.size + page):
        number, size, *found, _, _ = _FRAME.unpack_from(log, at)
        if found != salts or not number:
            return
        waiting[number] = at + _FRAME.size
        if not size:
            continue
        pages.extend(b"\0" * max(0, size * page - len(pages)))
        for one, place in waiting.items():
            if one <= size:
                pages[(one - 1) * page : one * page] = log[place : place + page]
        del pages[size * page :]
        waiting.clear()
