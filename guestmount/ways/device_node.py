"""A raw volume (volumeMode: Block): its device node is bound to the target, for both kinds of runtime."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from blockdev import Deadline, ioctls, mounts
from blockdev.errors import MountFailed
from guestmount import preflight
from guestmount.claims import SANDBOX, Cell, Claim, Target
from guestmount.handoff import Delivered
from guestmount.ways import closing, exclusion, guest_device
from guestmount.ways.attached import be_attached, check_nothing_at
from guestmount.ways.base import Arrival, Means, Problem, Usage
from guestmount.ways.mounted import grow_device
from volumes import SizeRange
from volumes.backend import Backend

log = logging.getLogger("runvol.device_node")


class DeviceNode(exclusion.OneKernel):
    """The runtime of a sandbox plugs the node in; runc makes the container a node of the same number."""

    name = "device-node"
    shareable = True

    def check(self, _means: Means, claim: Claim, arrival: Arrival, _deadline: Deadline) -> tuple[Claim, Target]:
        check_nothing_at(claim, arrival.path)
        if arrival.runtime.kind == SANDBOX:
            preflight.check_raw(arrival.runtime)
        return claim, arrival.target

    def deliver(self, means: Means, cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        if not claim.handed_out:
            claim = cell.write(means.written.by_others(claim))
        claim = be_attached(cell, claim, deadline, read_only=target.read_only)
        if ioctls.is_read_only(claim.device) != target.read_only:
            raise MountFailed(
                claim.device, path, "a device is read-only for all pods or for none; use one readOnly value"
            )
        if mounts.is_mount_point(path):
            if ioctls.same_node(path, claim.device):
                return
            # Its number went to somebody else: the volume's device was taken away under a pod.
            log.warning("the device at a target was not the volume's", extra={"volume": claim.volume, "target": path})
            mounts.be_unmounted(path, deadline)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.close(fd)
        mounts.bind(claim.device, path, read_only=False)

    def expand(self, means: Means, cell: Cell, backend: Backend, size: SizeRange, deadline: Deadline) -> int | None:
        claim = cell.present
        if not exclusion.in_guest(claim):
            return None
        wanted = backend.check_expand(claim.volume, size)
        if ioctls.size_bytes(claim.device or claim.source) >= wanted:
            return wanted
        volume = backend.expand(claim.volume, size)
        found = closing.living(means, claim, deadline)
        if found:
            raise guest_device.only_store(claim, volume, found)
        # The shim that plugs the node in finds one size or the other.
        grow_device(claim)
        return volume.capacity_bytes

    def usage(self, claim: Claim, _path: str, _deadline: Deadline) -> Usage:
        size = ioctls.size_bytes(claim.source)
        return Usage(total_bytes=size, used_bytes=os.stat(claim.source).st_blocks * 512, available_bytes=0)

    def problems(self, _claim: Claim, _path: str, _handed: Mapping[str, Delivered]) -> list[Problem]:
        return []
