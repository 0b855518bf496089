"""The tables of the store, and what a row of each is in this program.

Whoever changes them keeps what older releases wrote, and what they read: those work with the newer tables too.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from blockdev.dm_targets import MAX_THIN_ID
from snapshotter.errors import RowDamaged
from snapshotter.model import Kind, Snapshot, State

SCHEMA = 1
TABLES = """
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
COLUMNS = "key, parent, kind, state, device, size, fstype, created, updated, image, labels"
VALUES = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
# One row a device. Not part of the schema's number, as an older release works with it too.
ONE_ROW = "CREATE UNIQUE INDEX IF NOT EXISTS one_row ON snapshots (device) WHERE device <> 0"
BY_DEVICE = "CREATE INDEX IF NOT EXISTS by_device ON snapshots (device) WHERE device <> 0"
ONE_BASE = "CREATE UNIQUE INDEX IF NOT EXISTS one_base ON bases (device)"
# What snapshots use; an older release leaves what it says of devices that are gone.
COUNTED = (
    "CREATE TABLE IF NOT EXISTS counted (device INTEGER PRIMARY KEY, mapped INTEGER NOT NULL, inodes INTEGER NOT NULL, "
    "added INTEGER, final INTEGER NOT NULL) STRICT"
)
STALE = "DELETE FROM counted WHERE device NOT IN (SELECT device FROM snapshots)"
BASES = "SELECT fstype, size, device, ready FROM bases"

# Bytes of a device, at the most: more than any pool takes.
LARGEST = 1 << 60
# Of SQLite's file format: whether readers and writers expect a write-ahead log, which a copy has not.
LOG_FLAGS = slice(18, 20)

Row = tuple[str, str, int, int, int, int, str, int, int, str, str]


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
    if version > SCHEMA:
        raise ValueError(f"it was written by a newer runvol (schema {version}, this one knows {SCHEMA})")
    plain = {row[0] for row in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if lacking := {"facts", "snapshots", "doomed", "bases"} - plain:
        raise ValueError(f"it has no table {', '.join(sorted(lacking))}")
    if (said := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise ValueError(str(said))
    try:
        found = Contents(
            rows=[snapshot_of(row) for row in copy.execute(f"SELECT {COLUMNS} FROM snapshots ORDER BY key")],  # noqa: S608
            bases=[base_of(row) for row in copy.execute(BASES)],
            doomed={int(row[0]): int(row[1]) for row in copy.execute("SELECT device, size FROM doomed")},
            facts={str(row[0]): str(row[1]) for row in copy.execute("SELECT name, value FROM facts")},
        )
    except (RowDamaged, TypeError) as error:
        raise ValueError(str(error)) from None
    devices = [row.device for row in found.rows] + [base.device for base in found.bases] + list(found.doomed)
    for device in devices:
        if not isinstance(device, int) or not 0 <= device <= MAX_THIN_ID:
            raise ValueError(f"{device!r} is no device of a pool")
    return found


def without(content: bytes, keys: Iterable[str]) -> bytes:
    """A copy of a store, as SQLite's file, and the same without these rows."""
    raw = bytearray(content)
    raw[LOG_FLAGS] = b"\1\1"
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
        copy.deserialize(bytes(raw))
        copy.executemany("DELETE FROM snapshots WHERE key = ?", ((key,) for key in keys))
        return copy.serialize()


def damaged(db: sqlite3.Connection) -> Iterator[str]:
    """Keys of the snapshots' rows that `snapshot_of` does not read, in their order. sqlite3.Error."""
    rows = db.execute(f"SELECT {COLUMNS} FROM snapshots ORDER BY key")  # noqa: S608
    return (str(row[0]) for row in rows if is_damaged(row))


def is_damaged(row: Row) -> bool:
    try:
        snapshot_of(row)
    except (RowDamaged, TypeError):  # the tables of another program may have anything in them
        return True
    return False


def snapshot_of(row: Row) -> Snapshot:
    """RowDamaged for what nobody can have written."""
    key, parent, kind, state, device, size, fstype, created, updated, image, labels = row
    if not 0 <= device <= MAX_THIN_ID:
        raise RowDamaged(key, f"{device} is no device of a pool")
    if not 0 <= size <= LARGEST:
        raise RowDamaged(key, f"{size} is no size of a device")
    try:
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
            labels=_labels_in(labels),
        )
    except (ValueError, RecursionError) as error:
        raise RowDamaged(key, str(error)) from None


def _labels_in(text: str) -> dict[str, str]:
    found = json.loads(text) if text else {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its labels are none")
    return found


def base_of(row: tuple[str, int, int, int]) -> Base:
    return Base(fstype=row[0], size=row[1], device=row[2], ready=bool(row[3]))


def dumped(labels: Mapping[str, str]) -> str:
    return json.dumps(dict(labels), sort_keys=True) if labels else ""
