"""What a block device has done, as its kernel counts it: `/sys/dev/block/MAJOR:MINOR/stat`.

Documentation/block/stat.rst of the kernel: sectors are 512 bytes, ticks are milliseconds. A look touches no disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from blockdev import sysfs

_SECTOR, _TICKS = 512, 1000.0


@dataclass(frozen=True, kw_only=True)
class DiskStats:
    """Since the device exists; seconds are those of all requests together."""

    reads: int
    read_bytes: int
    read_seconds: float
    writes: int
    written_bytes: int
    write_seconds: float

    def since(self, before: DiskStats) -> DiskStats:
        """What was done after `before`; all of it where the device counts anew."""
        if before.reads > self.reads or before.writes > self.writes:
            return self
        return DiskStats(
            reads=self.reads - before.reads,
            read_bytes=self.read_bytes - before.read_bytes,
            read_seconds=self.read_seconds - before.read_seconds,
            writes=self.writes - before.writes,
            written_bytes=self.written_bytes - before.written_bytes,
            write_seconds=self.write_seconds - before.write_seconds,
        )


def directory(device: str) -> str:
    """Where sysfs has the device. OSError."""
    return sysfs.place(os.stat(device).st_rdev)


def read(place: str) -> DiskStats | None:
    """Of the device that sysfs has at `place`; None for one that is not there."""
    try:
        with open(f"{place}/stat") as file:
            numbers = [int(word) for word in file.read().split()]
    except (OSError, ValueError):
        return None
    if len(numbers) < 8:
        return None
    return DiskStats(
        reads=numbers[0],
        read_bytes=numbers[2] * _SECTOR,
        read_seconds=numbers[3] / _TICKS,
        writes=numbers[4],
        written_bytes=numbers[6] * _SECTOR,
        write_seconds=numbers[7] / _TICKS,
    )
