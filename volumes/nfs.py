"""The backend `nfs`: a directory of an NFS export for each volume (`volumeAs: subpath`), or the export (`sharepath`).

What a volume is stands beside it on the share (`volumes.share`), so that any controller can go on where another one
ended. Work on the share goes through a mount that hangs nowhere.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import msgspec

from blockdev import Deadline, nfs
from volumes import exports, nfs_deletion, nfs_records_place, nfs_share, share, share_lock, sizes
from volumes.backend import Keeper, Unkept
from volumes.errors import InvalidParameter, VolumeConflict, VolumeNotFound, VolumeUnfinished
from volumes.export_ids import id_of, key, name_of, short
from volumes.exports import Exports
from volumes.jobs import PATIENCE, Jobs
from volumes.model import Capability, ContentSource, Need, NfsSource, SizeRange, Snapshot, Source, Volume, VolumeKind
from volumes.nfs_filling import Filling
from volumes.nfs_share import Share
from volumes.nfs_snapshots import NfsSnapshots
from volumes.share import NFS_SNAPSHOT, NFS_VOLUME, RECORDS, Record, SnapshotRecord
from volumes.troubles import EXPECTED, Trouble, Unfinished, logged

_SMALLEST = 4096


class NfsBackend:
    """Volumes on any export that a class names; `<state_dir>/exports.json` remembers which there were."""

    name = "nfs"
    prefix = NFS_VOLUME
    kind = VolumeKind.FILES
    multi_node = True

    def __init__(
        self,
        state_dir: str,
        *,
        exports_known: Sequence[str] = (),
        cluster: Callable[[], Sequence[exports.Said]] | None = None,
    ) -> None:
        """`exports_known`: where volumes are found although this controller has never worked there, `server:/path`;
        `cluster`: who says what a cluster's objects name."""
        self._exports = Exports(state_dir, exports_known, cluster)
        # Many, as each may wait for a server of its own.
        self._jobs = Jobs(running=16, of_one=8, family=self._exports.server_of)
        self.keeper: Keeper = Unkept()
        # In the names of what is being made, so that two controllers never write to the same.
        own = os.urandom(6).hex()
        self._filling = Filling(self._jobs, own)
        self._snapshots = NfsSnapshots(self._exports, self._jobs, own)

    def close(self) -> None:
        """Nothing is held."""

    def check_store(self) -> None:
        """Its records lie on the shares; no server is asked."""

    def unfinished(self) -> Sequence[Unfinished]:
        return []

    def needs(self) -> Sequence[Need]:
        there = nfs.client_in_kernel()
        return [Need(met=there, what="no-nfs-client", finding="the kernel has an NFS client" if there
                     else "this kernel has no NFS client loaded")]  # fmt: skip

    # -- the controller's verbs

    def create(
        self,
        name: str,
        size: SizeRange,
        parameters: Mapping[str, str],
        uses: Sequence[Capability],
        source: ContentSource | None = None,
    ) -> Volume:
        """VolumeUnfinished, with how far it is, while the content of `source` is still being copied."""
        place = nfs_share.of_class(parameters, [flag for use in uses for flag in use.mount_flags])
        handle = id_of(place.records, name_of(name, place.elsewhere), NFS_VOLUME)
        kept = [source.source_id] if source is not None and source.kind == "volume" else []
        with (
            self.keeper.still(kept, Deadline.after(PATIENCE)),
            nfs_share.opened(place) as one,
            share.enough_space(f"volume {name}"),
        ):
            self._exports.remember(place.records)
            with share_lock.changing(one.records):
                record = _as_it_stands(one, short(handle))
                if record is None:
                    record = self._begun(one, handle, name, size, parameters, source)
                _check_same(record, name, place.elsewhere, size, parameters, source)
                if not record.ready and source is None:
                    record = _made(one, record)
            if not record.ready and source is not None:
                record = self._filling.finished(one, record, source)
            if record.directory and not share.is_there(one.root, record.directory):
                raise VolumeUnfinished(
                    f"volume {name} has no directory {record.directory!r} on the share any more; delete it, or, while "
                    "it is being deleted, ask again"
                )
            return _volume(record, place.records)

    def _begun(
        self, one: Share, handle: str, name: str, size: SizeRange, parameters: Mapping[str, str],
        source: ContentSource | None,
    ) -> Record:  # fmt: skip
        """The record of a new volume, of which nothing is there yet."""
        smallest = _SMALLEST if source is None else self._size_of(one, source, parameters)
        where = nfs_share.directory_of(name, parameters)
        record = Record(
            volume_id=short(handle), name=name, capacity=sizes.choose(size, smallest=smallest), directory=where,
            parameters=dict(parameters), ready=False, source=str(source or ""), handle=handle,
            serial=os.urandom(6).hex(), path=one.place.elsewhere,
        )  # fmt: skip
        inode = nfs_share.inode_of(one, where) if where else 0
        record = msgspec.structs.replace(record, made=_made_by_us(one, record, inode))
        if parameters.get("subDir") or inode or not where:  # otherwise its directory is its own, and new
            nfs_share.check_place(one, record)
        if record.made is not False:
            nfs_share.check_one_filesystem(one, record)
        if source is not None:
            nfs_share.check_free(one, record)
        nfs_records_place.check(one)
        share.write(one.records, record)
        return record

    def _size_of(self, one: Share, source: ContentSource, parameters: Mapping[str, str]) -> int:
        """The least that a volume with this content must have."""
        if parameters.get("volumeAs") == "sharepath":
            raise InvalidParameter("volumeAs", "sharepath", "cannot be made from another volume: the share is there")
        prefix = NFS_SNAPSHOT if source.kind == "snapshot" else NFS_VOLUME
        export, source_id = one.place.records, short(source.source_id)
        if not source.source_id.startswith(prefix + key(export)):
            if not source.source_id.startswith(prefix):
                raise VolumeNotFound(source.source_id)
            raise InvalidParameter("path", export.path, f"is another share than that of {source}; use a class of that")
        if source.kind == "snapshot":
            snapshot = share.read(one.records, source_id, SnapshotRecord)
            if snapshot is None:
                raise VolumeNotFound(source.source_id)
            if not snapshot.ready:
                raise VolumeUnfinished(f"snapshot {source.source_id} is still being made")
            return snapshot.capacity
        volume = share.read(one.records, source_id, Record)
        if volume is None or not volume.ready:
            raise VolumeNotFound(source.source_id)
        if volume.path != one.place.elsewhere:
            raise InvalidParameter("path", one.place.data.path, f"is another share than that of {source}")
        return volume.capacity

    def delete(self, volume_id: str) -> None:
        """As `_deleted`, behind the call where that takes long: VolumeUnfinished, and who asks again waits for it."""
        self._jobs.cancel(short(volume_id), PATIENCE)
        what = f"deleting volume {volume_id}"
        # Who joins a deletion that had begun may have made the volume anew meanwhile: that one is to go, too.
        joined = self._jobs.progress(what) is not None
        for _turn in range(2 if joined else 1):
            self._jobs.finished(what, what, lambda _progress: self._deleted(volume_id), PATIENCE)

    def _deleted(self, volume_id: str) -> None:
        """ExportUnknown where nobody can look."""
        try:
            known, volume_id = self._exports.of(volume_id, NFS_VOLUME), short(volume_id)
        except VolumeNotFound:
            return
        with (
            nfs_share.opened_of(known, volume_id) as one,
            share.enough_space(f"the deletion of volume {volume_id}"),
        ):
            nfs_deletion.delete(one, volume_id, self._jobs)
            place, left = one.place, share.names(one.root, share_lock.HALF)
        what = f"tidying {place.data.source}"
        if left:  # by calls that were killed, and whose callers do not come again
            with contextlib.suppress(*EXPECTED):
                self._jobs.finished(what, what, lambda _progress: _without_abandoned(place), 0.0)

    # -- snapshots

    snapshot_prefix = NFS_SNAPSHOT

    def take_snapshot(self, name: str, volume_id: str, deadline: Deadline) -> Snapshot:
        """As an archive on the volume's share; not `ready` while it is being made."""
        with self.keeper.still([volume_id], deadline):
            return self._snapshots.take(name, volume_id, deadline)

    def snapshot(self, snapshot_id: str) -> Snapshot:
        return self._snapshots.get(snapshot_id)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """VolumeUnfinished while it is being made, or a volume from it."""
        self._snapshots.delete(snapshot_id)

    def snapshots(
        self, *, after: int = 0, limit: int = -1, source: str = "", trouble: Trouble = logged
    ) -> Sequence[tuple[int, Snapshot]]:  # fmt: skip
        return self._snapshots.list(after=after, limit=limit, source=source, trouble=trouble)

    # -- looking at volumes

    def get(self, volume_id: str) -> Volume | None:
        """None where the share has been looked at; ExportUnknown where nobody can."""
        try:
            known = self._exports.of(volume_id, NFS_VOLUME)
        except VolumeNotFound:
            return None
        with exports.opened_any(known) as (records, export), share.readable(f"volume {volume_id}"):
            record = share.read(records, short(volume_id), Record)
        return _volume(record, export) if record is not None and record.ready else None

    def list(
        self, *, after: int = 0, limit: int = -1, trouble: Trouble = logged
    ) -> Sequence[tuple[int, Volume]]:  # fmt: skip
        """Volumes of the shares that this controller knows, in a stable order; a share that is away has none. What
        another export's volumes are called is no volume of this one, whatever lies on it."""

        def listed(records: int, export: nfs.Export) -> builtins.list[Volume]:
            order = exports.order(export, after)
            ready = (one for one in share.records(records, NFS_VOLUME, Record, trouble, order=order) if one.ready)
            some = [*itertools.islice(ready, limit if limit >= 0 else None)]
            if any(one.path for one in some) and _has_volumes(records):
                # Pods may have the share whole, and any of them could say that of another tenant's.
                trouble(f"records on {export.source} speak of another export, and there are volumes on this one; "
                        "exports for records are for nothing else")  # fmt: skip
                some = [one for one in some if not one.path]
            return [_volume(one, export) for one in some]

        found = self._exports.on_each(listed, trouble)
        return exports.part([(exports.place(one.volume_id), one) for one in found], after, limit)

    def available_bytes(self) -> int:
        """Nobody counts what a server has: a class without a server is not asked."""
        return sizes.LARGEST

    def check_expand(self, volume_id: str, size: SizeRange) -> int:
        return sizes.grown(volume_id, self._ready(volume_id).capacity_bytes, size)

    def promise(self, volume_id: str, size: SizeRange) -> int:
        return self.expand(volume_id, size).capacity_bytes

    def expand(self, volume_id: str, size: SizeRange) -> Volume:
        known = self._exports.of(volume_id, NFS_VOLUME)
        with (
            exports.opened_any(known) as (records, export),
            share.enough_space(f"the size of volume {volume_id}"),
            share_lock.changing(records),
        ):
            record = share.read(records, short(volume_id), Record)
            if record is None or not record.ready:
                raise VolumeNotFound(volume_id)
            capacity = sizes.grown(volume_id, record.capacity, size)
            if capacity != record.capacity:
                record = msgspec.structs.replace(record, capacity=capacity)
                share.write(records, record)
            return _volume(record, export)

    # -- the node's verbs

    def problems(self, _volume_id: str) -> Sequence[str]:
        return []

    def refuses(self, flag: str) -> str | None:
        wrong = nfs.check_options([flag])
        if wrong is None:
            return "names a port, and no number from 0 to 65535" if nfs.wrong_port([flag]) is not None else None
        if "vers" in wrong:
            return f"takes {', '.join(nfs.VERSIONS)}"
        return "is set by runvol from the server, the version and the node"

    def attach(self, volume_id: str, context: Mapping[str, str] | None = None) -> Source:
        """From the volume's context, which any node has; else from the share.

        A context that was written by hand may name a directory below the path by `subDir`; that of a volume that was
        made here has it in its path.
        """
        described = context is not None and bool(context.get("server"))
        facts = context if context is not None and described else self._ready(volume_id).parameters
        export = exports.of_class(facts, [])
        _, options = nfs.version_among([word for word in facts.get("options", "").split(",") if word])
        # Described by hand, `path` with its `subDir` is what is mounted, whatever `volumeAs` says of others.
        path = os.path.join(export.path, facts["subDir"]) if described and facts.get("subDir") else export.path
        return NfsSource(server=export.server, path=path, version=export.version, options=options)

    def recover(self) -> Sequence[str]:
        """A creation or deletion that was interrupted is finished by the same call, made again."""
        return []

    def unknown_files(self) -> Sequence[str]:
        return []

    # -- inside

    def _ready(self, volume_id: str) -> Volume:
        found = self.get(volume_id)
        if found is None:
            raise VolumeNotFound(volume_id)
        return found


def _has_volumes(records: int) -> bool:
    """Whether volumes lie on the export itself."""
    return any(not one.path for one in share.records(records, NFS_VOLUME, Record, share.passed_over))


def _without_abandoned(place: nfs_share.Place) -> None:
    with nfs_share.opened(place) as one:
        share_lock.tidy_abandoned(one.records, one.root, share_lock.HALF)


def _as_it_stands(one: Share, volume_id: str) -> Record | None:
    """The record; None for a volume that is not there. VolumeUnfinished for one that is not gone yet."""
    record = share.read(one.records, volume_id, Record)
    if record is not None and record.gone:
        if nfs_deletion.settle(one, record) is None:
            share.remove(one.records, volume_id)  # its files go with the next of this name
            return None
        if not record.deleting:
            raise VolumeUnfinished(
                f"an earlier volume {record.name} was deleted, and its directory {record.directory!r} stays until the "
                "volumes that lie in it are deleted, too"
            )
    if record is not None and record.deleting:
        raise VolumeUnfinished(f"volume {record.name} is being deleted; ask again")
    return record


def _made(one: Share, record: Record) -> Record:
    """An empty volume is there, as the record says from now on."""
    ours = False
    if record.directory:
        record, ours = _with_directory(one, record)
    if record.ready:
        return record
    if ours:
        with share.parent(one.root, record.directory) as (fd, name):
            share.chmod(fd, name, int(record.parameters.get("mode", "0777"), 8))
    record = msgspec.structs.replace(record, ready=True)
    share.write(one.records, record)
    return record


def _made_by_us(one: Share, record: Record, inode: int) -> bool | None:
    """Whether the directory of a new volume will be, or was, made by runvol; None where older records do not say.
    `inode`: of what lies in its place; 0 for nothing."""
    if not inode:
        return bool(record.directory)
    sharing = nfs_share.in_the_same(one, record, inode)
    return sharing[0].made if sharing else False


def _with_directory(one: Share, record: Record) -> tuple[Record, bool]:
    """The volume's directory is there. What its record now has to say of it, and whether its permissions are ours to
    set: never those of a directory that somebody else has made, nor of one that another volume has as well."""
    with share.parent(one.root, record.directory, made=True) as (fd, name):
        try:
            os.mkdir(name, 0o777, dir_fd=fd)
            inode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino
            return msgspec.structs.replace(record, made=True, inode=inode), True
        except FileExistsError:
            pass
        with share.opened(fd, name) as there:
            empty, inode = not os.listdir(there), os.fstat(there).st_ino
    now = share.read(one.records, record.volume_id, Record) or record
    if now.ready:
        return now, False  # another controller was faster
    if sharing := nfs_share.in_the_same(one, record, inode):
        return msgspec.structs.replace(now, inode=inode if sharing[0].made else 0), False
    if empty:
        ours = record.made is not False  # a process that was killed then has made it
        return msgspec.structs.replace(record, inode=inode if ours else 0), ours
    return msgspec.structs.replace(record, made=False if record.made else record.made), False


def _check_same(
    old: Record, name: str, path: str, size: SizeRange, parameters: Mapping[str, str], source: ContentSource | None
) -> None:
    """`path`: the export of its directory, where the records lie elsewhere."""
    if (old.name, old.path) != (name, path):
        raise VolumeUnfinished(f"the share's {RECORDS}/{old.volume_id}.json is the record of another volume; remove it")
    if old.parameters != dict(parameters):
        raise VolumeConflict(name, f"was made with the parameters {old.parameters}")
    if short(old.source) != short(str(source or "")):
        raise VolumeConflict(name, f"was made from {old.source or 'nothing'}, not from {source or 'nothing'}")
    if old.directory != nfs_share.directory_of(name, parameters):
        # Everybody on the share can have written that.
        raise VolumeUnfinished(
            f"the share's {RECORDS}/{old.volume_id}.json says that volume {name} lies at {old.directory[:200]!r}, "
            "which is not its place; remove that record, or put it right"
        )
    sizes.check_fits(name, old.capacity, size)


def _volume(record: Record, export: nfs.Export) -> Volume:
    """`export`: where its record lies. Which one that is, the record does not decide."""
    data = nfs_share.of_record(record, export).data
    path = os.path.join(data.path, record.directory) if record.directory else data.path
    return Volume(
        volume_id=record.handle or record.volume_id,
        name=record.name,
        backend=NfsBackend.name,
        capacity_bytes=record.capacity,
        parameters={**record.parameters, "server": export.server, "path": path},
        source=record.source,
    )
