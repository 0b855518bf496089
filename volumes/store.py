"""The store of a node's volumes: SQLite in WAL mode, written before the disk is changed.

A row's state tells what an interrupted process was about to do: `creating` and `deleting` are undone and
finished at the next start, `adopting` takes over a file that must never be lost.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from volumes.errors import StoreFailed

_SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS volumes (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    name       TEXT NOT NULL UNIQUE,
    backend    TEXT NOT NULL,
    capacity   INTEGER NOT NULL,
    parameters TEXT NOT NULL,
    state      TEXT NOT NULL,
    formatting INTEGER NOT NULL DEFAULT 0
) STRICT;
"""
_COLUMNS = "seq, id, name, backend, capacity, parameters, state, formatting"


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


class Store:
    """Rows of volumes. Safe to use from several threads and beside other processes.

    Every change is one transaction that is on the disk when the call returns. Raises StoreFailed.
    """

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._path = path
        self._lock = threading.RLock()
        with _explained(path):
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._migrate()

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > _SCHEMA:
            raise StoreFailed(
                f"the store {self._path} was written by a newer runvol (schema {version}, this one knows {_SCHEMA})"
            )
        self._db.executescript(_TABLES)
        self._db.execute(f"PRAGMA user_version = {_SCHEMA}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What happens inside is seen by others whole or not at all, and they wait for it."""
        with self._lock, _explained(self._path):
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def insert(
        self, *, volume_id: str, name: str, backend: str, capacity: int, parameters: Mapping[str, str], state: State
    ) -> None:
        """A new row; the caller has looked, in the same transaction, that the name is free."""
        self._execute(
            "INSERT INTO volumes (id, name, backend, capacity, parameters, state) VALUES (?, ?, ?, ?, ?, ?)",
            (volume_id, name, backend, capacity, json.dumps(dict(parameters), sort_keys=True), state.value),
        )

    def set_state(self, volume_id: str, state: State) -> None:
        self._execute("UPDATE volumes SET state = ? WHERE id = ?", (state.value, volume_id))

    def set_capacity(self, volume_id: str, capacity: int) -> None:
        self._execute("UPDATE volumes SET capacity = ? WHERE id = ?", (capacity, volume_id))

    def set_formatting(self, volume_id: str, formatting: bool) -> None:
        self._execute("UPDATE volumes SET formatting = ? WHERE id = ?", (int(formatting), volume_id))

    def remove(self, volume_id: str) -> None:
        self._execute("DELETE FROM volumes WHERE id = ?", (volume_id,))

    def get(self, volume_id: str) -> Row | None:
        return self._one("id = ?", volume_id)

    def by_name(self, name: str) -> Row | None:
        return self._one("name = ?", name)

    def rows(self, *, after: int = 0, limit: int = -1, state: State | None = None) -> list[Row]:
        """In the order of creation, those after the sequence number `after`: stable pages whatever comes and goes."""
        wanted = "seq > ? AND (? IS NULL OR state = ?)"
        return self._select(f"{wanted} ORDER BY seq LIMIT ?", after, state, state, limit)

    def _one(self, where: str, *values: object) -> Row | None:
        found = self._select(where, *values)
        return found[0] if found else None

    def _select(self, where: str, *values: object) -> list[Row]:
        with self._lock, _explained(self._path):
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM volumes WHERE {where}", values)  # noqa: S608
            return [_row(row) for row in rows]

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        with self._lock, _explained(self._path):
            self._db.execute(statement, values)


def _row(row: tuple[int, str, str, str, int, str, str, int]) -> Row:
    seq, volume_id, name, backend, capacity, parameters, state, formatting = row
    return Row(
        seq=seq,
        volume_id=volume_id,
        name=name,
        backend=backend,
        capacity=capacity,
        parameters=json.loads(parameters),
        state=State(state),
        formatting=bool(formatting),
    )


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreFailed(f"the store {path}: {error}; see `runvol doctor`") from error
