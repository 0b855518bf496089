"""A pool and its store in the hands of one command: no server and no other command has them meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockdev import Deadline
from blockdev.devicemapper import Mapper
from snapshotter import assembly, backing, turns
from snapshotter.errors import PoolRefused
from snapshotter.keeper import Keeper
from snapshotter.pool import Pool
from snapshotter.stamps import Stamp
from snapshotter.store import STORE, Store


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What one has inside."""

    store: Store
    pool: Pool
    keeper: Keeper
    stamp: Stamp

    def agree(self) -> None:
        """Store and pool have a new stamp, and the pool a copy of the store as it is now."""
        self.stamp.take(self.pool.status())
        self.keeper.write(self.store.image(), self.stamp.number, self.store.lineage.name)


@contextlib.contextmanager
def alone(
    mapper: Mapper, state_dir: str, deadline: Deadline, opened: Callable[[], Store] | None = None
) -> Iterator[Alone]:
    """The pool is assembled inside, its keeper held and the store open, by `opened` or as it is, empty too.

    PoolRefused where a process serves or changes the pool, or none is described.
    """
    described = backing.load(state_dir)
    if described is None:
        raise PoolRefused(assembly.NO_POOL.format(state_dir))
    with turns.whole(state_dir, described.identity):
        pool, _ = assembly.assemble(mapper, state_dir, deadline)
        store = opened() if opened is not None else Store(os.path.join(state_dir, STORE))
        keeper = Keeper(pool)
        store.closing.append(keeper.close)
        try:
            keeper.open()
            store.guard(time.time_ns())
            yield Alone(store=store, pool=pool, keeper=keeper, stamp=Stamp(store, pool))
        finally:
            store.close()
