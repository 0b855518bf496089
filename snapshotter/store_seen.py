"""What a store says to somebody who may change nothing: neither a row, nor a file beside it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from blockdev import databases
from snapshotter import tables
from snapshotter.errors import StoreFailed
from snapshotter.images import PIN


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`past`: why it is not of the pool's past, empty if it is. `following`: ids below were given. `pins`: chains
    whose content this node has decided on, with that. `damaged`: keys of rows that cannot be read, in order."""

    snapshots: int
    doomed: int
    quarantined: int
    past: str
    following: int
    pins: Mapping[str, str]
    damaged: tuple[str, ...] = ()


def seen(path: str) -> Seen:
    """StoreFailed, naming the file."""
    try:
        with contextlib.closing(databases.for_reading(path)) as db:
            facts = dict(db.execute("SELECT name, value FROM facts").fetchall())

            def count(table: str) -> int:
                return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608

            return Seen(
                snapshots=count("snapshots"), doomed=count("doomed"), quarantined=count("quarantined"),
                past=str(facts.get("past", "")), following=_number(facts.get("next_device")),
                pins={name.removeprefix(PIN): str(pin) for name, pin in facts.items() if name.startswith(PIN)},
                damaged=tuple(tables.damaged(db)),
            )  # fmt: skip
    except sqlite3.Error as error:
        raise StoreFailed(f"the store {path}: {error}") from error


def _number(said: object) -> int:
    text = str(said)
    return int(text) if text.isascii() and text.isdecimal() else 0
