"""What goes on behind the calls of a process, told to others: copies, walks and deletions, with how far they are.

Each process that has such work keeps a file of it in the run directory, which is a tmpfs, under a random name, and
holds a lock beside it: processes of containers see each other's files, and not each other's numbers. Who looks believes
what is held, and removes what nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from blockdev import durable, flocks

# Seconds between two lines of the same work, and the bytes of a file.
_EVERY, _MOST = 1.0, 4 << 20
# Seconds for a lock of one's own, which who looks may have for a moment; and how the names end.
_PATIENCE, _FILE, _LOCK = 1.0, ".json", ".lock"


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
    while True:
        running.begun.wait()
        try:
            _tell(directory)
        except (OSError, ValueError):  # there is no room for it, or not this moment
            time.sleep(_EVERY)


def _tell(directory: str) -> None:
    """Until there is no work, or somebody has removed what says so. OSError; ValueError for words that are no text."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    stem = os.path.join(directory, os.urandom(8).hex())
    with _held(stem + _LOCK) as lock:
        try:
            while (items := running.items()) and flocks.is_still(lock, stem + _LOCK):
                durable.replace(stem + _FILE, msgspec.json.encode(_Written(items)), synced=False)
                time.sleep(_EVERY)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(stem + _FILE)


@contextlib.contextmanager
def _held(path: str) -> Iterator[int]:
    """A lock of this process's own, gone at the end. OSError."""
    lock = flocks.take(path, _PATIENCE)
    if lock is None:
        raise BlockingIOError(path)
    try:
        yield lock
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        flocks.release(lock)


def seen(run_dir: str) -> list[Item]:
    """What all processes of this run directory do now. Files of dead ones are removed."""
    return [item for written in _read(os.path.join(run_dir, "work")) for item in written.items]


def _read(directory: str) -> Iterator[_Written]:
    try:
        names = sorted(os.listdir(directory), key=_stem)
    except OSError:
        return
    for stem, group in itertools.groupby(names, key=_stem):
        own = [os.path.join(directory, name) for name in group]
        path = os.path.join(directory, stem)
        if _are_nobodys(path + _LOCK, own) or path + _FILE not in own:
            continue
        try:
            written = msgspec.json.decode(durable.read(path + _FILE, _MOST), type=_Written)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue  # it has just been removed, or is no file of ours
        yield written


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _are_nobodys(lock: str, files: Sequence[str]) -> bool:
    """Whether nobody holds the lock, who need not be in sight; then the files are gone. What cannot be found out is
    somebody's."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            pass  # it is made before all other files of its name
        except OSError:
            return False
        else:
            stack.callback(os.close, fd)
            # Shared, as others who look are no holders; and kept until the files are gone.
            if not flocks.locked(fd, fcntl.LOCK_SH, 0):
                return False
            stack.callback(fcntl.flock, fd, fcntl.LOCK_UN)
        for path in files:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return True
