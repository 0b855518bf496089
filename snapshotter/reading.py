"""What stands in the store, as last committed: for List's walks, for Stat and Usage, for what looks for work behind.

Reading never waits for a writer, and holds nothing between two pages of a walk. Of an intent that was fulfilled, and is
written down as that only later, the snapshot is seen at once. A row that is damaged is told and passed over: only who
asks for that very snapshot is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from blockdev.dm_targets import MAX_THIN_ID
from snapshotter.database import Database
from snapshotter.errors import RowDamaged
from snapshotter.model import Snapshot, State
from snapshotter.tables import BASES, COLUMNS, LARGEST, Base, Counted, Row, base_of, is_damaged, snapshot_of, without

log = logging.getLogger("runvol.snapshotter")
_PAGE = 256


class Reading(Database):
    """The rows. For every thread, at any time."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        # The device of each intent that was fulfilled since the last `write_made`, by its key.
        self._made: dict[str, int] = {}
        # Whether the table of what snapshots use is there.
        self.counting = False
        # Keys of rows that were found damaged; those that were removed since too.
        self.damaged: set[str] = set()
        self._walked = False

    # -- snapshots ------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Snapshot | None:
        """The row as last committed. RowDamaged."""
        found = self._rows("key = ?", key)
        return self._seen(found[0]) if found else None

    def sound(self, key: str) -> Snapshot | None:
        """The same for who asks on behalf of another snapshot: a damaged row is none."""
        found = self._many("key = ?", key)
        return found[0] if found else None

    def pages(self) -> Iterator[list[Snapshot]]:
        """All rows in the order of their keys, some at a time; no lock and no transaction is held between the pages."""
        after = ""
        while rows := self._rows(f"key > ? ORDER BY key LIMIT {_PAGE}", after):
            yield self._sound(rows)
            after = rows[-1][0]

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
        return self.owners_of([device]).get(device, [])

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

    def damaged_now(self) -> list[str]:
        """Keys of the rows that were found damaged, and are so still."""
        if not self.damaged:
            return []
        rows = self._rows("key IN (SELECT value FROM json_each(?)) ORDER BY key", json.dumps(sorted(self.damaged)))
        return [row[0] for row in rows if is_damaged(row)]

    def count(self) -> int:
        return self._numbers("SELECT count(*) FROM snapshots")[0]

    def _many(self, where: str, *values: object) -> list[Snapshot]:
        return self._sound(self._rows(where, *values))

    def _rows(self, where: str, *values: object) -> list[Row]:
        return self.query(f"SELECT {COLUMNS} FROM snapshots WHERE {where}", *values)  # noqa: S608

    def _sound(self, rows: Iterable[Row]) -> list[Snapshot]:
        """Those that are not damaged."""
        found = []
        for row in rows:
            try:
                found.append(self._seen(row))
            except RowDamaged as error:
                if row[0] not in self.damaged:
                    log.error("a row of the store is passed over", extra={"store": self.path, "why": str(error)})
                self.damaged.add(row[0])
        return found

    def image(self) -> bytes:
        """See `Database.image`; without rows that are damaged, for whose sake the copy would be no use."""
        if not self._walked:
            for _ in self.pages():
                pass
            self._walked = True
        damaged = self.damaged_now()
        content = super().image()
        return without(content, damaged) if damaged else content

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
        return dict(
            self.query(
                "SELECT device, CASE WHEN size BETWEEN 0 AND ?2 THEN size ELSE 0 END FROM doomed "
                "WHERE device BETWEEN 1 AND ?1 ORDER BY since, device",
                MAX_THIN_ID, LARGEST,
            )
        )  # fmt: skip

    def count_doomed(self) -> int:
        return self._numbers("SELECT count(*) FROM doomed WHERE device BETWEEN 1 AND ?", MAX_THIN_ID)[0]

    def count_quarantined(self) -> int:
        return self._numbers("SELECT count(*) FROM quarantined")[0]

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
        """One whose device or size is damaged is none: the next demand makes another."""
        found = [base_of(row) for row in self.query(BASES)]
        return [base for base in found if 0 < base.device <= MAX_THIN_ID and 0 < base.size <= LARGEST]

    def _numbers(self, query: str, *values: int) -> list[int]:
        return [int(row[0]) for row in self.query(query, *values)]
