"""A thin pool as a whole: what it is told, and what it says of itself.

Every message that matters is followed by a look at the pool's status: the kernel throws the result of the commit after
a message away, so a `create_thin` on failing metadata says yes and makes nothing.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

from blockdev.devicemapper import Mapper, MapperError
from blockdev.dm_targets import SECTOR, PoolStatus
from snapshotter.errors import PoolFull, SnapshotterError, Unavailable
from snapshotter.watermarks import Health, Limits, Remedies, Watermarks

# Seconds for which a status is good enough to let a snapshot be made.
_FRESH = 0.25
# Seconds for which one is good enough to refuse by.
_JUST_NOW = 0.05


class DeviceMissing(SnapshotterError):
    """The pool has no device of this id."""


class DeviceThere(SnapshotterError):
    """The pool has a device of this id already, which this process has not made."""


class ToldPool:
    """A pool that is assembled under `name`."""

    def __init__(self, mapper: Mapper, name: str, limits: Limits | None = None) -> None:
        self.mapper, self.name = mapper, name
        self.limits, self.remedies = limits or Limits(), Remedies()
        self._block = 0
        self._seen: tuple[float, PoolStatus] | None = None
        self._seeing = threading.Lock()

    # -- messages ---------------------------------------------------------------------------------------------------

    def create_thin(self, device: int, *, again: bool = False) -> None:
        """A new, empty device. DeviceThere if the id is taken, unless `again`: an earlier life made it for this row."""
        self._create(f"create_thin {device}", device, again=again)

    def create_snapshot(self, device: int, origin: int, *, again: bool = False) -> None:
        """A snapshot of `origin`, which must be quiet. DeviceMissing without the origin; DeviceThere as above."""
        try:
            self._create(f"create_snap {device} {origin}", device, again=again)
        except MapperError as error:
            if error.errno == errno.ENODATA:
                raise DeviceMissing(f"pool {self.name} has no device {origin}, the origin of {device}") from None
            raise

    def _create(self, message: str, device: int, *, again: bool) -> None:
        """What exists is somebody else's, or another snapshot's: a success would hand out its data."""
        try:
            self._send(message, errno.EEXIST if again else None)
        except MapperError as error:
            if error.errno == errno.EEXIST:
                raise DeviceThere(f"pool {self.name} has a device {device} already that no snapshot has made") from None
            raise
        self._confirm()

    def delete(self, device: int) -> None:
        """Forget the device; one that is not there is no error. MapperError EBUSY while it is mapped."""
        self._send(f"delete {device}", errno.ENODATA)
        self._confirm()

    def set_transaction(self, old: int, new: int) -> None:
        """The pool's generation, compared and swapped."""
        self._send(f"set_transaction_id {old} {new}")
        self._confirm()

    def _send(self, message: str, done: int | None = None) -> None:
        try:
            self.mapper.message(self.name, message)
        except MapperError as error:
            if error.errno == done:
                return
            raise self._explained(error) from error

    def _explained(self, error: MapperError) -> SnapshotterError | MapperError:
        if error.errno in (errno.EOPNOTSUPP, errno.EIO, errno.EINVAL):
            broken = [finding for finding in self.health() if finding.state == "broken"]
            if broken:
                return Unavailable(f"{error}; {broken[0].message}")
        if error.errno == errno.ENXIO:
            return Unavailable(f"pool {self.name} is not there: {error}; `runvol pool status` tells more")
        return error

    def _confirm(self) -> None:
        """Unavailable unless the commit after the last message went through."""
        status = self.status()
        if status.mode in ("fail", "error", "ro") or status.needs_check:
            raise Unavailable(next(finding.message for finding in self.health(status) if finding.state == "broken"))

    # -- status -----------------------------------------------------------------------------------------------------

    def status(self) -> PoolStatus:
        # A status is as old as the question: whoever asks may be held up before it has the answer, and after.
        asked = time.monotonic()
        try:
            status = self.mapper.pool_status(self.name)
            with self._seeing:
                if self._seen is None or self._seen[0] <= asked:
                    self._seen = asked, status
            return status
        except MapperError as error:
            if error.errno == errno.ENXIO:
                raise Unavailable(f"pool {self.name} is not assembled; `runvol pool status` tells why") from None
            raise

    def _recent(self) -> PoolStatus:
        """The status as it was a moment ago; each message looks again."""
        kept = self._kept()
        return self.status() if kept is None else kept[1]

    def _kept(self) -> tuple[float, PoolStatus] | None:
        """The last status and when it was asked for, if that was a moment ago."""
        seen = self._seen
        return seen if seen is not None and time.monotonic() - seen[0] < _FRESH else None

    @property
    def _watermarks(self) -> Watermarks:
        return Watermarks(name=self.name, limits=self.limits, remedies=self.remedies)

    def health(self, status: PoolStatus | None = None) -> list[Health]:
        """What is wrong with the pool and what to do; one `ok` if nothing is."""
        return [self._watermarks.health(status or self.status())]

    def refuse_broken(self) -> PoolStatus:
        """The status a moment ago. PoolFull where the pool has no room, Unavailable where it takes no writes else."""
        return self._judged(self._watermarks.refuse_broken)

    def admit(self, places: int = 0, each: int = 0) -> None:
        """Return if a new snapshot may be made that writes `each` bytes at so many places at once.

        PoolFull before writes would hang, Unavailable where nothing can be made.
        """

        def judge(status: PoolStatus) -> None:
            self._watermarks.admit(status)
            if places:
                self._watermarks.admit_writes(status, places * max(2, -(-each // self.block_bytes())))

        self._judged(judge)

    def _judged(self, judge: Callable[[PoolStatus], None]) -> PoolStatus:
        """The status a moment ago, which the judge admits. Nobody is refused for what was: the pool may have been
        extended since, or put right."""
        kept = self._kept()
        if kept is not None:
            asked, status = kept
            try:
                judge(status)
                return status
            except (PoolFull, Unavailable):
                if time.monotonic() - asked < _JUST_NOW:
                    raise
        status = self.status()
        judge(status)
        return status

    def block_bytes(self) -> int:
        """Size of a data block of the pool."""
        if not self._block:
            ((_kind, table),) = self.mapper.lines(self.name, table=True)
            self._block = int(table.split()[2]) * SECTOR
        return self._block

    def data_bytes(self) -> int:
        """What the pool holds, as it was a moment ago."""
        return self._recent().data_total * self.block_bytes()
