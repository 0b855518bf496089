"""A volume for a runc pod: mounted once at the staging path, bound to each target; or a device node."""

from __future__ import annotations

import logging
import os

from blockdev import Deadline, exclusivity, filesystems, ioctls, loops, mounts
from blockdev.errors import CapabilityMissing, MountFailed
from guestmount import groups
from guestmount.claims import Cell, Claim, Target

log = logging.getLogger("runvol.host_delivery")


def be_attached(cell: Cell, claim: Claim, deadline: Deadline, *, read_only: bool = False) -> Claim:
    """A loop device stands on the volume's file, and the claim names it."""
    if ioctls.is_block(claim.source):
        return claim if claim.device == claim.source else cell.write(claim.but(device=claim.source))
    if claim.device and loops.be_kept(claim.device, claim.source):
        return claim
    device = loops.attach(claim.source, deadline=deadline, read_only=read_only)
    return cell.write(claim.but(device=device))


def mount_filesystem(cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
    """The filesystem hangs at the staging path, and is bound to `path`."""
    staging, use = claim.staging_path, claim.use
    if not mounts.is_mount_point(staging):
        if not (claim.prepared and claim.device and not exclusivity.is_free(claim.device, past_known=True)):
            # Otherwise it is still mounted for somebody who did not let go, and is no business of fsck's.
            filesystems.check(claim.source, use.fstype, deadline)
            if not claim.device:
                filesystems.grow(claim.source, deadline)  # unmounted, it needs no capability
        claim = be_attached(cell, claim, deadline)
        options = [*use.mount_flags, *mounts.safety(use.fstype)]
        os.makedirs(staging, mode=0o750, exist_ok=True)
        mounts.mount(claim.device, staging, use.fstype, options, deadline)
    else:
        _check_staged(claim)
    if not claim.prepared:
        _grow(claim)
        claim = cell.write(claim.but(prepared=True))
    if target.mount_group and not target.read_only:
        root = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            groups.apply(root, int(target.mount_group), deadline)
        finally:
            os.close(root)
    if not mounts.is_mount_point(path):
        os.makedirs(path, mode=0o750, exist_ok=True)
        mounts.bind(staging, path, read_only=target.read_only)
    elif not mounts.same_filesystem(path, staging):
        raise MountFailed(staging, path, "something else is mounted there; unpublish the volume first")


def _check_staged(claim: Claim) -> None:
    """What hangs at the staging path is this volume's device, and that is this volume's file still."""
    if not mounts.is_of_device(claim.staging_path, claim.device) or not (
        claim.device == claim.source or loops.be_kept(claim.device, claim.source)
    ):
        raise MountFailed(
            claim.source, claim.staging_path, "something else is mounted there; unpublish and unstage the volume first"
        )


def grow(claim: Claim, deadline: Deadline) -> None:
    """Device and filesystem take the size that the volume's store has now: online for the host, else unmounted.

    The caller has proved that a volume without an owner is free.
    """
    if claim.device:
        if claim.device != claim.source and not loops.be_kept(claim.device, claim.source):
            raise MountFailed(claim.source, claim.device, "the device is not the volume's any more; publish it again")
        if claim.device != claim.source:
            loops.resize(claim.device)
    if claim.use.raw:
        return
    if claim.owner is None:
        filesystems.grow(claim.source, deadline)
        return
    if not mounts.is_mount_point(claim.staging_path):
        raise MountFailed(claim.source, claim.staging_path, "it is not mounted there; publish the volume again")
    _check_staged(claim)
    if filesystems.lags(claim.device):
        filesystems.grow_mounted(claim.staging_path, ioctls.size_bytes(claim.device), claim.device)


def _grow(claim: Claim) -> None:
    if filesystems.lags(claim.device):
        try:
            filesystems.grow_mounted(claim.staging_path, ioctls.size_bytes(claim.device), claim.device)
        except CapabilityMissing:
            # The volume works at its old size; NodeExpand says what is missing.
            return


def place_node(cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
    """The volume's device node is bound to the file `path` (volumeMode: Block), for both kinds of runtime."""
    claim = be_attached(cell, claim, deadline, read_only=target.read_only)
    if ioctls.is_read_only(claim.device) != target.read_only:
        raise MountFailed(claim.device, path, "a device is read-only for all pods or for none; use one readOnly value")
    if mounts.is_mount_point(path):
        if ioctls.same_node(path, claim.device):
            return
        # Its number went to somebody else: the volume's device was taken away under a pod.
        log.warning("the device at a target was not the volume's", extra={"volume": claim.volume, "target": path})
        mounts.be_unmounted(path, deadline)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.close(fd)
    mounts.bind(claim.device, path, read_only=False)
