"""Files and names that are on the disk when the call returns, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time

from blockdev import syscalls

# Opened as a record, this is what something else answers.
NO_RECORD = (errno.EUCLEAN, errno.EISDIR, errno.ELOOP, errno.ENXIO)
# Seconds after which what a killed process was writing is nobody's work any more.
_ABANDONED = 60.0
_END = ".new"
# What `replace` puts behind the beginning of its names: a process and a number.
_OWN = re.compile(r"[0-9]+-[0-9a-f]{8}\.new")


def sync_directory(path: str) -> None:
    """What was created, renamed or removed in the directory stays so after a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)


def make_directories(path: str, mode: int) -> None:
    """The directory is there. OSError says what a disk does, of which mkdir(2) only says that the name is there."""
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
    except FileExistsError:
        os.listdir(path)
        raise


def read(path: str, most: int = 1 << 20) -> bytes:
    """All of a record. OSError with an errno of `NO_RECORD` for what is none: a FIFO would be waited for, a link leads
    elsewhere, and no record is longer than `most` bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EUCLEAN, "it is no regular file", path)
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EUCLEAN, f"it has more than {most} bytes", path)
    return content


def write_all(fd: int, content: bytes) -> None:
    """Every byte, or OSError: write(2) takes fewer where the disk ends, and says why only to the next call."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write(
    path: str, content: bytes, *, mode: int = 0o600, owner: tuple[int, int] | None = None, dir_fd: int | None = None,
    synced: bool = True,
) -> None:  # fmt: skip
    """Make a new file, whole and on the disk, in a place that is the caller's alone. Nothing is left if it fails.

    FileExistsError if there is one: two that write to one name would each rename the other's half. What is not `synced`
    may be gone after a power cut. `owner`: user and group, else the caller's.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    try:
        try:
            write_all(fd, content)
            if owner is not None:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            if synced:
                os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path, dir_fd=dir_fd)
        raise


def replace(
    path: str, content: bytes, *, beside: str = "", mode: int = 0o600, owner: tuple[int, int] | None = None,
    dir_fd: int | None = None, synced: bool = True,
) -> None:  # fmt: skip
    """`path` has this content from now on, whole, also after a power cut; if it fails, what it had before.

    It is written beside, under a name that no other call has, and renamed. `beside`: what that name begins with, on the
    same filesystem; by default it lies next to `path`. `dir_fd`: the directory that the two are relative to. What is
    not `synced` may be lost in a power cut. OSError speaks of `path`: the same trouble is always the same sentence.
    """
    new = f"{beside or f'{path}.'}{os.getpid()}-{os.urandom(4).hex()}{_END}"
    try:
        write(new, content, mode=mode, owner=owner, dir_fd=dir_fd, synced=synced)
        try:
            if synced or dir_fd is not None or not _exchanged(new, path):
                os.rename(new, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=dir_fd)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    if not synced:
        return
    if dir_fd is None:
        sync_directory(os.path.dirname(path) or ".")
    else:
        os.fsync(dir_fd)


def _exchanged(new: str, path: str) -> bool:
    """Whether the two changed places and the old content is gone. A file that is renamed over another one is written to
    the disk by ext4, which takes longer than all the rest."""
    try:
        syscalls.exchange(new, path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOSYS):
            return False  # nothing is there yet, or the filesystem cannot do it
        raise
    try:
        os.unlink(new)
    except IsADirectoryError:  # something else lay in the place of a record
        clear(new)
    return True


def clear(path: str) -> None:
    """Nothing is at `path`, whatever it was, if that can be had: what lies in the place of a file of ours."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def sweep(beside: str, *, abandoned: bool = False) -> None:
    """Remove what killed calls of `replace` have left under names of theirs that begin with `beside`, after a minute.

    `abandoned`: at once, and only names of just this form, as the caller knows that nobody else writes them.
    """
    place, prefix = os.path.split(beside)
    for name in os.listdir(place or "."):
        rest = name[len(prefix) :]
        if name.startswith(prefix) and (_OWN.fullmatch(rest) if abandoned else rest.endswith(_END)):
            path = os.path.join(place, name)
            with contextlib.suppress(FileNotFoundError):
                if abandoned or time.time() - os.lstat(path).st_mtime > _ABANDONED:
                    os.unlink(path)
