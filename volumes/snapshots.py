"""Snapshots of the backend `loop`: each an image file of its own, which never changes.

Being whole copies they need nothing of their volume, which may grow or be deleted. A group is several snapshots
taken while none of their volumes is in use by anybody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from blockdev import Deadline, durable
from volumes import copies
from volumes.errors import NoSpace, VolumeConflict, VolumeNotFound
from volumes.model import VOLUME_ID, Snapshot, SnapshotGroup
from volumes.store import SnapshotRow, State, Store

PREFIX, GROUP_PREFIX = "snap-", "group-"
SUFFIX, NEW = ".snap", ".snap-new"


class Snapshots:
    """Rows in the backend's store, files in its directory."""

    def __init__(
        self,
        store: Store,
        directory: str,
        *,
        busy: Callable[[], AbstractContextManager[None]],
        room: Callable[[], int],
        check_copy: Callable[[str], None],
    ) -> None:
        """`busy` keeps recovery away, of other processes too; `room` tells how many bytes can still be promised.

        `check_copy` raises if a volume's bytes cannot be copied one after the other.
        """
        self._store, self._directory, self._busy, self._room = store, directory, busy, room
        self._check_copy = check_copy

    def create(self, name: str, source: str, source_path: str, deadline: Deadline, *, group: str = "") -> Snapshot:
        """The snapshot called `name`, taken now or before. VolumeConflict if the name is another volume's."""
        old = self._store.snapshot_by_name(name)
        if old is not None and old.state is State.READY:
            if old.source != source or old.group != group:
                raise VolumeConflict(name, f"is a snapshot of {old.source}, not of {source}")
            return _snapshot(old)
        if old is not None:
            self._drop(old.snapshot_id)
        with self._busy():
            return self._take(name, source, source_path, deadline, group)

    def _take(self, name: str, source: str, source_path: str, deadline: Deadline, group: str) -> Snapshot:
        snapshot_id = self._begin(name, source, source_path, group)
        try:
            self._copy(snapshot_id, source, source_path, deadline)
        except BaseException:
            self._drop(snapshot_id)
            raise
        self._store.set_snapshot_state(snapshot_id, State.READY)
        return self.get(snapshot_id)

    def _begin(self, name: str, source: str, source_path: str, group: str) -> str:
        facts = os.stat(source_path)
        snapshot_id = PREFIX + os.urandom(16).hex()
        self._store.insert_snapshot(
            snapshot_id=snapshot_id, name=name, source=source, size=facts.st_size, created=time.time(), group=group
        )
        return snapshot_id

    def _copy(self, snapshot_id: str, source: str, source_path: str, deadline: Deadline) -> None:
        allocated, room = os.stat(source_path).st_blocks * 512, self._room()
        if allocated > room:
            raise NoSpace(f"a snapshot of {source} takes {allocated} bytes; {room} can still be promised")
        new = os.path.join(self._directory, snapshot_id + NEW)
        try:
            copies.copy(source_path, new, deadline, check=lambda: self._check_copy(source))
            os.rename(new, self.path(snapshot_id))
            durable.sync_directory(self._directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"the snapshot of {source} could not be written: {error.strerror}") from error
            raise

    def create_group(self, name: str, sources: Sequence[tuple[str, str]], deadline: Deadline) -> SnapshotGroup:
        """Snapshots of all `sources` (volume id and path), or of none. The callers keep the volumes still meanwhile.

        All rows are there before the first copy, and become ready in one step after the last: what a killed process
        leaves is unfinished as a whole.
        """
        import uuid

        group_id = GROUP_PREFIX + uuid.uuid5(uuid.NAMESPACE_OID, name).hex
        members = self._store.snapshots(group=group_id)
        if members and all(row.state is State.READY for row in members):
            if {row.source for row in members} != {volume for volume, _path in sources}:
                raise VolumeConflict(name, f"is a group of the volumes {sorted(row.source for row in members)}")
            return self.group(group_id)
        for row in members:  # an attempt that was killed
            self._drop(row.snapshot_id)
        with self._busy():
            made: dict[str, str] = {}
            try:
                with self._store.transaction():
                    for volume, path in sources:
                        made[volume] = self._begin(f"\1{group_id}/{volume}", volume, path, group_id)
                for volume, path in sources:
                    self._copy(made[volume], volume, path, deadline)
            except BaseException:
                self.delete_group(group_id)
                raise
            with self._store.transaction():
                for snapshot_id in made.values():
                    self._store.set_snapshot_state(snapshot_id, State.READY)
        return self.group(group_id)

    def group(self, group_id: str) -> SnapshotGroup:
        """VolumeNotFound for an unknown or unfinished group."""
        members = self._store.snapshots(group=group_id) if VOLUME_ID.match(group_id) else []
        if not members or any(row.state is not State.READY for row in members):
            raise VolumeNotFound(group_id)
        return SnapshotGroup(group_id=group_id, snapshots=tuple(map(_snapshot, members)))

    def delete_group(self, group_id: str) -> None:
        if VOLUME_ID.match(group_id):
            members = self._store.snapshots(group=group_id)
            with self._store.transaction():
                for row in members:
                    self._store.set_snapshot_state(row.snapshot_id, State.DELETING)
            for row in members:
                self._drop(row.snapshot_id)

    def get(self, snapshot_id: str) -> Snapshot:
        """VolumeNotFound where there is none."""
        row = self._store.snapshot(snapshot_id) if VOLUME_ID.match(snapshot_id) else None
        if row is None or row.state is not State.READY:
            raise VolumeNotFound(snapshot_id)
        return _snapshot(row)

    def list(self, *, after: int = 0, limit: int = -1, source: str = "") -> Sequence[tuple[int, Snapshot]]:
        rows = self._store.snapshots(after=after, limit=limit, source=source, state=State.READY)
        return [(row.seq, _snapshot(row)) for row in rows]

    def delete(self, snapshot_id: str) -> None:
        """No such snapshot afterwards, whether there was one or not."""
        if VOLUME_ID.match(snapshot_id) and self._store.snapshot(snapshot_id) is not None:
            self._store.set_snapshot_state(snapshot_id, State.DELETING)
            self._drop(snapshot_id)

    def path(self, snapshot_id: str) -> str:
        return os.path.join(self._directory, snapshot_id + SUFFIX)

    def settle(self, row: SnapshotRow) -> str | None:
        """Undo what was half-made, finish what was half-deleted; what was done, in words."""
        if row.state is State.READY:
            return None
        self._drop(row.snapshot_id)
        return f"removed snapshot {row.snapshot_id}, which was {row.state.value} when the process ended"

    def known_files(self) -> set[str]:
        return {snapshot_id + suffix for snapshot_id in self._store.snapshot_ids() for suffix in (SUFFIX, NEW)}

    def _drop(self, snapshot_id: str) -> None:
        for suffix in (NEW, SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._directory, snapshot_id + suffix))
        durable.sync_directory(self._directory)
        self._store.remove_snapshot(snapshot_id)


def _snapshot(row: SnapshotRow) -> Snapshot:
    return Snapshot(
        snapshot_id=row.snapshot_id, source=row.source, size_bytes=row.size, created=row.created, group=row.group
    )
