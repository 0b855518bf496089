"""What a store says to somebody who may change nothing: neither a row, nor a file beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from blockdev import databases
from snapshotter import failures
from snapshotter.errors import StoreFailed
from snapshotter.images import PIN


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`past`: why it is not of the pool's past, empty if it is. `following`: ids below were given. `pins`: chains
    whose content this node has decided on, with that."""

    snapshots: int
    doomed: int
    quarantined: int
    past: str
    following: int
    pins: Mapping[str, str]


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
            )  # fmt: skip
    except sqlite3.Error as error:
        raise StoreFailed(f"the store {path}: {error}") from error


def _number(said: object) -> int:
    text = str(said)
    return int(text) if text.isascii() and text.isdecimal() else 0


def disk_trouble(directory: str) -> str:
    """Why the filesystem of a directory takes nothing, in the kernel's words; empty where it does. A flush tells also
    of one that has given up and is mounted `rw` all the same; nothing is written that was not to be. Only an ext4 that
    has counted errors is asked by a file without a name: where its journal has failed, nothing else tells."""
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
    return failures.disk_trouble(os.path.join(directory, ""), flush=True) if _counted_errors(directory) else ""


def _counted_errors(directory: str) -> bool:
    """Whether the directory's ext4 has met errors since it was last checked (`/sys/fs/ext4/DEVICE/errors_count`)."""
    try:
        device = os.stat(directory).st_dev
        name = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
        with open(f"/sys/fs/ext4/{name}/errors_count") as file:
            return int(file.read()) > 0
    except (OSError, ValueError):
        return False
