"""One stamp on both sides: the pool's transaction id, which the store has a copy of, and which moves with the work.

An old copy of a store, a store that was lost, and one that another process moves on are told from the pool's own by it,
before the first id is drawn, device mapped or deleted. The stamp says which epoch of ids it is, how far the ids were
drawn, and a count, so that even without the store nobody gives an id of the past again:

    bit 62      1 (older releases began with a random number below)
    bits 40-61  the epoch: ids are given once in each
    bits 20-39  the run of 64 ids that was drawn from last
    bits 0-19   a count; it begins somewhere with each start, so that two that diverged do not meet
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace

from blockdev.devicemapper import MapperError
from blockdev.dm_targets import PoolStatus
from snapshotter.errors import PoolRefused, SnapshotterError, Unavailable
from snapshotter.ids import RUN
from snapshotter.pool import Pool
from snapshotter.store import Store

log = logging.getLogger("runvol.snapshotter")
_MARK = 1 << 62
_EPOCH, _FIELD = 22, 20
# The stamp is behind what was drawn by this many runs at the most, and has moved with each of them where nothing
# follows behind.
_LAG = 4


@dataclass(frozen=True, kw_only=True)
class Number:
    """A stamp, taken apart."""

    epoch: int
    run: int
    count: int

    def __int__(self) -> int:
        return _MARK | self.epoch << 2 * _FIELD | self.run << _FIELD | self.count


def parse(transaction: int) -> Number | None:
    """None for a transaction id of an older release, or of somebody else's pool."""
    if transaction >> 62 != 1:
        return None
    mask = (1 << _FIELD) - 1
    return Number(epoch=transaction >> 2 * _FIELD & (1 << _EPOCH) - 1, run=transaction >> _FIELD & mask,
                  count=transaction & mask)  # fmt: skip


def number(text: str | None) -> int:
    """The number in a fact of a store; 0 for anything else, as a store may have been damaged, or changed by hand."""
    return int(text) if text and text.isascii() and text.isdecimal() else 0


def _below(power: int) -> int:
    """A number below a power of two that nobody can know."""
    return int.from_bytes(os.urandom(4), "big") % power


def somewhere() -> int:
    """A count to begin with; half of them are left to count."""
    return _below(1 << _FIELD - 1)


def first_epoch(run: int) -> Number:
    return Number(epoch=_below(1 << _EPOCH), run=run, count=somewhere())


class Stamp:
    """The stamp of a pool and its store. For the one process that serves them; safe to use from several threads."""

    def __init__(self, store: Store, pool: Pool) -> None:
        self._store, self._pool = store, pool
        self._lock = threading.Lock()
        self._number = 0
        self._drawn = self._changes = 0
        # Whether a thread moves the stamp behind the calls; without one each run moves it.
        self.followed = False
        # Why this process is not the one that serves the pool; empty as long as nobody else has moved it.
        self.lost = ""

    @property
    def number(self) -> int:
        """As both sides have it; 0 as long as they could not be brought together."""
        return self._number

    def fits(self, status: PoolStatus) -> bool:
        """Whether the store is what this pool was last served with. PoolRefused for the store of another pool.

        A store that never had a pool fits none that was served.
        """
        self._refuse_other()
        told = {self._store.read_fact("generation"), self._store.read_fact("generation_next")}
        return str(status.transaction) in told

    def _refuse_other(self) -> None:
        known = self._store.read_fact("pool")
        if known not in (None, self._pool.identity):
            raise PoolRefused(
                f"the store {self._store.path} belongs to pool {known}, and {self._pool.name} is "
                f"{self._pool.identity}. Put the store of this pool in its place, or move it away: the pool has a copy "
                "of its own (`runvol pool repair-store`)"
            )

    def take(self, status: PoolStatus) -> None:
        """The store is this pool's from now on, and ids are drawn above all that either of them may have given.

        Both have a new stamp afterwards. Unavailable where the pool takes none.
        """
        now = parse(status.transaction)
        runs = -(-self._store.following() // RUN)
        if now is not None and not self.fits(status):
            runs = max(runs, now.run + 1 + _LAG)
        elif now is not None:
            runs = max(runs, now.run)
        epoch = first_epoch(runs + 1) if now is None else replace(now, run=runs + 1, count=somewhere())
        with self._lock:
            self._move(status.transaction, int(epoch), first=epoch.run * RUN)

    def follow(self) -> None:
        """Ids were drawn: the stamp moves before too many are. What the pool does not take now, it takes later."""
        behind = self._store.ids.drawn - self._drawn
        if behind >= (_LAG * RUN if self.followed else RUN):
            try:
                self.move()
            except (SnapshotterError, MapperError) as error:
                log.warning("the pool's stamp is not moved", extra={"why": str(error)})

    def move(self) -> bool:
        """Move the stamp if anything was done since; whether it was.

        PoolRefused if somebody else has moved it: another process serves the pool.
        """
        with self._lock:
            if not self._number or self._store.changes == self._changes:
                return False
            now = parse(self._number)
            if now is None:
                raise SnapshotterError(f"the stamp {self._number} of pool {self._pool.name} is none of this release's")
            run = max(now.run, self._store.following() // RUN)
            following = replace(now, run=run, count=now.count + 1)
            if following.count >> _FIELD:
                following = replace(now, run=run + 1, count=0)
            self._move(self._number, int(following))
            return True

    def begin_epoch(self) -> None:
        """Ids come back, but for those that the store knows: all of the pool's were compared with it just now."""
        with self._lock:
            now = parse(self._number)
            if now is None:
                raise Unavailable(f"pool {self._pool.name} has no stamp yet, so its ids cannot begin again")
            epoch = replace(now, epoch=(now.epoch + 1) % (1 << _EPOCH), run=0, count=somewhere())
            self._move(self._number, int(epoch), again=True)
        log.warning("a new epoch of device ids has begun", extra={"pool": self._pool.name, "epoch": epoch.epoch})

    def _move(self, old: int, new: int, *, first: int = 0, again: bool = False) -> None:
        """Told to the store first, then to the pool: a process that is killed in between leaves a store that fits.

        No id below `first` is given any more; with `again` they begin anew.
        """
        drawn = self._store.ids.drawn
        with self._store.transaction():
            self._store.set_fact("generation_next", str(new))
            self._store.give_from(first)
        try:
            self._pool.set_transaction(old, new)
        except MapperError as error:
            self.check(old, new)
            raise Unavailable(f"pool {self._pool.name} does not take a new stamp: {error}") from None
        with self._store.transaction():
            self._store.set_fact("pool", self._pool.identity)
            self._store.set_fact("generation", str(new))
            if again:
                self._store.begin_again()
        self._number, self._drawn, self._changes = new, drawn, self._store.changes

    def check(self, *expected: int) -> None:
        """PoolRefused unless the pool has the stamp that this process has given it: no id is given then any more."""
        found = self._pool.status().transaction
        if self._number and found not in (expected or (self._number,)):
            self.lost = self._store.barred = (
                f"another process has moved pool {self._pool.name} on, as its stamp is not the one that this process "
                "has given it: no device is given or deleted any more. Stop one of both, and start the other anew"
            )
            raise PoolRefused(self.lost)
        self.lost = ""
