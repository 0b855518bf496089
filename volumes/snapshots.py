"""Snapshots of the backend `loop`: each an image file of its own, which never changes.

Being whole copies they need nothing of their volume, which may grow or be deleted. A group is several snapshots
taken while none of their volumes is in use by anybody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from blockdev import Deadline, durable, flocks
from volumes import copies, marks, sizes
from volumes.backend import Keeper
from volumes.busy import Busy
from volumes.errors import NoSpace, VolumeConflict, VolumeNotFound, VolumeUnfinished
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import VOLUME_ID, Snapshot, SnapshotGroup
from volumes.place import is_file
from volumes.room import File
from volumes.store import SnapshotRow, State, Store
from volumes.troubles import speaking_of, told_before, without_name

PREFIX, GROUP_PREFIX = "snap-", "group-"
SUFFIX, NEW = ".snap", ".snap-new"
# Seconds in which a call that has waited still answers.
_SPARE = 0.5


@dataclass(frozen=True)
class _Taken:
    """Of what a snapshot is being taken. `copied`: bytes that it gets, where it shares none."""

    source: str
    source_path: str
    copied: int = 0


class Snapshots:
    """Rows in the backend's store, files in its directory."""

    def __init__(
        self,
        store: Store,
        directory: str,
        jobs: Jobs,
        *,
        busy: Busy,
        left: Callable[[], int],
        forget: Callable[[], None],
        keeper: Callable[[], Keeper],
    ) -> None:
        """`busy` keeps recovery away, of other processes too; `left` tells how many bytes can still be promised, less
        than nothing among it, and `forget` lets it look anew."""
        self._store, self._directory, self._jobs, self._busy, self._left = store, directory, jobs, busy, left
        self._forget, self._keeper = forget, keeper
        self._taking = dict[str, _Taken]()

    def create(self, name: str, source: str, source_path: str, deadline: Deadline) -> Snapshot:
        """The snapshot called `name`, taken now or before. VolumeConflict if the name is another volume's."""

        def work(progress: Progress) -> None:
            progress.ask = partial(self._keeper().make_way, source)
            with self._keeper().still([source], Deadline.after(PATIENCE)), self._busy(key):
                self._take(name, source, source_path, progress)

        old, key = self._store.snapshot_by_name(name), _taking(name)
        if old is None or old.state is not State.READY:
            self._jobs.finished(key, f"snapshot {name} of {source}", work, _patience(deadline))
            old = self._store.snapshot_by_name(name)
        if old is None or old.state is not State.READY:
            raise VolumeUnfinished(f"snapshot {name} was deleted meanwhile; ask again")
        if old.source != source or old.group:
            raise VolumeConflict(name, f"is a snapshot of {old.source}, not of {source}")
        return _snapshot(old)

    def _take(self, name: str, source: str, source_path: str, progress: Progress) -> None:
        old = self._store.snapshot_by_name(name)
        if old is not None and old.state is State.READY:
            return
        if old is not None:
            self.settle(old.snapshot_id)
            again = self._store.snapshot_by_name(name)
            if again is not None and again.state is State.READY:
                return
        if not is_file(source_path):
            raise VolumeNotFound(source)  # it was deleted before its turn came
        snapshot_id = self._begin(name, source, source_path, "")
        try:
            self._copy(snapshot_id, source, source_path, progress)
        except BaseException:
            with told_before(snapshot_id):
                self._drop(snapshot_id)
            raise
        self._store.set_snapshot_state(snapshot_id, State.READY)

    def _begin(self, name: str, source: str, source_path: str, group: str) -> str:
        facts = os.stat(source_path)
        snapshot_id = self._store.new_id(PREFIX)
        self._store.insert_snapshot(
            snapshot_id=snapshot_id, name=name, source=source, size=facts.st_size, created=time.time(), group=group
        )
        return snapshot_id

    def _copy(self, snapshot_id: str, source: str, source_path: str, progress: Progress) -> None:
        new = os.path.join(self._directory, snapshot_id + NEW)

        def check() -> None:
            """Asked where no blocks are shared."""
            self._promise(snapshot_id, _Taken(source, source_path, os.stat(source_path).st_blocks * 512))
            self._keeper().check_copy(source)

        try:
            with self._promised(snapshot_id, _Taken(source, source_path)), copies.being_made(new) as writer:
                copies.copy(source_path, writer, Deadline.after(copies.LIMIT), check=check, progress=progress)
                self._store.inherit_past(snapshot_id, source)
                if marks.is_marked(source_path, marks.FOREIGN):
                    marks.be_marked(writer, marks.FOREIGN)
                if self._store.snapshot(snapshot_id) is None or not flocks.is_still(writer, new):
                    raise VolumeUnfinished(f"the snapshot of {source} was taken back meanwhile; ask again")
                os.rename(new, self.path(snapshot_id))
                durable.sync_directory(self._directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"the snapshot of {source} could not be written: {error.strerror}") from error
            raise without_name(error, snapshot_id, self._directory) from error

    @contextlib.contextmanager
    def _promised(self, snapshot_id: str, taken: _Taken) -> Iterator[None]:
        """What it takes is the snapshot's, or its source's, until it has its file. NoSpace."""
        try:
            self._promise(snapshot_id, taken)
            yield
        finally:
            self._taking.pop(snapshot_id, None)

    def _promise(self, snapshot_id: str, taken: _Taken) -> None:
        """NoSpace where what it takes is others' already, which are promised nothing meanwhile.

        A snapshot that shares its source's blocks takes none. But what its source had to itself until then, the source
        needs once more when it is written over: by so much more is owed. Where they are copied it is the same number.
        """
        with self._store.transaction():
            for looks in (1, 2):
                self._taking.pop(snapshot_id, None)
                left = self._left()
                self._taking[snapshot_id] = taken
                takes = left - self._left()
                if takes <= max(0, left):
                    return
                if looks == 1:
                    self._forget()
        raise NoSpace(f"a snapshot takes {sizes.about(takes)}; {sizes.about(left)} can still be promised")

    def files(self) -> list[File]:
        """What they have they keep, although what they were taken from is written over. One that is being taken has
        what its source has."""
        # Before the rows are read: what is taken no more has a file by then.
        taking = [
            File(one_id=one, path=taken.source_path, promised=0, source=taken.source, is_snapshot=True)
            for one, taken in list(self._taking.items())
            if not taken.copied
        ]
        rows = self._store.snapshots()
        return taking + [
            File(one_id=row.snapshot_id, path=self.path(row.snapshot_id), promised=0, source=row.source,
                 is_snapshot=True) for row in rows
        ]  # fmt: skip

    def owed(self) -> int:
        """Bytes that snapshots which are being copied are still to get."""
        return sum(max(0, taken.copied - self._written(one)) for one, taken in list(self._taking.items()))

    def _written(self, snapshot_id: str) -> int:
        try:
            return os.stat(os.path.join(self._directory, snapshot_id + NEW)).st_blocks * 512
        except OSError:
            return 0

    def create_group(self, name: str, sources: Sequence[tuple[str, str]], deadline: Deadline) -> SnapshotGroup:
        """Snapshots of all `sources` (volume id and path), or of none. The volumes are kept still meanwhile.

        All rows are there before the first copy, and become ready in one step after the last: what a killed process
        leaves is unfinished as a whole.
        """
        import uuid

        of_name = uuid.uuid5(uuid.NAMESPACE_OID, name).hex
        group_id = f"{GROUP_PREFIX}{self._store.identity}-{of_name}"
        if self._store.snapshots(group=GROUP_PREFIX + of_name):  # of a release that left the store's identity out
            group_id = GROUP_PREFIX + of_name
        volumes = [volume for volume, _path in sources]

        def work(progress: Progress) -> None:
            keeper = self._keeper()

            def ask() -> None:
                for volume in volumes:
                    keeper.make_way(volume)

            progress.ask = ask
            with keeper.still(volumes, Deadline.after(PATIENCE)), self._busy(_taking(group_id)):
                for volume in volumes:
                    keeper.check_unowned(volume)
                self._take_group(group_id, sources, progress)

        if not self._is_whole(group_id):
            self._jobs.finished(_taking(group_id), f"snapshots of the group {name}", work, _patience(deadline))
        made = self.group(group_id)
        if {one.source for one in made.snapshots} != set(volumes):
            raise VolumeConflict(name, f"is a group of the volumes {sorted(one.source for one in made.snapshots)}")
        return made

    def _is_whole(self, group_id: str) -> bool:
        members = self._store.snapshots(group=group_id)
        return bool(members) and all(row.state is State.READY for row in members)

    def _take_group(self, group_id: str, sources: Sequence[tuple[str, str]], progress: Progress) -> None:
        if self._is_whole(group_id):
            return
        self._settle_group(group_id)  # an attempt that was killed
        if self._is_whole(group_id):
            return
        made: dict[str, str] = {}
        try:
            with self._store.transaction():
                for volume, path in sources:
                    made[volume] = self._begin(f"\1{group_id}/{volume}", volume, path, group_id)
            for volume, path in sources:
                self._copy(made[volume], volume, path, progress)
        except BaseException:
            with told_before(group_id):
                self._drop_group(group_id)
            raise
        with self._store.transaction():
            for snapshot_id in made.values():
                self._store.set_snapshot_state(snapshot_id, State.READY)

    def group(self, group_id: str) -> SnapshotGroup:
        """VolumeNotFound for an unknown or unfinished group."""
        members = self._store.snapshots(group=group_id) if VOLUME_ID.match(group_id) else []
        if not members or any(row.state is not State.READY for row in members):
            if not members:
                self._store.check_own(GROUP_PREFIX, group_id)
            raise VolumeNotFound(group_id)
        return SnapshotGroup(group_id=group_id, snapshots=tuple(map(_snapshot, members)))

    def delete_group(self, group_id: str) -> None:
        """No such group, nor any of its snapshots, afterwards; copies that are under way end."""
        self._jobs.cancel(_taking(group_id), PATIENCE)
        if VOLUME_ID.match(group_id):
            with self._busy(_taking(group_id)):
                self._drop_group(group_id)

    def _drop_group(self, group_id: str) -> None:
        members = self._store.snapshots(group=group_id)
        if not members:
            self._store.check_own(GROUP_PREFIX, group_id)
        with self._store.transaction():
            for row in members:
                self._store.set_snapshot_state(row.snapshot_id, State.DELETING)
        for row in members:
            self._drop(row.snapshot_id)

    def get(self, snapshot_id: str) -> Snapshot:
        """VolumeNotFound where there is none."""
        row = self._store.snapshot(snapshot_id) if VOLUME_ID.match(snapshot_id) else None
        if row is None or row.state is not State.READY:
            if row is None:
                self._store.check_own(PREFIX, snapshot_id)
            raise VolumeNotFound(snapshot_id)
        return _snapshot(row)

    def list(self, *, after: int = 0, limit: int = -1, source: str = "") -> Sequence[tuple[int, Snapshot]]:
        rows = self._store.snapshots(after=after, limit=limit, source=source, state=State.READY)
        return [(row.seq, _snapshot(row)) for row in rows]

    def delete(self, snapshot_id: str) -> None:
        """No such snapshot afterwards, whether there was one or not; a copy that is under way ends."""
        row = self._store.snapshot(snapshot_id) if VOLUME_ID.match(snapshot_id) else None
        if row is None:
            self._store.check_own(PREFIX, snapshot_id)
        else:
            if row.state is State.CREATING:
                self._jobs.cancel(_taking(row.name), PATIENCE)
            with self._busy(taking(row)):
                self._store.set_snapshot_state(snapshot_id, State.DELETING)
                self._drop(snapshot_id)

    def path(self, snapshot_id: str) -> str:
        return os.path.join(self._directory, snapshot_id + SUFFIX)

    def settle(self, snapshot_id: str) -> str | None:
        """Undo what was half-made, finish what was half-deleted; what was done, in words."""
        row = self._store.snapshot(snapshot_id)
        if row is None or row.state is State.READY:
            return None
        if row.group:
            return self._settle_group(row.group)
        if row.state is State.CREATING and is_file(self.path(snapshot_id)):
            # Its file took its name in the last step but one; the store may be an older copy of itself.
            self._store.set_snapshot_state(snapshot_id, State.READY)
            return f"finished snapshot {snapshot_id}"
        self._drop(snapshot_id)
        return f"removed snapshot {snapshot_id}, which was {row.state.value} when the process ended"

    def _settle_group(self, group_id: str) -> str | None:
        """All of its snapshots, or none."""
        members = self._store.snapshots(group=group_id)
        if all(one.state is State.READY for one in members):
            return None
        made = all(is_file(self.path(one.snapshot_id)) for one in members)
        if made and not any(one.state is State.DELETING for one in members):
            with self._store.transaction():
                for one in members:
                    self._store.set_snapshot_state(one.snapshot_id, State.READY)
            return f"finished the group {group_id}"
        for one in members:
            self._drop(one.snapshot_id)
        return f"removed the snapshots of the group {group_id}, which was unfinished when the process ended"

    def known_files(self) -> set[str]:
        return {snapshot_id + suffix for snapshot_id in self._store.snapshot_ids() for suffix in (SUFFIX, NEW)}

    def _drop(self, snapshot_id: str) -> None:
        """VolumeUnfinished while it is being taken, by another process too."""
        with speaking_of(self.path(snapshot_id)):
            copies.check_not_made(os.path.join(self._directory, snapshot_id + NEW))
            for suffix in (NEW, SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._directory, snapshot_id + suffix))
            durable.sync_directory(self._directory)
        self._store.remove_snapshot(snapshot_id)


def _taking(name: str) -> str:
    """The key of the work that takes a snapshot, or a group, of that name."""
    return f"snapshot {name}"


def taking(row: SnapshotRow) -> str:
    """The same for a snapshot that there is."""
    return _taking(row.group or row.name)


def _patience(deadline: Deadline) -> float:
    return max(0.0, min(PATIENCE, deadline.remaining() - _SPARE))


def _snapshot(row: SnapshotRow) -> Snapshot:
    return Snapshot(
        snapshot_id=row.snapshot_id, source=row.source, size_bytes=row.size, created=row.created, group=row.group
    )
