"""The backend `nfs`: a directory of an NFS export for each volume (`volumeAs: subpath`), or the export (`sharepath`).

What a volume is stands beside it on the share, in `<share>/.runvol/<id>.json`, so that any controller can go on where
another one ended, and nothing is lost with a node. Work on the share goes through a mount that hangs nowhere.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from blockdev import Deadline, durable, nfs
from volumes import sizes
from volumes.errors import InvalidParameter, SizeNotAllowed, VolumeConflict, VolumeNotFound, VolumeUnfinished
from volumes.model import Capability, ContentSource, NfsSource, SizeRange, Source, Volume, VolumeKind

PREFIX = "nfs-"
RECORDS, ARCHIVE = ".runvol", "archived-"
_SMALLEST = 4096
_CALL = 60.0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`<share>/.runvol/<id>.json`. `directory` is below the share; empty for the share itself."""

    volume_id: str
    name: str
    directory: str
    capacity: int
    parameters: dict[str, str]
    ready: bool


class NfsBackend:
    """Volumes on any export that a class names; `<state_dir>/exports.json` remembers which there were."""

    name = "nfs"
    prefix = PREFIX
    kind = VolumeKind.FILES
    multi_node = True

    def __init__(self, state_dir: str) -> None:
        self._known = os.path.join(state_dir, "exports.json")

    def close(self) -> None:
        """Nothing is held."""

    # -- the controller's verbs

    def create(
        self,
        name: str,
        size: SizeRange,
        parameters: Mapping[str, str],
        _uses: Sequence[Capability],
        source: ContentSource | None = None,
    ) -> Volume:
        share = _share(parameters)
        volume_id = _id(share, name)
        capacity = sizes.choose(size, smallest=_SMALLEST)
        if source is not None:
            raise SizeNotAllowed(f"volume_content_source {source}: the backend nfs makes empty volumes only")
        self._remember(share)
        with self._root(share) as root:
            old = _read(root, volume_id)
            if old is not None:
                _check_same(old, name, size, parameters)
                if old.ready:
                    return _volume(old, share)
                capacity = old.capacity
            directory = "" if parameters.get("volumeAs") == "sharepath" else _directory(name)
            record = Record(volume_id=volume_id, name=name, directory=directory, capacity=capacity,
                            parameters=dict(parameters), ready=False)  # fmt: skip
            _write(root, record)
            if directory:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(directory, 0o777, dir_fd=root)
                os.chmod(directory, int(parameters.get("mode", "0777"), 8), dir_fd=root)
            _write(root, msgspec.structs.replace(record, ready=True))
            return _volume(record, share)

    def delete(self, volume_id: str) -> None:
        """The directory is archived, or removed with its content if the class says so. A share itself is left."""
        share = self._share_of(volume_id)
        if share is None:
            return
        with self._root(share) as root:
            record = _read(root, volume_id)
            if record is None:
                return
            _write(root, msgspec.structs.replace(record, ready=False))
            if record.directory:
                _take_away(root, record)
            os.unlink(f"{RECORDS}/{volume_id}.json", dir_fd=root)

    def get(self, volume_id: str) -> Volume | None:
        share = self._share_of(volume_id)
        if share is None:
            return None
        with self._root(share) as root:
            record = _read(root, volume_id)
        return _volume(record, share) if record is not None and record.ready else None

    def list(self, *, after: int = 0, limit: int = -1) -> Sequence[tuple[int, Volume]]:
        """Volumes of the shares that this controller knows, in a stable order; a share that is away has none."""
        found: builtins.list[Volume] = []
        for share in self._shares():
            with contextlib.suppress(nfs.ServerSilent), self._root(share) as root:
                found += [_volume(record, share) for record in _records(root) if record.ready]
        numbered = [(_place(one.volume_id), one) for one in found]
        numbered.sort(key=lambda pair: pair[0])
        rest = [pair for pair in numbered if pair[0] > after]
        return rest if limit < 0 else rest[:limit]

    def available_bytes(self) -> int:
        """Nobody counts what a server has: a class without a server is not asked."""
        return sizes.LARGEST

    def check_expand(self, volume_id: str, size: SizeRange) -> int:
        return sizes.grown(volume_id, self._ready(volume_id).capacity_bytes, size)

    def expand(self, volume_id: str, size: SizeRange) -> Volume:
        capacity = self.check_expand(volume_id, size)
        share = self._share_of(volume_id)
        if share is None:
            raise VolumeNotFound(volume_id)
        with self._root(share) as root:
            record = _read(root, volume_id)
            if record is None:
                raise VolumeNotFound(volume_id)
            record = msgspec.structs.replace(record, capacity=capacity)
            _write(root, record)
            return _volume(record, share)

    # -- the node's verbs

    def refuses(self, flag: str) -> str | None:
        wrong = nfs.check_options([flag])
        return None if wrong is None else "is set by runvol from the server, the version and the node"

    def attach(self, volume_id: str, context: Mapping[str, str] | None = None) -> Source:
        """From the volume's context, which any node has; else from the share."""
        facts = context if context and context.get("server") else self._ready(volume_id).parameters
        return NfsSource(
            server=facts["server"],
            path=facts["path"],
            version=facts.get("vers", nfs.DEFAULT_VERSION),
            options=tuple(word for word in facts.get("options", "").split(",") if word),
        )

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
    def _root(self, share: nfs.Export) -> Iterator[int]:
        with nfs.opened(share, Deadline.after(_CALL)) as root:
            yield root

    def _shares(self) -> builtins.list[nfs.Export]:
        try:
            with open(self._known, "rb") as file:
                return msgspec.json.decode(file.read(), type=builtins.list[nfs.Export])
        except FileNotFoundError:
            return []

    def _remember(self, share: nfs.Export) -> None:
        known = self._shares()
        if share in known:
            return
        new = f"{self._known}.{os.getpid()}.new"
        durable.write(new, msgspec.json.encode([*known, share]))
        os.rename(new, self._known)

    def _share_of(self, volume_id: str) -> nfs.Export | None:
        return next((share for share in self._shares() if volume_id.startswith(PREFIX + _key(share))), None)


def _share(parameters: Mapping[str, str]) -> nfs.Export:
    for key in ("server", "path"):
        if not parameters.get(key):
            raise InvalidParameter(key, "", "must be given with the backend nfs")
    return nfs.Export(
        server=parameters["server"],
        path=parameters["path"].rstrip("/") or "/",
        version=parameters.get("vers", nfs.DEFAULT_VERSION),
    )


def _key(share: nfs.Export) -> str:
    return hashlib.sha256(f"{share.server}\0{share.path}".encode()).hexdigest()[:12]


def _id(share: nfs.Export, name: str) -> str:
    """The same for the same name on the same share, so that a creation may be repeated by another controller."""
    return f"{PREFIX}{_key(share)}-{hashlib.sha256(name.encode()).hexdigest()[:20]}"


def _place(volume_id: str) -> int:
    """A stable place among all volumes of this backend, below 2^56."""
    return int(hashlib.sha256(volume_id.encode()).hexdigest()[:13], 16) + 1


def _directory(name: str) -> str:
    """The name itself where it can be one; a person looks for it on the server."""
    plain = name.replace("/", "-").replace("\0", "-")
    if plain.startswith(".") or plain.startswith(ARCHIVE) or len(plain.encode()) > 200 or plain != name:
        return f"v-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return plain


def _read(root: int, volume_id: str) -> Record | None:
    try:
        fd = os.open(f"{RECORDS}/{volume_id}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        try:
            return msgspec.json.decode(file.read(65536), type=Record)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise VolumeUnfinished(f"the share's {RECORDS}/{volume_id}.json cannot be read: {error}") from None


def _write(root: int, record: Record) -> None:
    """Replace the record, whole or not at all."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(RECORDS, 0o700, dir_fd=root)
    new = f"{RECORDS}/.{record.volume_id}.{os.getpid()}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=root)
    try:
        os.write(fd, msgspec.json.encode(record))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, f"{RECORDS}/{record.volume_id}.json", src_dir_fd=root, dst_dir_fd=root)


def _records(root: int) -> Iterator[Record]:
    try:
        fd = os.open(RECORDS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return
    try:
        names = sorted(os.listdir(fd))
    finally:
        os.close(fd)
    for name in names:
        if name.startswith(PREFIX) and name.endswith(".json"):
            record = _read(root, name.removesuffix(".json"))
            if record is not None:
                yield record


def _take_away(root: int, record: Record) -> None:
    """Archive the directory, or remove it. Links in it are removed, not followed."""
    archived = f"{ARCHIVE}{record.directory}-{record.volume_id[-8:]}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(record.directory, archived, src_dir_fd=root, dst_dir_fd=root)
    if record.parameters.get("archiveOnDelete", "true") == "true":
        return
    try:
        facts = os.stat(archived, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(facts.st_mode):
        shutil.rmtree(archived, dir_fd=root)


def _check_same(old: Record, name: str, size: SizeRange, parameters: Mapping[str, str]) -> None:
    if old.parameters != dict(parameters):
        raise VolumeConflict(name, f"was made with the parameters {old.parameters}")
    sizes.check_fits(name, old.capacity, size)


def _volume(record: Record, share: nfs.Export) -> Volume:
    path = os.path.join(share.path, record.directory) if record.directory else share.path
    return Volume(
        volume_id=record.volume_id,
        name=record.name,
        backend=NfsBackend.name,
        capacity_bytes=record.capacity,
        parameters={**record.parameters, "path": path},
    )
