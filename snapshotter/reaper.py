"""What Commit and Remove leave to do: unmap devices that are done, give their blocks back, delete them.

Runs behind the calls, when they are quiet. A device that somebody keeps open waits, for ever if need be; what is to be
deleted stands in the store, so that it survives a restart.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from blockdev.devicemapper import MapperError
from blockdev.errors import BlockdevError
from snapshotter.background import Background
from snapshotter.entries import Entries
from snapshotter.errors import SnapshotterError, StoreFailed
from snapshotter.idle import Idle
from snapshotter.pace import Pace
from snapshotter.pool import DeviceMissing, DeviceThere, Pool
from snapshotter.store import Store

if TYPE_CHECKING:
    from snapshotter.seals import Seals

log = logging.getLogger("runvol.snapshotter")

_BATCH = 64
_REAPING = "giving devices back"
# Of snapshots that are made only to be deleted: the pool is busy with each for as long as with a Prepare's.
_FEW = 16
# Seconds until what was busy is tried again, and until the store is looked at anew: the command line dooms devices too.
_RETRY, _LOOK = 1.0, 15.0


class Reaper:
    """A thread; `busy` says how many calls are under way, so that they go first."""

    def __init__(
        self, store: Store, pool: Pool, idle: Idle, *, discard: bool, busy: Callable[[], float],
        release_images: Callable[[], object] | None = None, seals: Seals | None = None,
        background: Background | None = None, held: Callable[[int], bool] = lambda _device: False,
        chores: Mapping[str, Callable[[], object]] | None = None,
        leaving: Callable[[int], object] = lambda _device: None,
    ) -> None:  # fmt: skip
        self._background = background or Background()
        self._held, self._chores, self._leaving = held, chores or {}, leaving
        self._store, self._pool, self._idle, self._discard = store, pool, idle, discard
        self._release_images, self._seals = release_images or (lambda: None), seals
        self.entries = Entries()
        self._lock = threading.Lock()
        self._done_with: set[int] = set()
        self._tried: set[int] = set()
        self._progress = False
        self._wake, self._stop = threading.Event(), threading.Event()
        self._pace = Pace(busy, self._stop)
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        self.deleted = self.failed = self.idled = 0

    def start(self) -> None:
        self._thread.start()
        self._background.started(self._thread)

    def stop(self) -> None:
        """End after the device under way."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def tell(self, device: int) -> None:
        """This device may be unmapped, or deleted if the store says so; 0 only asks for a look."""
        with self._lock:
            if device:
                self._done_with.add(device)
        self._wake.set()

    def found_mapped(self, devices: Iterable[int]) -> None:
        """These were mapped before this process began, and are needed."""
        self._idle.found(devices, time.monotonic())

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._background.survived(_REAPING):
                self._wake.wait(_RETRY if self._waits() else _LOOK)
                self._wake.clear()
                self._pace.step()
                if not self._stop.is_set() and self.round():
                    self._wake.set()
            if self._background.fails(_REAPING):
                self._stop.wait(_RETRY)

    def _waits(self) -> bool:
        with self._lock:
            return bool(self._done_with) or bool(self._store.doomed())

    def round(self) -> bool:
        """Do what can be done now; whether it is worth coming again at once."""
        self._store.write_made()
        with contextlib.suppress(StoreFailed):  # there may be no room yet; nothing that is refused is deleted meanwhile
            self._store.quarantine_refused(time.time_ns())
        doomed = self._store.doomed()
        with self._lock:
            done_with = self._done_with - doomed.keys()
        for device in done_with:
            self._pace.step(len(done_with))
            if self._stop.is_set():
                return False
            if self._unmap_if_free(device):
                with self._lock:
                    self._done_with.discard(device)
        gone = [one for one in self._turn(doomed) if self._deleted(one, doomed)]
        if gone:
            with self._store.transaction(durable=False):
                self._store.buried(gone)
            with self._lock:
                self._done_with.difference_update(gone)
            self.deleted += len(gone)
        more = self._unmap_idle() or self._shorten()
        self._release_images()
        for what, chore in self._chores.items():
            with self._background.survived(what):
                chore()
        self._store.tidy()
        return more or self._goes_on(doomed, gone)

    def _turn(self, doomed: Mapping[int, int]) -> list[int]:
        """Some of those that were not tried since all were: who stays busy for ever keeps nobody else waiting."""
        batch = [device for device in doomed if device not in self._tried][:_BATCH]
        self._tried.update(batch)
        return batch

    def _goes_on(self, doomed: Mapping[int, int], gone: Sequence[int]) -> bool:
        """Whether some were not tried yet, or all were, and not in vain."""
        self._progress |= bool(gone)
        if doomed.keys() - self._tried:
            return True
        again, self._progress = self._progress and len(doomed) > len(gone), False
        self._tried.clear()
        return again

    def _unmap_if_free(self, device: int) -> bool:
        try:
            if not self._pool.in_use(device):
                self._tell_leaving(device)
            return self._unmap(device)
        except (MapperError, SnapshotterError, OSError) as error:
            log.warning("device is not unmapped yet", extra={"device": device, "why": str(error)})
            return False

    def _tell_leaving(self, device: int) -> None:
        """It is unmapped whatever comes of it."""
        try:
            self._leaving(device)
        except (SnapshotterError, BlockdevError, OSError) as error:
            log.warning("what a device holds is not counted yet", extra={"device": device, "why": str(error)})

    def _deleted(self, device: int, doomed: Mapping[int, int]) -> bool:
        self._pace.step(len(doomed))
        return not self._stop.is_set() and self._delete(device, doomed[device])

    def _delete(self, device: int, size: int) -> bool:
        """Whether the device is gone from the pool."""
        try:
            if self._is_wanted(device) or self._store.is_foreign(device):
                return False
            if self._discard and size and not self._give_blocks_back(device, size):
                return False
            if not self._unmap(device):
                return False
            self._pool.delete(device)
            self.entries.gone(device)
            if self._seals is not None:
                self._seals.forget(device)
        except (MapperError, SnapshotterError, OSError) as error:
            self.failed += 1
            if not (isinstance(error, MapperError) and error.errno == errno.EBUSY):
                log.warning("device is not deleted yet", extra={"device": device, "why": str(error)})
            return False
        return True

    def _is_wanted(self, device: int) -> bool:
        """Whether it is doomed only until a row has it, or has one by now; asked in this order (see `rowless`)."""
        return self._held(device) or bool(self._store.owners(device))

    def _unmap_idle(self) -> bool:
        """Unmap some of those that nobody needs for long; whether there may be more."""
        now = time.monotonic()
        due = self._idle.due(now, _BATCH)
        for device in due:
            self._pace.step(len(due))
            if self._stop.is_set():
                return False
            if self._idle.leave(device, now, self._unmap_written):
                self.idled += 1
        return len(due) == _BATCH

    def _unmap_written(self, device: int) -> bool:
        """Unmap; what was written is on the disk before, as a Commit cannot flush what is not mapped."""
        try:
            if (self._seals is None or self._seals.release(device)) and not self._pool.in_use(device):
                self._pool.flush(device)
                self._tell_leaving(device)
                return self._unmap(device)
        except (MapperError, SnapshotterError, OSError) as error:
            log.warning("idle device is not unmapped", extra={"device": device, "why": str(error)})
        return False

    def _unmap(self, device: int) -> bool:
        """Whether the device is unmapped, and what stood on it."""
        gone = self._pool.deactivate(device) if self._seals is None else self._seals.unmap(device)
        if gone:
            self._idle.forget(device)
            self.entries.unmapped(device)
        return gone

    def _shorten(self) -> bool:
        """Make some of the surplus entries go (see `entries`); whether there may be more. The snapshots are deleted
        in the next round, as they are doomed before they are made. It can wait, so calls go first."""
        surplus = self.entries.surplus(_FEW)
        if not surplus or self._pace.busy():
            return False
        try:
            self._pool.admit()
            with self._store.transaction():
                copies = [self._store.new_device() for _ in surplus]
                for copy in copies:
                    self._store.doom(copy, time.time_ns())
            for device, copy in zip(surplus, copies, strict=True):
                if self._stop.is_set() or self._pace.busy():
                    return False
                if self._pool.find(device) is None:
                    with contextlib.suppress(DeviceMissing):
                        self._copy(copy, device)
                self.entries.gone(device)
        except (MapperError, SnapshotterError) as error:
            log.warning("the kernel's list of devices is not shortened yet", extra={"why": str(error)})
            return False
        return True

    def _copy(self, copy: int, device: int) -> None:
        try:
            self._pool.create_snapshot(copy, device)
        except DeviceThere:
            # It is somebody else's, and must not be deleted.
            self._store.refuse(copy, time.time_ns())

    def _give_blocks_back(self, device: int, size: int) -> bool:
        """The blocks that only this device has; False while somebody has it open."""
        if self._seals is not None and not self._seals.release(device):
            return False
        if not self._pool.is_writable(device):
            if not self._unmap(device):
                return False
            try:
                self._pool.activate(device, size)
            except DeviceMissing:
                return True
        return self._pool.discard(device, size)
