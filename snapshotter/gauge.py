"""A filesystem that is as full as the pool, for whoever asks filesystems how full they are: kubelet and its cAdvisor,
which know no thin pool, node_exporter, df.

It is an ext4 on a loop device over a sparse file, as large as the pool's data, with one file in it of blocks that are
allocated and never written. It costs a few MiB for each TiB: clusters of 64 KiB, no journal, and inode tables that
nobody zeroes. It holds nothing, so whatever is wrong with it is put right by making it anew.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockdev import Deadline, loops, mountinfo, mounts, syscalls, sysfs
from blockdev.commands import run
from blockdev.deadlines import bounded
from blockdev.dm_targets import PoolStatus
from blockdev.errors import BlockdevError
from snapshotter.background import Background
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.pool import Pool
from snapshotter.watermarks import metadata_reserve

log = logging.getLogger("runvol.snapshotter")

FILE = "gauge.img"
# In the state directory; a gauge that is being made has another name until it is mounted.
_NEW, _DELETED = ".new", " (deleted)"
_BALLAST = "ballast"
_CLUSTER = 64 << 10
# Of one file, and of one call: ext4 has none above 16 TiB, and 8 TiB at once are too many blocks for it.
_LARGEST, _STEP = 4 << 40, 1 << 38
_SMALLEST = 16 << 20
# Inodes for each TiB, and at the least: what kubelet calls few is 5 %, and eleven are the filesystem's own.
_INODES_OF_TIB, _FEWEST = 1 << 16, 1024
_OPTIONS = ("nodev", "nosuid", "noexec", "noatime", "noinit_itable")
# A part of the whole that is too little to be shown.
_GRAIN = 2048
# Seconds between two looks at the pool, and for what the gauge's disk may take.
PAUSE, _PATIENCE = 5.0, 60.0
# What says nothing of the gauge itself: a node that has too little of something.
_SCARCE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.EAGAIN)


@dataclass(frozen=True, kw_only=True)
class Fill:
    """What is to be shown, in bytes."""

    total: int
    available: int


def fill(status: PoolStatus, block: int, reserve: int) -> Fill:
    """A pool's fill, with blocks of so many bytes: the fuller of its data and its metadata counts, and what new
    snapshots leave to those that run (`reserve`, percent) is used. So nothing is available before they are refused.
    """
    total = status.data_total * block
    if status.mode != "rw" or status.needs_check:
        return Fill(total=total, available=0)
    data = (status.data_free * 100 - status.data_total * reserve) / (100 * max(1, status.data_total))
    kept = metadata_reserve(status)
    metadata = (status.metadata_free - kept) / max(1, status.metadata_total - kept)
    return Fill(total=total, available=int(total * max(0.0, min(data, metadata))))


class Gauge:
    """Mounted on `path`, from a file in the state directory. For one thread; every verb may be repeated."""

    def __init__(self, path: str, state_dir: str) -> None:
        """An empty `path` is for one that is only taken away."""
        self.path = os.path.realpath(path) if path else ""
        self.file = os.path.join(os.path.realpath(state_dir), FILE)

    # -- looking ----------------------------------------------------------------------------------------------------

    def places(self) -> dict[str, str]:
        """Where gauges of this state directory are mounted, with the file that each stands on, as the kernel names it.
        Touches no filesystem of the gauge's."""
        found = {}
        for one in mountinfo.table():
            if one.device[0] == loops.MAJOR and self._is_ours(file := _backing_file(one.device)):
                found[one.target] = file
        return found

    def _is_ours(self, file: str) -> bool:
        return file.removesuffix(_DELETED) in (self.file, self.file + _NEW)

    def is_mounted(self) -> bool:
        """Whether it is there, and the last thing mounted on its path."""
        try:
            with self._opened():
                return True
        except Unavailable:
            return False

    def shown(self) -> Fill:
        """What it shows now. Unavailable if it is not there."""
        with self._opened() as root:
            return _shown(root)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of its root, which is not the directory below."""
        try:
            root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise Unavailable(f"the gauge is not mounted on {self.path}") from None
        try:
            number = os.fstat(root).st_dev
            if os.major(number) != loops.MAJOR or _backing_file((loops.MAJOR, os.minor(number))) != self.file:
                raise Unavailable(f"the gauge is not mounted on {self.path}")
            yield root
        finally:
            os.close(root)

    # -- doing ------------------------------------------------------------------------------------------------------

    def be_there(self) -> None:
        """Mounted, as large as it was last, so that kubelet finds it although the pool is not there yet; nothing where
        there was none."""
        size = self._size()
        if size and not self.is_mounted():
            self._make(size)

    def show(self, wanted: Fill) -> None:
        """Mounted, of that size (of 0: as it is), with so much available, but for a little."""
        size = max(_SMALLEST, (wanted.total or self._size()) // _CLUSTER * _CLUSTER)
        if not self.is_mounted() or self._size() != size:
            self._make(size)
        try:
            self._weigh(wanted)
        except OSError as error:
            if error.errno in _SCARCE:
                raise
            log.warning("the gauge is made anew", extra={"path": self.path, "why": str(error)})
            self._make(size)
            self._weigh(wanted)

    def be_absent(self) -> None:
        """Neither mounted anywhere nor on the disk; its directory goes too if nothing is in it."""
        places = self.places()
        for place in places:
            mounts.be_let_go(place)
        for file in (self.file, self.file + _NEW):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
        for place in {*places, self.path} - {""}:
            with contextlib.suppress(OSError):  # somebody else's, by now
                os.rmdir(place)

    def _size(self) -> int:
        try:
            return os.stat(self.file).st_size
        except FileNotFoundError:
            return 0

    def _make(self, size: int) -> None:
        """A new one in the place of what there is."""
        deadline = Deadline.after(_PATIENCE)
        self._prove_free()
        new = self.file + _NEW
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        _make_sparse(new, size)
        inodes = max(_FEWEST, size * _INODES_OF_TIB >> 40)
        run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-N", str(inodes), "-L", "runvol-gauge",
            "-O", "bigalloc,^has_journal,^resize_inode", "-C", str(_CLUSTER),
            "-E", "nodiscard,lazy_itable_init=1", new, deadline=deadline)  # fmt: skip
        # The device goes with its last mount, whoever takes that away.
        device, keeper = loops.open_private(new, deadline=deadline)
        try:
            for place in self.places():  # another one too, where the setting was another
                mounts.be_let_go(place)
            os.makedirs(self.path, mode=0o755, exist_ok=True)
            mounts.mount(device, self.path, "ext4", [*_OPTIONS, *mounts.safety("ext4")], deadline)
            os.rename(new, self.file)
        finally:
            os.close(keeper)

    def _prove_free(self) -> None:
        """Unavailable if what is at the path is somebody else's."""
        there = [one.device for one in mountinfo.table() if one.target == self.path]
        if not all(device[0] == loops.MAJOR and self._is_ours(_backing_file(device)) for device in there):
            raise Unavailable(f"snapshotter.gauge = {self.path!r}: something else is mounted there; name another place")
        if not there and os.path.lexists(self.path) and (not os.path.isdir(self.path) or os.listdir(self.path)):
            raise Unavailable(f"snapshotter.gauge = {self.path!r}: takes a directory with nothing in it, or none yet")

    def _weigh(self, wanted: Fill) -> None:
        """The ballast takes what is to be used."""
        with self._opened() as root:
            now = _shown(root)
            more = (now.available - min(wanted.available, now.total)) // _CLUSTER * _CLUSTER
            enough = max(_CLUSTER, now.total // _GRAIN)
            if more >= enough or (more > 0 and not wanted.available):
                _add(root, more)
                if (left := _shown(root).available - wanted.available) > 2 * enough:
                    raise Unavailable(
                        f"the gauge on {self.path} has {left} bytes more than the pool, and takes no ballast"
                    )
            elif -more >= enough:
                _take(root, -more)


def _make_sparse(path: str, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise Unavailable(
            f"the filesystem of {path} takes no sparse file of {size} bytes ({error.strerror}), as large as the pool"
        ) from error
    finally:
        os.close(fd)


@contextlib.contextmanager
def _ballast(root: int, number: int) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(f"{_BALLAST}.{number}", flags, 0o600, dir_fd=root)
    try:
        yield fd
    finally:
        os.close(fd)


def _add(root: int, more: int) -> None:
    """So many bytes more, in the first files with room; less where the filesystem is full before, by its own tables."""
    number = 0
    while more > 0:
        with _ballast(root, number) as fd:
            size = os.fstat(fd).st_size
            part = min(more, _LARGEST - size, _STEP)
            if part > 0:
                try:
                    syscalls.fallocate(fd, 0, size, part)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return
                more -= part
            else:
                number += 1


def _take(root: int, less: int) -> None:
    """So many bytes less, from the last files."""
    for number in reversed(range(sum(name.startswith(f"{_BALLAST}.") for name in os.listdir(root)))):
        with _ballast(root, number) as fd:
            size = os.fstat(fd).st_size
            part = min(less, size)
            os.ftruncate(fd, size - part)
            less -= part


def _shown(root: int) -> Fill:
    facts = os.fstatvfs(root)
    return Fill(total=facts.f_blocks * facts.f_frsize, available=facts.f_bavail * facts.f_frsize)


def _backing_file(device: tuple[int, int]) -> str:
    """What the kernel says that a loop device stands on; empty for nothing."""
    return sysfs.stands_on(sysfs.of_number(f"{device[0]}:{device[1]}"))


class Follower:
    """Lets the gauge follow the pool. What hangs or fails costs the gauge alone."""

    def __init__(self, gauge: Gauge, pool: Pool, ready: Callable[[], bool], background: Background) -> None:
        self._gauge, self._pool, self._ready, self._background = gauge, pool, ready, background
        # Why it does not follow now; empty if it does.
        self.trouble = ""

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            with self._background.survived("the gauge"):
                self.follow()
                if not self._gauge.path and not self.trouble:
                    stop.wait()  # nothing to follow
            stop.wait(PAUSE if self._ready() else 1.0)

    def follow(self) -> None:
        """One look. A node without mkfs.ext4, or a full state disk, is told, and no trouble of the snapshotter's."""
        try:
            bounded(f"showing the pool's fill on {self._gauge.path}", Deadline.after(_PATIENCE), self._follow)
        except (SnapshotterError, BlockdevError, OSError) as error:
            if str(error) != self.trouble:
                log.warning("the gauge does not follow the pool", extra={"why": str(error)})
            self.trouble = str(error)
        else:
            self.trouble = ""

    def _follow(self) -> None:
        if not self._gauge.path:
            self._gauge.be_absent()
            return
        if not self._ready():
            self._gauge.be_there()
            return
        pool = self._pool
        self._gauge.show(fill(pool.status(), pool.block_bytes(), pool.limits.data_reserve))
