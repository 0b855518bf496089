"""The snapshotter's memory: one row a snapshot, with its device, in SQLite.

What a later start can find out again from the pool (that an intended device exists by now) is written without waiting
for the disk. Put together of what each is told in its own module: the file (`database`), what is read (`reading`) and
written (`rows`), the ids (`ids`), the devices that are nobody's (`foreign`), and whose store it is (`lineage`).
"""

from __future__ import annotations

import os

from blockdev.dm_targets import MAX_THIN_ID
from snapshotter.errors import NotFound
from snapshotter.foreign import Foreign
from snapshotter.ids import RUN, Ids
from snapshotter.lineage import Lineage
from snapshotter.rows import Rows
from snapshotter.tables import Base

STORE = "snapshots.db"
_NONE_YET = ("the snapshotter makes it at its first start, once `runvol pool init` has made the pool; of a lost one, "
             "`runvol pool repair-store` makes what the pool knows")  # fmt: skip


def existing(state_dir: str) -> Store:
    """The store of this state directory. NotFound where there is none; OSError where that cannot be seen."""
    store = found(state_dir)
    if store is None:
        raise NotFound(os.path.join(state_dir, STORE), "the store", _NONE_YET)
    return store


def found(state_dir: str) -> Store | None:
    """The store of this state directory, if it has one. OSError where that cannot be seen."""
    path = os.path.join(state_dir, STORE)
    try:
        os.stat(path)
    except FileNotFoundError:
        return None
    return Store(path)


class Store(Rows):
    """Rows, and what has to be right about all of them at once. Safe to use from several threads; a second process may
    read beside it. Raises StoreFailed."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.foreign = Foreign(self)
        self.ids = Ids(self, self.foreign)
        self.lineage = Lineage(self, self.foreign)
        self._memories.append(self.ids)

    # -- inside a transaction -------------------------------------------------------------------------------------

    def remove(self, key: str, now: int) -> None:
        """The snapshot is gone, and its device is to be deleted behind, unless it is quarantined."""
        self.foreign.note(now)
        self.execute(
            "INSERT OR IGNORE INTO doomed SELECT device, ?, size FROM snapshots WHERE key = ? AND device <> 0 "
            "AND device NOT IN (SELECT device FROM quarantined)",
            now, key,
        )  # fmt: skip
        self.execute("DELETE FROM snapshots WHERE key = ?", key)

    def remove_damaged(self, key: str, now: int) -> None:
        """The snapshot, of which nobody knows what it was, is gone. What it had is quarantined, unless another has it
        too."""
        self.execute(
            "INSERT OR IGNORE INTO quarantined SELECT device, ?2 FROM snapshots AS this WHERE key = ?1 "
            "AND device BETWEEN 1 AND ?3 AND device NOT IN (SELECT device FROM snapshots WHERE key <> ?1) "
            "AND device NOT IN (SELECT device FROM bases) AND device NOT IN (SELECT device FROM doomed)",
            key, now, MAX_THIN_ID,
        )  # fmt: skip
        self.execute("DELETE FROM snapshots WHERE key = ?", key)

    def abandon(self, device: int, now: int, size: int = 0) -> None:
        """`doom`, but a device that is quarantined stays so: it may hold somebody else's data."""
        if self.foreign.is_refused(device):
            self.quarantine([device], now)
        elif not self.is_quarantined(device):
            self.doom(device, now, size)

    def replace_device(self, key: str, device: int) -> int:
        """The intent `key` has another id from now on, since the pool has `device` already, which is quarantined."""
        new = self.ids.new()
        self.execute("UPDATE snapshots SET device = ? WHERE key = ? AND device = ?", new, key, device)
        return new

    def move(self, key: str, device: int, now: int) -> None:
        """The snapshot has this device, made for it, from now on; the one that it had is to be deleted."""
        before, size = self.execute("SELECT device, size FROM snapshots WHERE key = ?", key).fetchone()
        self.adopt(device)
        self.set_device(key, device)
        self.abandon(before, now, size)

    # -- what its parts answer --------------------------------------------------------------------------------------

    def new_device(self) -> int:
        """See `Ids.new`; as those that follow, inside a transaction."""
        return self.ids.new()

    def raise_devices(self, above: int) -> None:
        self.ids.give_above(above)

    def give_from(self, first: int) -> None:
        self.ids.give_from(first)

    def begin_again(self) -> None:
        self.ids.begin_again()

    def following(self) -> int:
        """See `Ids.following`; as those that follow, at any time."""
        return self.ids.following()

    def used_up(self) -> bool:
        return self.ids.used_up()

    @property
    def barred(self) -> str:
        """Why no id may be given yet; see `Ids`."""
        return self.ids.barred

    @barred.setter
    def barred(self, why: str) -> None:
        self.ids.barred = why

    def guard(self, now: int) -> dict[int, list[str]]:
        """A device has one owner from now on; see `Foreign.guard`. For the server, and who has the store alone."""
        self._reserve.keep()
        self.lineage.load()
        return self.foreign.guard(now)

    @property
    def guarded(self) -> bool:
        return self.foreign.guarded

    @property
    def shared(self) -> frozenset[int]:
        """Quarantined devices that snapshots have."""
        return self.foreign.shared

    def refuse(self, device: int, now: int) -> None:
        self.foreign.refuse(device, now)

    def quarantine_refused(self, now: int) -> None:
        self.foreign.quarantine_refused(now)

    def is_foreign(self, device: int) -> bool:
        """Whether it is not what a row says; see `Foreign.knows`."""
        return self.foreign.knows(device)

    @property
    def past(self) -> str:
        """Why the store is not what its pool was last served with; see `Lineage`."""
        return self.lineage.past


__all__ = ["RUN", "STORE", "Base", "Store", "existing"]
