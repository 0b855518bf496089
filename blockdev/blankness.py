"""Whether a device may be formatted: only one that is provably blank, never one with a signature."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator

from blockdev.commands import run
from blockdev.deadlines import Deadline
from blockdev.errors import NotBlank
from blockdev.ioctls import opened, size_bytes
from blockdev.sparse import extents

_CHUNK = 1 << 20
# Both ends of a device, and the places where ext4 keeps copies of its superblock (each 128 MiB with
# 4 KiB blocks), must hold zeros; a whole disk cannot be read in the time of a call.
_END = 4 << 20
_COPY_EVERY = 128 << 20
_COPIES = 64
# Of a look all over a disk: what is read whole, the least number of pages, their smallest distance; bytes, seconds.
_WHOLE, _LEAST, _NEAR, _PAGE, _PATIENCE = 1 << 30, 4096, 128 << 10, 4096, 5.0


def signature(path: str, deadline: Deadline) -> str | None:
    """What libblkid recognises on the device (a filesystem, a RAID, LVM or LUKS member, a partition table)."""
    if _is_hole(path):  # a new volume's file, which is looked at several times
        return None
    code, output = run("blkid", "-p", "-o", "export", path, deadline=deadline, ok=(0, 2, 8))
    if code == 8:
        return "several signatures that contradict each other"
    if code == 2:
        return None
    facts = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    return facts.get("TYPE") or (f"a {facts['PTTYPE']} partition table" if "PTTYPE" in facts else None)


def _is_hole(path: str) -> bool:
    """Whether it is a regular file of which nothing is on its disk, or on the way there."""
    with opened(path) as fd:
        facts = os.fstat(fd)
        return stat.S_ISREG(facts.st_mode) and next(extents(fd, facts.st_size), None) is None


def prove_blank(path: str, deadline: Deadline) -> bool:
    """Return if nothing was ever written to the device; NotBlank, with what was found, otherwise.

    The answer says whether every byte is known to be zero (a file that is one hole), so that mkfs need not write
    zeros of its own. A file whose blocks hold nothing but zeros counts as blank too.
    """
    found = signature(path, deadline)
    if found is not None:
        raise NotBlank(path, f"it holds {found}")
    with opened(path) as fd:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return _prove_file(fd, path, deadline)
        _prove_node(fd, path, size_bytes(path), deadline)
        return False


def prove_unused(path: str, deadline: Deadline, *, end: int | None = None) -> None:
    """`prove_blank` for a whole disk that an operator names, as far as byte `end`: a look all over it besides.

    A device of a GiB is read whole. Of a larger one pages in equal distances are read, then those in the middle between
    them, and so on, until the distance is small or some seconds have passed; at least a few thousand are.
    """
    found = signature(path, deadline)
    if found is not None:
        raise NotBlank(path, f"it holds {found}")
    size = size_bytes(path) if end is None else end
    with opened(path) as fd:
        _prove_node(fd, path, size, deadline)
        if size <= _WHOLE:
            _zeros(fd, path, 0, size, deadline)
            return
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        until = time.monotonic() + _PATIENCE
        for number, at in enumerate(_spread(size)):
            if number >= _LEAST and time.monotonic() >= until:
                return
            _zeros(fd, path, at, min(at + _PAGE, size), deadline)


def _spread(size: int) -> Iterator[int]:
    """Places all over the size, in one direction each time, the distance halved from one time to the next."""
    step = size // _LEAST // _PAGE * _PAGE
    yield from range(0, size, step)
    while step > _NEAR:
        half = step // 2 // _PAGE * _PAGE
        yield from range(half, size, step)
        step = half


def _prove_file(fd: int, path: str, deadline: Deadline) -> bool:
    for start, end in extents(fd, os.fstat(fd).st_size):
        _zeros(fd, path, start, end, deadline)
    return True


def _prove_node(fd: int, path: str, size: int, deadline: Deadline) -> None:
    _zeros(fd, path, 0, min(size, _END), deadline)
    _zeros(fd, path, max(0, size - _END), size, deadline)
    for copy in range(1, _COPIES):
        at = copy * _COPY_EVERY
        if at + 4096 > size:
            break
        _zeros(fd, path, at, at + 4096, deadline)


def _zeros(fd: int, path: str, start: int, end: int, deadline: Deadline) -> None:
    at = start
    while at < end:
        deadline.check(f"reading {path} to see whether it is blank")
        data = os.pread(fd, min(_CHUNK, end - at), at)
        if not data:
            return
        if data.strip(b"\0"):
            raise NotBlank(path, f"there is data near byte {at}")
        at += len(data)


def wipe(path: str, deadline: Deadline) -> None:
    """Take back what an interrupted mkfs has written. Only for a device that no pod has ever had.

    A regular file becomes one hole; of a block node every signature goes, and both ends are zeroed.
    """
    with opened(path, os.O_RDWR) as fd:
        facts = os.fstat(fd)
        if stat.S_ISREG(facts.st_mode):
            os.ftruncate(fd, 0)
            os.ftruncate(fd, facts.st_size)
            os.fsync(fd)
            return
        size = size_bytes(path)
        for start, end in ((0, min(size, _END)), (max(0, size - _END), size)):
            os.pwrite(fd, bytes(end - start), start)
        for copy in range(1, _COPIES):
            if copy * _COPY_EVERY + 4096 <= size:
                os.pwrite(fd, bytes(4096), copy * _COPY_EVERY)
        os.fsync(fd)
    run("wipefs", "--all", path, deadline=deadline)
