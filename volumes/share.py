"""What runvol keeps on an NFS share beside the volumes: `<share>/.runvol`, one JSON record a volume or snapshot.

Any controller can go on where another one ended, and nothing is lost with a node. Pods that have the whole share can
write here too, so nothing that is read is trusted to be a path, only regular files are opened, and no link is followed,
`.runvol` itself included.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import TypeVar

import msgspec

from blockdev import BlockdevError, Deadline, beneath, durable, trees
from volumes import nfs_parameters, sizes
from volumes.errors import NoSpace, StoreFailed, VolumeUnfinished
from volumes.export_ids import digest, name_of, short
from volumes.model import VOLUME_ID
from volumes.parameter import BACKEND, FILESYSTEM, RUNTIME, one_of
from volumes.troubles import Trouble

RECORDS = ".runvol"
# What the ids of volumes and of snapshots begin with.
NFS_VOLUME, NFS_SNAPSHOT = "nfs-", "nfssnap-"
# What is called so: see `export_ids.id_of`.
A_RECORD = re.compile(r"nfs(?:snap)?-[0-9a-f]{12}-[0-9a-f]{20}\.json")
_LONGEST = 65536
# So many records of one share are looked at, and so many bytes of them; more than runvol ever makes there.
_MOST, _MOST_BYTES = 100_000, 64 << 20
# What the specification allows of a name; a NUL would part it where an id puts its own (`export_ids.name_of`).
NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,1000}")
_SOURCE = re.compile(r"(?:(?:volume|snapshot):[a-z0-9.-]{1,128})?")
# The parameters that a record may keep, and what they may be.
_KNOWN: Mapping[str, Callable[[str], bool]] = {
    BACKEND: one_of("nfs"), **{one.key: one.accepts for one in (RUNTIME, FILESYSTEM, *nfs_parameters.PARAMETERS)}
}  # fmt: skip
# No snapshot was taken later, in seconds since 1970.
_LATEST = 1 << 33
# Records that are read side by side, and how many of them ahead.
_AT_ONCE, _AHEAD = 8, 64
# Seconds that one call removes a tree; the next goes on.
REMOVAL = 100.0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`<id>.json` of a volume. `directory` is below the share; empty for the share itself. `source`: what it was made
    from: its directory then appears with all its content, or not at all. `made`: whether runvol has made the directory;
    None in records of releases that did not write it down. `gone`: the volume was deleted, and its directory goes with
    the last one that lies in it. `deleting`: nobody makes it anew before its files are gone. `handle`: its whole id;
    empty where an older release gave it. `serial`: no other volume of that name has, or had, the same; `inode`: of the
    directory that was made for it; empty and 0 in older records. `path`: the export of its directory, where the records
    lie on another one."""

    volume_id: str
    name: str
    directory: str
    capacity: int
    parameters: dict[str, str]
    ready: bool
    source: str = ""
    made: bool | None = None
    gone: bool = False
    deleting: bool = False
    handle: str = ""
    serial: str = ""
    inode: int = 0
    path: str = ""


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`<id>.json` of a snapshot, whose content is `<id>.tar`. `capacity`: what a volume of it needs; `created`: seconds
    since 1970."""

    snapshot_id: str
    name: str
    source: str
    capacity: int
    created: float
    ready: bool
    handle: str = ""
    serial: str = ""


log = logging.getLogger("runvol.volumes")
R = TypeVar("R", Record, SnapshotRecord)


def read(root: int, name: str, kind: type[R]) -> R | None:
    """The record of this id; VolumeUnfinished if it cannot be read."""
    raw = content(root, f"{name}.json")
    return None if raw is None else _decoded(raw, name, kind)


def content(root: int, name: str) -> bytes | None:
    """Of the file among the records, as much as a record may have; None where it is not there. VolumeUnfinished."""
    try:
        with opened(root, RECORDS) as place:
            return _content(place, name)
    except FileNotFoundError:
        return None


def _content(place: int, name: str) -> bytes | None:
    try:
        fd = _regular(place, name)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        return file.read(_LONGEST)


def _decoded(raw: bytes, name: str, kind: type[R]) -> R:
    try:
        record = msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise VolumeUnfinished(f"the share's {RECORDS}/{name}.json cannot be read: {error}") from None
    handle = record.handle or name
    same = _id_of(record) == short(handle) == name and VOLUME_ID.match(handle)
    wrong = _wrong(record) if same else "it is the record of another id"
    if wrong:
        raise VolumeUnfinished(f"the share's {RECORDS}/{name}.json cannot be read: {wrong}")
    return record


def _wrong(record: Record | SnapshotRecord) -> str:
    """What no runvol can have written, in words; empty where there is nothing of the kind."""
    if not NAME.fullmatch(record.name):
        return f"no volume is called {record.name[:200]!r}"
    if not _is_named(record):
        return f"it says that it is {record.name[:200]!r}, which has another id"
    if not 0 < record.capacity <= sizes.LARGEST:
        return f"no volume has the capacity {record.capacity}"
    if isinstance(record, SnapshotRecord):
        if not 0 <= record.created < _LATEST:
            return f"no snapshot was made at {record.created}"
        return "" if VOLUME_ID.match(record.source) else f"its source {record.source[:200]!r} is no volume"
    if record.directory and not is_place(record.directory):
        return f"its directory {record.directory[:200]!r} is no place below the share"
    if not _SOURCE.fullmatch(record.source):
        return f"its source {record.source[:200]!r} is neither volume nor snapshot"
    for key, value in record.parameters.items():
        if key not in _KNOWN:
            return f"{key[:200]!r} is no parameter of this release"
        if not _KNOWN[key](value):
            return f"its parameter {key} is {value[:200]!r}"
    return ""


def _is_named(record: Record | SnapshotRecord) -> bool:
    """Whether its id is the one of its name, and of the export that it says: whoever can write a record cannot find
    others that have the same."""
    name, path = record.name, record.path if isinstance(record, Record) else ""
    return digest(name_of(name, path))[:20] == _id_of(record).rpartition("-")[2]


def is_place(path: str) -> bool:
    """Whether the path leads to something below a share that is none of runvol's own records."""
    parts = path.split("/")
    return not {"", ".", ".."} & {*parts} and parts[0] != RECORDS and "\0" not in path


def _id_of(record: Record | SnapshotRecord) -> str:
    return record.volume_id if isinstance(record, Record) else record.snapshot_id


def _regular(place: int, name: str) -> int:
    """A descriptor for reading the file `name` among the records. VolumeUnfinished for anything but a regular file: a
    FIFO would be waited for, a device would do something, a link leads out of the share. FileNotFoundError."""
    fd = beneath.regular(place, name)
    if fd is None:
        raise VolumeUnfinished(f"the share's {RECORDS}/{name} cannot be read: it is no regular file")
    return fd


def write(root: int, record: Record | SnapshotRecord) -> None:
    """Replace the record, whole or not at all."""
    name = _id_of(record)
    with place_of_records(root) as place:
        durable.replace(f"{name}.json", msgspec.json.encode(record), beside=f".{name}.", dir_fd=place)


def write_over(root: int, record: Record) -> None:
    """The same on a share that has no room for another file: in the blocks that the record has."""
    content = msgspec.json.encode(record)
    with opened(root, RECORDS) as place:
        fd = beneath.regular(place, f"{record.volume_id}.json", os.O_RDWR)
    if fd is None:
        raise VolumeUnfinished(f"the share's {RECORDS}/{record.volume_id}.json is no regular file; remove it")
    try:
        # Never shorter, and in one piece: whoever is killed here leaves the one record or the other.
        durable.write_all(fd, content.ljust(os.fstat(fd).st_size))
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def place_of_records(root: int) -> Iterator[int]:
    """The directory of the records, which is there, as a descriptor."""
    try:
        fd = directory(root, RECORDS)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(RECORDS, 0o700, dir_fd=root)
        fd = directory(root, RECORDS)
    try:
        yield fd
    finally:
        os.close(fd)


def remove(root: int, name: str) -> None:
    """No such record, nor what a killed controller was writing of it."""
    for left in [f"{name}.json", *names(root, f".{name}.")]:
        with contextlib.suppress(FileNotFoundError), opened(root, RECORDS) as place:
            os.unlink(left, dir_fd=place)


def records(
    root: int, prefix: str, kind: type[R], trouble: Trouble, *, order: Callable[[str], int | None] = lambda _name: 0
) -> Iterator[R]:
    """Those whose id begins with `prefix`. `trouble` is told of one that cannot be read. `order`: where an id comes,
    and None for one that is not wanted, which is not even read.

    A file whose name can be nobody's id is none, whatever it says: everybody on the share can put one there.
    """
    found = [
        (at, file) for file in names(root, prefix, A_RECORD) if (at := order(file.removesuffix(".json"))) is not None
    ]
    left = _MOST_BYTES
    for number, (file, raw) in enumerate(_read_ahead(root, [file for _at, file in sorted(found)])):
        if number >= _MOST or left <= 0:
            trouble(f"the records on the share ({RECORDS}/{prefix}*.json) are too many, or too large: those from "
                    f"{file} on are not looked at")  # fmt: skip
            return
        try:
            if isinstance(raw, Exception):
                raise raw
            if raw is not None:
                left -= len(raw)
                yield _decoded(raw, file.removesuffix(".json"), kind)
        except VolumeUnfinished as error:
            trouble(str(error))
        except OSError as error:
            trouble(f"the share's {RECORDS}/{file} cannot be read: {error.strerror}")


def _read_ahead(root: int, files: list[str]) -> Iterator[tuple[str, bytes | Exception | None]]:
    """What these records hold, a few read side by side: each costs a handful of round trips to the server."""

    def read_one(file: str) -> bytes | Exception | None:
        try:
            return _content(place, file)
        except (VolumeUnfinished, OSError) as error:
            return error

    if not files:
        return
    with contextlib.suppress(FileNotFoundError), opened(root, RECORDS) as place:
        if len(files) <= _AT_ONCE:
            yield from ((file, read_one(file)) for file in files)
            return
        with futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="records") as readers:
            for first in range(0, len(files), _AHEAD):
                some = files[first : first + _AHEAD]
                try:
                    contents = [*readers.map(read_one, some)]
                except RuntimeError:  # no thread is to be had
                    contents = [read_one(file) for file in some]
                yield from zip(some, contents, strict=True)


def passed_over(sentence: str) -> None:
    """A record that cannot be read, for who needs no more than those that can."""
    log.debug("a record on a share is passed over", extra={"why": sentence})


def names(root: int, prefix: str | tuple[str, ...], pattern: re.Pattern[str] | None = None) -> list[str]:
    """What lies among the records under names that begin so, or in one of these ways, and match; so many that a caller
    sees there are too many. Everybody on the share can put any number there."""
    try:
        with opened(root, RECORDS) as place, os.scandir(place) as entries:
            wanted = (one.name for one in entries if one.name.startswith(prefix))
            return [*itertools.islice((one for one in wanted if not pattern or pattern.fullmatch(one)), _MOST + 1)]
    except FileNotFoundError:
        return []


def directory(root: int, path: str) -> int:
    """A directory of the share as a descriptor; a link in the path is none. FileNotFoundError, or StoreFailed."""
    with parent(root, path) as (fd, name):
        return _stepped_into(fd, name, path)


@contextlib.contextmanager
def parent(root: int, path: str, *, made: bool = False) -> Iterator[tuple[int, str]]:
    """The directory that holds `path`, and the last name of it; `made` makes what is missing on the way."""
    *way, name = path.split("/")
    if {"", ".."} & {*way, name}:
        raise StoreFailed(f"a record on the share speaks of {path!r}, which is no place in it")
    fd = os.dup(root)
    try:
        for part in way:
            if made:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
            new = _stepped_into(fd, part, path)
            os.close(fd)
            fd = new
        yield fd, name
    finally:
        os.close(fd)


def _stepped_into(fd: int, name: str, path: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise StoreFailed(f"{path!r} on the share is no directory, or leads through a link") from None
        raise


@contextlib.contextmanager
def opened(root: int, path: str) -> Iterator[int]:
    """`directory`, closed at the end."""
    fd = directory(root, path)
    try:
        yield fd
    finally:
        os.close(fd)


def archive(root: int, name: str) -> int:
    """A descriptor for reading the archive `<name>.tar` among the records. FileNotFoundError, VolumeUnfinished."""
    with opened(root, RECORDS) as place:
        return _regular(place, f"{name}.tar")


def new_archive(root: int, name: str) -> int:
    """A descriptor for writing an archive `<name>.tar` that is new among the records."""
    remove_tree(root, f"{RECORDS}/{name}.tar")
    with place_of_records(root) as place:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"{name}.tar", flags, 0o600, dir_fd=place)


@contextlib.contextmanager
def unless_whole(root: int, path: str) -> Iterator[None]:
    """What was half-made at `path` goes with the failure."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, BlockdevError):
            remove_tree(root, path)
        raise


def is_there(root: int, path: str) -> bool:
    """Whether anything lies at `path`, a link among it."""
    try:
        with parent(root, path) as (fd, name):
            os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def tidy(root: int, prefix: str, suffix: str = "") -> None:
    """Nothing that was half-made is left under such names."""
    for name in names(root, prefix):
        if name.endswith(suffix):
            remove_tree(root, f"{RECORDS}/{name}")


def remove_tree(root: int, path: str) -> None:
    """Nothing is at `path`. Links are removed, not followed. NotRemoved; WaitExpired, and the next call goes on."""
    with contextlib.suppress(FileNotFoundError), parent(root, path) as (fd, name):
        trees.remove(fd, name, Deadline.after(REMOVAL))


def chmod(directory: int, name: str, mode: int) -> None:
    """Not through a link, even one that is put there in this moment: it would lead to this machine's own files."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def not_its_own(volume: Record) -> tuple[str, ...]:
    """What lies at the top of the volume and does not belong to it: a whole share holds our records."""
    return () if volume.directory else (RECORDS,)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """StoreFailed, naming `what`, where the share does not let it be read."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{what} cannot be read from its share: {error.strerror}") from error


@contextlib.contextmanager
def enough_space(what: str) -> Iterator[None]:
    """NoSpace, naming `what`, where the share has no room for what is written inside; StoreFailed where it refuses."""
    try:
        yield
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreFailed
        raise kind(f"{what}: its share says {error.strerror}") from error
