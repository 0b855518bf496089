"""Devices for which no row stands yet, or never will.

The id is doomed in the store before the device is made, and a row may take it from there in one transaction: whoever is
killed in between leaves a device that is deleted, and nothing else. In this process nobody deletes it meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from blockdev import Deadline
from snapshotter import strangers
from snapshotter.pool import Pool
from snapshotter.store import Store


class Rowless:
    """Which of them are held in this process. Safe to use from several threads."""

    def __init__(self, store: Store, pool: Pool) -> None:
        self._store, self._pool = store, pool
        self._held: set[int] = set()

    def holds(self, device: int) -> bool:
        """Whether somebody makes this device just now: it stands among the doomed and must not be deleted.

        Who finds that it is not held looks for its row next.
        """
        return device in self._held

    def taking(self) -> Taking:
        return Taking(self._store, self._pool, self._held)


class Taking:
    """The ids that the making of one device takes: more than one, where the pool turns out to have some already."""

    def __init__(self, store: Store, pool: Pool, held: set[int]) -> None:
        self._store, self._pool, self._held = store, pool, held
        self._taken: set[int] = set()

    def make(
        self, create: Callable[[int], None], deadline: Deadline, *, proof: Callable[[], object] = lambda: None
    ) -> int:
        """The id of a device that `create` has made. What `proof` raises, in the transaction that takes the first id,
        ends it."""

        def first() -> int:
            with self._store.transaction():
                proof()
                return self._take()

        device = self._store.ids.renewing(first)
        return strangers.make(self._store, self._pool, device, create, lambda _theirs: self._take(), deadline)

    def _take(self) -> int:
        """An id, in a transaction: kept from the reaper before that can see it among the doomed."""
        device = self._store.new_device()
        self._taken.add(device)
        self._held.add(device)
        self._store.doom(device, time.time_ns())
        return device

    def let_go(self) -> None:
        """What no row has taken by now may be deleted."""
        self._held.difference_update(self._taken)
