"""What runvol keeps on an NFS share beside the volumes: `<share>/.runvol`, one JSON record a volume or snapshot.

Any controller can go on where another one ended, and nothing is lost with a node. Pods that have the whole share can
write here too, so nothing that is read is trusted to be a path, and links are not followed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from volumes.errors import NoSpace, StoreFailed, VolumeUnfinished

RECORDS = ".runvol"
# What the ids of volumes and of snapshots begin with.
NFS_VOLUME, NFS_SNAPSHOT = "nfs-", "nfssnap-"
_LONGEST = 65536
log = logging.getLogger("runvol.share")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`<id>.json` of a volume. `directory` is below the share; empty for the share itself. `source`: what it was made
    from: its directory then appears with all its content, or not at all."""

    volume_id: str
    name: str
    directory: str
    capacity: int
    parameters: dict[str, str]
    ready: bool
    source: str = ""


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`<id>.json` of a snapshot, whose content is `<id>.tar`. `capacity`: what a volume of it needs; `created`: seconds
    since 1970."""

    snapshot_id: str
    name: str
    source: str
    capacity: int
    created: float
    ready: bool


R = TypeVar("R", Record, SnapshotRecord)


def read(root: int, name: str, kind: type[R]) -> R | None:
    """The record of this id; VolumeUnfinished if it cannot be read."""
    try:
        fd = os.open(f"{RECORDS}/{name}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        try:
            return msgspec.json.decode(file.read(_LONGEST), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise VolumeUnfinished(f"the share's {RECORDS}/{name}.json cannot be read: {error}") from None


def write(root: int, record: Record | SnapshotRecord) -> None:
    """Replace the record, whole or not at all."""
    make(root)
    name = record.volume_id if isinstance(record, Record) else record.snapshot_id
    new = f"{RECORDS}/.{name}.{os.getpid()}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=root)
    try:
        os.write(fd, msgspec.json.encode(record))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, f"{RECORDS}/{name}.json", src_dir_fd=root, dst_dir_fd=root)


def make(root: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(RECORDS, 0o700, dir_fd=root)


def remove(root: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{RECORDS}/{name}.json", dir_fd=root)


def records(root: int, prefix: str, kind: type[R], *, strict: bool = True) -> Iterator[R]:
    """Those whose id begins with `prefix`. One that cannot be read is VolumeUnfinished, or, for a list of what there is
    (not `strict`), a line in the log."""
    try:
        fd = directory(root, RECORDS)
    except FileNotFoundError:
        return
    try:
        names = sorted(os.listdir(fd))
    finally:
        os.close(fd)
    for name in names:
        if name.startswith(prefix) and name.endswith(".json"):
            try:
                record = read(root, name.removesuffix(".json"), kind)
            except VolumeUnfinished as error:
                if strict:
                    raise
                log.warning("left out of a list", extra={"why": str(error)})
                continue
            if record is not None:
                yield record


def names(root: int, prefix: str) -> list[str]:
    """What lies among the records under names that begin so."""
    fd = directory(root, RECORDS)
    try:
        return [name for name in os.listdir(fd) if name.startswith(prefix)]
    finally:
        os.close(fd)


def directory(root: int, path: str) -> int:
    """A directory of the share as a descriptor; a link in the path is none. FileNotFoundError, or StoreFailed."""
    with parent(root, path) as (fd, name):
        return _stepped_into(fd, name, path)


@contextlib.contextmanager
def parent(root: int, path: str, *, made: bool = False) -> Iterator[tuple[int, str]]:
    """The directory that holds `path`, and the last name of it; `made` makes what is missing on the way."""
    *way, name = path.split("/")
    if ".." in (*way, name) or path.startswith("/"):
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


def archive(root: int, name: str, flags: int) -> int:
    """A descriptor of the archive `<name>.tar` among the records."""
    make(root)
    return os.open(f"{RECORDS}/{name}.tar", flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root)


@contextlib.contextmanager
def unless_whole(root: int, path: str) -> Iterator[None]:
    """What was half-made at `path` goes with the failure."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
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
    """Nothing is at `path`. Links are removed, not followed."""
    try:
        facts = os.stat(path, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(facts.st_mode):
        import shutil

        shutil.rmtree(path, dir_fd=root)
    else:
        os.unlink(path, dir_fd=root)


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
def enough_space(what: str) -> Iterator[None]:
    """NoSpace, naming `what`, where the share has no room for what is written inside."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{what} could not be written to its share: {error.strerror}") from error
        raise
