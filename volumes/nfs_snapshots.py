"""Snapshots of volumes on NFS: a tar archive beside the volume's record, made behind, with progress.

Two controllers may make the same: each writes under a name of its own, and what is whole takes its place by rename.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from functools import partial

import msgspec

from blockdev import BlockdevError, Deadline, nfs
from volumes import exports, nfs_share, share, share_lock
from volumes.errors import VolumeConflict, VolumeNotFound, VolumeUnfinished
from volumes.export_ids import id_of, short
from volumes.exports import Exports
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import Snapshot
from volumes.nfs_share import Share
from volumes.share import NFS_SNAPSHOT, NFS_VOLUME, RECORDS, Record, SnapshotRecord
from volumes.troubles import Trouble, logged


class NfsSnapshots:
    """The snapshots of all known exports. `own` stands in the names of what this process is making."""

    def __init__(self, known: Exports, jobs: Jobs, own: str) -> None:
        self._exports, self._jobs, self._own = known, jobs, own

    def take(self, name: str, volume_id: str, deadline: Deadline) -> Snapshot:
        """The snapshot called `name` of the volume; not `ready` while its archive is being made."""
        known = self._exports.of(volume_id, NFS_VOLUME)
        with nfs_share.opened_of(known, volume_id) as one, share.enough_space(f"snapshot {name}"):
            handle = id_of(one.place.records, name, NFS_SNAPSHOT)
            with share_lock.changing(one.records):
                volume = share.read(one.records, short(volume_id), Record)
                if volume is None or not volume.ready:
                    raise VolumeNotFound(volume_id)
                record = share.read(one.records, short(handle), SnapshotRecord)
                if record is None:
                    record = SnapshotRecord(
                        snapshot_id=short(handle), name=name, source=volume_id, capacity=volume.capacity,
                        created=time.time(), ready=False, handle=handle, serial=os.urandom(6).hex(),
                    )  # fmt: skip
                    share.write(one.records, record)
            if (record.name, short(record.source)) != (name, short(volume_id)):
                raise VolumeConflict(name, f"is a snapshot of {record.source}, not of {volume_id}")
            if not record.ready:
                archived, given_up = partial(self._archived, record, volume), partial(_given_up, record)
                work = nfs_share.behind(one.place, f"snapshot {name}", archived, given_up)
                patience = max(0.0, min(PATIENCE, deadline.remaining() - 1))
                with contextlib.suppress(VolumeUnfinished):
                    self._jobs.finished(record.snapshot_id, f"snapshot {name} of {volume_id}", work, patience)
                record = share.read(one.records, record.snapshot_id, SnapshotRecord) or record
        return _snapshot(record)

    def _archived(self, record: SnapshotRecord, volume: Record, one: Share, progress: Progress) -> None:
        # Most processes never copy anything.
        from volumes import archives

        new = f"{record.snapshot_id}.{record.serial}.{self._own}.new"
        with share.unless_whole(one.records, f"{RECORDS}/{new}.tar"):
            with (
                share.opened(one.root, volume.directory or ".") as directory,
                open(share.new_archive(one.records, new), "wb") as archive,
                share_lock.beating(archive.fileno()),
            ):
                archives.pack(directory, archive, progress, without=share.not_its_own(volume))
                os.fsync(archive.fileno())
            with share_lock.changing(one.records):
                now = share.read(one.records, record.snapshot_id, SnapshotRecord)
                if now is None or now.serial != record.serial:
                    raise VolumeUnfinished(f"snapshot {record.name} was deleted meanwhile; ask again")
                if now.ready:  # another controller was faster
                    share.remove_tree(one.records, f"{RECORDS}/{new}.tar")
                    return
                with share.opened(one.records, RECORDS) as place:
                    os.rename(f"{new}.tar", f"{record.snapshot_id}.tar", src_dir_fd=place, dst_dir_fd=place)
                share.write(one.records, msgspec.structs.replace(record, ready=True))
                share.tidy(one.records, f"{record.snapshot_id}.", ".new.tar")  # what kills have left

    def get(self, snapshot_id: str) -> Snapshot:
        """VolumeNotFound where there is none; ExportUnknown where nobody can tell."""
        known = self._exports.of(snapshot_id, NFS_SNAPSHOT)
        with exports.opened_any(known) as (records, _export), share.readable(f"snapshot {snapshot_id}"):
            record = share.read(records, short(snapshot_id), SnapshotRecord)
        if record is None:
            raise VolumeNotFound(snapshot_id)
        return _snapshot(record)

    def delete(self, snapshot_id: str) -> None:
        """No such snapshot afterwards; an archive that is being made ends. VolumeUnfinished while a volume is made from
        it; ExportUnknown."""
        try:
            known, snapshot_id = self._exports.of(snapshot_id, NFS_SNAPSHOT), short(snapshot_id)
        except VolumeNotFound:
            return
        self._jobs.cancel(snapshot_id, PATIENCE)
        with (
            exports.opened_any(known) as (records, export),
            share.enough_space(f"the deletion of snapshot {snapshot_id}"),
            share_lock.changing(records),
        ):
            for one in share.records(records, NFS_VOLUME, Record, logged):
                if not one.ready and not one.gone and short(one.source) == f"snapshot:{snapshot_id}":
                    self._check_abandoned(records, export, one, snapshot_id)
            share.tidy(records, f"{snapshot_id}.", ".tar")
            share.remove(records, snapshot_id)

    def _check_abandoned(self, records: int, export: nfs.Export, made: Record, snapshot_id: str) -> None:
        """VolumeUnfinished where somebody makes this volume from the snapshot. Half a copy that nobody works on any
        more loses its source: its next call says that the snapshot is gone."""
        working = self._jobs.progress(made.volume_id) is not None
        place = nfs_share.of_record(made, export)
        if not working and place.elsewhere:
            working = True  # unless it can be looked at
            with contextlib.suppress(BlockdevError), exports.opened(place.data) as root:
                working = share_lock.is_worked_on(records, root, made.volume_id)
        elif not working:
            working = share_lock.is_worked_on(records, records, made.volume_id)
        if working:
            raise VolumeUnfinished(f"volume {made.volume_id} is being made from snapshot {snapshot_id}")

    def list(self, *, after: int, limit: int, source: str, trouble: Trouble) -> Sequence[tuple[int, Snapshot]]:
        """Those of the shares that answer, with their places; of one volume only, if `source` names it."""

        def listed(root: int, export: nfs.Export) -> builtins.list[Snapshot]:
            known = share.records(root, NFS_SNAPSHOT, SnapshotRecord, trouble, order=exports.order(export, after))
            wanted = (_snapshot(one) for one in known if not source or short(source) == short(one.source))
            return [*itertools.islice(wanted, limit if limit >= 0 else None)]

        found = self._exports.on_each(listed, trouble)
        return exports.part([(exports.place(one.snapshot_id), one) for one in found], after, limit)


def _snapshot(record: SnapshotRecord) -> Snapshot:
    return Snapshot(
        snapshot_id=record.handle or record.snapshot_id,
        source=record.source,
        size_bytes=record.capacity,
        created=record.created,
        ready=record.ready,
    )


def _given_up(record: SnapshotRecord, one: Share) -> None:
    now = share.read(one.records, record.snapshot_id, SnapshotRecord)
    if now is not None and now.serial == record.serial and not now.ready:
        share.remove(one.records, record.snapshot_id)
