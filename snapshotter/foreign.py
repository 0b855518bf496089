"""Devices of the pool of which nobody knows whose they are: quarantined, never mapped afresh, a parent, or deleted.

An older release could give a device twice; and the pool may turn out to have an id already, at a moment when the store
cannot take that down. Such a one is remembered here and in a page beside the store (`refusals`) until it can.
"""

from __future__ import annotations

from snapshotter.errors import StoreFailed
from snapshotter.refusals import SLOTS, Refusals
from snapshotter.rows import Rows

_SEVERAL = (
    "SELECT device FROM (SELECT device FROM snapshots WHERE device <> 0 UNION ALL SELECT device FROM bases "
    "UNION ALL SELECT device FROM doomed) GROUP BY device HAVING count(*) > 1"
)


class Foreign:
    """Those of one store. For the server; its threads may use it beside each other."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        # Ids that the pool turned out to have already, and that could not be quarantined yet; on the disk as well.
        self._refused: set[int] = set()
        self._refusals = Refusals(f"{rows.path}.refused")
        # Quarantined devices that snapshots have.
        self.shared: frozenset[int] = frozenset()
        # Whether what `guard` does is on the disk.
        self.guarded = False

    def guard(self, now: int) -> dict[int, list[str]]:
        """Have the database refuse a second row with a device; the devices that have several owners, with their keys.

        As long as a device has several rows, `Ids.new` alone keeps it from being given again. May be repeated.
        StoreFailed where not all of it is on the disk (`guarded` is False then): what is known is kept to in memory all
        the same, and no id is given until it is.
        """
        self.guarded = False
        self._refused |= self._refusals.prepare() | {int(row[0]) for row in self._rows.query(_SEVERAL)}
        several = sorted(self._refused)
        # What the disk knows already counts, whether or not it takes more.
        self.look(*several)
        with self._rows.transaction():
            self._rows.set_aside(several, now)
            self._rows.refuse_doubles()
        self._rows.counting = True
        owners = self.look()
        self._refused.difference_update(several)
        if several:
            self._refusals.clear()
        if self._refusals.trouble:
            raise StoreFailed(self._refusals.trouble)
        self.guarded = True
        return owners

    def look(self, *more: int) -> dict[int, list[str]]:
        """Which of those that are quarantined, and of these, snapshots have: their keys, by device."""
        owners = self._rows.owners_of({*more, *self._rows.quarantined()})
        self.shared = frozenset(owners)
        return owners

    def refuse(self, device: int, now: int) -> None:
        """The pool has this id already: it is quarantined, in a transaction of its own. Remembered if that fails."""
        self._refused.add(device)
        self._refusals.add(device)
        self.quarantine_refused(now)

    def quarantine_refused(self, now: int) -> None:
        """What was refused and could not be quarantined then is now. Does nothing where there is none."""
        refused = sorted(self._refused)
        if not refused:
            return
        with self._rows.transaction():
            self._rows.quarantine(refused, now)
            self._rows.buried(refused)
        self._refused.difference_update(refused)
        for device in refused:
            self._refusals.drop(device)

    def note(self, now: int) -> None:
        """Whatever is refused is quarantined with the transaction that this is in, however that came about."""
        if self._refused:
            self._rows.quarantine(tuple(self._refused), now)

    def is_refused(self, device: int) -> bool:
        """Whether the pool turned out to have it, and the store does not know that yet."""
        return device in self._refused

    def knows(self, device: int) -> bool:
        """Whether the device is not what a row says: refused, or quarantined. Such a one is never mapped or deleted."""
        if self.is_refused(device):
            return True
        return bool(self._rows.query("SELECT 1 FROM quarantined WHERE device = ?", device))

    @property
    def overflows(self) -> str:
        """Why no more can be remembered, so that nothing may be made that could turn out to be there; else empty."""
        if len(self._refused) >= SLOTS // 2 or (self._refused and self._refusals.trouble):
            return (
                f"{len(self._refused)} devices are not ours, and the store {self._rows.path} cannot take that down "
                f"{self._refusals.trouble}; make room on its disk"
            )
        return ""
