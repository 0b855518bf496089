"""The backend `nfs`: a directory of an NFS export for each volume (`volumeAs: subpath`), or the export (`sharepath`).

What a volume is stands beside it on the share (`volumes.share`), so that any controller can go on where another one
ended. Work on the share goes through a mount that hangs nowhere.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
from collections.abc import Callable, Mapping, Sequence

import msgspec

from blockdev import Deadline, nfs
from volumes import exports, share, sizes
from volumes.backend import Keeper, Unkept
from volumes.errors import (
    InvalidParameter,
    StoreFailed,
    VolumeConflict,
    VolumeNotFound,
    VolumeUnfinished,
)
from volumes.export_ids import digest, id_of, key, short
from volumes.exports import Exports
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import Capability, ContentSource, Need, NfsSource, SizeRange, Snapshot, Source, Volume, VolumeKind
from volumes.nfs_snapshots import NfsSnapshots
from volumes.share import NFS_SNAPSHOT, NFS_VOLUME, RECORDS, Record, SnapshotRecord
from volumes.troubles import Trouble, Unfinished, logged

ARCHIVE = "archived-"
_SMALLEST = 4096
# How often a name may be archived.
_ARCHIVES = 1000


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
        self._jobs = Jobs(running=16)
        self.keeper: Keeper = Unkept()
        # In the names of what is being made, so that two controllers never write to the same.
        self._own = os.urandom(6).hex()
        self._snapshots = NfsSnapshots(self._exports, self._jobs, self._own)

    def close(self) -> None:
        """Nothing is held."""

    def check_store(self) -> None:
        """Its records lie on the shares; no server is asked."""

    def unfinished(self) -> Sequence[Unfinished]:
        return []

    def needs(self) -> Sequence[Need]:
        there = nfs.client_in_kernel()
        return [Need(met=there, finding="the kernel has an NFS client" if there
                     else "this kernel has no NFS client loaded: modprobe nfs")]  # fmt: skip

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
        export = exports.of_class(parameters, [flag for use in uses for flag in use.mount_flags])
        handle = id_of(export, name, NFS_VOLUME)
        volume_id = short(handle)
        kept = [source.source_id] if source is not None and source.kind == "volume" else []
        with (
            self.keeper.still(kept, Deadline.after(PATIENCE)),
            exports.opened(export) as root,
            share.enough_space(f"volume {name}"),
        ):
            self._exports.remember(export)
            record = share.read(root, volume_id, Record)
            if record is not None and record.gone:
                raise VolumeUnfinished(f"an earlier volume {name} was deleted, and its directory {record.directory!r} "
                                       "stays until the volumes that lie in it are deleted, too")  # fmt: skip
            if record is None:
                smallest = _SMALLEST if source is None else self._size_of(root, export, source, parameters)
                place = _place_of(name, parameters)
                record = Record(
                    volume_id=volume_id, name=name, capacity=sizes.choose(size, smallest=smallest),
                    directory=place, parameters=dict(parameters), ready=False, source=str(source or ""),
                    made=_made_by_us(root, place), handle=handle,
                )  # fmt: skip
                if source is not None:
                    _check_free(root, record)
                share.write(root, record)
            _check_same(record, name, size, parameters, source)
            if not record.ready:
                record = self._make(root, export, record, source)
            return _volume(record, export)

    def _make(self, root: int, export: nfs.Export, record: Record, source: ContentSource | None) -> Record:
        """The record of the volume, which is there."""
        ours = False
        if source is not None:
            work = self._filling(export, record, source)
            self._jobs.finished(record.volume_id, f"volume {record.name} from {source}", work, PATIENCE)
            if not share.is_there(root, record.directory):
                # That work had ended before somebody deleted the volume; the next call begins anew.
                raise VolumeUnfinished(f"volume {record.name} from {source}: its content is gone; ask again")
            record = share.read(root, record.volume_id, Record) or record
            ours = "mode" in record.parameters
        elif record.directory:
            record, ours = _with_directory(root, record)
        if record.ready:
            return record
        if record.directory and ours:
            with share.parent(root, record.directory) as (fd, name):
                share.chmod(fd, name, int(record.parameters.get("mode", "0777"), 8))
        record = msgspec.structs.replace(record, ready=True)
        share.write(root, record)
        return record

    def _size_of(
        self, root: int, export: nfs.Export, source: ContentSource, parameters: Mapping[str, str]
    ) -> int:  # fmt: skip
        """The least that a volume with this content must have."""
        if parameters.get("volumeAs") == "sharepath":
            raise InvalidParameter("volumeAs", "sharepath", "cannot be made from another volume: the share is there")
        prefix = NFS_SNAPSHOT if source.kind == "snapshot" else NFS_VOLUME
        if not source.source_id.startswith(prefix + key(export)):
            if not source.source_id.startswith(prefix):
                raise VolumeNotFound(source.source_id)
            raise InvalidParameter("path", export.path, f"is another share than that of {source}; use a class of that")
        if source.kind == "snapshot":
            snapshot = share.read(root, short(source.source_id), SnapshotRecord)
            if snapshot is None:
                raise VolumeNotFound(source.source_id)
            if not snapshot.ready:
                raise VolumeUnfinished(f"snapshot {source.source_id} is still being made")
            return snapshot.capacity
        volume = share.read(root, short(source.source_id), Record)
        if volume is None or not volume.ready:
            raise VolumeNotFound(source.source_id)
        return volume.capacity

    def _filling(self, export: nfs.Export, record: Record, source: ContentSource) -> Callable[[Progress], None]:
        """The work that copies the content beside its place, and then puts it there."""

        def work(progress: Progress) -> None:
            # Most processes never copy anything.
            from volumes import archives

            with exports.opened(export) as root, share.enough_space(f"volume {record.name}"):
                if share.is_there(root, record.directory):
                    return  # a process that was killed then, or another controller, has done it
                new = f"{RECORDS}/new-{record.volume_id}.{self._own}"
                with share.unless_whole(root, new):
                    share.remove_tree(root, new)
                    with share.parent(root, new) as (place, name):
                        os.mkdir(name, 0o700, dir_fd=place)
                    with share.opened(root, new) as target:
                        if source.kind == "snapshot":
                            with open(share.archive(root, short(source.source_id)), "rb") as archive:
                                archives.unpack(archive, target, progress)
                        else:
                            old = share.read(root, short(source.source_id), Record)
                            if old is None:
                                raise VolumeNotFound(source.source_id)
                            with share.opened(root, old.directory or ".") as directory:
                                archives.copy(directory, target, progress, without=share.not_its_own(old))
                    _put_in_place(root, new, record)
                share.tidy(root, f"new-{record.volume_id}.")

        return work

    def delete(self, volume_id: str) -> None:
        """As `_deleted`, behind the call where that takes long: VolumeUnfinished, and who asks again waits for it."""
        self._jobs.cancel(short(volume_id), PATIENCE)
        what = f"deleting volume {volume_id}"
        self._jobs.finished(what, what, lambda _progress: self._deleted(volume_id), PATIENCE)

    def _deleted(self, volume_id: str) -> None:
        """The directory is archived, or removed with its content if the class says so. What was there before the volume
        is left as it is, a share itself among it. ExportUnknown where nobody can look."""
        try:
            known, volume_id = self._exports.of(volume_id, NFS_VOLUME), short(volume_id)
        except VolumeNotFound:
            return
        with exports.opened_any(known) as (root, _export), share.enough_space(f"the deletion of volume {volume_id}"):
            record = share.read(root, volume_id, Record)
            if record is None or record.gone:
                return
            damaged: builtins.list[str] = []
            has_others, copies, deleted = False, builtins.list[str](), builtins.list[Record]()
            living = builtins.list[Record]()
            for other in share.records(root, NFS_VOLUME, Record, damaged.append):
                if other.volume_id != volume_id:
                    has_others |= _is_in(other, record) and not other.gone
                    (deleted if other.gone else living).append(other)
                    if not other.ready and short(other.source) == f"volume:{volume_id}":
                        copies.append(other.volume_id)
            self._check_not_copied(root, record, copies)
            if damaged and record.parameters.get("subDir"):
                raise VolumeUnfinished(f"{damaged[0]}; it may be of a volume in the same subDir as {volume_id}")
            share.write(root, msgspec.structs.replace(record, ready=False))
            share.tidy(root, f"new-{volume_id}.")
            if has_others and record.directory and record.made is not False:
                share.write(root, msgspec.structs.replace(record, ready=False, gone=True))
                return
            _take_away(root, record, sure=not damaged)
            share.remove(root, volume_id)
            # What was deleted before, and only waited for this one.
            for other in sorted(deleted, key=lambda one: len(one.directory), reverse=True):
                if _is_in(record, other) and not any(_is_in(one, other) for one in living):
                    _take_away(root, other, sure=not damaged)
                    share.remove(root, other.volume_id)

    def _check_not_copied(self, root: int, record: Record, copies: Sequence[str]) -> None:
        """VolumeUnfinished while something is being made from this volume (`copies`: volumes), or it from something."""
        if self._jobs.progress(record.volume_id) is not None:
            raise VolumeUnfinished(f"volume {record.volume_id} is being filled from {record.source}")
        made = [*copies]
        made += [one.snapshot_id for one in share.records(root, NFS_SNAPSHOT, SnapshotRecord, logged)
                 if not one.ready and short(one.source) == record.volume_id]  # fmt: skip
        if made:
            raise VolumeUnfinished(f"volume {record.volume_id} is being copied to {made[0]}; wait, or delete that")

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
        with exports.opened_any(known) as (root, export):
            record = share.read(root, short(volume_id), Record)
        return _volume(record, export) if record is not None and record.ready else None

    def list(
        self, *, after: int = 0, limit: int = -1, trouble: Trouble = logged
    ) -> Sequence[tuple[int, Volume]]:  # fmt: skip
        """Volumes of the shares that this controller knows, in a stable order; a share that is away has none."""

        def listed(root: int, export: nfs.Export) -> builtins.list[Volume]:
            return [_volume(one, export) for one in share.records(root, NFS_VOLUME, Record, trouble) if one.ready]

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
        capacity = self.check_expand(volume_id, size)
        known = self._exports.of(volume_id, NFS_VOLUME)
        with exports.opened_any(known) as (root, export), share.enough_space(f"the size of volume {volume_id}"):
            record = share.read(root, short(volume_id), Record)
            if record is None:
                raise VolumeNotFound(volume_id)
            record = msgspec.structs.replace(record, capacity=capacity)
            share.write(root, record)
            return _volume(record, export)

    # -- the node's verbs

    def problems(self, _volume_id: str) -> Sequence[str]:
        return []

    def refuses(self, flag: str) -> str | None:
        wrong = nfs.check_options([flag])
        if wrong is None:
            return None
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


def _place_of(name: str, parameters: Mapping[str, str]) -> str:
    """The volume's directory below the share; empty for the share itself."""
    below = _sub_directory(parameters)
    return "" if parameters.get("volumeAs") == "sharepath" else below or _directory(name)


def _sub_directory(parameters: Mapping[str, str]) -> str:
    if parameters.get("volumeAs") == "sharepath" and parameters.get("subDir"):
        raise InvalidParameter("subDir", parameters["subDir"], "means nothing with volumeAs: sharepath")
    return parameters.get("subDir", "")


def _made_by_us(root: int, place: str) -> bool | None:
    """Whether the directory of a new volume will be, or was, made by runvol; None where older records do not say."""
    if not place or not share.is_there(root, place):
        return bool(place)
    sharing = _in_the_same(root, place)
    return sharing[0].made if sharing else False


def _in_the_same(root: int, place: str, besides: str = "") -> list[Record]:
    found = share.records(root, NFS_VOLUME, Record, logged)
    return [one for one in found if one.directory == place and one.volume_id != besides]


def _with_directory(root: int, record: Record) -> tuple[Record, bool]:
    """The volume's directory is there. What its record now has to say of it, and whether its permissions are ours to
    set: never those of a directory that somebody else has made, nor of one that another volume has as well."""
    with share.parent(root, record.directory, made=True) as (fd, name):
        try:
            os.mkdir(name, 0o777, dir_fd=fd)
            return msgspec.structs.replace(record, made=True), True
        except FileExistsError:
            pass
        with share.opened(fd, name) as there:
            empty = not os.listdir(there)
    now = share.read(root, record.volume_id, Record) or record
    if now.ready or _in_the_same(root, record.directory, record.volume_id):
        return now, False  # another controller was faster, or another volume has it too
    if empty:
        return record, record.made is not False  # a process that was killed then has made it
    return msgspec.structs.replace(record, made=False if record.made else record.made), False


def _take_away(root: int, record: Record, *, sure: bool) -> None:
    """The directory of a deleted volume is archived, or removed if its class says so; what was there before the volume
    stays. Where not all is known (`sure`), nothing is removed that might be somebody's."""
    if not record.directory or record.made is False:
        return
    if not sure or record.made is None or record.parameters.get("archiveOnDelete", "true") == "true":
        _archive(root, record)
    else:
        _remove(root, record)


def _is_in(other: Record, record: Record) -> bool:
    """Whether another volume has this one's directory too, or one in it: a subDir may be the same for several."""
    return f"{other.directory}/".startswith(f"{record.directory}/")


def _directory(name: str) -> str:
    """The name itself where it can be one; a person looks for it on the server."""
    plain = name.replace("/", "-").replace("\0", "-")
    if plain.startswith(".") or plain.startswith(ARCHIVE) or len(plain.encode()) > 200 or plain != name:
        return f"v-{digest(name)[:32]}"
    return plain


def _put_in_place(root: int, new: str, record: Record) -> None:
    """The whole content becomes the volume's directory, unless another controller was faster."""
    with share.parent(root, record.directory, made=True) as (fd, name):
        try:
            os.rename(new, name, src_dir_fd=root, dst_dir_fd=fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not share.is_there(
                root, record.directory
            ):
                raise


def _check_free(root: int, record: Record) -> None:
    """VolumeConflict if something of somebody else's lies where the content would go."""
    if share.is_there(root, record.directory):
        raise VolumeConflict(record.name, f"its directory {record.directory!r} is on the share already")


def _archive(root: int, record: Record) -> None:
    """The directory has another name, which tells what it was."""
    first = f"{ARCHIVE}{record.directory.replace('/', '-')[:200]}-{record.volume_id[-8:]}"
    with contextlib.suppress(FileNotFoundError), share.parent(root, record.directory) as (fd, name):
        for number in range(1, _ARCHIVES + 1):
            archived = first if number == 1 else f"{first}-{number}"
            try:
                os.rename(name, archived, src_dir_fd=fd, dst_dir_fd=root)
                return
            except OSError as error:
                # An earlier volume of this name was archived, too; or somebody has put something of this name there.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        raise StoreFailed(f"{first} and {_ARCHIVES - 1} more such names are taken on the share; remove some of them")


def _remove(root: int, record: Record) -> None:
    """The directory is gone, with what is in it: out of everybody's sight first, so that a killed process's work is
    recognised. Links in it are removed, not followed."""
    gone = f"{RECORDS}/gone-{record.volume_id}"
    share.remove_tree(root, gone)
    with (
        contextlib.suppress(FileNotFoundError),
        share.parent(root, record.directory) as (fd, name),
        share.opened(root, RECORDS) as records,
    ):
        os.rename(name, os.path.basename(gone), src_dir_fd=fd, dst_dir_fd=records)
    share.remove_tree(root, gone)


def _check_same(
    old: Record, name: str, size: SizeRange, parameters: Mapping[str, str], source: ContentSource | None
) -> None:
    if old.parameters != dict(parameters):
        raise VolumeConflict(name, f"was made with the parameters {old.parameters}")
    if short(old.source) != short(str(source or "")):
        raise VolumeConflict(name, f"was made from {old.source or 'nothing'}, not from {source or 'nothing'}")
    if old.directory != _place_of(name, parameters):
        # Everybody on the share can have written that.
        raise VolumeUnfinished(
            f"the share's {RECORDS}/{old.volume_id}.json says that volume {name} lies at {old.directory[:200]!r}, "
            "which is not its place; remove that record, or put it right"
        )
    sizes.check_fits(name, old.capacity, size)


def _volume(record: Record, export: nfs.Export) -> Volume:
    path = os.path.join(export.path, record.directory) if record.directory else export.path
    return Volume(
        volume_id=record.handle or record.volume_id,
        name=record.name,
        backend=NfsBackend.name,
        capacity_bytes=record.capacity,
        # Which export that is, the record does not decide.
        parameters={**record.parameters, "server": export.server, "path": path},
        source=record.source,
    )
