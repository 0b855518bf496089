"""What stands at a sandbox pod's target: a read-only tmpfs.

If a runtime ignores the hand-off, it shares this directory into the guest instead, and the pod fails to write
(EROFS) instead of filling the host's disk in silence.
"""

from __future__ import annotations

import errno
import os

from blockdev import Deadline, mountinfo, mounts, selinux, syscalls
from blockdev.detached import filesystem
from blockdev.errors import MountFailed
from blockdev.mountinfo import Mount

NOTE, SOURCE = "RUNVOL-PLACEHOLDER", "runvol"
_TEXT = """This directory stands in for a volume that was handed to the pod's guest as a device.
If you read this inside a container, the runtime ignored the hand-off: run `runvol doctor` on the node.
"""
_ATTRIBUTES = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)
_LABEL = "system_u:object_r:container_file_t:s0"


def be_placed(target: str, deadline: Deadline, *, label: str = "") -> None:
    """The placeholder stands at `target`, made whole before it appears there; nothing happens if it does already.

    `label`: of SELinux, that kubelet has given the volume; empty for one that every container may read.
    """
    if stands(target):
        return
    if mounts.is_mount_point(target):
        raise MountFailed("the placeholder", target, "something else is mounted there; unpublish the volume first")
    options: dict[str, str | None] = {"source": SOURCE, "size": "64k", "mode": "0755"}
    if selinux.is_on():
        # kubelet (hostutil's getSELinuxSupport) has containerd label each file of what says `seclabel` in the table of
        # mounts, which a read-only filesystem refuses; one that was mounted with a label does not say it.
        options[selinux.CONTEXT] = label or _LABEL
    with filesystem("tmpfs", options, deadline=deadline) as root:
        fd = os.open(NOTE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444, dir_fd=root)
        try:
            os.write(fd, _TEXT.encode())
        finally:
            os.close(fd)
        deadline.poll(f"making the placeholder for {target} read-only", lambda: _be_read_only(root), every=0.002)
        try:
            syscalls.move_mount(root, target)
        except OSError as error:
            raise MountFailed("the placeholder", target, str(error.strerror)) from error


def _be_read_only(root: int) -> bool:
    """False while the note still counts as open for writing.

    A program that another call starts in this moment holds a copy of our descriptor between its fork and its exec.
    """
    try:
        syscalls.mount_setattr(root, _ATTRIBUTES)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def is_listed(target: str) -> bool:
    """As `stands`, by the table of mounts alone: nothing that could be a dead server's mount is touched."""
    found = mountinfo.at(target)
    return found is not None and is_one(found)


def is_one(mount: Mount) -> bool:
    return mount.fstype == "tmpfs" and mount.source == SOURCE


def stands(target: str) -> bool:
    """Whether the placeholder, read-only, is what is mounted at `target`."""
    return mounts.is_mount_point(target) and mounts.is_read_only(target) and os.path.exists(os.path.join(target, NOTE))
