"""The snapshotter's memory: one row a snapshot, with its device, in SQLite.

Write-ahead log. What a caller is told is on the disk when the call returns: one flush serves all who wait for one
(`flushes`). What a later start can find out again from the pool (that an intended device exists by now) is written
without waiting for the disk. A device id is given once in an epoch: whatever becomes of a transaction, memory follows
the disk, and the database itself refuses a second row with a device. Nothing but SQL happens under the lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from blockdev import ioctls
from blockdev.dm_targets import MAX_THIN_ID
from blockdev.durable import sync_directory
from blockdev.reserve import Reserve
from snapshotter.errors import IdsUsedUp, NotFound, StoreFailed, Unavailable
from snapshotter.flushes import Flushes
from snapshotter.model import Kind, Snapshot, State
from snapshotter.refusals import SLOTS, Refusals

log = logging.getLogger("runvol.snapshotter")

_SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS snapshots (
    key     TEXT PRIMARY KEY,
    parent  TEXT NOT NULL,
    kind    INTEGER NOT NULL,
    state   INTEGER NOT NULL,
    device  INTEGER NOT NULL,
    size    INTEGER NOT NULL,
    fstype  TEXT NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    image   TEXT NOT NULL,
    labels  TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_parent ON snapshots (parent);
CREATE TABLE IF NOT EXISTS doomed (
    device INTEGER PRIMARY KEY, since INTEGER NOT NULL, size INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS bases (
    fstype TEXT NOT NULL, size INTEGER NOT NULL, device INTEGER NOT NULL, ready INTEGER NOT NULL,
    PRIMARY KEY (fstype, size)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quarantined (device INTEGER PRIMARY KEY, since INTEGER NOT NULL) STRICT;
"""
_COLUMNS = "key, parent, kind, state, device, size, fstype, created, updated, image, labels"
_VALUES = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
_PAGE = 256
STORE = "snapshots.db"
# Device ids are taken in runs of this many, so that most transactions need not write the counter; a start skips the
# rest of a run.
RUN = 64
_LONG_LOG = 2 << 20
# What is kept free on the store's disk for removals, in bytes (some hundreds of them), where so many times as much is
# free: on small disks too.
_RESERVE, _SPARED = 1 << 20, 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# A filesystem without files that have no name, or one that is merely full: that is told otherwise.
_NO_ANSWER = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, *_NO_ROOM)
# Ids above one that somebody else has taken are drawn as long as this many are left; below that, those around it.
_ENOUGH = MAX_THIN_ID // 2
# One row a device. Not part of the schema's number, as an older release works with it too.
_ONE_ROW = "CREATE UNIQUE INDEX IF NOT EXISTS one_row ON snapshots (device) WHERE device <> 0"
_BY_DEVICE = "CREATE INDEX IF NOT EXISTS by_device ON snapshots (device) WHERE device <> 0"
# What snapshots use; an older release leaves what it says of devices that are gone.
_COUNTED = (
    "CREATE TABLE IF NOT EXISTS counted (device INTEGER PRIMARY KEY, mapped INTEGER NOT NULL, inodes INTEGER NOT NULL, "
    "added INTEGER, final INTEGER NOT NULL) STRICT"
)
_STALE = "DELETE FROM counted WHERE device NOT IN (SELECT device FROM snapshots)"
_ONE_BASE = "CREATE UNIQUE INDEX IF NOT EXISTS one_base ON bases (device)"
_LINEAGE = "lineage"
_BASES = "SELECT fstype, size, device, ready FROM bases"
_SEVERAL = (
    "SELECT device FROM (SELECT device FROM snapshots WHERE device <> 0 UNION ALL SELECT device FROM bases "
    "UNION ALL SELECT device FROM doomed) GROUP BY device HAVING count(*) > 1"
)
_GIVEN = (
    "SELECT EXISTS (SELECT 1 FROM snapshots WHERE device = ?1 AND device <> 0) "
    "OR EXISTS (SELECT 1 FROM doomed WHERE device = ?1) OR EXISTS (SELECT 1 FROM bases WHERE device = ?1) "
    "OR EXISTS (SELECT 1 FROM quarantined WHERE device = ?1)"
)


_Row = tuple[str, str, int, int, int, int, str, int, int, str, str]


@dataclass(frozen=True, kw_only=True)
class Base:
    """An empty, formatted device that first layers are snapshots of."""

    fstype: str
    size: int
    device: int
    ready: bool


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes in blocks that a device maps, and inodes used in its filesystem. `added`: bytes that are not its origin's,
    where that was looked at. `final`: the device does not change any more."""

    mapped: int
    inodes: int
    added: int | None = None
    final: bool = False


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What stands in a copy of a store. `doomed` are devices with their sizes."""

    rows: list[Snapshot]
    bases: list[Base]
    doomed: dict[int, int]
    facts: dict[str, str]


def contents(copy: sqlite3.Connection) -> Contents:
    """All of a copy of a store, which may be one of a store that was damaged: ValueError or sqlite3.Error then."""
    version = copy.execute("PRAGMA user_version").fetchone()[0]
    if version > _SCHEMA:
        raise ValueError(f"it was written by a newer runvol (schema {version}, this one knows {_SCHEMA})")
    plain = {row[0] for row in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if lacking := {"facts", "snapshots", "doomed", "bases"} - plain:
        raise ValueError(f"it has no table {', '.join(sorted(lacking))}")
    if (said := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise ValueError(str(said))
    try:
        found = Contents(
            rows=[_snapshot(row) for row in copy.execute(f"SELECT {_COLUMNS} FROM snapshots ORDER BY key")],  # noqa: S608
            bases=[_base(row) for row in copy.execute(_BASES)],
            doomed={int(row[0]): int(row[1]) for row in copy.execute("SELECT device, size FROM doomed")},
            facts={str(row[0]): str(row[1]) for row in copy.execute("SELECT name, value FROM facts")},
        )
    except TypeError as error:
        raise ValueError(str(error)) from None
    devices = [row.device for row in found.rows] + [base.device for base in found.bases] + list(found.doomed)
    for device in devices:
        if not isinstance(device, int) or not 0 <= device <= MAX_THIN_ID:
            raise ValueError(f"{device!r} is no device of a pool")
    return found


def new_lineage() -> str:
    """16 characters that no other store has."""
    return os.urandom(8).hex()


def existing(state_dir: str) -> Store:
    """The store of this state directory. NotFound where there is none."""
    path = os.path.join(state_dir, STORE)
    if not os.path.exists(path):
        raise NotFound(path, "the store")
    return Store(path)


class Store:
    """Rows. Safe to use from several threads; a second process may read beside it. Raises StoreFailed."""

    def __init__(self, path: str) -> None:
        with _told(path):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        # Before SQLite has the files open, whose locks go with any descriptor of theirs that is closed.
        ioctls.keep_no_access_times(os.path.dirname(path))
        self.path = path
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._made: dict[str, int] = {}
        self._past = ""
        self._following = self._reserved = 0
        # How many ids were drawn, and how many changes were made; for what follows behind (`stamps`, `keeper`).
        self.drawn = self.changes = 0
        # What else ends with the store.
        self.closing: list[Callable[[], None]] = []
        # Why no id may be given yet; empty once the pool's devices were compared with the rows.
        self.barred = ""
        # Whether the table of what snapshots use is there.
        self._counts = False
        # Whether what `guard` does is on the disk.
        self.guarded = False
        # Quarantined devices that snapshots have; see `guard`.
        self.shared: frozenset[int] = frozenset()
        # Ids that the pool turned out to have already, and that could not be quarantined yet; on the disk as well.
        self._refused: set[int] = set()
        self._refusals = Refusals(f"{path}.refused")
        self._reserve = Reserve(f"{path}.reserve", _RESERVE, times=_SPARED)
        with _explained(path):
            self._db = self._connect()
            self._db.execute("PRAGMA journal_mode = WAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA:
                raise StoreFailed(f"{path} was written by a newer runvol (schema {version}, this one knows {_SCHEMA})")
            # The log is copied back by `tidy`, in the background, and never inside a call.
            self._db.execute("PRAGMA wal_autocheckpoint = 0")
            if version < _SCHEMA:
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(_TABLES)
                self._db.execute(f"PRAGMA user_version = {_SCHEMA}")
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
            self._keeper = self._connect()
            # The log is there from the first look on. Each commit leaves its flush to `transaction`.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("SELECT count(*) FROM facts").fetchone()
        with _told(path):
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

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """What happens inside is seen whole or not at all; unless `durable`, a power cut may undo it.

        StoreFailed where it is not on the disk at the end. Others may have seen it by then: like a call that was
        killed, it is finished or undone by the next one.
        """
        with self._lock, _explained(self.path):
            self._begin()
            before = self._following, self._reserved
            try:
                yield
            except BaseException:
                # What the body took is free again, and a run that was reserved in it is not reserved.
                self._roll_back(*before)
                raise
            try:
                self._commit()
            except BaseException:
                # Nobody knows what is on the disk: the counter is read from there again.
                self._roll_back(0, 0)
                raise
            self.changes += 1
            number = self._flushes.written()
        if durable:
            with _told(self.path):
                self._flushes.wait(number)

    def _begin(self) -> None:
        if self._db.in_transaction:
            # A rollback that failed has left it open.
            self._db.execute("ROLLBACK")
        self._db.execute("BEGIN IMMEDIATE")

    def _commit(self) -> None:
        self._db.execute("COMMIT")

    def _roll_back(self, following: int, reserved: int) -> None:
        """Memory first: it must follow the disk although the rollback itself fails. What the caller raises counts."""
        self._following, self._reserved = following, reserved
        with contextlib.suppress(sqlite3.Error):
            # A full disk may have ended the transaction already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def guard(self, now: int) -> dict[int, list[str]]:
        """Have the database refuse a second row with a device; the devices that have several owners, with their keys.

        An older release could give a device twice. Such a one is quarantined: never deleted, no base, and not mapped
        afresh. As long as it has several rows, `new_device` alone keeps ids from being given again. May be repeated;
        for the server only. StoreFailed where not all of it is on the disk (`guarded` is False then): what is known is
        kept to in memory all the same, and no id is given until it is.
        """
        self.guarded = False
        self._reserve.keep()
        self._refused |= self._refusals.prepare() | set(self._numbers(_SEVERAL))
        several = sorted(self._refused)
        # What the disk knows already counts, whether or not it takes more.
        self.shared = frozenset(self._owners(sorted({*several, *self.quarantined()})))
        self._past = self.read_fact("past") or ""
        with self.transaction():
            self.quarantine(several, now)
            self.buried(several)
            self._db.executemany("DELETE FROM bases WHERE device = ?", ((device,) for device in several))
            doubled = self._db.execute(
                "SELECT 1 FROM snapshots WHERE device <> 0 GROUP BY device HAVING count(*) > 1 LIMIT 1"
            ).fetchone()
            self._db.execute(_BY_DEVICE if doubled else _ONE_ROW)
            self._db.execute(_ONE_BASE)
            self._db.execute(_COUNTED)
            self._db.execute(_STALE)
        self._counts = True
        owners = self._owners(self.quarantined())
        self.shared = frozenset(owners)
        self._refused.difference_update(several)
        if several:
            self._refusals.clear()
        if self._refusals.trouble:
            raise StoreFailed(self._refusals.trouble)
        self.guarded = True
        return owners

    def _owners(self, devices: Sequence[int]) -> dict[int, list[str]]:
        """The snapshots that have one of these devices, by device."""
        owners: dict[int, list[str]] = {}
        with self._reading, _explained(self.path):
            for device in devices:
                keys = self._reader.execute("SELECT key FROM snapshots WHERE device = ? ORDER BY key", (device,))
                owners[device] = [str(row[0]) for row in keys.fetchall()]
        return {device: keys for device, keys in owners.items() if keys}

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
        with _explained(self.path):
            self._keeper.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def confirm(self) -> None:
        """Return once all that was seen of the store is on the disk. StoreFailed where it cannot be brought there."""
        with self.transaction():
            pass

    def make_room(self) -> None:
        """The disk is full: what is kept for removals, which are what makes room, is given to them. With it the log is
        copied back and begins anew, so that they need no more."""
        if self._reserve.give_up():
            log.warning("the store's disk is full; its reserve is given to removals", extra={"store": self.path})
        with contextlib.suppress(StoreFailed):
            self._copy_back()

    def image(self) -> bytes:
        """All of the store as one file of SQLite's, as last committed; nobody waits for it. For one thread only."""
        with _explained(self.path):
            return self._keeper.serialize()

    @property
    def past(self) -> str:
        """Why the store is not what its pool was last served with, as a sentence; empty if it is."""
        return self._past

    def enter_past(self, why: str, unproven: Iterable[int], now: int, *, before: str = "") -> None:
        """The pool went on without this store. Devices of which nothing proves that they still are what the rows say
        are quarantined: not mapped, no parents, no bases, never deleted. It is of another lineage from now on;
        `before` is that of the last store that was the pool's own."""
        devices = sorted(unproven)
        with self.transaction():
            self.set_fact("past", why)
            self.set_fact(_LINEAGE, new_lineage())
            self.set_fact("before", before)
            self.quarantine(devices, now)
            self.buried(devices)
            self._db.executemany("DELETE FROM bases WHERE device = ?", ((device,) for device in devices))
            # Whether a caller was ever answered is written down later than that, so it may have been.
            self._db.executemany(
                "UPDATE snapshots SET state = ? WHERE state = ? AND device = ?",
                ((State.READY, State.PREPARING, device) for device in devices),
            )
        self._past = why
        self.shared = frozenset(self._owners(self.quarantined()))

    def put(self, row: Snapshot) -> None:
        """The row is as it is here, whatever there was of its key or device. Inside a transaction."""
        self._db.execute("DELETE FROM snapshots WHERE key = ? OR (device = ? AND device <> 0)", (row.key, row.device))
        self.insert(row)

    def stand_alone(self) -> None:
        """Snapshots whose parent is not there have none from now on: containerd collects from the roots upwards, and
        would never come to them. Inside a transaction."""
        self._db.execute("UPDATE snapshots SET parent = '' WHERE parent NOT IN (SELECT key FROM snapshots)")

    def forget_rows(self, device: int) -> None:
        """The snapshots of this device are gone, and nothing is done with the device. Inside a transaction."""
        self._db.execute("DELETE FROM snapshots WHERE device = ? AND device <> 0", (device,))

    def leave_past(self) -> None:
        """An operator has decided. Inside a transaction."""
        self.forget_facts(["past", "before"])
        self._past = ""

    def name_lineage(self) -> None:
        """The store has a name of its own, by which its copies in the pool are known."""
        if not self.read_fact(_LINEAGE):
            with self.transaction():
                self.set_fact(_LINEAGE, new_lineage())

    @property
    def lineage(self) -> str:
        """That name; empty for a store that was not compared with a pool yet."""
        return self.read_fact(_LINEAGE) or ""

    @property
    def before(self) -> str:
        """The lineage of the last store that was the pool's own, while this one is not; else empty."""
        return self.read_fact("before") or ""

    def facts(self, prefix: str) -> list[str]:
        """Names of facts that begin so."""
        with self._reading, _explained(self.path):
            rows = self._reader.execute("SELECT name FROM facts WHERE name >= ? AND name < ?", (prefix, prefix + "~"))
            return [str(row[0]) for row in rows.fetchall()]

    # -- inside a transaction -------------------------------------------------------------------------------------

    def find(self, key: str) -> Snapshot | None:
        """The row, as this transaction sees it."""
        return self._one(self._db, "key = ?", key)

    def has_children(self, key: str) -> bool:
        return self._db.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (key,)).fetchone() is not None

    def insert(self, row: Snapshot) -> None:
        self._db.execute(
            f"INSERT INTO snapshots ({_COLUMNS}) VALUES ({_VALUES})",  # noqa: S608
            (row.key, row.parent, row.kind, row.state, row.device, row.size, row.fstype, row.created, row.updated,
             row.image, _dump(row.labels)),
        )  # fmt: skip

    def set_state(self, key: str, state: State) -> None:
        self._db.execute("UPDATE snapshots SET state = ? WHERE key = ?", (state, key))

    def set_labels(self, key: str, labels: Mapping[str, str], updated: int) -> None:
        self._db.execute("UPDATE snapshots SET labels = ?, updated = ? WHERE key = ?", (_dump(labels), updated, key))

    def set_size(self, key: str, size: int) -> None:
        self._db.execute("UPDATE snapshots SET size = ? WHERE key = ?", (size, key))

    def commit(self, key: str, name: str, labels: Mapping[str, str], now: int) -> None:
        """The active snapshot `key` is the committed `name` from now on."""
        self._db.execute(
            "UPDATE snapshots SET key = ?, kind = ?, state = ?, labels = ?, created = ?, updated = ? WHERE key = ?",
            (name, Kind.COMMITTED, State.READY, _dump(labels), now, now, key),
        )

    def remove(self, key: str, now: int) -> None:
        """The snapshot is gone, and its device is to be deleted behind, unless it is quarantined."""
        if self._refused:
            self.quarantine(tuple(self._refused), now)
        self._db.execute(
            "INSERT OR IGNORE INTO doomed SELECT device, ?, size FROM snapshots WHERE key = ? AND device <> 0 "
            "AND device NOT IN (SELECT device FROM quarantined)",
            (now, key),
        )
        self._db.execute("DELETE FROM snapshots WHERE key = ?", (key,))

    def abandon(self, device: int, now: int, size: int = 0) -> None:
        """`doom`, but a device that is quarantined stays so: it may hold somebody else's data."""
        if device in self._refused:
            self.quarantine([device], now)
        elif not self._db.execute("SELECT 1 FROM quarantined WHERE device = ?", (device,)).fetchone():
            self.doom(device, now, size)

    def refuse(self, device: int, now: int) -> None:
        """The pool has this id already: it is quarantined, in a transaction of its own. Remembered if that fails."""
        self._refused.add(device)
        self._refusals.add(device)
        self.quarantine_refused(now)

    def quarantine_refused(self, now: int) -> None:
        """What was refused and could not be quarantined then is now. Does nothing where there is none."""
        refused = sorted(self._refused)
        if not refused:
            return
        with self.transaction():
            self.quarantine(refused, now)
            self.buried(refused)
        self._refused.difference_update(refused)
        for device in refused:
            self._refusals.drop(device)

    def is_foreign(self, device: int) -> bool:
        """Whether the device is not what a row says: refused, or quarantined. Such a one is never mapped or deleted."""
        if device in self._refused:
            return True
        return bool(self._numbers("SELECT count(*) FROM quarantined WHERE device = ?", device)[0])

    def new_device(self) -> int:
        """An id that was never given before, if the transaction is committed.

        Unavailable while the store was not compared with its pool, PoolFull once no id is left.
        """
        if self.barred:
            raise Unavailable(self.barred)
        if len(self._refused) >= SLOTS // 2 or (self._refused and self._refusals.trouble):
            raise Unavailable(
                f"{len(self._refused)} devices are not ours, and the store {self.path} cannot take that down "
                f"{self._refusals.trouble}; make room on its disk"
            )
        while True:
            if self._following >= self._reserved:
                self._following = _counted_on(self.fact("next_device"))
                self._reserved = self._following + RUN
                self.set_fact("next_device", str(self._reserved))
            device, self._following = self._following, self._following + 1
            if device > MAX_THIN_ID:
                raise IdsUsedUp(
                    f"the pool has given all of its {MAX_THIN_ID} device ids; they come back in a new epoch, which "
                    "begins as soon as its devices were compared with the store's"
                )
            if not self._db.execute(_GIVEN, (device,)).fetchone()[0]:
                self.drawn += 1
                return device

    def give_from(self, first: int) -> None:
        """Give no id below this one any more, however few that leaves."""
        if max(first, self._following) > max(_counted_on(self.fact("next_device")), self._following):
            self.set_fact("next_device", str(first))
            self._following = self._reserved = 0

    def begin_again(self) -> None:
        """Ids are given from the first on again, but for those that anything has. Inside a transaction, and only in a
        new epoch of the pool, once its devices were compared with the store's."""
        self.set_fact("next_device", "1")
        self._following = self._reserved = 0

    def used_up(self) -> bool:
        """Whether no id is left in this epoch."""
        return self.following() > MAX_THIN_ID and self._following >= min(self._reserved, MAX_THIN_ID + 1)

    def following(self) -> int:
        """All ids below were given in this epoch, or may have been."""
        return _counted_on(self.read_fact("next_device"))

    def raise_devices(self, above: int) -> None:
        """Give no id up to `above`, which the pool has already, unless that would leave few."""
        if above >= _ENOUGH:
            return
        if self._following <= above < self._reserved:
            self._following = above + 1
        elif above >= _counted_on(self.fact("next_device")):
            self.set_fact("next_device", str(above + 1))
            self._following = self._reserved = 0

    def replace_device(self, key: str, device: int) -> int:
        """The intent `key` has another id from now on, since the pool has `device` already, which is quarantined."""
        new = self.new_device()
        self._db.execute("UPDATE snapshots SET device = ? WHERE key = ? AND device = ?", (new, key, device))
        return new

    def adopt(self, device: int) -> None:
        """A device that was doomed while it was made is not to be deleted: a row takes it in this transaction."""
        self.buried([device])

    def move(self, key: str, device: int, now: int) -> None:
        """The snapshot has this device, made for it, from now on; the one that it had is to be deleted."""
        before = self._db.execute("SELECT device, size FROM snapshots WHERE key = ?", (key,)).fetchone()
        self.adopt(device)
        self._db.execute("UPDATE snapshots SET device = ? WHERE key = ?", (device, key))
        self.abandon(before[0], now, before[1])

    def doom(self, device: int, now: int, size: int = 0) -> None:
        """Delete this device behind, unless a snapshot has it; without a size its blocks are not discarded first."""
        self._db.execute(
            "INSERT OR IGNORE INTO doomed SELECT ?1, ?2, ?3 "
            "WHERE NOT EXISTS (SELECT 1 FROM snapshots WHERE device = ?1 AND device <> 0)",
            (device, now, size),
        )

    def buried(self, devices: Iterable[int]) -> None:
        """These are gone from the pool."""
        gone = [(device,) for device in devices]
        self._db.executemany("DELETE FROM doomed WHERE device = ?", gone)
        if self._counts:
            self._db.executemany("DELETE FROM counted WHERE device = ?", gone)

    def set_counted(self, device: int, counted: Counted) -> None:
        """What the device of a snapshot holds; nothing if no snapshot has it by now."""
        if self._counts:
            self._db.execute(
                "INSERT OR REPLACE INTO counted SELECT ?1, ?2, ?3, ?4, ?5 "
                "WHERE EXISTS (SELECT 1 FROM snapshots WHERE device = ?1)",
                (device, counted.mapped, counted.inodes, counted.added, int(counted.final)),
            )

    def set_base(self, base: Base) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO bases VALUES (?, ?, ?, ?)", (base.fstype, base.size, base.device, int(base.ready))
        )

    def forget_base(self, base: Base) -> None:
        self._db.execute("DELETE FROM bases WHERE fstype = ? AND size = ?", (base.fstype, base.size))

    def quarantine(self, devices: Iterable[int], now: int) -> None:
        self._db.executemany("INSERT OR IGNORE INTO quarantined VALUES (?, ?)", ((device, now) for device in devices))

    def release(self, devices: Iterable[int]) -> None:
        self._db.executemany("DELETE FROM quarantined WHERE device = ?", ((device,) for device in devices))

    def fact(self, name: str) -> str | None:
        found = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(found[0]) if found else None

    def forget_facts(self, names: Iterable[str]) -> None:
        self._db.executemany("DELETE FROM facts WHERE name = ?", ((name,) for name in names))

    def set_fact(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def made(self, row: Snapshot) -> None:
        """The intent is fulfilled. Written down later, by `write_made`: until then a start would find it out anew."""
        self._made[row.key] = row.device

    def write_made(self) -> None:
        """Write down which intents were fulfilled; for one thread only."""
        made = dict(self._made)
        if not made:
            return
        with self.transaction(durable=False):
            self._db.executemany(
                "UPDATE snapshots SET state = ? WHERE key = ? AND device = ?",
                ((State.READY, key, device) for key, device in made.items()),
            )
        for key, device in made.items():
            if self._made.get(key) == device:
                self._made.pop(key, None)

    # -- reading, at any time -------------------------------------------------------------------------------------

    def get(self, key: str) -> Snapshot | None:
        """The row as last committed; never waits for a writer."""
        with self._reading, _explained(self.path):
            return self._one(self._reader, "key = ?", key)

    def pages(self) -> Iterator[list[Snapshot]]:
        """All rows in the order of their keys, some at a time; no lock and no transaction is held between the pages."""
        after = ""
        while True:
            with self._reading, _explained(self.path):
                rows = self._reader.execute(
                    f"SELECT {_COLUMNS} FROM snapshots WHERE key > ? ORDER BY key LIMIT {_PAGE}",  # noqa: S608
                    (after,),
                ).fetchall()
            if not rows:
                return
            yield [self._snapshot(row) for row in rows]
            after = rows[-1][0]

    def intents(self) -> list[Snapshot]:
        """Rows whose device may not exist yet."""
        return [row for row in self._many("state = ?", State.PREPARING) if row.state is State.PREPARING]

    def children(self, key: str) -> list[Snapshot]:
        return self._many("parent = ?", key)

    def with_image(self, image: str) -> list[Snapshot]:
        return self._many("image = ?", image)

    def _many(self, where: str, *values: object) -> list[Snapshot]:
        with self._reading, _explained(self.path):
            rows = self._reader.execute(f"SELECT {_COLUMNS} FROM snapshots WHERE {where}", values)  # noqa: S608
            return [self._snapshot(row) for row in rows]

    def _one(self, db: sqlite3.Connection, where: str, *values: object) -> Snapshot | None:
        row = db.execute(f"SELECT {_COLUMNS} FROM snapshots WHERE {where}", values).fetchone()  # noqa: S608
        return None if row is None else self._snapshot(row)

    def _snapshot(self, row: _Row) -> Snapshot:
        found = _snapshot(row)
        if found.state is not State.READY and self._made.get(found.key) == found.device:
            return replace(found, state=State.READY)
        return found

    def images(self) -> set[str]:
        """The images that devices of the pool stand on."""
        with self._reading, _explained(self.path):
            rows = self._reader.execute("SELECT DISTINCT image FROM snapshots WHERE image <> '' AND device <> 0")
            return {str(row[0]) for row in rows.fetchall()}

    def doomed(self) -> dict[int, int]:
        """Devices to delete, oldest first, with their sizes."""
        with self._reading, _explained(self.path):
            return dict(self._reader.execute("SELECT device, size FROM doomed ORDER BY since, device").fetchall())

    def counted(self, device: int) -> Counted | None:
        """What was written down of a device."""
        if not self._counts:
            return None
        with self._reading, _explained(self.path):
            query = "SELECT mapped, inodes, added, final FROM counted WHERE device = ?"
            row = self._reader.execute(query, (device,)).fetchone()
        return None if row is None else Counted(mapped=row[0], inodes=row[1], added=row[2], final=bool(row[3]))

    def of_device(self, device: int) -> list[Snapshot]:
        """The snapshots that have this device: one, or none."""
        return self._many("device = ? AND device <> 0", device)

    def owners(self, device: int) -> list[str]:
        """Keys of the snapshots that have this device: one, or none."""
        return [row.key for row in self.of_device(device)]

    def quarantined(self) -> list[int]:
        return self._numbers("SELECT device FROM quarantined ORDER BY device")

    def devices(self) -> set[int]:
        """Every id that the store knows of."""
        return set(
            self._numbers(
                "SELECT device FROM snapshots WHERE device <> 0 UNION SELECT device FROM doomed "
                "UNION SELECT device FROM bases UNION SELECT device FROM quarantined"
            )
        )

    def fulfilled(self) -> set[int]:
        """Devices of snapshots that are more than an intent."""
        return set(self._numbers(f"SELECT device FROM snapshots WHERE device <> 0 AND state <> {int(State.PREPARING)}"))  # noqa: S608

    def first_layers(self) -> set[tuple[str, int]]:
        """Type and size of the filesystems of snapshots that have no parent."""
        with self._reading, _explained(self.path):
            query = "SELECT DISTINCT fstype, size FROM snapshots WHERE parent = '' AND device <> 0"
            return {(str(row[0]), int(row[1])) for row in self._reader.execute(query).fetchall()}

    def base(self, fstype: str, size: int) -> Base | None:
        found = [base for base in self.bases() if (base.fstype, base.size) == (fstype, size)]
        return found[0] if found else None

    def bases(self) -> list[Base]:
        with self._reading, _explained(self.path):
            return [_base(row) for row in self._reader.execute(_BASES).fetchall()]

    def read_fact(self, name: str) -> str | None:
        with self._reading, _explained(self.path):
            found = self._reader.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(found[0]) if found else None

    def count(self) -> int:
        return self._numbers("SELECT count(*) FROM snapshots")[0]

    def _numbers(self, query: str, *values: int) -> list[int]:
        with self._reading, _explained(self.path):
            return [int(row[0]) for row in self._reader.execute(query, values).fetchall()]


def _snapshot(row: _Row) -> Snapshot:
    key, parent, kind, state, device, size, fstype, created, updated, image, labels = row
    return Snapshot(
        key=key,
        parent=parent,
        kind=Kind(kind),
        state=State(state),
        device=device,
        size=size,
        fstype=fstype,
        created=created,
        updated=updated,
        image=image,
        labels=json.loads(labels) if labels else {},
    )


def _counted_on(told: str | None) -> int:
    """The next id. Of what is no number nobody knows how many were given: all, so that a new epoch has to begin."""
    if told is None:
        return 1
    return int(told) if told.isascii() and told.isdecimal() and int(told) else MAX_THIN_ID + 1


def _base(row: tuple[str, int, int, int]) -> Base:
    return Base(fstype=row[0], size=row[1], device=row[2], ready=bool(row[3]))


def _dump(labels: Mapping[str, str]) -> str:
    return json.dumps(dict(labels), sort_keys=True) if labels else ""


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failed(path, str(error.strerror), full=error.errno in _NO_ROOM) from error


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
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
    why = disk_trouble(path)
    return f" (its filesystem says: {why})" if why else ""


def disk_trouble(path: str, *, flush: bool = False) -> str:
    """Why the filesystem of the store takes nothing, in the kernel's words; empty where it does. Leaves no file. With
    `flush` the disk is asked too, which may take its time."""
    try:
        fd = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\0")
            if flush:
                os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return "" if error.errno in _NO_ANSWER else str(error.strerror)
    return ""
