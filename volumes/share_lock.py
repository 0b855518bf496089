"""One controller at a time changes what stands on an NFS share: a lock on a file of the share itself.

It holds between all controllers of the share where the protocol has locks (version 4), between those of one machine
with version 3, which is mounted without. Work that takes long does not hold it: that has a file or a directory of its
own, which it touches as long as it lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator

from blockdev import BlockdevError, beneath, flocks
from volumes import share
from volumes.errors import StoreFailed, VolumeUnfinished
from volumes.share import RECORDS

LOCK = "lock"
# What the names of half-made, and of half-removed, directories begin with.
HALF = ("new-", "gone-")
# Seconds: for others' changes, which take milliseconds; between two looks; between two touches; and after the last one.
_PATIENCE, _STEP, _BEAT, _ALIVE = 8.0, 0.02, 20.0, 120.0
# What a server says that has no locks to give.
_NONE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Threads of one process need not ask the server which of them is first. By the directory of the records.
_here: dict[tuple[int, int], threading.Lock] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def changing(records: int) -> Iterator[None]:
    """Alone at work on what the records below the directory descriptor `records` speak of. VolumeUnfinished where
    others are for too long; StoreFailed."""
    until = time.monotonic() + _PATIENCE
    with share.place_of_records(records) as place:
        facts = os.fstat(place)
        with _guard:
            mine = _here.setdefault((facts.st_dev, facts.st_ino), threading.Lock())
        if not mine.acquire(timeout=_PATIENCE):
            raise _others()
        try:
            fd = _locked(place, until)
            try:
                yield
            finally:
                try:
                    _set(fd, fcntl.F_UNLCK)
                finally:
                    os.close(fd)
        finally:
            mine.release()


def _locked(place: int, until: float) -> int:
    """The lock's file, locked, and still the one of that name."""
    while True:
        fd = _lock_file(place)
        try:
            while not _set(fd, fcntl.F_WRLCK):
                if time.monotonic() > until:
                    raise _others()
                time.sleep(_STEP)
            if flocks.is_still(fd, LOCK, dir_fd=place, through_links=False):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # somebody has removed it: what others lock is another file
        if time.monotonic() > until:
            raise _others()


def _others() -> VolumeUnfinished:
    return VolumeUnfinished(
        f"another controller, or another call, is at work on the share (its {RECORDS}/{LOCK} is locked); ask again"
    )


def _lock_file(place: int) -> int:
    try:
        fd = beneath.regular(place, LOCK, os.O_RDWR)
    except FileNotFoundError:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(FileExistsError):
            return os.open(LOCK, flags, 0o600, dir_fd=place)
        fd = beneath.regular(place, LOCK, os.O_RDWR)
    if fd is None:
        raise StoreFailed(f"the share's {RECORDS}/{LOCK} is no regular file; remove it")
    return fd


def _set(fd: int, kind: int) -> bool:
    """Whether this descriptor has the lock; true where the server has none to give."""
    try:
        return flocks.byte(fd, 0, kind)
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return True


@contextlib.contextmanager
def beating(fd: int) -> Iterator[None]:
    """The open file or directory is touched now and then, so that others see that somebody is at work on it."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT):
            with contextlib.suppress(OSError):  # the work itself says what is wrong
                os.utime(fd)

    thread = threading.Thread(target=beat, name="share beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_worked_on(records: int, root: int, one_id: str) -> bool:
    """Whether somebody makes the volume or snapshot of this id, or may have begun to, by the server's own clock.
    `root`: where it is made."""
    now = _server_time(records)
    if now is None:
        return True
    looked = [(records, f"{one_id}.json")]
    for base in {records, root}:
        parts = [name for begins in (f"new-{one_id}.", f"{one_id}.") for name in share.names(base, begins)]
        looked += [(base, name) for name in parts if name not in (f"{one_id}.json", f"{one_id}.tar")]
    for base, name in looked:
        with contextlib.suppress(OSError), share.opened(base, RECORDS) as place:
            # A time to come is nobody's touch.
            if now - _ALIVE < os.stat(name, dir_fd=place, follow_symlinks=False).st_mtime < now + _ALIVE:
                return True
    return False


def tidy_abandoned(records: int, root: int, prefix: str | tuple[str, ...]) -> None:
    """Nothing that nobody works on is left under such names. What cannot be removed keeps none of the others: OSError,
    or BlockdevError, of the first at the end."""
    names = share.names(root, prefix)
    now = _server_time(records) if names else None
    first: OSError | BlockdevError | None = None
    for name in names:
        try:
            with share.opened(root, RECORDS) as place:
                facts = os.stat(name, dir_fd=place, follow_symlinks=False)
            # Whoever gave it that name has it for a while, too, which its own time does not tell.
            if now is not None and max(facts.st_mtime, facts.st_ctime) <= now - _ALIVE:
                share.remove_tree(root, f"{RECORDS}/{name}")
        except FileNotFoundError:
            continue  # another controller was faster
        except (OSError, BlockdevError) as error:
            first = first or error
    if first is not None:
        raise first


def _server_time(records: int) -> float | None:
    """What the server's clock says, from a file that it has just touched."""
    with share.opened(records, RECORDS) as place, contextlib.suppress(OSError):
        fd = _lock_file(place)
        try:
            os.utime(fd)
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)
    return None
