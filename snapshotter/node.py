"""The snapshotter of one node, put together: store, pool, verbs, and what runs behind them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blockdev import Deadline
from blockdev.devicemapper import Events, Mapper
from blockdev.errors import BlockdevError
from snapshotter import assembly, backing, past, recovery, strangers
from snapshotter.background import Background
from snapshotter.bases import Bases, rounded
from snapshotter.errors import PoolFull, PoolRefused, SnapshotterError, StoreFailed, Unavailable
from snapshotter.extending import Extender
from snapshotter.gauge import Follower, Gauge
from snapshotter.idle import Idle
from snapshotter.keeper import Keeper
from snapshotter.lending import Lender
from snapshotter.origins import Sizes
from snapshotter.pace import Pace
from snapshotter.pool import Limits, Pool
from snapshotter.reaper import Reaper
from snapshotter.snapshots import Snapshotter
from snapshotter.stamps import Stamp
from snapshotter.store import STORE, Store
from snapshotter.strangers import Compared

if TYPE_CHECKING:
    from snapshotter.images import Images
    from snapshotter.seals import Sealer, Seals

log = logging.getLogger("runvol.snapshotter")

_RETRY, _LOOK, _PAUSE = 2.0, 10.0, 1.0
# Seconds that a call waits for the pool: containerd may hold its database's transaction meanwhile.
_PATIENCE = 1.5
_OPENING = "opening the pool"
# Seconds that an end may take; systemd allows 30 for it, with the calls under way.
_ENDING = 15.0
# A copy of the store is made at most so often, in seconds, and takes at most this part of the time.
_COPY_PAUSE, _COPY_SHARE = 2.0, 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator chooses. Sizes are bytes."""

    state_dir: str
    fstype: str = "ext4"
    size: int = 10 << 30
    by_namespace: Mapping[str, int] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    discard: bool = True
    images: str = ""
    # Whose shared images are used: see `trust`.
    image_keys: tuple[str, ...] = ()
    image_roots: str = ""
    images_unsigned: bool = False
    verity: bool = False
    # Layers that another namespace has unpacked are not stored again.
    share_layers: bool = True
    # Seconds after which a mapped device that nobody has open is unmapped; 0 is never.
    unmap_idle: float = 600
    # Where a filesystem shows the pool's fill; empty for nowhere.
    gauge: str = ""


class Activity:
    """How long ago the last call ended; what runs behind lets calls go first."""

    def __init__(self) -> None:
        self._running, self._last = 0, 0.0

    def begin(self) -> None:
        self._running += 1

    def end(self, now: float) -> None:
        self._running -= 1
        self._last = now

    def quiet_for(self) -> float:
        """Seconds without a call; 0 while one runs."""
        return 0.0 if self._running else time.monotonic() - self._last


class Node:
    """Opens the store at once; the pool comes in the background, and calls that need it wait for it."""

    def __init__(self, settings: Settings) -> None:
        description = backing.load(settings.state_dir)
        if description is None:
            raise PoolRefused(f"no pool is described in {settings.state_dir}; make one with `runvol pool init`")
        self.settings, self.activity = settings, Activity()
        self._usable, self._stop = threading.Event(), threading.Event()
        self.background = Background()
        self.store = Store(os.path.join(settings.state_dir, STORE))
        self.store.barred = f"the devices of pool {description.name} are not compared with the store's yet"
        self.mapper = Mapper()
        # Its nodes are known only once it is assembled; the name and the identity are known now.
        self.pool = Pool(self.mapper, description.name, description.identity, "", settings.limits)
        self.pool.remedies = backing.remedies(description)
        self.stamp, self.keeper = Stamp(self.store, self.pool), Keeper(self.pool)
        self.store.closing.append(self.keeper.close)
        self._copied, self._copy_at, self.copied_at = 0, 0.0, 0.0
        sizes = {rounded(size) for size in (settings.size, *settings.by_namespace.values())}
        self.bases = Bases(self.store, self.pool, os.path.join(settings.state_dir, "bases"),
                           {(settings.fstype, size) for size in sizes})  # fmt: skip
        self.images = self._shared_images()
        self.seals, self.sealer = self._verified_layers()
        self.idle = Idle(settings.unmap_idle)
        self.reaper = Reaper(self.store, self.pool, self.idle, discard=settings.discard, busy=self.activity.quiet_for,
                             release_images=self.images.release_unused if self.images else None,
                             seals=self.seals, background=self.background,
                             held=self._is_held, chores={"parting layers from writers": self._part_layers,
                                                         "writing down what is used": self._write_counts,
                                                         "giving up unused bases": self._drop_bases},
                             leaving=self._leaving)  # fmt: skip
        self.snapshots = Snapshotter(
            self.store, self.pool, self.bases,
            Sizes(fstype=settings.fstype, size=settings.size, by_namespace=settings.by_namespace),
            self._done_with, self.images, self.seals, self.idle,
            self.sealer.tell if self.sealer else lambda _name: None, self.activity.quiet_for, self.background,
            settings.share_layers, self.stamp.follow,
        )  # fmt: skip
        self.store.ids.renew = self.renew_ids
        self.lender = Lender(self.store, self.pool, self.snapshots)
        # Set once the pool was opened, or could not be.
        self._tried = threading.Event()
        self._why_not = f"pool {description.name} is being assembled"
        self._extender: Extender | None = None
        self.found = recovery.Found()
        self._compared: Compared | None = None
        self._ahead: dict[str, Callable[[], None]] = {
            "the recovery": self._recover_behind, "starting the reaper": self._start_reaper,
            "making the empty base": self._make_base, "starting the counts": self.snapshots.counts.start,
        }  # fmt: skip
        if self.sealer is not None:
            self._ahead["starting the sealer"] = self.sealer.start
        self._threads = [threading.Thread(target=self._run, name="pool", daemon=True),
                         threading.Thread(target=self._follow, name="follower", daemon=True)]  # fmt: skip
        gauge = Gauge(settings.gauge, settings.state_dir)
        self.gauge = Follower(gauge, self.pool, self._usable.is_set, self.background)
        # Apart from the others, as nothing waits for it.
        self._gauging = threading.Thread(target=self.gauge.run, args=(self._stop,), name="gauge", daemon=True)

    def _shared_images(self) -> Images | None:
        if not self.settings.images:
            return None
        # With what it hashes by, a tenth of a start.
        from snapshotter.images import Images, Share
        from snapshotter.trust import Trust

        trust = Trust(self.settings.image_keys, self.settings.image_roots, unsigned=self.settings.images_unsigned)
        return Images(self.mapper, self.store, Share(self.settings.images), trust)

    def _verified_layers(self) -> tuple[Seals | None, Sealer | None]:
        """Trees that were made stay in use when no more are made."""
        directory = os.path.join(self.settings.state_dir, "seals")
        if not self.settings.verity and not os.path.isdir(directory):
            return None, None
        from snapshotter.seals import Sealer, Seals

        seals = Seals(self.mapper, self.store, self.pool, directory, Pace(self.activity.quiet_for, self._stop).step)
        return seals, Sealer(seals, self.store, self._done_with, self.background) if self.settings.verity else None

    def _done_with(self, device: int) -> None:
        self.reaper.tell(device)

    def _is_held(self, device: int) -> bool:
        return bool(self.stamp.lost) or self.snapshots.copies.holds(device) or self.lender.keeps(device)

    def _part_layers(self) -> None:
        self.snapshots.commits.part_open()

    def _write_counts(self) -> None:
        self.snapshots.counts.write()

    def _drop_bases(self) -> None:
        self.bases.drop_unused(lambda base: self.snapshots.counts.count_base(base, Deadline.after(30)))

    def _leaving(self, device: int) -> None:
        self.snapshots.counts.leaving(device)

    @property
    def ready(self) -> bool:
        return self._usable.is_set()

    @property
    def why_not(self) -> str:
        """Why the pool cannot be used yet; empty once it can."""
        return "" if self.ready else self._why_not

    def start(self) -> None:
        for thread in (*self._threads, self._gauging):
            thread.start()
            self.background.started(thread)

    def wait_for_pool(self, deadline: Deadline) -> None:
        """Unavailable, with the reason: at once if the pool could not be opened, else if it does not come within two
        seconds of the call's beginning."""
        if self._usable.is_set():
            return
        left = min(deadline.at, deadline.began + _PATIENCE) - time.monotonic()
        self._tried.wait(max(0.0, left))
        if not self._usable.is_set():
            raise Unavailable(self._why_not)

    def open_pool(self) -> None:
        """Assemble and bind the pool; from here on calls may use it."""
        pool, below = assembly.assemble(
            self.mapper, self.settings.state_dir, Deadline.after(300), self.settings.limits
        )  # fmt: skip
        self.pool.metadata = pool.metadata
        self._hold()
        with contextlib.suppress(StoreFailed):
            self._guard()  # what failed is tried again before ids are given; what there is is served meanwhile
        self._recognise()
        self._compare()
        self._extender = Extender(self.mapper, self.pool, below)
        self._usable.set()
        self._tried.set()

    def _hold(self) -> None:
        """Be the one that serves the pool. One that takes no keeper now is held by the locks of `server` alone."""
        try:
            self.keeper.open()
        except (Unavailable, PoolFull, BlockdevError, OSError) as error:
            log.warning("the pool is not held by its keeper", extra={"why": str(error)})

    def _recognise(self) -> None:
        """Whether store and pool are of one moment; what cannot be told now is told before ids are given."""
        status = self.pool.status()
        why = past.recognised(self.store, self.pool, self.stamp, status, Deadline.after(120))
        if why:
            past.enter(self.store, self.keeper, status, why)

    def _guard(self) -> None:
        for device, keys in self.store.guard(time.time_ns()).items():
            log.error("a device that was given more than once, or is not its snapshot's, is quarantined",
                      extra={"device": device, "snapshots": keys[:20]})  # fmt: skip

    def _compare(self) -> None:
        """Let ids be given: only once what the pool has and the store does not know is out of the way.

        A pool that is broken, or that the tools cannot read now, is compared later; what is there already is served
        meanwhile.
        """
        try:
            self._compare_now()
        except (SnapshotterError, BlockdevError, OSError) as error:
            why = f"the devices of pool {self.pool.name} cannot be compared with the store's: {error}"
            if why != self.store.barred:
                log.error("no device can be given", extra={"why": why})
            self.store.barred = why

    def _compare_now(self) -> None:
        if not self.store.guarded:
            self._guard()
        self.stamp.check()
        status = self.pool.status()
        if status.mode not in ("rw", "out_of_data_space") or status.needs_check:
            self.store.barred = (
                f"the devices of pool {self.pool.name} cannot be compared with the store's while it is "
                f"{'waiting for a check' if status.needs_check else status.mode}; `runvol pool status` tells more"
            )
            return
        self._compared = strangers.compare(self.store, self.pool, Deadline.after(120))
        unknown = sorted({*self._compared.orphans, *self._compared.foreign})
        if unknown:
            log.warning("the pool has devices that the store does not know; they are quarantined",
                        extra={"devices": unknown[:20], "count": len(unknown)})  # fmt: skip
        if not self.keeper.held:
            self._hold()
        if not self.stamp.number:
            self.stamp.take(self.pool.status())
        self.store.lineage.found()
        self.store.barred = ""

    def renew_ids(self) -> None:
        """Begin a new epoch of ids: what the pool has, what is mapped and what the store knows is never given."""
        strangers.compare(self.store, self.pool, Deadline.after(120))
        with self.store.transaction():
            self.store.quarantine(sorted(set(self.pool.active()) - self.store.devices()), time.time_ns())
        self.stamp.begin_epoch()

    def follow(self) -> None:
        """Move the stamp, and copy the store into the pool, if anything was done since."""
        if not self.ready or self.store.barred:
            return
        self.stamp.move()
        if not self.keeper.held or not self.stamp.number:
            return
        changes, began = self.store.changes, time.monotonic()
        if changes != self._copied and began >= self._copy_at:
            try:
                self.store.write_made()
                self.keeper.write(
                    self.store.image(), self.stamp.number, self.store.lineage.name, self.store.lineage.before
                )
                self._copied, self.copied_at = changes, time.time()
            finally:
                ended = time.monotonic()
                self._copy_at = ended + max(_COPY_PAUSE, _COPY_SHARE * (ended - began))

    def _follow(self) -> None:
        self.stamp.followed = True
        while not self._stop.wait(_PAUSE):
            with self.background.survived("following the calls with the pool's stamp and copy of the store"):
                self.follow()

    def recover(self) -> recovery.Found:
        """Finish or undo what a killed process left."""
        self.found = recovery.recover(
            self.store, self.pool, self.bases, self.snapshots, self.reaper, self._compared
        )  # fmt: skip
        if self.seals is not None:
            self.seals.sweep()
        return self.found

    def _run(self) -> None:
        """Whatever is raised in here is logged, counted and survived: nothing is deleted or extended without it."""
        while not self._stop.is_set() and not self.ready:
            with self.background.survived(_OPENING):
                self._try_to_open()
            if not self.ready:
                self._why_not = self.background.fails(_OPENING) or self._why_not
                self._tried.set()
                self._stop.wait(_RETRY)
        # Whoever waited for this start goes first; what they ask for is settled by their calls.
        self._stop.wait(_PAUSE)
        if self._stop.is_set():
            return
        self._catch_up()
        said: set[str] = set()
        while not self._stop.is_set():
            with self.background.survived("the watch over the pool"):
                self._watch(said)
            self._stop.wait(_PAUSE)

    def _catch_up(self) -> None:
        """What a start has to do behind the calls; what fails is done with the next look at the pool."""
        for what, work in list(self._ahead.items()):
            with self.background.survived(what):
                work()
                del self._ahead[what]

    def _try_to_open(self) -> None:
        """A pool that is not there or not ours is no trouble of this thread's: calls are told."""
        try:
            self.open_pool()
        except (SnapshotterError, BlockdevError, OSError) as error:
            self._why_not = str(error)
            log.error("the pool cannot be used", extra={"why": str(error)})

    def _recover_behind(self) -> None:
        found = self.recover()
        log.info("recovered", extra={"settled": found.settled, "unmapped": found.unmapped, "lost": len(found.lost),
                                     "orphans": len(found.orphans), "quarantined": len(found.foreign)})  # fmt: skip

    def _start_reaper(self) -> None:
        self.reaper.start()
        self.reaper.tell(0)

    def _make_base(self) -> None:
        try:
            size, deadline = rounded(self.settings.size), Deadline.after(300)
            self.bases.device(self.settings.fstype, size, deadline)
            self.snapshots.counts.empty(self.settings.fstype, size, deadline)
        except (SnapshotterError, BlockdevError, OSError) as error:
            log.error("the empty base cannot be made yet", extra={"why": str(error)})

    def _watch(self, said: set[str]) -> None:
        """Look at the pool after each event, and now and then. `said` are the findings that were logged."""
        with contextlib.closing(Events()) as events:
            while not self._stop.is_set():
                if self.store.barred:
                    self._compare()
                self._catch_up()
                found = self._findings()
                for finding in sorted(found - said):
                    log.warning("pool", extra={"finding": finding})
                said.clear()
                said.update(found)
                # Every new device is an event too: one look a second is enough for what thresholds are for.
                self._stop.wait(_PAUSE)
                until = time.monotonic() + _LOOK
                while time.monotonic() < until and not self._stop.is_set():
                    if events.wait(0.5):
                        break

    def _findings(self) -> set[str]:
        """What is not well with the pool, after what can be extended was; a finding is logged when it is new."""
        found: set[str] = set()
        try:
            if self._extender is not None:
                self._extender.as_needed(Deadline.after(60))
        except (SnapshotterError, BlockdevError, OSError) as error:
            found.add(f"it cannot be extended: {error}")
        try:
            found |= {finding.message for finding in self.pool.health() if finding.state != "ok"}
        except (SnapshotterError, BlockdevError, OSError) as error:
            found.add(str(error))
        return found

    def cleanup(self) -> None:
        self.reaper.tell(0)

    def stop(self) -> bool:
        """End what runs behind; devices stay mapped, as containers use them. Whether all has ended: what hangs in the
        kernel is left behind."""
        self._stop.set()
        ending = threading.Thread(target=self._end, name="ending", daemon=True)
        ending.start()
        ending.join(_ENDING)
        if ending.is_alive():
            log.error("the disk of the store, or the pool, does not answer; what hangs there is left behind")
        return not ending.is_alive()

    def _end(self) -> None:
        if self.sealer is not None:
            self.sealer.stop()
        self.reaper.stop()
        self.snapshots.counts.stop()
        with self.background.survived("writing down what was made"):
            self.store.write_made()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(10)
        if not any(thread.is_alive() for thread in self._threads):
            self._copy_at = 0.0
            with self.background.survived("the last copy of the store"):
                self.follow()
        if self._gauging.is_alive():
            self._gauging.join(_PAUSE)
        self.store.close()
        self.mapper.close()


__all__ = ["STORE", "Activity", "Node", "Settings"]
