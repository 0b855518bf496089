"""Snapshots of volumes on NFS: a tar archive beside the volume's record, made behind, with progress.

Two controllers may make the same: each writes under a name of its own, and what is whole takes its place by rename.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from blockdev import Deadline, nfs
from volumes import exports, share
from volumes.errors import VolumeConflict, VolumeNotFound, VolumeUnfinished
from volumes.export_ids import id_of, short
from volumes.exports import Exports
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import Snapshot
from volumes.share import NFS_SNAPSHOT, NFS_VOLUME, RECORDS, Record, SnapshotRecord
from volumes.troubles import Trouble, logged


class NfsSnapshots:
    """The snapshots of all known exports. `own` stands in the names of what this process is making."""

    def __init__(self, known: Exports, jobs: Jobs, own: str) -> None:
        self._exports, self._jobs, self._own = known, jobs, own

    def take(self, name: str, volume_id: str, deadline: Deadline) -> Snapshot:
        """The snapshot called `name` of the volume; not `ready` while its archive is being made."""
        known = self._exports.of(volume_id, NFS_VOLUME)
        handle = id_of(known[0], name, NFS_SNAPSHOT)
        snapshot_id = short(handle)
        with exports.opened_any(known) as (root, export), share.enough_space(f"snapshot {name}"):
            volume = share.read(root, short(volume_id), Record)
            if volume is None or not volume.ready:
                raise VolumeNotFound(volume_id)
            record = share.read(root, snapshot_id, SnapshotRecord)
            if record is None:
                record = SnapshotRecord(snapshot_id=snapshot_id, name=name, source=volume_id, capacity=volume.capacity,
                                        created=time.time(), ready=False, handle=handle)  # fmt: skip
                share.write(root, record)
            if (record.name, short(record.source)) != (name, short(volume_id)):
                raise VolumeConflict(name, f"is a snapshot of {record.source}, not of {volume_id}")
            if not record.ready:
                work = self._archiving(export, record, volume)
                patience = max(0.0, min(PATIENCE, deadline.remaining() - 1))
                with contextlib.suppress(VolumeUnfinished):
                    self._jobs.finished(snapshot_id, f"snapshot {name} of {volume_id}", work, patience)
                record = share.read(root, snapshot_id, SnapshotRecord) or record
        return _snapshot(record)

    def _archiving(self, export: nfs.Export, record: SnapshotRecord, volume: Record) -> Callable[[Progress], None]:
        def work(progress: Progress) -> None:
            # Most processes never copy anything.
            from volumes import archives

            new = f"{record.snapshot_id}.{self._own}.new"
            with (
                exports.opened(export) as root,
                share.enough_space(f"snapshot {record.name}"),
                _unless_tidied(f"snapshot {record.name}"),
                share.unless_whole(root, f"{RECORDS}/{new}.tar"),
            ):
                with (
                    share.opened(root, volume.directory or ".") as directory,
                    open(share.new_archive(root, new), "wb") as archive,
                ):
                    archives.pack(directory, archive, progress, without=share.not_its_own(volume))
                    os.fsync(archive.fileno())
                with share.opened(root, RECORDS) as place:
                    os.rename(f"{new}.tar", f"{record.snapshot_id}.tar", src_dir_fd=place, dst_dir_fd=place)
                share.write(root, msgspec.structs.replace(record, ready=True))
                share.tidy(root, f"{record.snapshot_id}.", ".new.tar")

        return work

    def get(self, snapshot_id: str) -> Snapshot:
        """VolumeNotFound where there is none; ExportUnknown where nobody can tell."""
        with exports.opened_any(self._exports.of(snapshot_id, NFS_SNAPSHOT)) as (root, _export):
            record = share.read(root, short(snapshot_id), SnapshotRecord)
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
            exports.opened_any(known) as (root, _export),
            share.enough_space(f"the deletion of snapshot {snapshot_id}"),
        ):
            made = [one.volume_id for one in share.records(root, NFS_VOLUME, Record, logged)
                    if not one.ready and short(one.source) == f"snapshot:{snapshot_id}"]  # fmt: skip
            if made:
                raise VolumeUnfinished(f"volume {made[0]} is being made from snapshot {snapshot_id}")
            share.tidy(root, f"{snapshot_id}.", ".tar")
            share.remove(root, snapshot_id)

    def list(self, *, after: int, limit: int, source: str, trouble: Trouble) -> Sequence[tuple[int, Snapshot]]:
        """Those of the shares that answer, with their places; of one volume only, if `source` names it."""

        def listed(root: int, _export: nfs.Export) -> builtins.list[Snapshot]:
            known = share.records(root, NFS_SNAPSHOT, SnapshotRecord, trouble)
            return [_snapshot(one) for one in known if not source or short(source) == short(one.source)]

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


@contextlib.contextmanager
def _unless_tidied(what: str) -> Iterator[None]:
    """VolumeUnfinished where another controller was faster, and has removed what was being written here."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            raise VolumeUnfinished(f"{what}: another controller was at work on it; ask again") from None
        raise
