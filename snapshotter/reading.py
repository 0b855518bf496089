"""What stands in the store, as last committed: for List's walks, for Stat and Usage, for what looks for work behind.

Reading never waits for a writer, and holds nothing between two pages of a walk. Of an intent that was fulfilled, and is
written down as that only later, the snapshot is seen at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

from snapshotter.database import Database
from snapshotter.model import Snapshot, State
from snapshotter.tables import BASES, COLUMNS, Base, Counted, Row, base_of, snapshot_of

_PAGE = 256


class Reading(Database):
    """The rows. For every thread, at any time."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        # The device of each intent that was fulfilled since the last `write_made`, by its key.
        self._made: dict[str, int] = {}
        # Whether the table of what snapshots use is there.
        self.counting = False

    # -- snapshots ------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Snapshot | None:
        """The row as last committed."""
        found = self._many("key = ?", key)
        return found[0] if found else None

    def pages(self) -> Iterator[list[Snapshot]]:
        """All rows in the order of their keys, some at a time; no lock and no transaction is held between the pages."""
        after = ""
        while rows := self._many(f"key > ? ORDER BY key LIMIT {_PAGE}", after):
            yield rows
            after = rows[-1].key

    def intents(self) -> list[Snapshot]:
        """Rows whose device may not exist yet."""
        return [row for row in self._many("state = ?", State.PREPARING) if row.state is State.PREPARING]

    def children(self, key: str) -> list[Snapshot]:
        return self._many("parent = ?", key)

    def with_image(self, image: str) -> list[Snapshot]:
        return self._many("image = ?", image)

    def of_device(self, device: int) -> list[Snapshot]:
        """The snapshots that have this device: one, or none."""
        return self._many("device = ? AND device <> 0", device)

    def owners(self, device: int) -> list[str]:
        """Keys of the snapshots that have this device: one, or none."""
        return [row.key for row in self.of_device(device)]

    def owners_of(self, devices: Iterable[int]) -> dict[int, list[str]]:
        """Keys of the snapshots that have one of these devices, by device."""
        owners: dict[int, list[str]] = {}
        for device, key in self.query(
            "SELECT device, key FROM snapshots WHERE device <> 0 AND device IN (SELECT value FROM json_each(?)) "
            "ORDER BY device, key",
            json.dumps(sorted(devices)),
        ):
            owners.setdefault(int(device), []).append(str(key))
        return owners

    def count(self) -> int:
        return self._numbers("SELECT count(*) FROM snapshots")[0]

    def _many(self, where: str, *values: object) -> list[Snapshot]:
        rows = self.query(f"SELECT {COLUMNS} FROM snapshots WHERE {where}", *values)  # noqa: S608
        return [self._seen(row) for row in rows]

    def _seen(self, row: Row) -> Snapshot:
        found = snapshot_of(row)
        if found.state is not State.READY and self._made.get(found.key) == found.device:
            return replace(found, state=State.READY)
        return found

    # -- devices --------------------------------------------------------------------------------------------------

    def devices(self) -> set[int]:
        """Every id that the store knows of."""
        return set(
            self._numbers(
                "SELECT device FROM snapshots WHERE device <> 0 UNION SELECT device FROM doomed "
                "UNION SELECT device FROM bases UNION SELECT device FROM quarantined"
            )
        )

    def fulfilled(self) -> set[int]:
        """Devices of snapshots that are more than an intent."""
        return set(self._numbers("SELECT device FROM snapshots WHERE device <> 0 AND state <> ?", State.PREPARING))

    def doomed(self) -> dict[int, int]:
        """Devices to delete, oldest first, with their sizes."""
        return dict(self.query("SELECT device, size FROM doomed ORDER BY since, device"))

    def quarantined(self) -> list[int]:
        return self._numbers("SELECT device FROM quarantined ORDER BY device")

    def counted(self, device: int) -> Counted | None:
        """What was written down of a device."""
        if not self.counting:
            return None
        for row in self.query("SELECT mapped, inodes, added, final FROM counted WHERE device = ?", device):
            return Counted(mapped=row[0], inodes=row[1], added=row[2], final=bool(row[3]))
        return None

    # -- what they stand on ---------------------------------------------------------------------------------------

    def images(self) -> set[str]:
        """The images that devices of the pool stand on."""
        rows = self.query("SELECT DISTINCT image FROM snapshots WHERE image <> '' AND device <> 0")
        return {str(row[0]) for row in rows}

    def first_layers(self) -> set[tuple[str, int]]:
        """Type and size of the filesystems of snapshots that have no parent."""
        rows = self.query("SELECT DISTINCT fstype, size FROM snapshots WHERE parent = '' AND device <> 0")
        return {(str(row[0]), int(row[1])) for row in rows}

    def base(self, fstype: str, size: int) -> Base | None:
        found = [base for base in self.bases() if (base.fstype, base.size) == (fstype, size)]
        return found[0] if found else None

    def bases(self) -> list[Base]:
        return [base_of(row) for row in self.query(BASES)]

    def _numbers(self, query: str, *values: int) -> list[int]:
        return [int(row[0]) for row in self.query(query, *values)]
