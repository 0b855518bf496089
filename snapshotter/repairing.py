"""`runvol pool repair-store`: a store that is lost, or came back from the past, is made again from the pool's own copy.

The copy knows what was there when it was made, a few seconds before the end; the pool knows which devices are there
now. What both agree on comes back. What was done since with the store that is there now stays. A device that nobody
knows stays quarantined, and what containerd still knows although its device is gone is named.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockdev import Deadline
from blockdev.devicemapper import Mapper
from snapshotter import images, past, seals
from snapshotter.alone import Alone, alone
from snapshotter.errors import NotFound, PoolRefused, RowDamaged
from snapshotter.model import Snapshot
from snapshotter.store import Store
from snapshotter.tables import Contents

log = logging.getLogger("runvol.snapshotter")


@dataclass
class Report:
    """What came back, and what did not; keys as containerd has them in the backend (`namespace/number/name`).

    `made` is when the copy was made, in nanoseconds since 1970; 0 where none was needed. `lost` has children before
    their parents, as they have to be removed.
    """

    made: int = 0
    restored: list[str] = field(default_factory=list)
    kept: int = 0
    lost: list[str] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)
    parents: dict[str, str] = field(default_factory=dict)

    def depth(self, key: str) -> int:
        """How many of those that are known lie below."""
        below = 0
        while (key := self.parents.get(key, "")) and below < len(self.parents):
            below += 1
        return below


def repair_store(mapper: Mapper, state_dir: str, deadline: Deadline, *, keep: bool = False) -> Report:
    """Make the store one with its pool. With `keep` as it stands: an operator says that it is right.

    PoolRefused where a process serves the pool, or where there is nothing to repair; NotFound where the pool has no
    copy. May be interrupted and repeated.
    """
    with alone(mapper, state_dir, deadline) as it:
        return _repair(it, deadline, keep=keep)


def _repair(it: Alone, deadline: Deadline, *, keep: bool) -> Report:
    store, pool, keeper, status = it.store, it.pool, it.keeper, it.pool.status()
    why = past.recognised(store, pool, it.stamp, status, deadline)
    if why:
        past.enter(store, keeper, status, why)
    elif not store.past:
        raise PoolRefused(f"the store {store.path} is what pool {pool.name} was last served with: nothing to repair")
    ids, report = pool.ids(deadline), Report()
    if keep:
        _keep(store, ids, report)
    else:
        for copy, content in past.copies(keeper, status, besides=store.lineage.name):
            report.made = report.made or copy.made
            _take(store, content, ids, report)
        if not report.made:
            raise NotFound(pool.name, "a copy of the store in pool")
    _drop_lost(store, ids, report)
    with store.transaction():
        store.lineage.leave_past()
        store.set_fact(past.SUPERSEDED, str(max((copy.sequence for copy in keeper.copies()), default=0)))
    it.agree()
    report.quarantined = store.quarantined()
    return report


def _take(store: Store, copy: Contents, ids: set[int], report: Report) -> None:
    """What the copy knows, unless what is there now says otherwise."""
    report.parents |= {row.key: row.parent for row in copy.rows}
    with store.transaction():
        trusted = {row.device for page in store.pages() for row in page} - set(store.quarantined())
        # It was committed under another name since, or removed, and somebody has it open still.
        decided = (trusted | store.doomed().keys()) - {0}
        back = _take_rows(store, copy.rows, ids, trusted, decided, report)
        known = decided | {row.device for row in copy.rows}
        for base in copy.bases:
            if base.device not in ids - known:
                continue
            known.add(base.device)
            back.add(base.device)
            there = store.base(base.fstype, base.size)
            if base.ready and there is None:
                store.set_base(base)
            elif there is None or there.device != base.device:
                store.release([base.device])
                store.doom(base.device, time.time_ns())
        for device, size in copy.doomed.items():
            if device in ids - known:
                # A row that an older store has of it was removed since.
                store.forget_rows(device)
                store.release([device])
                store.doom(device, time.time_ns(), size)
        store.release(sorted(back))
        for name, value in copy.facts.items():
            if _is_kept(store, name) and store.fact(name) is None:
                store.set_fact(name, value)


def _take_rows(
    store: Store, rows: Sequence[Snapshot], ids: set[int], trusted: set[int], decided: set[int], report: Report
) -> set[int]:  # fmt: skip
    """The devices of those rows that came back. Inside a transaction."""
    back = set[int]()
    for row in rows:
        here = _found(store, row.key)
        kept = here is not None and (here.device in trusted or not here.device)
        if kept or row.device in decided | back:
            continue
        if row.device and row.device not in ids:
            report.lost.append(row.key)
            continue
        store.put(row)
        back |= {row.device} - {0}
        report.restored.append(row.key)
    return back


def _found(store: Store, key: str) -> Snapshot | None:
    """A row that is damaged is none: the copy's takes its place."""
    try:
        return store.find(key)
    except RowDamaged:
        return None


def _is_kept(store: Store, name: str) -> bool:
    """Whether a fact says something of images and layers, whoever served. Of a layer whose tree went with the store it
    says what nobody can use: without it the layer is sealed anew."""
    if name.startswith(seals.FACT):
        device = name.removeprefix(seals.FACT)
        return device.isdecimal() and os.path.exists(os.path.join(os.path.dirname(store.path), seals.TREES, device))
    return name.startswith(images.PIN)


def _keep(store: Store, ids: set[int], report: Report) -> None:
    """An operator says that the rows are right: their devices are trusted again."""
    with store.transaction():
        owned = [row.device for page in store.pages() for row in page if row.device in ids]
        store.release(owned)
        report.kept = len(owned)


def _drop_lost(store: Store, ids: set[int], report: Report) -> None:
    """Rows without a device, and rows of which nothing proves that the device is theirs: it stays quarantined."""
    unproven, now = set(store.quarantined()), time.time_ns()
    rows = [row for page in store.pages() for row in page]
    report.parents |= {row.key: row.parent for row in rows}
    gone = [row.key for row in rows if row.device and (row.device not in ids or row.device in unproven)]
    with store.transaction():
        for key in gone:
            store.remove(key, now)
        store.stand_alone()
    lost = {*report.lost, *gone} - set(report.restored) | set(gone)
    report.lost = sorted(lost, key=lambda key: (-report.depth(key), key))
    report.restored = [key for key in report.restored if key not in set(gone)]


__all__ = ["Report", "repair_store"]
