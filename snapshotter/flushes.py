"""A Commit's flush, which may hang: a pool without room keeps it for a minute, a dead disk for ever.

containerd holds its own database's transaction meanwhile. So the flush runs behind, the call looks at the pool and is
refused as soon as that cannot take what is written. The flush goes on, and the next Commit joins it.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from concurrent import futures

from blockdev import Deadline
from blockdev.deadlines import started
from snapshotter.errors import PoolFull, SnapshotterError, TookTooLong
from snapshotter.pool import Pool
from snapshotter.workers import Workers, aside, current

log = logging.getLogger("runvol.snapshotter")
_AT_ONCE = 16
# Seconds until a flush is one that is waited for, between two looks at the pool, and for which a full pool may still be
# extended by itself.
_SOON, _LOOK, _EXTENDED = 0.25, 0.5, 1.0
# The device was unmapped meanwhile, by somebody who has flushed it before.
_UNMAPPED = (errno.ENOENT, errno.ENXIO)


class _Flush:
    def __init__(self) -> None:
        self.ended = threading.Event()
        self.error: Exception | None = None
        self.future: futures.Future[None] | None = None


class Flushes:
    """Flushes of one pool's devices: at most one a device, and so many at once."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._lane = pool, Workers(_AT_ONCE, name="flushes")
        self._lock = threading.Lock()
        self._running: dict[int, _Flush] = {}
        # The kernel tells the loss of what was written to one flush only; the next would succeed.
        self._lost: dict[int, str] = {}

    def flush(self, device: int, key: str, deadline: Deadline) -> None:
        """What was written to the device of the snapshot `key` is on the disk, however long that takes.

        PoolFull or Unavailable while the pool cannot take it, TookTooLong at the deadline; SnapshotterError for ever if
        some of it is lost. May be repeated.
        """
        self._refuse_lost(device, key)
        while self._is_full(deadline):
            with aside():
                time.sleep(_SOON)
        one = self._begun(device)
        if not one.ended.wait(min(_SOON, deadline.remaining())):
            self._wait(one, device, key, deadline)
        if one.error is not None:
            self._refuse_lost(device, key)
            raise one.error

    def _is_full(self, deadline: Deadline) -> bool:
        """False if the pool takes writes, True if it is full and may be extended yet. PoolFull, Unavailable."""
        try:
            self._pool.refuse_broken()
        except PoolFull:
            if not self._pool.limits.extend_by or time.monotonic() > deadline.began + _EXTENDED:
                raise
            return True
        return False

    def _refuse_lost(self, device: int, key: str) -> None:
        why = self._lost.get(device)
        if why:
            raise SnapshotterError(
                f"not all that was written to snapshot {key!r} has reached pool {self._pool.name} ({why}): it cannot "
                "be committed; remove it and make it anew"
            )

    def _wait(self, one: _Flush, device: int, key: str, deadline: Deadline) -> None:
        with aside():
            while not one.ended.is_set():
                try:
                    self._is_full(deadline)
                    if not deadline.remaining():
                        raise TookTooLong(
                            f"what was written to snapshot {key!r} was not on the disk within {deadline.given:.0f} s: "
                            "the disk is slow, or the flush hangs in the kernel. It goes on; try again"
                        )
                except Exception:
                    self._leave(one, device)
                    raise
                one.ended.wait(min(_LOOK, deadline.remaining()))

    def _begun(self, device: int) -> _Flush:
        with self._lock:
            one = self._running.get(device)
            if one is None:
                one = self._running[device] = _Flush()
                try:
                    self._begin(one, device)
                except BaseException:
                    del self._running[device]
                    raise
            return one

    def _begin(self, one: _Flush, device: int) -> None:
        if current() is not None:
            one.future = self._lane.submit(self._run, one, device)
        else:  # no server's: the process may have forked, and the lane's threads are not in the child
            started("flushing", threading.Thread(target=self._run, args=(one, device), name="flush", daemon=True))

    def _leave(self, one: _Flush, device: int) -> None:
        """What waits for a thread need not be begun."""
        with self._lock:
            if one.future is not None and one.future.cancel():
                self._running.pop(device, None)

    def _run(self, one: _Flush, device: int) -> None:
        try:
            self._pool.flush(device)
        except Exception as error:
            one.error = error
            if isinstance(error, OSError) and error.errno not in _UNMAPPED:
                self._lost[device] = error.strerror or str(error)
                log.error("what was written to a device is lost", extra={"device": device, "why": str(error)})
        finally:
            with self._lock:
                self._running.pop(device, None)
            one.ended.set()
