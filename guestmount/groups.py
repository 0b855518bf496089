"""A pod's group on a filesystem, with the meaning of Kubernetes' fsGroup and `OnRootMismatch`.

kubelet leaves this to a driver with VOLUME_MOUNT_GROUP: it could not reach a filesystem that only a guest mounts, and
Kata's Rust shim does not pass the group on. Other pods of the volume may run meanwhile and change every name, so what
was looked at is what is changed: by descriptor, never by a name that a link could take over in between.
"""

from __future__ import annotations

import errno
import logging
import os
import stat

from blockdev import Deadline, trees
from blockdev.errors import FilesystemDamaged

log = logging.getLogger("runvol.groups")

_FILE, _DIRECTORY = 0o660, 0o770 | stat.S_ISGID
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# What the filesystem does not let even root change (an immutable file, a share that squashes root) keeps its group, as
# under kubelet.
_KEPT = (errno.EPERM, errno.EACCES)
_DAMAGED = (errno.EUCLEAN, errno.EBADMSG, errno.EIO)


def are_given(root: int, group: int) -> bool:
    """Whether a run of `apply` has come to its end there."""
    return _has(os.fstat(root), group)


def apply(root: int, group: int, deadline: Deadline) -> bool:
    """Give the tree below the directory descriptor `root` to `group`; whether anything had to be done.

    Skipped if the root has the group and its bits already. The root is changed last, so that an interrupted run
    is repeated, and skips what is right by then. Names that vanish or change meanwhile are somebody's who is there to
    see the new group himself.
    """
    if are_given(root, group):
        return False
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        if not _may_be_changed(fd):
            log.warning("the files keep their groups, which their server, or a flag, does not let be changed",
                        extra={"group": group})  # fmt: skip
            return False
        try:
            kept = _give_all(root, group, deadline)
        except OSError as error:
            if error.errno not in _DAMAGED:
                raise
            raise FilesystemDamaged("the volume", f"{error.strerror}, while its files got group {group}") from error
        if kept:
            log.warning("some files keep their group: they may not be changed", extra={"files": kept, "group": group})
        os.fchown(fd, -1, group)
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | _DIRECTORY)
    finally:
        os.close(fd)
    return True


def _may_be_changed(fd: int) -> bool:
    """Not on a share whose server takes root for nobody: kubelet too leaves its files as they are."""
    try:
        os.fchown(fd, -1, os.fstat(fd).st_gid)
    except OSError as error:
        if error.errno not in _KEPT:
            raise
        return False
    return True


def _give_all(root: int, group: int, deadline: Deadline) -> int:
    """How many entries keep their group."""
    kept = 0
    what = f"giving the volume's files to group {group}"
    for directory, directories, others in trees.walk(root, what, deadline):
        for name in (*directories, *others):
            deadline.check(what)
            kept += not _give(directory, name, group)
    return kept


def _bits(mode: int) -> int:
    """What a group needs. A link has no mode, and that of a device node stays as it is."""
    if stat.S_ISDIR(mode):
        return _DIRECTORY
    return 0 if stat.S_ISLNK(mode) or stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else _FILE


def _has(facts: os.stat_result, group: int) -> bool:
    bits = _bits(facts.st_mode)
    return facts.st_gid == group and facts.st_mode & bits == bits


def _give(directory: int, name: str, group: int) -> bool:
    """Whether the entry has the group now, or is gone."""
    try:
        fd = os.open(name, _LOOK, dir_fd=directory)
    except OSError as error:
        if error.errno in trees.NOT_THERE:
            return True
        if error.errno in _KEPT:
            return False
        raise
    try:
        facts = os.fstat(fd)
        if _has(facts, group):
            return True
        # What the descriptor stands for, and nothing that has its name by now; for a link that is the link itself.
        same = f"/proc/self/fd/{fd}"
        os.chown(same, -1, group)
        bits = _bits(facts.st_mode)
        if bits:
            os.chmod(same, stat.S_IMODE(facts.st_mode) | bits)
    except OSError as error:
        if error.errno not in _KEPT:
            raise
        return False
    finally:
        os.close(fd)
    return True
