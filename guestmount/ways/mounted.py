"""A block filesystem that the host's kernel mounts: once, at the staging path, and bound to each target."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from blockdev import Deadline, exclusivity, filesystems, ioctls, loops, mountinfo, mounts, selinux, superblocks
from blockdev.errors import CapabilityMissing, MountFailed
from guestmount import agreement
from guestmount.claims import Cell, Claim, Target
from guestmount.errors import Refused
from guestmount.handoff import Delivered
from guestmount.ways import exclusion
from guestmount.ways.attached import be_attached, check_nothing_at, is_ours
from guestmount.ways.base import Arrival, Means, Problem, Usage, of_mount
from volumes import SizeRange
from volumes.backend import Backend


class Mounted(exclusion.OneKernel):
    """For pods that run on the host's kernel."""

    name = "mounted"

    def check(self, _means: Means, claim: Claim, arrival: Arrival, _deadline: Deadline) -> tuple[Claim, Target]:
        check_nothing_at(claim, arrival.path)
        agreement.check_same_label(claim, arrival.request)
        return claim, arrival.target

    def deliver(self, means: Means, cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        if not mounts.is_mount_point(path):
            _check_writable(claim, path, target, deadline)
        claim = _be_staged(means, cell, claim, deadline)
        staging = claim.staging_path
        if group := claim.group_of(target):
            root = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                means.giving.files(claim.volume, root, group, deadline)
            finally:
                os.close(root)
            means.written.given(claim, group)
        if not mounts.is_mount_point(path):
            os.makedirs(path, mode=0o750, exist_ok=True)
            mounts.bind(staging, path, read_only=target.read_only)
        elif not mounts.same_filesystem(path, staging):
            raise MountFailed(staging, path, "something else is mounted there; unpublish the volume first")

    def expand(
        self, _means: Means, _cell: Cell, _backend: Backend, _size: SizeRange, _deadline: Deadline
    ) -> int | None:  # fmt: skip
        return None

    def usage(self, _claim: Claim, path: str, deadline: Deadline) -> Usage:
        return of_mount(path, deadline)

    def problems(self, _claim: Claim, path: str, _handed: Mapping[str, Delivered]) -> list[Problem]:
        return nothing_mounted(path)


def nothing_mounted(path: str) -> list[Problem]:
    """The problem of a target at which something of the host's has to be mounted."""
    if mounts.is_mount_point(path):
        return []
    return [Problem(reason="MountMissing", message=f"nothing is mounted at {path}", unreachable=True)]


def _be_staged(means: Means, cell: Cell, claim: Claim, deadline: Deadline) -> Claim:
    """The filesystem hangs at the staging path, checked before and grown to its device."""
    staging, use = claim.staging_path, claim.use
    if not mounts.is_mount_point(staging):
        if not (claim.prepared and claim.device and not exclusivity.is_free(claim.device, past_known=True)):
            # Otherwise it is still mounted for somebody who did not let go, and is no business of fsck's.
            means.written.be_safe(claim, "a runc pod", deadline)
            filesystems.check(claim.source, use.fstype, deadline)
            if not claim.device:
                filesystems.grow(claim.source, deadline)  # unmounted, it needs no capability
        claim = be_attached(cell, claim, deadline)
        options = [*selinux.of_host(use.mount_flags), *mounts.safety(use.fstype)]
        os.makedirs(staging, mode=0o750, exist_ok=True)
        mounts.mount(claim.device, staging, use.fstype, options, deadline)
    else:
        _check_staged(claim)
    if claim.prepared:
        return claim
    _take_size(claim)
    return cell.write(claim.but(prepared=True))


def _check_writable(claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
    """Refused for a pod that would write, where the kernel has made the filesystem read-only after an error. Pods that
    have it keep it; once the last of them has gone it is checked, and mounted anew."""
    others = sorted({one.pod for at, one in claim.targets.items() if at != path})
    reads = target.read_only or "ro" in claim.use.mount_flags
    if reads or not claim.device or not mounts.is_mount_point(claim.staging_path) or not _has_stopped(claim):
        return
    if not others:
        mounts.be_unmounted(claim.staging_path, deadline)
        return
    raise Refused(
        f"the filesystem of volume {claim.volume} met an error and is read-only since; another pod can write to it "
        f"once nobody has it any more (now: {', '.join(others)})"
    )


def _has_stopped(claim: Claim) -> bool:
    """Whether the kernel takes no more writes for a filesystem that it has mounted: newer ones say so only in their own
    words, or in the superblock."""
    try:
        os.stat(claim.staging_path)
    except OSError as error:
        return error.errno in (errno.EIO, errno.ESHUTDOWN)
    said = mountinfo.at(claim.staging_path)
    if said is not None and {"ro", "emergency_ro", "shutdown"} & {*said.super_options}:
        return True
    block = superblocks.read(claim.device)
    return block is not None and block.errors


def _check_staged(claim: Claim) -> None:
    """What hangs at the staging path is this volume's device, and that is this volume's file still."""
    if not mounts.is_of_device(claim.staging_path, claim.device) or not is_ours(claim):
        raise MountFailed(
            claim.source, claim.staging_path, "something else is mounted there; unpublish and unstage the volume first"
        )


def _take_size(claim: Claim) -> None:
    if filesystems.lags(claim.device):
        try:
            filesystems.grow_mounted(claim.staging_path, ioctls.size_bytes(claim.device), claim.device)
        except CapabilityMissing:
            # The volume works at its old size; NodeExpand says what is missing.
            return


def grow(means: Means, claim: Claim, deadline: Deadline) -> None:
    """The filesystem takes the size that the volume's store has now: online for the host, else unmounted.

    The caller has proved that a volume without an owner is free.
    """
    grow_device(claim)
    if claim.owner is None:
        grow_unmounted(means, claim, deadline)
        return
    if not mounts.is_mount_point(claim.staging_path):
        raise MountFailed(claim.source, claim.staging_path, "it is not mounted there; publish the volume again")
    _check_staged(claim)
    if filesystems.lags(claim.device):
        filesystems.grow_mounted(claim.staging_path, ioctls.size_bytes(claim.device), claim.device)


def grow_unmounted(means: Means, claim: Claim, deadline: Deadline) -> None:
    """The filesystem of a volume that nobody has takes its whole device. The kernel grows it in a mount of its own
    where it may mount what is there; ext4 can do without."""
    if not filesystems.lags(claim.source):
        return
    if claim.use.fstype != "xfs" and not means.written.is_mountable(claim):
        filesystems.grow_by_program(claim.source, deadline)
        return
    means.written.be_safe(claim, "its growth", deadline)
    filesystems.grow(claim.source, deadline)


def grow_device(claim: Claim) -> None:
    """The loop device, if there is one, takes the size of its file."""
    if claim.device and claim.device != claim.source:
        if not loops.be_kept(claim.device, claim.source):
            raise MountFailed(claim.source, claim.device, "the device is not the volume's any more; publish it again")
        loops.resize(claim.device)
