"""The store's file: SQLite with a write-ahead log, its transactions, and the named facts that are no rows.

What a caller is told is on the disk when the call returns: one flush serves all who wait for one (`flushes`). Whatever
becomes of a transaction, memory follows the disk. Nothing but SQL happens under the lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from blockdev import ioctls
from blockdev.durable import sync_directory
from blockdev.reserve import Reserve
from snapshotter.errors import StoreFailed
from snapshotter.failures import explained, told
from snapshotter.flushes import Flushes
from snapshotter.tables import SCHEMA, TABLES

log = logging.getLogger("runvol.snapshotter")

_LONG_LOG = 2 << 20
# What is kept free on the store's disk for removals, in bytes (some hundreds of them), where so many times as much is
# free: on small disks too.
_RESERVE, _SPARED = 1 << 20, 2


class Memory(Protocol):
    """What is kept in memory of the database, and changes in a transaction."""

    def begin(self) -> None:
        """A transaction begins."""

    def undo(self) -> None:
        """It came to nothing: all is as it was when it began."""

    def forget(self) -> None:
        """Nobody knows what came of it: all is read again."""


class Database:
    """Safe to use from several threads; a second process may read beside it. Raises StoreFailed."""

    def __init__(self, path: str) -> None:
        with told(path):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        # Before SQLite has the files open, whose locks go with any descriptor of theirs that is closed.
        ioctls.keep_no_access_times(os.path.dirname(path))
        self.path = path
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._memories: list[Memory] = []
        # How many changes were made; for what follows behind (`stamps`, `keeper`).
        self.changes = 0
        # What else ends with the store.
        self.closing: list[Callable[[], None]] = []
        self._reserve = Reserve(f"{path}.reserve", _RESERVE, times=_SPARED)
        with explained(path):
            self._db = self._connect()
            self._db.execute("PRAGMA journal_mode = WAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise StoreFailed(f"{path} was written by a newer runvol (schema {version}, this one knows {SCHEMA})")
            # The log is copied back by `tidy`, in the background, and never inside a call.
            self._db.execute("PRAGMA wal_autocheckpoint = 0")
            if version < SCHEMA:
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(TABLES)
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
            self._keeper = self._connect()
            # The log is there from the first look on. Each commit leaves its flush to `transaction`.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("SELECT count(*) FROM facts").fetchone()
        with told(path):
            self._flushes = Flushes(f"{path}-wal", self._lock)
            sync_directory(os.path.dirname(path))

    def _connect(self) -> sqlite3.Connection:
        made = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        made.execute("PRAGMA cache_size = -1024")
        return made

    def close(self) -> None:
        """Also what was to end with it. May be repeated."""
        while self.closing:
            self.closing.pop()()
        with self._lock, self._reading:
            for connection in (self._db, self._reader, self._keeper):
                connection.close()
            self._flushes.close()

    @property
    def flushes(self) -> int:
        """How often the disk was waited for."""
        return self._flushes.count

    # -- transactions ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """What happens inside is seen whole or not at all; unless `durable`, a power cut may undo it.

        StoreFailed where it is not on the disk at the end. Others may have seen it by then: like a call that was
        killed, it is finished or undone by the next one.
        """
        with self._lock, explained(self.path):
            self._begin()
            try:
                yield
            except BaseException:
                self._roll_back(known=True)
                raise
            try:
                self._commit()
            except BaseException:
                self._roll_back(known=False)
                raise
            self.changes += 1
            number = self._flushes.written()
        if durable:
            with told(self.path):
                self._flushes.wait(number)

    def _begin(self) -> None:
        if self._db.in_transaction:
            # A rollback that failed has left it open.
            self._db.execute("ROLLBACK")
        self._db.execute("BEGIN IMMEDIATE")
        for memory in self._memories:
            memory.begin()

    def _commit(self) -> None:
        self._db.execute("COMMIT")

    def _roll_back(self, *, known: bool) -> None:
        """Memory first: it must follow the disk although the rollback itself fails. What the caller raises counts.
        `known` is whether nothing of the transaction can be on the disk."""
        for memory in self._memories:
            if known:
                memory.undo()
            else:
                memory.forget()
        with contextlib.suppress(sqlite3.Error):
            # A full disk may have ended the transaction already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        """Inside a transaction: one statement, or a question as the transaction sees it."""
        return self._db.execute(statement, values)

    def execute_each(self, statement: str, devices: Iterable[int], *values: object) -> None:
        """Inside a transaction: the statement for each device, which is the first of its values."""
        self._db.executemany(statement, ((device, *values) for device in devices))

    def query(self, question: str, *values: object) -> list[Any]:
        """The rows that answer it, as last committed; never waits for a writer."""
        with self._reading, explained(self.path):
            return self._reader.execute(question, values).fetchall()

    # -- facts ------------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> str | None:
        """Inside a transaction."""
        found = self.execute("SELECT value FROM facts WHERE name = ?", name).fetchone()
        return str(found[0]) if found else None

    def set_fact(self, name: str, value: str) -> None:
        """Inside a transaction."""
        self.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    def forget_facts(self, names: Iterable[str]) -> None:
        """Inside a transaction."""
        self._db.executemany("DELETE FROM facts WHERE name = ?", ((name,) for name in names))

    def read_fact(self, name: str) -> str | None:
        """As last committed."""
        found = self.query("SELECT value FROM facts WHERE name = ?", name)
        return str(found[0][0]) if found else None

    def facts(self, prefix: str) -> list[str]:
        """Names of facts that begin so, as last committed."""
        rows = self.query("SELECT name FROM facts WHERE name >= ? AND name < ?", prefix, prefix + "~")
        return [str(row[0]) for row in rows]

    # -- the disk ---------------------------------------------------------------------------------------------------

    def confirm(self) -> None:
        """Return once all that was seen of the store is on the disk. StoreFailed where it cannot be brought there."""
        with self.transaction():
            pass

    def tidy(self) -> None:
        """Copy a log that has grown back into the database, without making anybody wait, and set aside what removals
        were given once there is room again. For one thread only."""
        self._reserve.keep()
        try:
            if os.path.getsize(f"{self.path}-wal") < _LONG_LOG:
                return
        except FileNotFoundError:
            return
        self._copy_back()

    def _copy_back(self) -> None:
        with explained(self.path):
            self._keeper.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def make_room(self) -> None:
        """The disk is full: what is kept for removals, which are what makes room, is given to them. With it the log is
        copied back and begins anew, so that they need no more."""
        if self._reserve.give_up():
            log.warning("the store's disk is full; its reserve is given to removals", extra={"store": self.path})
        with contextlib.suppress(StoreFailed):
            self._copy_back()

    def image(self) -> bytes:
        """All of the store as one file of SQLite's, as last committed; nobody waits for it. For one thread only."""
        with explained(self.path):
            return self._keeper.serialize()
