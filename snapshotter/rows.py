"""What is written into the store, a row at a time: each verb is one statement or a few, inside a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from snapshotter.model import Kind, Snapshot, State
from snapshotter.reading import Reading
from snapshotter.tables import BY_DEVICE, COLUMNS, COUNTED, ONE_BASE, ONE_ROW, STALE, VALUES, Base, Counted, dumped


class Rows(Reading):
    """Rows that are read, and written. But for `made` and `write_made` all is for inside a transaction."""

    # -- snapshots ------------------------------------------------------------------------------------------------

    def find(self, key: str) -> Snapshot | None:
        """The row, as this transaction sees it. RowDamaged."""
        row = self.execute(f"SELECT {COLUMNS} FROM snapshots WHERE key = ?", key).fetchone()  # noqa: S608
        return None if row is None else self._seen(row)

    def has_children(self, key: str) -> bool:
        return self.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", key).fetchone() is not None

    def insert(self, row: Snapshot) -> None:
        self.execute(
            f"INSERT INTO snapshots ({COLUMNS}) VALUES ({VALUES})",  # noqa: S608
            row.key, row.parent, row.kind, row.state, row.device, row.size, row.fstype, row.created, row.updated,
            row.image, dumped(row.labels),
        )  # fmt: skip

    def put(self, row: Snapshot) -> None:
        """The row is as it is here, whatever there was of its key or device."""
        self.execute("DELETE FROM snapshots WHERE key = ? OR (device = ? AND device <> 0)", row.key, row.device)
        self.insert(row)

    def set_state(self, key: str, state: State) -> None:
        self.execute("UPDATE snapshots SET state = ? WHERE key = ?", state, key)

    def set_labels(self, key: str, labels: Mapping[str, str], updated: int) -> None:
        self.execute("UPDATE snapshots SET labels = ?, updated = ? WHERE key = ?", dumped(labels), updated, key)

    def set_device(self, key: str, device: int) -> None:
        self.execute("UPDATE snapshots SET device = ? WHERE key = ?", device, key)

    def commit(self, key: str, name: str, labels: Mapping[str, str], now: int) -> None:
        """The active snapshot `key` is the committed `name` from now on."""
        self.execute(
            "UPDATE snapshots SET key = ?, kind = ?, state = ?, labels = ?, created = ?, updated = ? WHERE key = ?",
            name, Kind.COMMITTED, State.READY, dumped(labels), now, now, key,
        )  # fmt: skip

    def stand_alone(self) -> None:
        """Snapshots whose parent is not there have none from now on: containerd collects from the roots upwards, and
        would never come to them."""
        self.execute("UPDATE snapshots SET parent = '' WHERE parent NOT IN (SELECT key FROM snapshots)")

    def forget_rows(self, device: int) -> None:
        """The snapshots of this device are gone, and nothing is done with the device."""
        self.execute("DELETE FROM snapshots WHERE device = ? AND device <> 0", device)

    def fulfil(self, devices: Iterable[int]) -> None:
        """The intents that have one of these devices may have been answered to a caller."""
        self.execute_each(
            "UPDATE snapshots SET state = ?2 WHERE state = ?3 AND device = ?1", devices, State.READY, State.PREPARING
        )

    def made(self, row: Snapshot) -> None:
        """The intent is fulfilled. Written down later, by `write_made`: until then a start would find it out anew."""
        self._made[row.key] = row.device

    def write_made(self) -> None:
        """Write down which intents were fulfilled; for one thread only."""
        made = dict(self._made)
        if not made:
            return
        with self.transaction(durable=False):
            for key, device in made.items():
                self.execute("UPDATE snapshots SET state = ? WHERE key = ? AND device = ?", State.READY, key, device)
        for key, device in made.items():
            if self._made.get(key) == device:
                self._made.pop(key, None)

    # -- devices --------------------------------------------------------------------------------------------------

    def doom(self, device: int, now: int, size: int = 0) -> None:
        """Delete this device behind, unless a snapshot has it; without a size its blocks are not discarded first."""
        self.execute(
            "INSERT OR IGNORE INTO doomed SELECT ?1, ?2, ?3 "
            "WHERE NOT EXISTS (SELECT 1 FROM snapshots WHERE device = ?1 AND device <> 0)",
            device, now, size,
        )  # fmt: skip

    def adopt(self, device: int) -> None:
        """A device that was doomed while it was made is not to be deleted: a row takes it in this transaction."""
        self.buried([device])

    def buried(self, devices: Iterable[int]) -> None:
        """These are gone from the pool."""
        gone = list(devices)
        self.execute_each("DELETE FROM doomed WHERE device = ?", gone)
        if self.counting:
            self.execute_each("DELETE FROM counted WHERE device = ?", gone)

    def set_counted(self, device: int, counted: Counted) -> None:
        """What the device of a snapshot holds; nothing if no snapshot has it by now."""
        if self.counting:
            self.execute(
                "INSERT OR REPLACE INTO counted SELECT ?1, ?2, ?3, ?4, ?5 "
                "WHERE EXISTS (SELECT 1 FROM snapshots WHERE device = ?1)",
                device, counted.mapped, counted.inodes, counted.added, int(counted.final),
            )  # fmt: skip

    def quarantine(self, devices: Iterable[int], now: int) -> None:
        self.execute_each("INSERT OR IGNORE INTO quarantined VALUES (?, ?)", devices, now)

    def set_aside(self, devices: Iterable[int], now: int) -> None:
        """Quarantine these for good: they are no bases, and are not deleted."""
        taken = list(devices)
        self.quarantine(taken, now)
        self.buried(taken)
        self.execute_each("DELETE FROM bases WHERE device = ?", taken)

    def is_quarantined(self, device: int) -> bool:
        return self.execute("SELECT 1 FROM quarantined WHERE device = ?", device).fetchone() is not None

    def release(self, devices: Iterable[int]) -> None:
        self.execute_each("DELETE FROM quarantined WHERE device = ?", devices)

    def set_base(self, base: Base) -> None:
        self.execute(
            "INSERT OR REPLACE INTO bases VALUES (?, ?, ?, ?)", base.fstype, base.size, base.device, int(base.ready)
        )

    def forget_base(self, base: Base) -> None:
        self.execute("DELETE FROM bases WHERE fstype = ? AND size = ?", base.fstype, base.size)

    def refuse_doubles(self) -> None:
        """The database takes no second row with a device, once none has one; what snapshots use has its table."""
        doubled = self.execute(
            "SELECT 1 FROM snapshots WHERE device <> 0 GROUP BY device HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
        for statement in (BY_DEVICE if doubled else ONE_ROW, ONE_BASE, COUNTED, STALE):
            self.execute(statement)
