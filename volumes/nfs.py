"""The backend `nfs`: a directory of an NFS export for each volume (`volumeAs: subpath`), or the export (`sharepath`).

What a volume is stands beside it on the share (`volumes.share`), so that any controller can go on where another one
ended. Work on the share goes through a mount that hangs nowhere.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec

from blockdev import Deadline, durable, nfs
from volumes import share, sizes
from volumes.errors import (
    InvalidParameter,
    NoSpace,
    VolumeConflict,
    VolumeNotFound,
    VolumeUnfinished,
)
from volumes.jobs import Jobs, Progress
from volumes.model import Capability, ContentSource, NfsSource, SizeRange, Snapshot, Source, Volume, VolumeKind
from volumes.share import RECORDS, Record, SnapshotRecord

PREFIX, SNAPSHOT_PREFIX = "nfs-", "nfssnap-"
ARCHIVE = "archived-"
_SMALLEST = 4096
_CALL = 60.0
T = TypeVar("T", Volume, Snapshot)
# Seconds that a call waits for a copy; it goes on, and the caller asks again.
_PATIENCE = 8.0


class NfsBackend:
    """Volumes on any export that a class names; `<state_dir>/exports.json` remembers which there were."""

    name = "nfs"
    prefix = PREFIX
    kind = VolumeKind.FILES
    multi_node = True

    def __init__(self, state_dir: str) -> None:
        self._known = os.path.join(state_dir, "exports.json")
        self._jobs = Jobs()
        # In the names of what is being made, so that two controllers never write to the same.
        self._own = os.urandom(6).hex()

    def close(self) -> None:
        """Nothing is held."""

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
        export = _share(parameters, [flag for use in uses for flag in use.mount_flags])
        volume_id = _id(export, name)
        self._remember(export)
        with self._root(export) as root, _no_space(f"volume {name}"):
            record = share.read(root, volume_id, Record)
            if record is None:
                smallest = _SMALLEST if source is None else self._size_of(root, export, source, parameters)
                record = Record(
                    volume_id=volume_id, name=name, capacity=sizes.choose(size, smallest=smallest),
                    directory=_place_of(name, parameters),
                    parameters=dict(parameters), ready=False, source=str(source or ""),
                )  # fmt: skip
                if source is not None:
                    _check_free(root, record)
                share.write(root, record)
            _check_same(record, name, size, parameters, source)
            if not record.ready:
                self._make(root, export, record, source)
            return _volume(record, export)

    def _make(self, root: int, export: nfs.Export, record: Record, source: ContentSource | None) -> None:
        if source is not None:
            work = self._filling(export, record, source)
            self._jobs.finished(record.volume_id, f"volume {record.name} from {source}", work, _PATIENCE)
            record = share.read(root, record.volume_id, Record) or record
        elif record.directory:
            with share.parent(root, record.directory, made=True) as (fd, name), contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o777, dir_fd=fd)
        if record.directory and (source is None or "mode" in record.parameters):
            with share.parent(root, record.directory) as (fd, name):
                share.chmod(fd, name, int(record.parameters.get("mode", "0777"), 8))
        share.write(root, msgspec.structs.replace(record, ready=True))

    def _size_of(
        self, root: int, export: nfs.Export, source: ContentSource, parameters: Mapping[str, str]
    ) -> int:  # fmt: skip
        """The least that a volume with this content must have."""
        if parameters.get("volumeAs") == "sharepath":
            raise InvalidParameter("volumeAs", "sharepath", "cannot be made from another volume: the share is there")
        prefix = SNAPSHOT_PREFIX if source.kind == "snapshot" else PREFIX
        if not source.source_id.startswith(prefix + _key(export)):
            if not source.source_id.startswith(prefix):
                raise VolumeNotFound(source.source_id)
            raise InvalidParameter("path", export.path, f"is another share than that of {source}; use a class of that")
        if source.kind == "snapshot":
            snapshot = share.read(root, source.source_id, SnapshotRecord)
            if snapshot is None:
                raise VolumeNotFound(source.source_id)
            if not snapshot.ready:
                raise VolumeUnfinished(f"snapshot {source.source_id} is still being made")
            return snapshot.capacity
        volume = share.read(root, source.source_id, Record)
        if volume is None or not volume.ready:
            raise VolumeNotFound(source.source_id)
        return volume.capacity

    def _filling(self, export: nfs.Export, record: Record, source: ContentSource) -> Callable[[Progress], None]:
        """The work that copies the content beside its place, and then puts it there."""

        def work(progress: Progress) -> None:
            # Most processes never copy anything.
            from volumes import archives

            with self._root(export) as root, _no_space(f"volume {record.name}"):
                if share.is_there(root, record.directory):
                    return  # a process that was killed then, or another controller, has done it
                new = f"{RECORDS}/new-{record.volume_id}.{self._own}"
                with share.unless_whole(root, new):
                    share.remove_tree(root, new)
                    os.mkdir(new, 0o700, dir_fd=root)
                    with share.opened(root, new) as target:
                        if source.kind == "snapshot":
                            with open(share.archive(root, source.source_id, os.O_RDONLY), "rb") as archive:
                                archives.unpack(archive, target, progress)
                        else:
                            old = share.read(root, source.source_id, Record)
                            if old is None:
                                raise VolumeNotFound(source.source_id)
                            with share.opened(root, old.directory or ".") as directory:
                                archives.copy(directory, target, progress, without=_ours(old))
                    _put_in_place(root, new, record)
                share.tidy(root, f"new-{record.volume_id}.")

        return work

    def delete(self, volume_id: str) -> None:
        """The directory is archived, or removed with its content if the class says so. A share itself is left."""
        export = self._share_of(volume_id)
        if export is None:
            return
        with self._root(export) as root:
            record = share.read(root, volume_id, Record)
            if record is None:
                return
            self._check_not_copied(root, record)
            share.write(root, msgspec.structs.replace(record, ready=False))
            if record.directory and not _has_others(root, record):
                _take_away(root, record)
            share.tidy(root, f"new-{volume_id}.")
            share.remove(root, volume_id)

    def _check_not_copied(self, root: int, record: Record) -> None:
        """VolumeUnfinished while something is being made from this volume, or it from something."""
        if self._jobs.progress(record.volume_id) is not None:
            raise VolumeUnfinished(f"volume {record.volume_id} is being filled from {record.source}")
        made = [one.volume_id for one in share.records(root, PREFIX, Record)
                if not one.ready and one.source == f"volume:{record.volume_id}"]  # fmt: skip
        made += [one.snapshot_id for one in share.records(root, SNAPSHOT_PREFIX, SnapshotRecord)
                 if not one.ready and one.source == record.volume_id]  # fmt: skip
        if made:
            raise VolumeUnfinished(f"volume {record.volume_id} is being copied to {made[0]}; wait, or delete that")

    # -- snapshots

    snapshot_prefix = SNAPSHOT_PREFIX

    def take_snapshot(self, name: str, volume_id: str, deadline: Deadline) -> Snapshot:
        """The snapshot called `name` of the volume, as an archive on its share; not `ready` while it is being made."""
        export = self._share_of(volume_id)
        if export is None:
            raise VolumeNotFound(volume_id)
        snapshot_id = _id(export, name, SNAPSHOT_PREFIX)
        with self._root(export) as root, _no_space(f"snapshot {name}"):
            volume = share.read(root, volume_id, Record)
            if volume is None or not volume.ready:
                raise VolumeNotFound(volume_id)
            record = share.read(root, snapshot_id, SnapshotRecord)
            if record is None:
                record = SnapshotRecord(snapshot_id=snapshot_id, name=name, source=volume_id, capacity=volume.capacity,
                                        created=time.time(), ready=False)  # fmt: skip
                share.write(root, record)
            if (record.name, record.source) != (name, volume_id):
                raise VolumeConflict(name, f"is a snapshot of {record.source}, not of {volume_id}")
            if not record.ready:
                work = self._archiving(export, record, volume)
                patience = max(0.0, min(_PATIENCE, deadline.remaining() - 1))
                with contextlib.suppress(VolumeUnfinished):
                    self._jobs.finished(snapshot_id, f"snapshot {name} of {volume_id}", work, patience)
                record = share.read(root, snapshot_id, SnapshotRecord) or record
        return self._snapshot(record)

    def _archiving(self, export: nfs.Export, record: SnapshotRecord, volume: Record) -> Callable[[Progress], None]:
        def work(progress: Progress) -> None:
            # Most processes never copy anything.
            from volumes import archives

            new = f"{record.snapshot_id}.{self._own}.new"
            with (
                self._root(export) as root,
                _no_space(f"snapshot {record.name}"),
                _unless_tidied(f"snapshot {record.name}"),
                share.unless_whole(root, f"{RECORDS}/{new}.tar"),
            ):
                with (
                    share.opened(root, volume.directory or ".") as directory,
                    open(share.archive(root, new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as archive,
                ):
                    archives.pack(directory, archive, progress, without=_ours(volume))
                    os.fsync(archive.fileno())
                whole = f"{RECORDS}/{record.snapshot_id}.tar"
                os.rename(f"{RECORDS}/{new}.tar", whole, src_dir_fd=root, dst_dir_fd=root)
                share.write(root, msgspec.structs.replace(record, ready=True))
                share.tidy(root, f"{record.snapshot_id}.", ".new.tar")

        return work

    def snapshot(self, snapshot_id: str) -> Snapshot:
        """VolumeNotFound where there is none."""
        export = self._share_of(snapshot_id, SNAPSHOT_PREFIX)
        if export is not None:
            with self._root(export) as root:
                record = share.read(root, snapshot_id, SnapshotRecord)
            if record is not None:
                return self._snapshot(record)
        raise VolumeNotFound(snapshot_id)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """No such snapshot afterwards; VolumeUnfinished while it is being made, or a volume from it."""
        export = self._share_of(snapshot_id, SNAPSHOT_PREFIX)
        if export is None:
            return
        if self._jobs.progress(snapshot_id) is not None:
            raise VolumeUnfinished(f"snapshot {snapshot_id} is being made")
        with self._root(export) as root:
            made = [one.volume_id for one in share.records(root, PREFIX, Record)
                    if not one.ready and one.source == f"snapshot:{snapshot_id}"]  # fmt: skip
            if made:
                raise VolumeUnfinished(f"volume {made[0]} is being made from snapshot {snapshot_id}")
            share.tidy(root, f"{snapshot_id}.", ".tar")
            share.remove(root, snapshot_id)

    def snapshots(self, *, after: int = 0, limit: int = -1, source: str = "") -> Sequence[tuple[int, Snapshot]]:
        found: builtins.list[Snapshot] = []
        for export in self._shares():
            with contextlib.suppress(nfs.ServerSilent), self._root(export) as root:
                known = share.records(root, SNAPSHOT_PREFIX, SnapshotRecord, strict=False)
                found += [self._snapshot(one) for one in known if source in ("", one.source)]
        return _part([(_place(one.snapshot_id), one) for one in found], after, limit)

    @staticmethod
    def _snapshot(record: SnapshotRecord) -> Snapshot:
        return Snapshot(
            snapshot_id=record.snapshot_id, source=record.source, size_bytes=record.capacity, created=record.created,
            ready=record.ready,
        )  # fmt: skip

    def get(self, volume_id: str) -> Volume | None:
        export = self._share_of(volume_id)
        if export is None:
            return None
        with self._root(export) as root:
            record = share.read(root, volume_id, Record)
        return _volume(record, export) if record is not None and record.ready else None

    def list(self, *, after: int = 0, limit: int = -1) -> Sequence[tuple[int, Volume]]:
        """Volumes of the shares that this controller knows, in a stable order; a share that is away has none."""
        found: builtins.list[Volume] = []
        for export in self._shares():
            with contextlib.suppress(nfs.ServerSilent), self._root(export) as root:
                found += [
                    _volume(one, export) for one in share.records(root, PREFIX, Record, strict=False) if one.ready
                ]
        return _part([(_place(one.volume_id), one) for one in found], after, limit)

    def available_bytes(self) -> int:
        """Nobody counts what a server has: a class without a server is not asked."""
        return sizes.LARGEST

    def check_expand(self, volume_id: str, size: SizeRange) -> int:
        return sizes.grown(volume_id, self._ready(volume_id).capacity_bytes, size)

    def expand(self, volume_id: str, size: SizeRange) -> Volume:
        capacity = self.check_expand(volume_id, size)
        export = self._share_of(volume_id)
        if export is None:
            raise VolumeNotFound(volume_id)
        with self._root(export) as root:
            record = share.read(root, volume_id, Record)
            if record is None:
                raise VolumeNotFound(volume_id)
            record = msgspec.structs.replace(record, capacity=capacity)
            share.write(root, record)
            return _volume(record, export)

    # -- the node's verbs

    def refuses(self, flag: str) -> str | None:
        wrong = nfs.check_options([flag])
        if wrong is None:
            return None
        if "vers" in wrong:
            return f"takes {', '.join(nfs.VERSIONS)}"
        return "is set by runvol from the server, the version and the node"

    def attach(self, volume_id: str, context: Mapping[str, str] | None = None) -> Source:
        """From the volume's context, which any node has; else from the share."""
        facts = context if context and context.get("server") else self._ready(volume_id).parameters
        export = _share(facts, [])
        _, options = nfs.version_among([word for word in facts.get("options", "").split(",") if word])
        return NfsSource(server=export.server, path=export.path, version=export.version, options=options)

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

    @contextlib.contextmanager
    def _root(self, export: nfs.Export) -> Iterator[int]:
        with nfs.opened(export, Deadline.after(_CALL)) as root:
            yield root

    def _shares(self) -> builtins.list[nfs.Export]:
        try:
            with open(self._known, "rb") as file:
                return msgspec.json.decode(file.read(), type=builtins.list[nfs.Export])
        except FileNotFoundError:
            return []

    def _remember(self, export: nfs.Export) -> None:
        known = self._shares()
        if export in known:
            return
        new = f"{self._known}.{os.getpid()}.new"
        durable.write(new, msgspec.json.encode([*known, export]))
        os.rename(new, self._known)

    def _share_of(self, one_id: str, prefix: str = PREFIX) -> nfs.Export | None:
        return next((export for export in self._shares() if one_id.startswith(prefix + _key(export))), None)


def set_mode(source: NfsSource, mode: int, deadline: Deadline, *, recursive: bool) -> None:
    """Give an export's directory these permissions, and with `recursive` what it holds: directories the same, files
    without the bits for execution. Links are left alone. ServerSilent, MountFailed, OSError."""
    export = nfs.Export(server=source.server, path=source.path, version=source.version, options=source.options)
    with nfs.opened(export, deadline) as root:
        os.chmod(f"/proc/self/fd/{root}", mode)
        if not recursive:
            return
        for _path, directories, files, fd in os.fwalk(".", dir_fd=root):
            deadline.check(f"setting mode {mode:o} below {export.source}")
            for name, wanted in [*((name, mode) for name in directories), *((name, mode & ~0o111) for name in files)]:
                with contextlib.suppress(FileNotFoundError):
                    share.chmod(fd, name, wanted)


def _share(parameters: Mapping[str, str], flags: Sequence[str]) -> nfs.Export:
    """The export, in the version that the parameter `vers`, or else one of the mount options, names."""
    for key in ("server", "path"):
        if not parameters.get(key):
            raise InvalidParameter(key, "", "must be given with the backend nfs")
    asked, _ = nfs.version_among([*flags, *parameters.get("options", "").split(",")])
    named = parameters.get("vers", "")
    if asked and named and asked != named:
        raise InvalidParameter("vers", named, f"contradicts the mount option for version {asked}")
    return nfs.Export(
        server=parameters["server"],
        path=parameters["path"].rstrip("/") or "/",
        version=named or asked or nfs.DEFAULT_VERSION,
    )


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def _key(export: nfs.Export) -> str:
    return _digest(f"{export.server}\0{export.path}")[:12]


def _id(export: nfs.Export, name: str, prefix: str = PREFIX) -> str:
    """The same for the same name on the same share, so that a creation may be repeated by another controller."""
    return f"{prefix}{_key(export)}-{_digest(name)[:20]}"


def _place(volume_id: str) -> int:
    """A stable place among all volumes of this backend, below 2^56."""
    return int(_digest(volume_id)[:13], 16) + 1


def _place_of(name: str, parameters: Mapping[str, str]) -> str:
    """The volume's directory below the share; empty for the share itself."""
    if parameters.get("volumeAs") == "sharepath":
        if parameters.get("subDir"):
            raise InvalidParameter("subDir", parameters["subDir"], "means nothing with volumeAs: sharepath")
        return ""
    return parameters.get("subDir") or _directory(name)


def _has_others(root: int, record: Record) -> bool:
    """Whether another volume has this directory too, or one in it: a subDir may be the same for several."""
    others = [one for one in share.records(root, PREFIX, Record) if one.volume_id != record.volume_id]
    return any(f"{one.directory}/".startswith(f"{record.directory}/") for one in others)


def _directory(name: str) -> str:
    """The name itself where it can be one; a person looks for it on the server."""
    plain = name.replace("/", "-").replace("\0", "-")
    if plain.startswith(".") or plain.startswith(ARCHIVE) or len(plain.encode()) > 200 or plain != name:
        return f"v-{_digest(name)[:32]}"
    return plain


def _part(numbered: list[tuple[int, T]], after: int, limit: int) -> Sequence[tuple[int, T]]:
    """Those after the place `after`, in order."""
    rest = sorted((pair for pair in numbered if pair[0] > after), key=lambda pair: pair[0])
    return rest if limit < 0 else rest[:limit]


def _ours(volume: Record) -> tuple[str, ...]:
    """What lies in the volume and is not its own: a whole share holds our records."""
    return () if volume.directory else (RECORDS,)


@contextlib.contextmanager
def _no_space(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{what} could not be written to its share: {error.strerror}") from error
        raise


@contextlib.contextmanager
def _unless_tidied(what: str) -> Iterator[None]:
    """VolumeUnfinished where another controller was faster, and has removed what was being written here."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            raise VolumeUnfinished(f"{what}: another controller was at work on it; ask again") from None
        raise


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


def _take_away(root: int, record: Record) -> None:
    """Archive the directory, or remove it. Links in it are removed, not followed."""
    archived = f"{ARCHIVE}{record.directory.replace('/', '-')[:200]}-{record.volume_id[-8:]}"
    with contextlib.suppress(FileNotFoundError), share.parent(root, record.directory) as (fd, name):
        os.rename(name, archived, src_dir_fd=fd, dst_dir_fd=root)
    if record.parameters.get("archiveOnDelete", "true") == "true":
        return
    share.remove_tree(root, archived)


def _check_same(
    old: Record, name: str, size: SizeRange, parameters: Mapping[str, str], source: ContentSource | None
) -> None:
    if old.parameters != dict(parameters):
        raise VolumeConflict(name, f"was made with the parameters {old.parameters}")
    if old.source != str(source or ""):
        raise VolumeConflict(name, f"was made from {old.source or 'nothing'}, not from {source or 'nothing'}")
    sizes.check_fits(name, old.capacity, size)


def _volume(record: Record, export: nfs.Export) -> Volume:
    path = os.path.join(export.path, record.directory) if record.directory else export.path
    return Volume(
        volume_id=record.volume_id,
        name=record.name,
        backend=NfsBackend.name,
        capacity_bytes=record.capacity,
        parameters={**record.parameters, "path": path},
        source=record.source,
    )
