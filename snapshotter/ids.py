"""Device ids: each is given once in an epoch of the pool, and to nobody what anything has already.

The next one is counted in the store, whose transaction decides: one that comes to nothing gives its ids back, and of
one that may or may not be on the disk the count is read again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from blockdev.dm_targets import MAX_THIN_ID
from snapshotter.errors import IdsUsedUp, Unavailable
from snapshotter.foreign import Foreign
from snapshotter.rows import Rows

# Device ids are taken in runs of this many, so that most transactions need not write the counter; a start skips the
# rest of a run.
RUN = 64
# Ids above one that somebody else has taken are drawn as long as this many are left; below that, those around it.
_ENOUGH = MAX_THIN_ID // 2
_NEXT = "next_device"
_T = TypeVar("_T")
_GIVEN = (
    "SELECT EXISTS (SELECT 1 FROM snapshots WHERE device = ?1 AND device <> 0) "
    "OR EXISTS (SELECT 1 FROM doomed WHERE device = ?1) OR EXISTS (SELECT 1 FROM bases WHERE device = ?1) "
    "OR EXISTS (SELECT 1 FROM quarantined WHERE device = ?1)"
)


class Ids:
    """The ids of one store. What changes the count is for inside a transaction."""

    def __init__(self, rows: Rows, foreign: Foreign) -> None:
        self._rows, self._foreign = rows, foreign
        # Of the run that is reserved: the next id, and the first above.
        self._following = self._reserved = 0
        self._before = 0, 0
        # How many were drawn; for what follows behind (`stamps`).
        self.drawn = 0
        # Why none may be given yet; empty once the pool's devices were compared with the rows.
        self.barred = ""
        # Begins a new epoch, in which ids come back; the server sets it.
        self.renew: Callable[[], None] | None = None
        self._renewal = threading.Lock()

    def begin(self) -> None:
        """See `Memory`."""
        self._before = self._following, self._reserved

    def undo(self) -> None:
        """What was taken is free again, and a run that was reserved is not reserved."""
        self._following, self._reserved = self._before

    def forget(self) -> None:
        """The count is read from the disk again."""
        self._following = self._reserved = 0

    def new(self) -> int:
        """An id that was never given before, if the transaction is committed.

        Unavailable while the store was not compared with its pool, PoolFull once no id is left.
        """
        if why := self.barred or self._foreign.overflows:
            raise Unavailable(why)
        while True:
            if self._following >= self._reserved:
                self._following = _counted_on(self._rows.fact(_NEXT))
                self._reserved = self._following + RUN
                self._rows.set_fact(_NEXT, str(self._reserved))
            device, self._following = self._following, self._following + 1
            if device > MAX_THIN_ID:
                raise IdsUsedUp(
                    f"the pool has given all of its {MAX_THIN_ID} device ids; they come back in a new epoch, which "
                    "begins as soon as its devices were compared with the store's"
                )
            if not self._rows.execute(_GIVEN, device).fetchone()[0]:
                self.drawn += 1
                return device

    def renewing(self, work: Callable[[], _T]) -> _T:
        """`work`, and once more where no id was left: one call begins a new epoch for all that meet the end at once."""
        try:
            return work()
        except IdsUsedUp:
            if self.renew is None:
                raise
        with self._renewal:
            if self.used_up():
                self.renew()
        return work()

    def following(self) -> int:
        """All ids below were given in this epoch, or may have been; as last committed."""
        return _counted_on(self._rows.read_fact(_NEXT))

    def used_up(self) -> bool:
        """Whether no id is left in this epoch."""
        return self.following() > MAX_THIN_ID and self._following >= min(self._reserved, MAX_THIN_ID + 1)

    def give_from(self, first: int) -> None:
        """Give no id below this one any more, however few that leaves."""
        if max(first, self._following) > max(_counted_on(self._rows.fact(_NEXT)), self._following):
            self._count_from(first)

    def begin_again(self) -> None:
        """Ids are given from the first on again, but for those that anything has: only in a new epoch of the pool, once
        its devices were compared with the store's."""
        self._count_from(1)

    def give_above(self, device: int) -> None:
        """Give no id up to this one, which the pool has already, unless that would leave few."""
        if device >= _ENOUGH:
            return
        if self._following <= device < self._reserved:
            self._following = device + 1
        elif device >= _counted_on(self._rows.fact(_NEXT)):
            self._count_from(device + 1)

    def _count_from(self, first: int) -> None:
        self._rows.set_fact(_NEXT, str(first))
        self.forget()


def _counted_on(told: str | None) -> int:
    """The next id. Of what is no number nobody knows how many were given: all, so that a new epoch has to begin."""
    if told is None:
        return 1
    return int(told) if told.isascii() and told.isdecimal() and int(told) else MAX_THIN_ID + 1
