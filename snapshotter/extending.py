"""Making a pool larger: by what an operator says, by what lies below it by now, or by itself above a threshold.

For the moment between two tables the pool is suspended; a mark in the state directory says so, and whoever comes after
a process that was killed then lets the I/O through again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator

from blockdev import Deadline
from blockdev.devicemapper import Mapper, MapperError
from blockdev.dm_targets import PoolStatus
from blockdev.errors import BlockdevError
from snapshotter import backing, turns
from snapshotter.backing import Backing
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.pool import Pool

log = logging.getLogger("runvol.snapshotter")

# Percent by which a pool is extended that does not do so by itself.
_STEP = 20
# Seconds in which a pool that was full takes writes again once it is larger, and between two looks at it.
_AGAIN, _PAUSE = 5.0, 0.05


class Extender:
    """Makes the pool larger; one extension at a time, whichever process wants it."""

    def __init__(self, mapper: Mapper, pool: Pool, below: Backing) -> None:
        self._mapper, self._pool, self._below = mapper, pool, below
        self._lock = threading.Lock()

    def extend(self, part: str, more: int, deadline: Deadline) -> PoolStatus:
        """`more` bytes for `part` (data or metadata), or what there is more of it by now; the status afterwards.

        Unavailable where there is nothing, or where the pool does not take it.
        """
        with self._turn(deadline):
            return self._extend(part, more, self._pool.status(), deadline)

    def extend_somehow(self, part: str, deadline: Deadline) -> PoolStatus:
        """By what there is more by now, or else by the percentage that it extends itself by."""
        with self._turn(deadline):
            status = self._pool.status()
            more = 0 if self._below.beyond(part, status) else self._step(part, status)
            return self._extend(part, more, status, deadline)

    @contextlib.contextmanager
    def _turn(self, deadline: Deadline) -> Iterator[None]:
        with self._lock, turns.extension(self._below.state_dir, deadline):
            self._resume()
            yield

    def _resume(self) -> None:
        """A process that was killed between two tables has left the pool suspended, and all I/O waiting."""
        if self._is_left_suspended():
            found = self._mapper.find(self._pool.name)
            if found is not None and found.suspended:
                self._mapper.resume(self._pool.name)
            os.unlink(self._suspending())

    def _suspending(self) -> str:
        """There as long as an extension has the pool suspended; a reboot ends that too."""
        return os.path.join(self._below.state_dir, "pool.suspended")

    def _is_left_suspended(self) -> bool:
        return os.path.exists(self._suspending())

    def _extend(self, part: str, more: int, before: PoolStatus, deadline: Deadline) -> PoolStatus:
        self._below.extend(part, more, before, deadline)
        after = self._reload(deadline)
        if _fill(part, after)[1] <= _fill(part, before)[1]:
            raise Unavailable(
                f"pool {self._pool.name} does not take what its {part} device has more: "
                + "; ".join(finding.message for finding in self._pool.health(after))
            )
        return self._taking_writes(after, min(_AGAIN, deadline.remaining()))

    def _taking_writes(self, after: PoolStatus, seconds: float) -> PoolStatus:
        """The status once the kernel lets writes on that waited for space, which it does behind the new table."""
        until = time.monotonic() + seconds
        while after.mode == "out_of_data_space" and after.data_free and time.monotonic() < until:
            time.sleep(_PAUSE)
            after = self._pool.status()
        return after

    def _reload(self, deadline: Deadline) -> PoolStatus:
        it = self._below.description
        metadata, data = self._below.attach(deadline)
        table = self._below.table(metadata, data)
        self._mapper.load(it.name, [table])
        os.close(os.open(self._suspending(), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            self._mapper.suspend(it.name)
            self._mapper.resume(it.name)
        except MapperError:
            # A resume that failed leaves every device of the pool hanging: back to the table as it was.
            self._mapper.clear(it.name)
            self._mapper.resume(it.name)
            raise
        os.unlink(self._suspending())
        return self._pool.status()

    def as_needed(self, deadline: Deadline) -> list[str]:
        """Extend what has passed its threshold, each part whatever becomes of the other; what was done, as sentences.

        Unavailable with what could not be extended, once all was tried.
        """
        if self._is_left_suspended():
            with self._turn(deadline):
                pass
        status = self._pool.status()
        if status.mode in ("fail", "error") or not self._pool.limits.extend_by:
            return []
        done, failed = [], []
        for part in ("metadata", "data"):
            if not self._is_above(part, status):
                continue
            try:
                said = self._extend_above(part, deadline)
            except (SnapshotterError, BlockdevError, OSError) as error:
                failed.append(f"the {part}: {error}")
                continue
            if said:
                done.append(said)
                log.warning("pool", extra={"extended": said})
        if failed:
            raise Unavailable("; ".join(failed))
        return done

    def _extend_above(self, part: str, deadline: Deadline) -> str:
        with self._turn(deadline):
            # Another process may have extended it while this one waited for its turn.
            before = self._pool.status()
            if not self._is_above(part, before):
                return ""
            more = 0 if self._below.beyond(part, before) else self._step(part, before)
            after = self._extend(part, more, before, deadline)
        (_, was), (_, now) = _fill(part, before), _fill(part, after)
        by = (now - was) * self._unit(part)
        return f"extended the {part} of pool {self._pool.name} by {by} bytes (now {after.mode})"

    def _is_above(self, part: str, status: PoolStatus) -> bool:
        used, total = _fill(part, status)
        return used * 100 >= total * self._pool.limits.extend_above

    def _step(self, part: str, status: PoolStatus) -> int:
        unit, (_, total) = self._unit(part), _fill(part, status)
        return max(1, -(-total * (self._pool.limits.extend_by or _STEP) // 100)) * unit

    def _unit(self, part: str) -> int:
        return self._below.description.block if part == "data" else backing.METADATA_BLOCK


def _fill(part: str, status: PoolStatus) -> tuple[int, int]:
    """Blocks that are used, and all."""
    if part == "data":
        return status.data_used, status.data_total
    return status.metadata_used, status.metadata_total
