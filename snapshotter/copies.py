"""Snapshots of devices, each as its origin is at one instant, its filesystem frozen."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import bounded
from snapshotter.locks import Locks
from snapshotter.pool import Pool
from snapshotter.rowless import Rowless

# Seconds for which one may wait for others of its origin without being in anybody's way: each takes milliseconds.
_PATIENCE = 0.25


class Copies:
    """Makes them, one of a device at a time. Safe to use from several threads."""

    def __init__(self, pool: Pool, rowless: Rowless) -> None:
        self._pool, self._rowless = pool, rowless
        self._devices = Locks(patience=_PATIENCE)

    def holds(self, device: int) -> bool:
        """See `Rowless.holds`."""
        return self._rowless.holds(device)

    def copy(
        self, device: int, origin: int, deadline: Deadline, *, again: bool = False,
        proof: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """The device is a snapshot of `origin`. DeviceThere, DeviceMissing; what `proof` raises, once the origin is
        quiet, ends it."""
        with self._devices.held(str(origin), deadline=deadline), self._pool.quiet(origin):
            proof()
            self._pool.create_snapshot(device, origin, again=again)

    @contextlib.contextmanager
    def made(self, origin: int, deadline: Deadline) -> Iterator[int]:
        """The id of a snapshot of `origin` that has no row.

        It is deleted afterwards, unless a transaction inside gives it to a row (`Store.move`, `Store.adopt`).
        DeviceMissing without the origin; WaitExpired if it does not come to rest in time: it is left as it was, as soon
        as the kernel lets go of it.
        """
        making = _Making(self, self._rowless, origin, deadline)
        try:
            yield bounded(f"snapshotting device {origin}", deadline, making.run)
        finally:
            making.leave()


class _Making:
    """One snapshot, in a thread that may stay in the kernel for longer than its caller waits."""

    def __init__(self, copies: Copies, rowless: Rowless, origin: int, deadline: Deadline) -> None:
        self._copies, self._origin, self._deadline = copies, origin, deadline
        self._taking = rowless.taking()
        self._ended, self._left = threading.Event(), threading.Event()

    def run(self) -> int:
        try:
            return self._taking.make(self._create, self._deadline)
        finally:
            self._ended.set()
            if self._left.is_set():
                self._taking.let_go()

    def leave(self) -> None:
        """The caller has what it wanted, or has given up; who comes last lets go of the ids."""
        self._left.set()
        if self._ended.is_set():
            self._taking.let_go()

    def _create(self, device: int) -> None:
        self._copies.copy(device, self._origin, self._deadline, proof=self._still_wanted)

    def _still_wanted(self) -> None:
        if self._left.is_set():
            raise WaitExpired(f"snapshotting device {self._origin}", self._deadline.given)
