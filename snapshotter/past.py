"""A store that its pool was not last served with: an old copy, a new one in the place of one that is lost, or the store
of a pool that came back from the past itself.

What the store alone can answer it answers. A device is mapped, and is a parent, only where the pool's own copy of the
store says the same of it (`keeper`): an id is given once in an epoch, so that what was true once is true as long as the
device is there. All others are quarantined until an operator has decided (`repairing`); new work goes on, with ids that
neither side can have given.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator

from blockdev import Deadline
from blockdev.dm_targets import PoolStatus
from blockdev.errors import BlockdevError
from snapshotter import stamps
from snapshotter.errors import SnapshotterError
from snapshotter.keeper import Copy, Keeper
from snapshotter.pool import Pool
from snapshotter.store import Store
from snapshotter.tables import Contents, contents

log = logging.getLogger("runvol.snapshotter")
# The number of the last copy that was there when an operator decided: none of them says what is true now.
SUPERSEDED = "superseded"
_ASK = "`runvol pool repair-store` takes what the pool's own copy of the store knows"


def recognised(store: Store, pool: Pool, stamp: stamps.Stamp, status: PoolStatus, deadline: Deadline) -> str:
    """Why the store is not what the pool was last served with; empty if it is, or if the pool is new to everybody.

    PoolRefused for the store of another pool.
    """
    if stamp.fits(status):
        return ""
    known = store.read_fact("generation")
    if known is None:
        if not store.count() and _is_empty(pool, deadline):
            return ""
        return f"the store of pool {pool.name} was lost, and this is a new one: {_ASK}"
    if is_older(status, known):
        return (
            f"pool {pool.name} came back from the past: its stamp is {status.transaction}, and the store's {known}. If "
            "its devices are right, `runvol pool repair-store --keep` says so"
        )
    return (
        f"the store is an old copy: its stamp is {known}, and that of pool {pool.name} {status.transaction}. Put the "
        f"newest in its place, or {_ASK}"
    )


def _is_empty(pool: Pool, deadline: Deadline) -> bool:
    """Whether nobody can have used the pool yet. One that cannot be looked into may have been."""
    try:
        return not pool.ids(deadline)
    except (SnapshotterError, BlockdevError, OSError) as error:
        log.warning("nobody can tell whether the pool is new", extra={"pool": pool.name, "why": str(error)})
        return False


def is_older(status: PoolStatus, known: str) -> bool:
    """Whether the pool has the stamp of an earlier moment than the store."""
    ours, theirs = stamps.parse(stamps.number(known)), stamps.parse(status.transaction)
    return (
        ours is not None
        and theirs is not None
        and ours.epoch == theirs.epoch
        and (ours.run, ours.count) > (theirs.run, theirs.count)
    )


def enter(store: Store, keeper: Keeper, status: PoolStatus, why: str) -> None:
    """Quarantine what nothing proves. May be repeated."""
    rows = {(row.key, row.device) for page in store.pages() for row in page if row.device}
    bases = {(base.fstype, base.size, base.device) for base in store.bases()}
    doomed = set(store.doomed())
    older = is_older(status, store.read_fact("generation") or "")
    before: str | None = None
    for copy, known in () if older else copies(keeper, status):
        if before is None:
            before = known.facts.get("before", "") if "past" in known.facts else copy.lineage
        rows -= {(row.key, row.device) for row in known.rows}
        bases -= {(base.fstype, base.size, base.device) for base in known.bases if base.ready}
        doomed -= known.doomed.keys()
    unproven = {device for _, device in rows} | {device for _, _, device in bases} | doomed
    store.lineage.enter_past(why, unproven, time.time_ns(), before=before or "")
    log.error("the store is not the pool's own", extra={"why": why, "unproven": len(unproven)})


def copies(keeper: Keeper, status: PoolStatus, *, besides: str = "") -> Iterator[tuple[Copy, Contents]]:
    """Of each store that the pool was served with in its present epoch the newest copy that can be read; the newest
    first, and none of the lineage `besides`, nor one that a newer store knows to be decided upon. A damaged one, or one
    of a store that was damaged when it was copied, is told and passed over."""
    now, done, decided = stamps.parse(status.transaction), {besides}, 0
    for copy in keeper.copies():
        then = stamps.parse(copy.stamp)
        if now is None or then is None or then.epoch != now.epoch or copy.lineage in done or copy.sequence <= decided:
            continue
        try:
            known = _read(keeper, copy)
        except (sqlite3.Error, OSError, ValueError) as error:
            log.warning("a copy of the store cannot be read", extra={"place": copy.place, "why": str(error)})
            continue
        if known is None:
            log.warning("a copy of the store is damaged", extra={"place": copy.place})
            continue
        done.add(copy.lineage)
        decided = max(decided, stamps.number(known.facts.get(SUPERSEDED)))
        yield copy, known


def _read(keeper: Keeper, copy: Copy) -> Contents | None:
    found = keeper.read(copy)
    if found is None:
        return None
    with contextlib.closing(found):
        return contents(found)
