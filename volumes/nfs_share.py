"""A share as its volumes need it: the export of their directories, and that of their records, maybe another one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from blockdev import nfs
from volumes import exports, share, share_lock
from volumes.errors import InvalidParameter, VolumeConflict, VolumeUnfinished
from volumes.export_ids import digest, short
from volumes.jobs import Progress
from volumes.nfs_parameters import RECORDS_PATH
from volumes.share import RECORDS, Record
from volumes.troubles import EXPECTED, Trouble

ARCHIVE = "archived-"
# What the names of marks begin with.
DATA_MARK = "data-"


@dataclass(frozen=True)
class Place:
    """Where a class has its volumes. `records` is the same export as `data`, unless the class names another."""

    data: nfs.Export
    records: nfs.Export

    @property
    def elsewhere(self) -> str:
        """What a record has to say of the volume's export; empty where it lies on it."""
        return "" if self.data.path == self.records.path else self.data.path


@dataclass(frozen=True)
class Share:
    """The roots of both, as descriptors of directories."""

    place: Place
    root: int
    records: int


def of_class(parameters: Mapping[str, str], flags: Sequence[str]) -> Place:
    """InvalidParameter."""
    data = exports.of_class(parameters, flags)
    path = parameters.get(RECORDS_PATH, "").rstrip("/") or data.path
    whole = os.path.normpath(f"/{data.path}").rstrip("/")
    if path != data.path and f"{os.path.normpath(f'/{path}')}/".startswith(f"{whole}/"):
        raise InvalidParameter(RECORDS_PATH, path, "lies in the volumes' own export, where pods could come at it")
    return Place(data, dataclasses.replace(data, path=path))


@contextlib.contextmanager
def opened(place: Place) -> Iterator[Share]:
    """ServerSilent, MountFailed."""
    with contextlib.ExitStack() as stack:
        yield _with_data(stack, place, stack.enter_context(exports.opened(place.records)))


@contextlib.contextmanager
def opened_of(known: Sequence[nfs.Export], volume_id: str) -> Iterator[Share]:
    """The share of a volume, by one of the exports that may have its record. What the record says of its directory's
    export is of one origin with the id, which is made from both."""
    with contextlib.ExitStack() as stack:
        records, export = stack.enter_context(exports.opened_any(known))
        record = share.read(records, short(volume_id), Record)
        yield _with_data(stack, of_record(record, export), records)


def _with_data(stack: contextlib.ExitStack, place: Place, records: int) -> Share:
    root = stack.enter_context(exports.opened(place.data)) if place.elsewhere else records
    return Share(place, root, records)


def of_record(record: Record | None, export: nfs.Export) -> Place:
    """`export`: where the record lies."""
    path = record.path if record is not None else ""
    return Place(dataclasses.replace(export, path=path) if path else export, export)


def directory_of(name: str, parameters: Mapping[str, str]) -> str:
    """The volume's directory below the share; empty for the share itself. InvalidParameter."""
    below = parameters.get("subDir", "")
    if parameters.get("volumeAs") == "sharepath":
        if below:
            raise InvalidParameter("subDir", below, "means nothing with volumeAs: sharepath")
        return ""
    return below or _plain(name)


def _plain(name: str) -> str:
    """The name itself where it can be one; a person looks for it on the server."""
    plain = name.replace("/", "-").replace("\0", "-")
    if plain.startswith(".") or plain.startswith(ARCHIVE) or len(plain.encode()) > 200 or plain != name:
        return f"v-{digest(name)[:32]}"
    return plain


def place_on_server(one: Share, record: Record) -> str:
    """The path of the volume's directory on its server, however its export is spelled."""
    return os.path.normpath(f"/{record.path or one.place.records.path}/{record.directory}")


def is_in(one: Share, other: Record, record: Record) -> bool:
    """Whether another volume has this one's directory too, or one in it: a subDir may be the same for several."""
    outer = place_on_server(one, record)
    return f"{place_on_server(one, other)}/".startswith(outer if outer == "/" else f"{outer}/")


def is_same(one: Share, other: Record, record: Record) -> bool:
    """Whether the two have one directory."""
    return place_on_server(one, other) == place_on_server(one, record)


def normal(path: str) -> str:
    """One spelling of an export's path."""
    return os.path.normpath(f"/{path.lstrip('/')}")


def data_mark(path: str) -> str:
    """What lies among the records of another export's volumes, and says whose they are (see `nfs_records_place`)."""
    return f"{DATA_MARK}{digest(normal(path))[:20]}"


def is_marked(one: Share) -> bool:
    return share.is_there(one.records, f"{RECORDS}/{data_mark(one.place.data.path)}")


def all_records(one: Share, trouble: Trouble) -> Iterator[Record]:
    """Of all volumes whose directories may lie on the share. What lies on the export of the directories itself is
    believed in nothing where the records are kept elsewhere: pods may have that whole. Only where no mark says so yet,
    a living volume there is one: releases before the marks let both be made."""
    yield from share.records(one.records, share.NFS_VOLUME, Record, trouble)
    if one.place.elsewhere and not is_marked(one):
        for other in share.records(one.root, share.NFS_VOLUME, Record, trouble):
            if not other.path and not other.gone and not other.deleting:
                yield msgspec.structs.replace(other, path=one.place.data.path)


@contextlib.contextmanager
def at(one: Share, record: Record) -> Iterator[Share]:
    """The share as another record of the same place has it: its directory may lie on another export. ServerSilent,
    MountFailed."""
    place = of_record(record, one.place.records)
    if place.data.path == one.place.data.path:
        yield one
        return
    with exports.opened(place.data) as root:
        yield Share(place, root, one.records)


def in_the_same(one: Share, record: Record, inode: int) -> list[Record]:
    """Other volumes' records that speak of the same directory, which is there and has this inode. What has made none,
    or an earlier one, proves nothing; older records do not say which."""
    found = share.records(one.records, share.NFS_VOLUME, Record, share.passed_over)
    same = (other for other in found if is_same(one, other, record) and other.volume_id != record.volume_id)
    return [other for other in same if other.inode == inode or not (other.serial or other.gone)]


def check_place(one: Share, record: Record) -> None:
    """VolumeUnfinished while what lies where the new volume's directory would be, or around it, is being removed."""
    for other in all_records(one, share.passed_over):
        if not is_in(one, other, record) and not is_in(one, record, other):
            continue
        if other.deleting and other.made is not False:
            raise VolumeUnfinished(f"volume {other.name}, which lies in the same place, is being deleted; ask again")


def check_one_filesystem(one: Share, record: Record) -> None:
    """InvalidParameter where the volume's directory would be made on another filesystem of the server's than the
    export: from there it could not be archived, nor its content come from a copy."""
    fd, there = os.dup(one.root), os.fstat(one.root).st_dev
    try:
        for part in record.directory.split("/")[:-1]:
            try:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except OSError:
                return  # it is to be made, or says itself what is wrong
            os.close(fd)
            fd = below
            if os.fstat(fd).st_dev != there:
                why = f"{part!r} is another filesystem of the server than {one.place.data.path}; name that as `path`"
                raise InvalidParameter("subDir", record.directory, why)
    finally:
        os.close(fd)


def inode_of(one: Share, path: str) -> int:
    """Of what lies at `path`, a link among it; 0 where nothing does."""
    try:
        with share.parent(one.root, path) as (fd, name):
            return os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return 0


def check_free(one: Share, record: Record) -> None:
    """VolumeConflict if something of somebody else's lies where the content would go."""
    if share.is_there(one.root, record.directory):
        raise VolumeConflict(record.name, f"its directory {record.directory!r} is on the share already")


def check_still(one: Share, record: Record) -> Record:
    """The record as it stands now. VolumeUnfinished where it is another volume's, or nobody's."""
    now = share.read(one.records, record.volume_id, Record)
    if now is None or now.serial != record.serial or now.gone or now.deleting:
        raise VolumeUnfinished(f"volume {record.name} was deleted meanwhile; ask again")
    return now


def new_name(record: Record) -> str:
    """What the names begin with under which this volume's content is being made, among the records."""
    return f"new-{record.volume_id}.{record.serial}"


def gone_name(volume_id: str) -> str:
    """Under which what was a volume's lies among the records until it is empty; nobody can have put something there."""
    return f"gone-{volume_id}.{os.urandom(6).hex()}"


def behind(
    place: Place, what: str, work: Callable[[Share, Progress], None], given_up: Callable[[Share], None]
) -> Callable[[Progress], None]:
    """Work that a call need not wait for, on a mount of its own. Where it fails `given_up` takes back what says that it
    goes on, while nobody else changes the share: whoever asks again begins anew, and nobody may."""

    def whole(progress: Progress) -> None:
        with opened(place) as one, share.enough_space(what):
            try:
                with _unless_tidied(what):
                    work(one, progress)
            except EXPECTED:
                with contextlib.suppress(*EXPECTED), share_lock.changing(one.records):
                    given_up(one)
                raise

    return whole


@contextlib.contextmanager
def _unless_tidied(what: str) -> Iterator[None]:
    """VolumeUnfinished where another controller was faster, and has removed what was being written here."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            raise VolumeUnfinished(f"{what}: another controller was at work on it; ask again") from None
        raise
