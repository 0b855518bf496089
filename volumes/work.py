"""What goes on behind the calls of a process, told to others: copies, walks and deletions, with how far they are.

Each process that has such work keeps a file of it in the run directory, which is a tmpfs; who looks believes the files
of processes that live.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import msgspec

from blockdev import durable

# Seconds between two lines of the same work, and the bytes of a file.
_EVERY, _MOST = 1.0, 4 << 20


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """`what` in words; bytes that are done, and how many there are (0: unknown); seconds since it began."""

    what: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0

    @property
    def percent(self) -> int | None:
        return min(99, self.done * 100 // self.total) if self.total else None


class _Written(msgspec.Struct, frozen=True):
    pid: int
    started: int
    items: list[Item]


class Told(Protocol):
    """What tells how far a work is, as `Item` has it."""

    what: str
    total: int
    done: int


class _Running:
    """The work of this process. `begun` is set while there is any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: dict[object, tuple[float, Told]] = {}
        self.begun = threading.Event()

    def add(self, key: object, progress: Told) -> None:
        with self._lock:
            self._items[key] = time.monotonic(), progress
            self.begun.set()

    def remove(self, key: object) -> None:
        with self._lock:
            self._items.pop(key, None)
            if not self._items:
                self.begun.clear()

    def items(self) -> list[Item]:
        with self._lock:
            known = list(self._items.values())
        now = time.monotonic()
        return [
            Item(what=one.what, done=one.done, total=one.total, seconds=round(now - began, 1)) for began, one in known
        ]


running = _Running()


def tell(run_dir: str) -> None:
    """From now on others can see what this process does. For processes that stay."""
    threading.Thread(target=_told, args=[os.path.join(run_dir, "work")], name="work told", daemon=True).start()


def _told(directory: str) -> None:
    path = os.path.join(directory, f"{os.getpid()}.json")
    while True:
        running.begun.wait()
        while items := running.items():
            with contextlib.suppress(OSError):  # there is no room for it, or not this moment
                os.makedirs(directory, mode=0o700, exist_ok=True)
                content = msgspec.json.encode(_Written(os.getpid(), _started(os.getpid()), items))
                durable.replace(path, content, synced=False)
            time.sleep(_EVERY)
        with contextlib.suppress(OSError):
            os.unlink(path)


def seen(run_dir: str) -> list[Item]:
    """What all processes of this run directory do now. Files of dead ones are removed."""
    return [item for written in _read(os.path.join(run_dir, "work")) for item in written.items]


def _read(directory: str) -> Iterator[_Written]:
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        path = os.path.join(directory, name)
        try:
            written = msgspec.json.decode(durable.read(path, _MOST), type=_Written)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue  # it has just been removed, or is being written
        if _started(written.pid) == written.started:
            yield written
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _started(pid: int) -> int:
    """When the process began, in ticks since the boot (proc(5)); 0 for none: numbers are used again."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
