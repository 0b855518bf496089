"""A Commit's flush, which may hang: a pool without room keeps it for a minute, a dead disk for ever.

containerd holds its own database's transaction meanwhile. So the flush runs behind, the call looks at the pool and is
refused as soon as that cannot take what is written. The flush goes on, and the next Commit joins it.
"""

from __future__ import annotations

import logging
import threading
import time

from blockdev import Deadline
from blockdev.deadlines import started
from snapshotter.errors import PoolFull, SnapshotterError, TookTooLong
from snapshotter.pool import Pool
from snapshotter.workers import aside, current

log = logging.getLogger("runvol.snapshotter")
_AT_ONCE = 16
# Seconds until a flush is one that is waited for, between two looks at the pool, and for which a full pool may still be
# extended by itself.
_SOON, _LOOK, _EXTENDED = 0.25, 0.5, 1.0


class _Flush:
    """One, and how it ended."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def ended(self) -> None:
        self._under_way.release()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended."""
        if not self._under_way.acquire(timeout=seconds):
            return False
        self._under_way.release()
        return True


class _Thread(threading.Thread):
    """Flushes one device after the other. Handing over costs each Commit, so nothing dearer than a lock does it."""

    def __init__(self, writebacks: Writebacks) -> None:
        super().__init__(name="writebacks", daemon=True)
        self._writebacks, self._awake = writebacks, threading.Lock()
        self._awake.acquire()
        self._job = _Flush(), 0

    def begin(self, one: _Flush, device: int) -> None:
        self._job = one, device
        self._awake.release()

    def run(self) -> None:
        while self._awake.acquire():
            self._writebacks.run(*self._job, self)


class Writebacks:
    """Flushes of one pool's devices: at most one a device, and so many at once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._running: dict[int, _Flush] = {}
        self._free: list[_Thread] = []
        self._threads = 0
        # The kernel tells the loss of what was written to one flush only; the next would succeed.
        self._lost: dict[int, str] = {}

    def flush(self, device: int, key: str, deadline: Deadline) -> None:
        """What was written to the device of the snapshot `key` is on the disk, however long that takes.

        PoolFull or Unavailable while the pool cannot take it, TookTooLong at the deadline; SnapshotterError for ever if
        some of it is lost. May be repeated.
        """
        self._refuse_lost(device, key)
        one = None if self._is_full(deadline) else self._begun(device)
        if one is None or not one.wait(_SOON):
            with aside():
                one = self._waited_for(one, device, key, deadline)
        if one.error is not None:
            self._refuse_lost(device, key)
            raise one.error

    def _refuse_lost(self, device: int, key: str) -> None:
        why = self._lost.get(device)
        if why:
            raise SnapshotterError(
                f"not all that was written to snapshot {key!r} has reached pool {self._pool.name} ({why}): it cannot "
                "be committed; remove it and make it anew"
            )

    def _is_full(self, deadline: Deadline) -> bool:
        """False if the pool takes writes, True if it is full and may be extended yet. PoolFull, Unavailable."""
        try:
            self._pool.refuse_broken()
        except PoolFull:
            if not self._pool.limits.extend_by or time.monotonic() > deadline.began + _EXTENDED:
                raise
            return True
        return False

    def _waited_for(self, one: _Flush | None, device: int, key: str, deadline: Deadline) -> _Flush:
        """The flush, which is begun if it is not yet, once it has ended."""
        while True:
            full = self._is_full(deadline)
            if not deadline.remaining():
                raise TookTooLong(
                    f"what was written to snapshot {key!r} was not on the disk within {deadline.given:.0f} s: the disk "
                    "is slow, or the flush hangs in the kernel. It goes on; try again"
                )
            if one is None and not full:
                one = self._begun(device)
            seconds = min(_LOOK, deadline.remaining())
            if one is None:
                time.sleep(min(_SOON, seconds))
            elif one.wait(seconds):
                return one

    def _begun(self, device: int) -> _Flush | None:
        """The device's flush; None while too many others are under way."""
        with self._lock:
            one = self._running.get(device)
            if one is not None:
                return one
            one = _Flush()
            if current() is None:  # no server's call; its process may fork, and the threads are not in the child
                thread = threading.Thread(target=self.run, args=(one, device, None), name="flush", daemon=True)
                started("flushing", thread)
            elif self._free or self._threads < _AT_ONCE:
                (self._free.pop() if self._free else self._another()).begin(one, device)
            else:
                return None
            self._running[device] = one
            return one

    def _another(self) -> _Thread:
        thread = _Thread(self)
        started("flushing", thread)
        self._threads += 1
        return thread

    def run(self, one: _Flush, device: int, thread: _Thread | None) -> None:
        """What a thread does for one device."""
        try:
            self._pool.flush(device)
        except Exception as error:
            one.error = error
            if isinstance(error, OSError):
                self._lost[device] = error.strerror or str(error)
                log.error("what was written to a device is lost", extra={"device": device, "why": str(error)})
        with self._lock:
            del self._running[device]
            if thread is not None:
                self._free.append(thread)
        one.ended()
