"""ext4 and XFS on a device: make, check, grow.

Nothing here mounts at a path. Growing uses a mount that hangs nowhere (`detached`), so that it leaves
nothing behind when the process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from blockdev import durable, ioctls, superblocks
from blockdev.blankness import prove_blank, signature
from blockdev.commands import Limits, run
from blockdev.deadlines import Deadline
from blockdev.detached import private_mount, would_be_replayed
from blockdev.errors import (
    CapabilityMissing,
    CommandFailed,
    FilesystemDamaged,
    FilesystemUnknown,
    MountFailed,
    WrongFilesystem,
)

DEFAULT = "ext4"
# Smallest device that mkfs accepts, in bytes: mkfs.xfs refuses less than 300 MB; ext4 needs room for a journal.
SMALLEST = {"ext4": 8 << 20, "xfs": 300 << 20}
SUPPORTED = tuple(SMALLEST)
_UNKNOWN_OPTION = re.compile(r"Bad option\(s\) specified: (\S+,)?assume_storage_prezeroed\b")
# dumpe2fs: `Group 1: (Blocks 32768-65535) csum 0x6888 [INODE_UNINIT, BLOCK_UNINIT]`, the last only if there are any.
_GROUP = re.compile(
    r"^Group ([0-9]+): \(Blocks [0-9]+-[0-9]+\)(?: csum 0x[0-9a-f]+)?(?: \[([A-Z_, ]*)\])?", re.MULTILINE
)
_ZEROED = 4
_FLAGS = {"INODE_UNINIT": 1, "BLOCK_UNINIT": 2, "ITABLE_ZEROED": _ZEROED}


def found_on(path: str, deadline: Deadline) -> str | None:
    """The filesystem, or another signature, on the device; None if libblkid sees nothing."""
    block = superblocks.read(path)
    return block.fstype if block is not None else signature(path, deadline)


def make(path: str, fstype: str, deadline: Deadline) -> None:
    """Format a device that is provably blank, durably; NotBlank otherwise."""
    all_zero = prove_blank(path, deadline)
    if fstype == "xfs":
        run("mkfs.xfs", "-q", "-K", path, deadline=deadline)
    elif all_zero:
        make_ext4_on_zeros(path, deadline)
    else:
        run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1", path, deadline=deadline)
    with ioctls.opened(path, os.O_RDWR) as fd:
        os.fsync(fd)


def make_ext4_on_zeros(path: str, deadline: Deadline, *options: str) -> None:
    """An ext4 on what reads as zeros all over, written sparsely. Its inode tables are marked as zeros: no kernel writes
    them later.

    e2fsprogs before 1.47 has no option for that, and refuses it: then the marks are set afterwards.
    """
    made = ("mkfs.ext4", "-q", "-F", "-m", "0", *options, "-E")
    try:
        run(*made, "nodiscard,assume_storage_prezeroed=1", path, deadline=deadline)
    except CommandFailed as error:
        if not _UNKNOWN_OPTION.search(error.output):
            raise
        run(*made, "nodiscard,lazy_itable_init=1,lazy_journal_init=1", path, deadline=deadline)
        _mark_zeroed(path, deadline)


def _mark_zeroed(path: str, deadline: Deadline) -> None:
    """Of an unmounted ext4: each group's inode table is zeros (EXT4_BG_INODE_ZEROED, fs/ext4/ext4.h)."""
    groups = _groups(path, deadline)
    lines = (f"set_block_group {number} flags {flags | _ZEROED}\nset_block_group {number} checksum calc\n"
             for number, flags in groups.items())  # fmt: skip
    commands = os.memfd_create("debugfs")
    try:
        durable.write_all(commands, "".join(lines).encode())
        run("debugfs", "-w", "-f", f"/proc/{os.getpid()}/fd/{commands}", path, deadline=deadline)
    finally:
        os.close(commands)
    now = _groups(path, deadline)
    if not now or not all(flags & _ZEROED for flags in now.values()):
        raise CommandFailed(
            "debugfs", 0, f"the inode tables of {path} could not be marked as zeros: install e2fsprogs 1.47"
        )


def _groups(path: str, deadline: Deadline) -> dict[int, int]:
    """The flags of each block group."""
    _, said = run("dumpe2fs", path, deadline=deadline)
    return {
        int(number): sum(_FLAGS.get(word.strip(), 0) for word in (words or "").split(","))
        for number, words in _GROUP.findall(said)
    }


def check(path: str, fstype: str, deadline: Deadline) -> None:
    """Return once the filesystem is `fstype` and consistent; repairs what needs no decision.

    WrongFilesystem, or FilesystemDamaged with fsck's words. A clean ext4 costs one read; an unclean one
    e2fsck, which replays the journal. XFS replays its log when it is mounted next, and is checked by that.
    """
    block = superblocks.read(path)
    if block is None or block.fstype != fstype:
        raise WrongFilesystem(path, found_on(path, deadline) or "no filesystem", fstype)
    if fstype == "xfs" or block.clean:
        return
    _checked("e2fsck", "-p", path, path=path, deadline=deadline, ok=(0, 1))


def verify(path: str, fstype: str) -> None:
    """The whole filesystem is consistent, whoever has written it. Repairs what is no question. For callers that have
    the device open, and have proved that nobody else has.

    A program reads it, in user space, under limits that grow with the device; it takes minutes where there are millions
    of files. Only an XFS log that holds changes has to be replayed by the kernel, in one private mount, before that.
    WrongFilesystem, FilesystemDamaged.
    """
    block = superblocks.read(path)
    if block is None or block.fstype != fstype:
        raise WrongFilesystem(path, "no filesystem" if block is None else block.fstype, fstype)
    deadline = Deadline.after(_limits(path).cpu * _WAITING)
    if fstype == "xfs":
        _verify_xfs(path, deadline)
    else:
        _checked("e2fsck", "-f", "-p", path, path=path, deadline=deadline, ok=(0, 1))


def _verify_xfs(path: str, deadline: Deadline) -> None:
    """Checked, and mounted only where its log holds changes; then checked with them.

    Two read the log, and not alike: a record that is torn ends it for the kernel, which replays what went before.
    So what a program calls clean is checked first, and then the kernel is asked whether it would replay something.
    """
    kind = () if ioctls.is_block(path) else ("-f",)
    check = ("xfs_repair", "-n", "-P", "-o", "ag_stride=0", *kind, path)
    if _seems_clean(path, deadline):
        _checked(*check, path=path, deadline=deadline)
        with _explained(path):
            if not ioctls.is_block(path) and not would_be_replayed(path, "xfs", deadline=deadline):
                return
    with _explained(path), private_mount(path, "xfs", deadline=deadline, held=True):
        pass  # replays it
    _checked(*check, path=path, deadline=deadline)


def _seems_clean(path: str, deadline: Deadline) -> bool:
    """Whether nothing in an XFS log seems to be left to replay."""
    said = _checked("xfs_logprint", "-t", path, path=path, deadline=deadline, ok=tuple(range(256)))
    return "state: <CLEAN>" in said or "totally zeroed log" in said


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """What its mount says of a filesystem, or its growth: that it is damaged, and the volume's name, whatever device
    stood on it in that moment."""
    try:
        yield
    except FilesystemUnknown:
        raise
    except MountFailed as error:
        raise FilesystemDamaged(path, f"the kernel does not mount it: {error.reason}") from error
    except OSError as error:
        if error.errno not in (errno.EUCLEAN, errno.EBADMSG, errno.EIO):
            raise
        raise FilesystemDamaged(path, str(error.strerror)) from error


# Seconds of waiting for a disk that a second of work may have.
_WAITING = 10


def _limits(path: str) -> Limits:
    """Enough for any filesystem of that size that mkfs and ordinary use make."""
    size = ioctls.size_bytes(path)
    return Limits(memory=(1 << 30) + size // 256, cpu=120 + (size >> 30) * 4)


# What xfs_repair says of every image file on some filesystems.
_NOISE = ("Cannot get host filesystem geometry", "Repair may fail if there is a sector", "the image and the host file")


def _checked(program: str, *arguments: str, path: str, deadline: Deadline, ok: tuple[int, ...] = (0,)) -> str:
    """A checker reads what somebody else may have written: it has limits, and its words are the answer."""
    try:
        return run(program, *arguments, deadline=deadline, ok=ok, limits=_limits(path))[1]
    except CommandFailed as error:
        said = "\n".join(line for line in error.output.splitlines() if not line.strip().startswith(_NOISE))
        said = said if said.strip() else f"{program} ended with status {error.code}"
        raise FilesystemDamaged(path, said) from None


def grow(path: str, deadline: Deadline) -> bool:
    """Let the filesystem take its whole device; whether there was anything to take. Nobody else may use it.

    Safe against a kill at any moment. Against a power cut too, where the process has CAP_SYS_RESOURCE (ext4) or the
    filesystem is XFS: the kernel then grows it in its journal.
    """
    if not lags(path):
        return False
    try:
        with _explained(path), private_mount(path, _fstype(path), deadline=deadline) as root:
            grow_mounted(root, ioctls.size_bytes(path), path)
    except CapabilityMissing:
        grow_by_program(path, deadline)
    return True


def grow_by_program(path: str, deadline: Deadline) -> None:
    """Let an ext4 take its whole device without a mount, by e2fsprogs alone, at the price of a whole fsck.

    Unlike the kernel's own growth it has no journal, so it goes on to its end although this process is killed.
    """
    with ioctls.opened(path) as fd:
        limits = _limits(path)
        run("e2fsck", "-f", "-p", path, deadline=deadline, ok=(0, 1), outlive=fd, limits=limits)
        run("resize2fs", path, deadline=deadline, outlive=fd, limits=limits)


def lags(path: str) -> bool:
    """Whether the filesystem is smaller than its device by more than a mkfs leaves unused."""
    block = superblocks.read(path)
    if block is None:
        return False
    return ioctls.size_bytes(path) - block.total_bytes >= max(block.block_bytes, _REST)


# ext4 leaves the last group out if it would be too small to hold its own tables.
_REST = 4 << 20


def grow_mounted(root: int | str, device_bytes: int, path: str) -> None:
    """Grow a mounted filesystem online; `root` is a directory in it, or a descriptor of one."""
    fd = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=root) if isinstance(root, int) else os.open(root, os.O_RDONLY)
    try:
        block = os.fstatvfs(fd).f_bsize
        if _fstype(path) == "xfs":
            ioctls.xfs_grow(fd, device_bytes // block)
        else:
            ioctls.ext4_resize(fd, device_bytes // block)
        os.fsync(fd)
    except PermissionError:
        raise CapabilityMissing(f"growing the ext4 on {path} while it is mounted", "CAP_SYS_RESOURCE") from None
    finally:
        os.close(fd)


def _fstype(path: str) -> str:
    block = superblocks.read(path)
    if block is None:
        raise WrongFilesystem(path, "no filesystem", " or ".join(SUPPORTED))
    return block.fstype
