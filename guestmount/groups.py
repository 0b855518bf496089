"""A pod's group on a filesystem, with the meaning of Kubernetes' fsGroup and `OnRootMismatch`.

kubelet leaves this to a driver with VOLUME_MOUNT_GROUP: it could not reach a filesystem that only a guest mounts,
and Kata's Rust shim does not pass the group on.
"""

from __future__ import annotations

import os
import stat

from blockdev import Deadline

_FILE, _DIRECTORY = 0o660, 0o770 | stat.S_ISGID


def apply(root: int, group: int, deadline: Deadline) -> bool:
    """Give the tree below the directory descriptor `root` to `group`; whether anything had to be done.

    Skipped if the root has the group and its bits already. The root is changed last, so that an interrupted run
    is repeated in full.
    """
    facts = os.fstat(root)
    if facts.st_gid == group and facts.st_mode & _DIRECTORY == _DIRECTORY:
        return False
    for _path, directories, files, here in os.fwalk(".", dir_fd=root, follow_symlinks=False):
        deadline.check(f"giving the volume's files to group {group}")
        for name in (*files, *directories):
            _give(here, name, group)
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        os.fchown(fd, -1, group)
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | _DIRECTORY)
    finally:
        os.close(fd)
    return True


def _give(directory: int, name: str, group: int) -> None:
    facts = os.stat(name, dir_fd=directory, follow_symlinks=False)
    os.chown(name, -1, group, dir_fd=directory, follow_symlinks=False)
    if not stat.S_ISLNK(facts.st_mode):
        bits = _DIRECTORY if stat.S_ISDIR(facts.st_mode) else _FILE
        os.chmod(name, stat.S_IMODE(facts.st_mode) | bits, dir_fd=directory)
