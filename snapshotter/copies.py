"""Snapshots of devices for which no row stands yet.

The id is doomed in the store before the device is made, and a row takes it from there in one transaction: whoever is
killed in between leaves a device that is deleted, and nothing else. In this process nobody deletes it meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import bounded
from snapshotter import strangers
from snapshotter.locks import Locks
from snapshotter.pool import Pool
from snapshotter.store import Store


class Copies:
    """Makes them, one of a device at a time; `devices` are the locks of those that are being snapshotted, `with_ids`
    does what draws an id once more when ids have come back."""

    def __init__(
        self, store: Store, pool: Pool, devices: Locks, with_ids: Callable[[Callable[[], int]], int] = lambda it: it()
    ) -> None:
        self._store, self._pool, self._devices, self._with_ids = store, pool, devices, with_ids
        self._held: set[int] = set()

    def holds(self, device: int) -> bool:
        """Whether somebody makes this device just now: it stands among the doomed and must not be deleted.

        Who finds that it is not held looks for its row next.
        """
        return device in self._held

    @contextlib.contextmanager
    def made(self, origin: int, deadline: Deadline) -> Iterator[int]:
        """The id of a snapshot of `origin` as it is in one moment, its filesystem frozen.

        It is deleted afterwards, unless a transaction inside gives it to a row (`Store.move`, `Store.adopt`).
        DeviceMissing without the origin; WaitExpired if it does not come to rest in time: it is left as it was, as soon
        as the kernel lets go of it.
        """
        making = _Making(self, origin, deadline)
        try:
            yield bounded(f"snapshotting device {origin}", deadline, making.run)
        finally:
            making.leave()


class _Making:
    """One snapshot, in a thread that may stay in the kernel for longer than its caller waits."""

    def __init__(self, copies: Copies, origin: int, deadline: Deadline) -> None:
        self._copies, self._origin, self._deadline = copies, origin, deadline
        self._taken: set[int] = set()
        self._ended, self._left = threading.Event(), threading.Event()

    def run(self) -> int:
        try:
            it = self._copies
            first = it._with_ids(self._first)
            return strangers.make(it._store, it._pool, first, self._create, lambda _theirs: self._take(),
                                  self._deadline)  # fmt: skip
        finally:
            self._ended.set()
            if self._left.is_set():
                self._let_go()

    def leave(self) -> None:
        """The caller has what it wanted, or has given up; who comes last lets go of the ids."""
        self._left.set()
        if self._ended.is_set():
            self._let_go()

    def _first(self) -> int:
        with self._copies._store.transaction():
            return self._take()

    def _take(self) -> int:
        """An id, doomed; inside a transaction."""
        device = self._copies._store.new_device()
        self._taken.add(device)
        self._copies._held.add(device)
        self._copies._store.doom(device, time.time_ns())
        return device

    def _create(self, device: int) -> None:
        it = self._copies
        alone = it._devices.held(str(self._origin), deadline=self._deadline)
        with alone, it._pool.quiet(self._origin):
            if self._left.is_set():
                raise WaitExpired(f"snapshotting device {self._origin}", self._deadline.given)
            it._pool.create_snapshot(device, self._origin)

    def _let_go(self) -> None:
        self._copies._held -= self._taken
