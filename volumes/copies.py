"""Copying an image file: in one step where the filesystem shares blocks, hole by hole elsewhere."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator

from blockdev import Deadline, exclusivity, flocks, sparse
from blockdev.errors import DeviceBusy, NoFile
from blockdev.ioctls import opened
from volumes import place
from volumes.errors import VolumeUnfinished
from volumes.jobs import Progress

_FICLONE = 0x40049409  # linux/fs.h
_CHUNK = 64 << 20
# Seconds: a copy that goes on still is not the wait of any call.
LIMIT = 86400.0
_NO_REFLINK = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)


@contextlib.contextmanager
def being_made(path: str) -> Iterator[int]:
    """A new, empty file as a descriptor, locked while it is made. VolumeUnfinished if somebody else makes it;
    NoFile where something else lies there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NoFile(path)
        if not flocks.locked(fd, fcntl.LOCK_EX, 0):
            raise VolumeUnfinished(f"{path} is being made; ask again")
        os.ftruncate(fd, 0)
        yield fd
    finally:
        flocks.release(fd)


def check_not_made(path: str) -> None:
    """VolumeUnfinished while somebody, of another process too, makes the file."""
    if not place.is_file(path):
        return  # nobody makes that
    with contextlib.suppress(FileNotFoundError), opened(path) as fd:
        if not flocks.locked(fd, fcntl.LOCK_SH, 0):
            raise VolumeUnfinished(f"{path} is being made; ask again")


def copy(
    source: str,
    writer: int,
    deadline: Deadline,
    *,
    check: Callable[[], None] | None,
    progress: Progress | None = None,
) -> None:
    """Give the empty file `writer`, durably, the content and the holes of `source`.

    A reflink (XFS, btrfs) is atomic, so the source may be in use: the copy is what a power cut would leave. Without
    reflinks a copy takes time, so `check` is asked first and raises if somebody may come in the middle, and the source
    must be open nowhere, before and after, and unchanged: DeviceBusy with the holders otherwise. None for a source that
    never changes, which any number may read.
    """
    if not _reflink(source, writer):
        settled = _unchanged(source, check) if check is not None else contextlib.nullcontext()
        with settled, opened(source) as reader:
            _copy_data(reader, writer, source, deadline, progress or Progress(source))
    os.fsync(writer)


@contextlib.contextmanager
def _unchanged(source: str, check: Callable[[], None]) -> Iterator[None]:
    """Nobody wrote to the file while the block ran."""
    check()
    exclusivity.prove_free(source, past_known=False)
    before = os.stat(source)
    yield
    exclusivity.prove_free(source, past_known=False)
    after = os.stat(source)
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise DeviceBusy(source, "it was written to while it was copied")


def _reflink(source: str, writer: int) -> bool:
    try:
        with opened(source) as reader:
            fcntl.ioctl(writer, _FICLONE, reader)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def _copy_data(reader: int, writer: int, source: str, deadline: Deadline, progress: Progress) -> None:
    facts = os.fstat(reader)
    size, progress.total = facts.st_size, facts.st_blocks * 512
    os.ftruncate(writer, size)
    for start, end in sparse.extents(reader, size):
        at = start
        while at < end:
            deadline.check(f"copying {source}")
            moved = os.copy_file_range(reader, writer, min(_CHUNK, end - at), at, at)
            if moved == 0:
                raise DeviceBusy(source, "it became shorter while it was copied")
            at += moved
            progress.add(moved)
