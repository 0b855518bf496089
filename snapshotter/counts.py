"""What snapshots use: bytes in blocks and inodes that their parents do not have.

An active snapshot is asked about each ten seconds, so its answer costs an ioctl and a few reads: what the kernel says
that it maps, less what its parent maps. Blocks that it has in common with its parent and has written anew are missing
in that; a look into the pool's metadata, behind the calls and one for many, puts it right within a minute. A layer does
not change: it is counted once, and that is kept in the store.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from blockdev import Deadline, superblocks
from blockdev.errors import BlockdevError
from snapshotter.background import Background
from snapshotter.bases import EMPTY
from snapshotter.errors import SnapshotterError
from snapshotter.locks import Locks
from snapshotter.model import Kind, Snapshot
from snapshotter.pace import Pace
from snapshotter.pool import DeviceMissing, Pool
from snapshotter.store import Store
from snapshotter.tables import Base, Counted

log = logging.getLogger("runvol.snapshotter")
# Seconds between looks into the pool's metadata, from the first that asks for one until it is made, and that it waits
# at most for a moment without calls.
_EVERY, _SOON, _LONGEST_WAIT = 30.0, 2.0, 10.0
# Up to so many active devices are compared with their parents one by one; of more, all of the pool is listed once.
_FEW = 4
_LOOKING = "counting what snapshots use"


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """An active device as a look into the metadata saw it: bytes mapped and added, writes that it had had."""

    mapped: int
    added: int
    writes: int


class Counts:
    """Answers for rows. Safe to use from several threads.

    `inodes_of_image` is the number of inodes in a shared image; `after` is told of devices that were mapped to be
    counted; `quiet` says for how many seconds there was no call.
    """

    def __init__(
        self, store: Store, pool: Pool, after: Callable[[int], None], *,
        inodes_of_image: Callable[[str, Deadline], int] = lambda _image, _deadline: 0,
        quiet: Callable[[], float] = lambda: 9.0, background: Background | None = None,
    ) -> None:  # fmt: skip
        self._store, self._pool, self._after = store, pool, after
        self._inodes_of_image = inodes_of_image
        self._background = background or Background()
        self._counting = Locks()
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}
        self._images: dict[str, int] = {}
        # Keys that the next look is for; what `write` writes down.
        self._asked: dict[str, None] = {}
        self._left: dict[int, Counted] = {}
        self._wake, self._stop = threading.Event(), threading.Event()
        self._pace = Pace(quiet, self._stop, _LONGEST_WAIT)
        self._thread = threading.Thread(target=self._run, name="counts", daemon=True)

    # -- the answers ----------------------------------------------------------------------------------------------

    def usage(self, row: Snapshot, activate: Callable[[], None], deadline: Deadline) -> tuple[int, int]:
        """Bytes and inodes that the snapshot adds to its parent, never negative; `activate` maps one that is active.

        A layer that was not counted yet is counted now.
        """
        if row.kind is Kind.VIEW or not row.device:
            return 0, 0
        if row.kind is Kind.COMMITTED:
            return self._of_layer(row, deadline)
        below = self._below(row, deadline)
        now = self._now(row.device, row.fstype) or self._left.get(row.device) or self._store.counted(row.device)
        if now is None:
            activate()
            now = self._now(row.device, row.fstype) or Counted(mapped=below.mapped, inodes=below.inodes)
        seen = self._seen.get(row.device)
        if seen is None:
            added = now.added if now.added is not None else max(0, now.mapped - below.mapped)
        else:
            added = max(0, seen.added + now.mapped - seen.mapped)
        self.ask(row.key)
        return added, max(0, now.inodes - below.inodes)

    def _of_layer(self, row: Snapshot, deadline: Deadline) -> tuple[int, int]:
        known = self._layer(row, deadline)
        if known.added is None:
            with self._counting.held("look", deadline=deadline):
                known = self._layer(row, deadline)
                if known.added is None:
                    if failed := self._look([row], deadline):
                        raise SnapshotterError(f"what snapshot {row.key!r} uses cannot be told: {failed[row.key]}")
                    known = self._layer(row, deadline)
        return known.added or 0, max(0, known.inodes - self._below(row, deadline).inodes)

    def _layer(self, row: Snapshot, deadline: Deadline) -> Counted:
        """What a committed device maps and holds; counted now if it never was."""
        known = self._store.counted(row.device)
        if known is not None and known.final:
            return known
        with self._counting.held(str(row.device), deadline=deadline):
            known = self._store.counted(row.device)
            if known is None or not known.final:
                known = self._count_layer(row)
            return known

    def _count_layer(self, row: Snapshot) -> Counted:
        found = self._now(row.device, row.fstype)
        if found is None:
            try:
                self._pool.activate(row.device, row.size, read_only=True)
            except DeviceMissing as error:
                raise SnapshotterError(f"the data of snapshot {row.key!r} is lost: {error}") from None
            found = self._now(row.device, row.fstype)
            self._after(row.device)
        if found is None:
            raise SnapshotterError(f"the device of snapshot {row.key!r} was unmapped while it was counted; try again")
        found = replace(found, final=True)
        self._keep({row.device: found})
        return found

    def _below(self, row: Snapshot, deadline: Deadline) -> Counted:
        """What the snapshot began with: its parent, or the empty filesystem."""
        if not row.parent:
            return self.empty(row.fstype, row.size, deadline)
        above = self._store.sound(row.parent)
        if above is None:
            return Counted(mapped=0, inodes=0)
        if above.device:
            return self._layer(above, deadline)
        if row.image and row.image not in self._images:
            self._images[row.image] = self._inodes_of_image(row.image, deadline)
        return Counted(mapped=0, inodes=self._images.get(row.image, 0))

    def empty(self, fstype: str, size: int, deadline: Deadline) -> Counted:
        """The base of first layers. It does not change either; it may be gone, what was counted of it is not."""
        said = (self._store.read_fact(f"{EMPTY}{fstype} {size}") or "").split()
        if len(said) != 2 or not all(map(str.isdecimal, said)):
            base = self._store.base(fstype, size)
            if base is None or not base.ready:
                return Counted(mapped=0, inodes=0)
            return self.count_base(base, deadline)
        mapped, inodes = map(int, said)
        return Counted(mapped=mapped, inodes=inodes)

    def count_base(self, base: Base, deadline: Deadline) -> Counted:
        """What an empty filesystem holds, written down."""
        fact = f"{EMPTY}{base.fstype} {base.size}"
        with self._counting.held(fact, deadline=deadline):
            found = self._now(base.device, base.fstype)
            if found is None:
                self._pool.activate(base.device, base.size, read_only=True)
                found = self._now(base.device, base.fstype)
                self._after(base.device)
        if found is None:
            raise SnapshotterError(f"base {base.device} was unmapped while it was counted; try again")
        with self._store.transaction(durable=False):
            self._store.set_fact(fact, f"{found.mapped} {found.inodes}")
        return found

    def _now(self, device: int, fstype: str) -> Counted | None:
        """What a mapped device maps, and the inodes that are used in it as last written back; None if it is not mapped.

        A guest writes the filesystem: of one that cannot be read no inode is counted.
        """
        found = self._pool.find(device)
        if found is None:
            return None
        try:
            mapped = self._pool.mapped(device)
        except (FileNotFoundError, SnapshotterError):
            return None
        try:
            if fstype == "xfs":
                _forget_cache(self._pool.path(device))
            block = superblocks.space(self._pool.path(device))
        except FileNotFoundError:
            return None
        except (BlockdevError, OSError):
            block = None
        inodes = max(0, block.inodes - block.free_inodes) if block is not None else 0
        return Counted(mapped=mapped, inodes=inodes)

    # -- what is told ---------------------------------------------------------------------------------------------

    def ask(self, key: str) -> None:
        """Let the next look be for this snapshot too."""
        with self._lock:
            self._asked[key] = None
        self._wake.set()

    def leaving(self, device: int) -> None:
        """The device, which nobody has open, is about to be unmapped."""
        rows = self._store.of_device(device)
        if len(rows) != 1:
            return
        row, known = rows[0], self._store.counted(device)
        if row.kind is Kind.COMMITTED and (known is None or not known.final):
            self._count_layer(row)
        elif row.kind is Kind.ACTIVE and (found := self._now(device, row.fstype)) is not None:
            seen = self._seen.pop(device, None)
            added = None if seen is None else max(0, seen.added + found.mapped - seen.mapped)
            self._left[device] = replace(found, added=added)

    def write(self) -> None:
        """Write down what was left; behind the calls."""
        left = dict(self._left)
        if left:
            self._keep(left)
        for device, counted in left.items():
            if self._left.get(device) is counted:
                self._left.pop(device, None)

    def _keep(self, counted: dict[int, Counted]) -> None:
        with self._store.transaction(durable=False):
            for device, one in counted.items():
                self._store.set_counted(device, one)

    # -- looks into the pool's metadata ---------------------------------------------------------------------------

    def look(self, deadline: Deadline) -> None:
        """One look for all that were asked about and are not known exactly. What it fails for is asked about still."""
        with self._lock:
            asked, self._asked = self._asked, {}
        try:
            self._look_for(asked, deadline)
        except BaseException:
            with self._lock:
                self._asked = asked | self._asked
            raise

    def _look_for(self, asked: Iterable[str], deadline: Deadline) -> None:
        rows = [row for row in map(self._store.sound, asked) if row is not None and row.device]
        wanted = [row for row in rows if self._is_wanted(row, deadline)]
        if wanted:
            with self._counting.held("look", deadline=deadline):
                for key, why in self._look(wanted, deadline).items():
                    log.warning("what a snapshot uses is not known exactly", extra={"key": key, "why": why})

    def _is_wanted(self, row: Snapshot, deadline: Deadline) -> bool:
        if row.kind is Kind.ACTIVE:
            seen = self._seen.get(row.device)
            return seen is None or seen.writes != self._pool.writes(row.device)
        try:
            return row.kind is Kind.COMMITTED and self._layer(row, deadline).added is None
        except (SnapshotterError, BlockdevError, OSError) as error:
            log.warning("a layer is not counted yet", extra={"key": row.key, "why": str(error)})
            return False

    def _look(self, rows: list[Snapshot], deadline: Deadline) -> dict[str, str]:
        """Count what these add, exactly; of which it failed, and why."""
        before = {row.device: (self._pool.writes(row.device), self._now(row.device, row.fstype)) for row in rows}
        active = [row for row in rows if row.kind is Kind.ACTIVE]
        failed: dict[str, str] = {}
        added: dict[int, int] = {}
        with self._pool.metadata_snapshot(deadline):
            if len(active) > _FEW:
                listed = self._pool.listed(deadline)
                added = {row.device: listed[row.device][0] for row in active if row.device in listed}
            for row in rows:
                try:
                    origin = self._origin(row)
                    if row.device not in added and origin:
                        added[row.device] = self._pool.added(row.device, origin, deadline)
                except (SnapshotterError, BlockdevError, OSError, ValueError) as error:
                    failed[row.key] = str(error)
        for row in rows:
            if row.kind is Kind.ACTIVE:
                self._see(row, *before[row.device], added.get(row.device))
            elif row.key not in failed:
                known = self._layer(row, deadline)
                plain = max(0, known.mapped - self._below(row, deadline).mapped)
                self._keep({row.device: replace(known, added=added.get(row.device, plain))})
        return failed

    def _see(self, row: Snapshot, writes: int, found: Counted | None, added: int | None) -> None:
        if found is not None and added is not None:
            self._seen[row.device] = _Seen(mapped=found.mapped, added=added, writes=writes)

    def _origin(self, row: Snapshot) -> int:
        """The device that it was a snapshot of; 0 if that is no device of the pool, or is gone."""
        if row.parent:
            above = self._store.sound(row.parent)
            return above.device if above is not None else 0
        base = self._store.base(row.fstype, row.size)
        return base.device if base is not None and base.ready else 0

    # -- the thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """May be repeated if it failed."""
        if self._thread.ident is None:
            self._thread.start()
            self._background.started(self._thread)

    def stop(self) -> None:
        """End after the look under way."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._stop.wait(_SOON)
            self._pace.step()
            if self._stop.is_set():
                return
            self._wake.clear()
            with self._background.survived(_LOOKING):
                self.look(Deadline.after(60))
                self._forget_gone()
            if self._background.fails(_LOOKING):
                self._wake.set()  # nobody may ask again
            self._stop.wait(_EVERY)

    def _forget_gone(self) -> None:
        mapped = set(self._pool.active())
        for device in list(self._seen):
            if device not in mapped:
                self._seen.pop(device, None)


def _forget_cache(path: str) -> None:
    """XFS writes past the device's page cache: what was read from there before says nothing about it now."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


__all__ = ["Counts"]
