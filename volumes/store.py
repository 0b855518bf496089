"""The store of a node's volumes: SQLite in WAL mode, written before the disk is changed.

A row's state tells what an interrupted process was about to do: `creating` and `deleting` are undone and
finished at the next start, `adopting` takes over a file that must never be lost.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import re
import sqlite3
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from blockdev import databases, reserve
from volumes.errors import StoreAway, StoreFailed

R = TypeVar("R")
# Seconds.
_A_MOMENT = 0.2
# Bytes that are kept for a disk that is full: of the log that SQLite writes to (it begins anew after 1,000 pages of
# 4 KiB), and of whatever opening the store needs besides.
_LOG_BYTES, _RESERVE = 4608 << 10, 1 << 20
_SCHEMA = 1  # nothing was released with another one
_TABLES = """
CREATE TABLE IF NOT EXISTS volumes (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    name       TEXT NOT NULL UNIQUE,
    backend    TEXT NOT NULL,
    capacity   INTEGER NOT NULL,
    parameters TEXT NOT NULL,
    state      TEXT NOT NULL,
    formatting INTEGER NOT NULL DEFAULT 0,
    source     TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS snapshots (
    seq      INTEGER PRIMARY KEY AUTOINCREMENT,
    id       TEXT NOT NULL UNIQUE,
    name     TEXT NOT NULL UNIQUE,
    source   TEXT NOT NULL,
    size     INTEGER NOT NULL,
    created  REAL NOT NULL,
    state    TEXT NOT NULL,
    in_group TEXT NOT NULL
) STRICT;
"""
# What a store knows of itself, and ids of stores that are lost for good; an older release passes them over.
_OF_ITSELF = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS forgotten (id TEXT PRIMARY KEY) STRICT;
"""
# Added since. Of rows that were there before, or that an older release makes, nobody knows: that counts as yes.
_ADDED = (
    ("volumes", "foreign_written", "INTEGER NOT NULL DEFAULT 1"),
    ("volumes", "mount_group", "TEXT NOT NULL DEFAULT ''"),
    ("volumes", "promised", "INTEGER NOT NULL DEFAULT 0"),
    ("snapshots", "foreign_written", "INTEGER NOT NULL DEFAULT 1"),
)
# What may follow an id's prefix: the identity of its store, which older releases left out, and 16 random bytes.
_OURS = re.compile(r"(?:([0-9a-f]{8})-)?[0-9a-f]{32}\Z")
_COLUMNS = "seq, id, name, backend, capacity, parameters, state, formatting, source"
_SNAPSHOT_COLUMNS = "seq, id, name, source, size, created, state, in_group"


log = logging.getLogger("runvol.volumes")


class WrittenByNewer(StoreFailed):
    """A downgrade: nothing is served from what this release may misunderstand."""


class State(enum.StrEnum):
    CREATING = enum.auto()
    ADOPTING = enum.auto()
    READY = enum.auto()
    DELETING = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Row:
    seq: int
    volume_id: str
    name: str
    backend: str
    capacity: int
    parameters: Mapping[str, str]
    state: State
    formatting: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class SnapshotRow:
    seq: int
    snapshot_id: str
    name: str
    source: str
    size: int
    created: float
    state: State
    group: str


class Store:
    """Rows of volumes. Safe to use from several threads and beside other processes.

    Every change is one transaction that is on the disk when the call returns. Raises StoreFailed, also while the file
    cannot be opened; on a filesystem that takes no writes it is read. The first change makes the file; who only looks
    makes nothing.
    """

    def __init__(self, path: str, *, reading: bool = False) -> None:
        """`reading`: nothing is ever written, nor made beside it; a change raises StoreFailed."""
        self.path, self._reading = path, reading
        self._lock = threading.RLock()
        self._reserve = reserve.Reserve(f"{path}.reserve", _RESERVE)
        self._db: sqlite3.Connection | None = None
        # Stands for a file that is not there, as long as nobody writes.
        self._nothing: sqlite3.Connection | None = None
        self._identity, self._adopts = "", False
        # Opened for reading alone, since its filesystem takes no writes.
        self._frozen = False
        if not os.path.exists(path):
            return
        try:
            self._open()
        except WrittenByNewer:
            raise
        except StoreFailed as error:
            # What a node has delivered is in its claims; taking that back must not wait for this.
            log.error("a store cannot be opened; tried again by each call that needs it", extra={"why": str(error)})

    def _open(self) -> sqlite3.Connection:
        """Raises StoreFailed."""
        with _explained(self.path):
            if self._reading:
                self._db, self._frozen = self._opened_for_reading(), False
                return self._db
            with contextlib.suppress(OSError):  # SQLite says what is wrong
                os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            try:
                self._db, self._frozen = self._opened(), False
            except sqlite3.OperationalError:
                if not _takes_no_writes(self.path):
                    if not self._reserve.give_up():
                        raise
                    self._db, self._frozen = self._opened(), False
                else:
                    self._db, self._frozen = self._opened_for_reading(), True
            if not self._frozen:
                self._keep_room()
        return self._db

    def _keep_room(self) -> None:
        """What takes something away is written also on a disk that is full by then."""
        self._reserve.keep()
        with contextlib.suppress(OSError):
            if reserve.has_room(os.path.dirname(self.path), _LOG_BYTES):
                reserve.keep_beyond(f"{self.path}-wal", _LOG_BYTES)

    def _be_full(self, error: sqlite3.Error) -> bool:
        """Whether there is room now that was kept for a disk without any."""
        code = getattr(error, "sqlite_errorcode", 0)
        if code & 0xFF != sqlite3.SQLITE_FULL or not self._reserve.give_up():
            return False
        reserve.keep_beyond(f"{self.path}-wal", _LOG_BYTES)
        return True

    def _opened(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        with _closed_on_failure(db):
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            self._check_version(db)
            db.executescript(_TABLES)
            db.executescript(_OF_ITSELF)
            for table, column, kind in _ADDED:
                if column not in {row[1] for row in db.execute(f"PRAGMA table_info({table})")}:
                    with contextlib.suppress(sqlite3.OperationalError):  # another process was faster
                        db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
            db.execute(f"PRAGMA user_version = {_SCHEMA}")
            self._be_known(db)
        return db

    def _be_known(self, db: sqlite3.Connection) -> None:
        """The store has an identity. One that has had rows before it got one owns the ids that name none."""
        if not self._learn(db):
            db.execute("BEGIN IMMEDIATE")
            had = "SELECT count(*) FROM sqlite_sequence"  # has a row for each table that ever had one
            facts = {"identity": os.urandom(4).hex(), "adopts": str(int(db.execute(had).fetchone()[0] > 0))}
            for fact in facts.items():
                db.execute("INSERT OR IGNORE INTO facts (key, value) VALUES (?, ?)", fact)
            db.execute("COMMIT")
            self._learn(db)

    def _learn(self, db: sqlite3.Connection) -> bool:
        known = dict(db.execute("SELECT key, value FROM facts"))
        self._identity, self._adopts = known.get("identity", ""), known.get("adopts") == "1"
        return bool(self._identity)

    @property
    def identity(self) -> str:
        """Eight hexadecimal digits that the ids of its volumes and snapshots carry. StoreFailed."""
        with self._lock:
            if not self._identity:
                self._database(writing=True)
            return self._identity

    def new_id(self, prefix: str) -> str:
        """An id that no other store gives."""
        return f"{prefix}{self.identity}-{os.urandom(16).hex()}"

    def check_own(self, prefix: str, one_id: str) -> None:
        """StoreAway for an id of our form that another store has given; not for what nobody of ours can have made."""
        found = _OURS.match(one_id.removeprefix(prefix))
        if found is None:
            return
        with self._lock, _explained(self.path):
            db = self._database()
            if (found[1] is None and self._adopts) or (found[1] and found[1] == self._identity):
                return
            if self._identity and db.execute("SELECT 1 FROM forgotten WHERE id = ?", (one_id,)).fetchone():
                return
        raise StoreAway(
            f"{one_id} was made by another store than the one in {os.path.dirname(self.path)}: its filesystem may not "
            "be mounted (mount it and start the plugin again), or it is another node's. If that store is lost for "
            f"good, run `runvol volumes forget {one_id}`"
        )

    def holds(self, one_id: str) -> bool:
        """Whether a volume, a snapshot or a group has this id."""
        with self._lock, _explained(self.path):
            asked = "SELECT 1 FROM volumes WHERE id = ?1 UNION SELECT 1 FROM snapshots WHERE ?1 IN (id, in_group)"
            return self._database().execute(asked, (one_id,)).fetchone() is not None

    def forget(self, one_id: str) -> None:
        """What another store made under this id is lost: it counts as deleted from now on."""
        self._execute("INSERT OR IGNORE INTO forgotten (id) VALUES (?)", (one_id,))

    def _opened_for_reading(self) -> sqlite3.Connection:
        """Without its log the file is whole, and nobody can change it; with one, SQLite reads both."""
        if self._reading:
            return self._known_for_reading(databases.for_reading(self.path))
        log_left = os.path.exists(f"{self.path}-wal") and os.path.getsize(f"{self.path}-wal") > 0
        address = f"file:{urllib.parse.quote(self.path)}?mode=ro{'' if log_left else '&immutable=1'}"
        return self._known_for_reading(
            sqlite3.connect(address, uri=True, timeout=10, isolation_level=None, check_same_thread=False)
        )

    def _known_for_reading(self, db: sqlite3.Connection) -> sqlite3.Connection:
        with _closed_on_failure(db):
            self._check_version(db)
            with contextlib.suppress(sqlite3.OperationalError):  # of a release without
                self._learn(db)
        return db

    def _check_version(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > _SCHEMA:
            raise WrittenByNewer(
                f"the store {self.path} was written by a newer runvol (schema {version}, this one knows {_SCHEMA})"
            )

    def _database(self, *, writing: bool = False) -> sqlite3.Connection:
        """To be called with the lock held. Raises StoreFailed."""
        if writing and self._reading:
            raise StoreFailed(f"the store {self.path} is only looked at here")
        if self._db is None and not writing and not os.path.exists(self.path):
            if self._nothing is None:
                self._nothing = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                self._nothing.executescript(_TABLES)
            return self._nothing
        if self._db is not None and not (self._frozen and not _takes_no_writes(self.path)):
            return self._db
        if self._db is not None:
            self._db.close()
            self._db = None
        return self._open()

    def check(self) -> None:
        """StoreFailed if it cannot be read. Does not wait for who writes, or waits to."""
        if self._lock.acquire(timeout=_A_MOMENT):
            try:
                with _explained(self.path):
                    self._database().execute("SELECT id FROM volumes LIMIT 1").fetchall()
            finally:
                self._lock.release()
            return
        with _explained(self.path):
            db = sqlite3.connect(f"file:{urllib.parse.quote(self.path)}?mode=ro", uri=True, timeout=1)
            with contextlib.closing(db):
                db.execute("SELECT id FROM volumes LIMIT 1").fetchall()

    def close(self) -> None:
        with self._lock:
            for db in (self._db, self._nothing):
                if db is not None:
                    db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What happens inside is seen by others whole or not at all, and they wait for it."""
        with self._lock, _explained(self.path):
            db = self._database(writing=True)
            if db.in_transaction:
                yield
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                yield
                # A disk that is full says so here; an open transaction would swallow whatever comes next.
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    self._be_full(error)  # for who asks again
                raise

    def insert(
        self,
        *,
        volume_id: str,
        name: str,
        backend: str,
        capacity: int,
        parameters: Mapping[str, str],
        state: State,
        source: str = "",
        foreign_written: bool = True,
    ) -> None:
        """A new row; the caller has looked, in the same transaction, that the name is free."""
        self._execute(
            "INSERT INTO volumes (id, name, backend, capacity, parameters, state, source, foreign_written) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (volume_id, name, backend, capacity, json.dumps(dict(parameters), sort_keys=True), state.value, source,
             int(foreign_written)),
        )  # fmt: skip

    def past(self, one_id: str) -> tuple[bool, str]:
        """Whether a kernel other than the node's may have written a volume's, or a snapshot's, bytes since they were
        last checked; and the group that the volume was last given. Yes, and none, for an unknown one."""
        asked = (
            "SELECT foreign_written, mount_group FROM volumes WHERE id = ?1 "
            "UNION SELECT foreign_written, '' FROM snapshots WHERE id = ?1"
        )
        with self._lock, _explained(self.path):
            try:
                found = self._database().execute(asked, (one_id,)).fetchone()
            except sqlite3.OperationalError:  # of an older release, on a filesystem that takes no writes
                found = None
        return (bool(found[0]), str(found[1])) if found is not None else (True, "")

    def note(self, volume_id: str, *, foreign_written: bool | None = None, mount_group: str | None = None) -> None:
        """What `past` tells of a volume from now on; None leaves it as it is."""
        self._execute(
            "UPDATE volumes SET foreign_written = coalesce(?, foreign_written), mount_group = coalesce(?, mount_group) "
            "WHERE id = ?",
            (None if foreign_written is None else int(foreign_written), mount_group, volume_id),
        )

    def next_number(self) -> int:
        """The `seq` that the next row gets."""
        with self._lock, _explained(self.path):
            asked = "SELECT seq FROM sqlite_sequence WHERE name = 'volumes'"
            found = self._database(writing=not self._reading).execute(asked).fetchone()
        return (int(found[0]) if found else 0) + 1

    def number_above(self, seq: int) -> None:
        """Rows that come from now on have a greater `seq` than this."""
        with self.transaction():
            self._execute("INSERT INTO sqlite_sequence (name, seq) SELECT 'volumes', 0 WHERE NOT EXISTS "
                          "(SELECT 1 FROM sqlite_sequence WHERE name = 'volumes')", ())  # fmt: skip
            self._execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'volumes'", (seq,))

    def set_state(self, volume_id: str, state: State) -> None:
        self._execute("UPDATE volumes SET state = ? WHERE id = ?", (state.value, volume_id))

    def set_capacity(self, volume_id: str, capacity: int) -> None:
        self._execute("UPDATE volumes SET capacity = ? WHERE id = ?", (capacity, volume_id))

    def promises(self) -> dict[str, int]:
        """Volumes that were promised a size which they have not got yet, in bytes."""
        with self._lock, _explained(self.path):
            asked = "SELECT id, promised FROM volumes WHERE promised > capacity"
            try:
                return dict(self._database().execute(asked).fetchall())
            except sqlite3.OperationalError:  # of an older release, on a filesystem that takes no writes
                return {}

    def set_promised(self, volume_id: str, capacity: int) -> None:
        """The volume may grow to this size whatever else is promised meanwhile."""
        self._execute("UPDATE volumes SET promised = ? WHERE id = ?", (capacity, volume_id))

    def set_formatting(self, volume_id: str, formatting: bool) -> None:
        self._execute("UPDATE volumes SET formatting = ? WHERE id = ?", (int(formatting), volume_id))

    def remove(self, volume_id: str) -> None:
        self._execute("DELETE FROM volumes WHERE id = ?", (volume_id,))

    def get(self, volume_id: str) -> Row | None:
        return self._one("id = ?", volume_id)

    def by_name(self, name: str) -> Row | None:
        return self._one("name = ?", name)

    def has_name(self, name: str) -> bool:
        """Whether a volume has it, in whatever state."""
        with self._lock, _explained(self.path):
            return self._database().execute("SELECT 1 FROM volumes WHERE name = ?", (name,)).fetchone() is not None

    def rows(self, *, after: int = 0, limit: int = -1, state: State | None = None) -> list[Row]:
        """In the order of creation, those after the sequence number `after`: stable pages whatever comes and goes."""
        wanted = "seq > ? AND (? IS NULL OR state = ?)"
        return self._select(f"{wanted} ORDER BY seq LIMIT ?", after, state, state, limit)

    def ids(self) -> set[str]:
        """Of every volume, whatever else its row says."""
        with self._lock, _explained(self.path):
            return {row[0] for row in self._database().execute("SELECT id FROM volumes")}

    def snapshot_ids(self) -> set[str]:
        """Of every snapshot, whatever else its row says."""
        with self._lock, _explained(self.path):
            return {row[0] for row in self._database().execute("SELECT id FROM snapshots")}

    def insert_snapshot(
        self, *, snapshot_id: str, name: str, source: str, size: int, created: float, group: str
    ) -> None:
        """What its volume's past is, is the snapshot's."""
        self._execute(
            "INSERT INTO snapshots (id, name, source, size, created, state, in_group, foreign_written) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (snapshot_id, name, source, size, created, State.CREATING.value, group, int(self.past(source)[0])),
        )

    def inherit_past(self, snapshot_id: str, source: str) -> None:
        """Once its bytes are there: a guest may have come in the middle."""
        if self.past(source)[0]:
            self._execute("UPDATE snapshots SET foreign_written = 1 WHERE id = ?", (snapshot_id,))

    def set_snapshot_state(self, snapshot_id: str, state: State) -> None:
        self._execute("UPDATE snapshots SET state = ? WHERE id = ?", (state.value, snapshot_id))

    def remove_snapshot(self, snapshot_id: str) -> None:
        self._execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))

    def snapshot(self, snapshot_id: str) -> SnapshotRow | None:
        found = self._select_snapshots("id = ?", snapshot_id)
        return found[0] if found else None

    def snapshot_by_name(self, name: str) -> SnapshotRow | None:
        found = self._select_snapshots("name = ?", name)
        return found[0] if found else None

    def snapshots(
        self, *, after: int = 0, limit: int = -1, source: str = "", group: str = "", state: State | None = None
    ) -> list[SnapshotRow]:
        """In the order of creation; empty filters match everything."""
        wanted = "seq > ? AND ? IN ('', source) AND ? IN ('', in_group) AND (? IS NULL OR state = ?)"
        return self._select_snapshots(f"{wanted} ORDER BY seq LIMIT ?", after, source, group, state, state, limit)

    def _select_snapshots(self, where: str, *values: object) -> list[SnapshotRow]:
        with self._lock, _explained(self.path):
            rows = self._database().execute(f"SELECT {_SNAPSHOT_COLUMNS} FROM snapshots WHERE {where}", values)  # noqa: S608
            return self._readable(_snapshot_row, rows)

    def _one(self, where: str, *values: object) -> Row | None:
        """StoreFailed for a row that cannot be read."""
        with self._lock, _explained(self.path):
            rows = self._database().execute(f"SELECT {_COLUMNS} FROM volumes WHERE {where}", values).fetchall()  # noqa: S608
        try:
            return _row(rows[0]) if rows else None
        except (ValueError, TypeError) as error:
            raise StoreFailed(f"the store {self.path}: the row of {rows[0][1]} cannot be read: {error}") from error

    def _select(self, where: str, *values: object) -> list[Row]:
        with self._lock, _explained(self.path):
            rows = self._database().execute(f"SELECT {_COLUMNS} FROM volumes WHERE {where}", values)  # noqa: S608
            return self._readable(_row, rows)

    def _readable(self, read: Callable[[Any], R], rows: Iterable[Any]) -> list[R]:
        """What one row says cannot be read hides no other."""
        found = []
        for row in rows:
            try:
                found.append(read(row))
            except (ValueError, TypeError) as error:
                log.error("a row is passed over", extra={"store": self.path, "row": str(row[1]), "why": str(error)})
        return found

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        with self._lock, _explained(self.path):
            db = self._database(writing=True)
            try:
                db.execute(statement, values)
            except sqlite3.OperationalError as error:
                if db.in_transaction or not self._be_full(error):
                    raise
                db.execute(statement, values)


def _row(row: tuple[int, str, str, str, int, str, str, int, str]) -> Row:
    seq, volume_id, name, backend, capacity, parameters, state, formatting, source = row
    return Row(
        seq=seq,
        volume_id=volume_id,
        name=name,
        backend=backend,
        capacity=capacity,
        parameters=json.loads(parameters),
        state=State(state),
        formatting=bool(formatting),
        source=source,
    )


def _snapshot_row(row: tuple[Any, ...]) -> SnapshotRow:
    names = ("seq", "snapshot_id", "name", "source", "size", "created", "state", "group")
    facts = dict(zip(names, row, strict=True))
    return SnapshotRow(**(facts | {"state": State(facts["state"])}))


def _takes_no_writes(path: str) -> bool:
    return bool(os.statvfs(os.path.dirname(path)).f_flag & os.ST_RDONLY)


@contextlib.contextmanager
def _closed_on_failure(db: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        db.close()
        raise


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreFailed(f"the store {path}: {error}; see `runvol doctor`") from error
