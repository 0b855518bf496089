"""A block filesystem that a guest gets as a device: a placeholder stands at the target, a hand-off names the device."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager

import msgspec

from blockdev import Deadline, filesystems, ioctls, mounts, selinux, superblocks
from blockdev.detached import private_mount
from blockdev.errors import FilesystemDamaged, WrongFilesystem
from guestmount import placeholder, preflight
from guestmount.claims import Cell, Claim, Target
from guestmount.errors import Refused
from guestmount.handoff import Delivered, Delivery
from guestmount.ways import closing, exclusion
from guestmount.ways.attached import be_attached, check_nothing_at
from guestmount.ways.base import Arrival, Means, Problem, Usage
from guestmount.ways.mounted import grow_device, grow_unmounted
from volumes import SizeRange, Volume, VolumeNotFound
from volumes.backend import Backend

log = logging.getLogger("runvol.guest_device")

# Seconds that a mount, or its end, may take behind a call.
_MOUNTED = 3600.0


class GuestDevice(exclusion.OneKernel):
    """The guest's agent mounts it. Nothing of the host's mounts it while a sandbox has it."""

    name = "guest-device"
    hands_over = True

    def check(self, means: Means, claim: Claim, arrival: Arrival, _deadline: Deadline) -> tuple[Claim, Target]:
        check_nothing_at(claim, arrival.path)
        preflight.check(
            arrival.runtime,
            pv_name=claim.volume,
            read_only=arrival.target.read_only,
            rust_shared_block=means.rust_shared_block,
        )
        kata = arrival.runtime.kata
        target = msgspec.structs.replace(
            arrival.target,
            shim=kata.shim if kata is not None else "",
            on_node=kata is not None and kata.wants_node(preflight.annotations_of(arrival.runtime)),
        )
        if claim.group_of(target) and arrival.runtime.gives_group:
            target = msgspec.structs.replace(target, group_in_guest=True)
        dialect = means.dialects.of(arrival.runtime.dialect, arrival.runtime.handler)
        dialect.check(_delivery(claim, arrival.path, target))
        return claim, target

    def prepare(self, means: Means, claim: Claim, target: Target, deadline: Deadline) -> Claim:
        if not claim.prepared:
            _make_ready(means, claim, target, deadline)
            claim = claim.but(prepared=True, handed_out=False)  # a check in it has cleared the note
        return means.written.by_others(claim)

    def deliver(self, means: Means, cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        owner = claim.owner
        if owner is None:
            raise Refused(f"volume {claim.volume} has no owner")
        if not claim.prepared and _is_open(means, claim):
            # The record is older than its hand-offs (a restored one): what was done before they were written was done.
            claim = cell.write(claim.but(prepared=True))
        if not (claim.prepared and claim.handed_out):
            claim, damage = self._prepared(means, claim, target, deadline)
            if damage is not None and means.dialects.at(path) is None:
                raise damage
            cell.write(claim)
        if not mounts.is_mount_point(path):
            os.makedirs(path, mode=0o750, exist_ok=True)
        placeholder.be_placed(path, deadline, label=selinux.context_of(claim.use.mount_flags))
        dialect = means.dialects.of(owner.dialect, owner.handler)
        if dialect.needs_node or target.on_node:
            claim = be_attached(cell, claim, deadline)
        dialect.deliver(_delivery(claim, path, target))

    def expand(self, means: Means, cell: Cell, backend: Backend, size: SizeRange, deadline: Deadline) -> int | None:
        claim = cell.present
        wanted = backend.check_expand(claim.volume, size)
        has = ioctls.size_bytes(claim.device or claim.source)
        if claim.prepared and has >= wanted and not filesystems.lags(claim.source):
            return wanted
        volume = backend.expand(claim.volume, size)
        if claim.prepared:
            found = closing.obstacle(means, claim, deadline) or self._unmountable(means, claim)
            if found:
                raise only_store(claim, volume, found)
            self._close(means, cell, volume, deadline)
        prepared, damage = self._prepared(means, cell.present, next(iter(claim.targets.values())), deadline)
        cell.write(prepared)
        for path, target in claim.targets.items():
            self.deliver(means, cell, cell.present, path, target, deadline)
        if damage is not None:
            raise damage
        return volume.capacity_bytes

    def _prepared(
        self, means: Means, claim: Claim, target: Target, deadline: Deadline
    ) -> tuple[Claim, FilesystemDamaged | WrongFilesystem | None]:
        """The claim of a volume that may be handed over; and why it could only be so as it is, which is for the guest
        that has made it so, and no other: closed for ever, its hand-off would mend nothing."""
        at_work = means.written.is_checking(claim) or means.giving.is_at_work(claim.volume)
        if not claim.prepared and not at_work:
            # Its hand-off may have been closed by a process that was killed, whose programs go on.
            with exclusion.explained(claim):
                exclusion.guest_has_let_go(claim)
        try:
            return self.prepare(means, claim, target, deadline), None
        except (FilesystemDamaged, WrongFilesystem) as error:
            log.error("a volume stays as its guest has made it", extra={"volume": claim.volume, "why": str(error)})
            return means.written.by_others(claim.but(prepared=True, handed_out=False)), error

    def _unmountable(self, means: Means, claim: Claim) -> str:
        if claim.use.fstype == "xfs" and not means.written.is_mountable(claim):
            return "node.guest_filesystems = never lets no mount of the host grow its XFS"
        return ""

    def _close(self, means: Means, cell: Cell, volume: Volume, deadline: Deadline) -> None:
        """No container can take the volume until its targets are delivered, and then it is as for the first one."""
        claim = cell.present
        try:
            with exclusion.explained(claim):
                found = closing.close(means, claim, _deliveries(claim), deadline)
            if found:
                raise only_store(claim, volume, found)
            # Whoever is killed here has grown nothing, and the next one opens what is closed.
            cell.write(claim.but(prepared=False, handed_out=False))
        except BaseException:
            for path, target in claim.targets.items():
                self.deliver(means, cell, claim, path, target, deadline)
            raise

    def usage(self, claim: Claim, _path: str, _deadline: Deadline) -> Usage:
        return of_superblock(claim)

    def problems(self, _claim: Claim, path: str, handed: Mapping[str, Delivered]) -> list[Problem]:
        found = no_placeholder(path)
        if path not in handed or handed[path].problem:
            why = handed[path].problem if path in handed else "it is missing"
            found.append(Problem(reason="HandOffDamaged", message=f"the hand-off for {path}: {why}", unreachable=True))
        elif handed[path].closed:
            message = f"the hand-off for {path} is closed until the volume has grown; containers wait for it"
            found.append(Problem(reason="HandOffClosed", message=message, unreachable=True))
        return found


def no_placeholder(path: str) -> list[Problem]:
    """The problem of a target that only a guest may use."""
    if placeholder.stands(path):
        return []
    return [Problem(reason="PlaceholderMissing", message=f"no read-only placeholder stands at {path}")]


def _make_ready(means: Means, claim: Claim, target: Target, deadline: Deadline) -> None:
    """Checked, grown and given its group. No guest can have it yet: the hand-off is written after this."""
    if not means.giving.is_at_work(claim.volume):  # otherwise that was done, and it is mounted
        if not means.written.is_checking(claim):
            filesystems.check(claim.source, claim.use.fstype, deadline)
        grow_device(claim)
        grow_unmounted(means, claim, deadline)
    group = "" if target.group_in_guest else claim.group_of(target)
    if group and not means.written.has_group(claim, group):
        means.written.be_safe(claim, f"giving its files to group {group}", deadline)
        held = os.open(claim.source, os.O_RDONLY | os.O_CLOEXEC)

        def mounted() -> AbstractContextManager[int]:
            return private_mount(claim.source, claim.use.fstype, deadline=Deadline.after(_MOUNTED), held=True)

        done = functools.partial(means.written.given, claim, group)
        means.giving.whole(claim.volume, held, mounted, group, deadline, done)


def _is_open(means: Means, claim: Claim) -> bool:
    """Whether a container can take the volume at any moment, from one of its hand-offs."""
    handed = (means.dialects.at(path) for path in claim.targets)
    return any(one is not None and not one.problem and not one.closed for one in handed)


def _deliveries(claim: Claim) -> list[Delivery]:
    return [_delivery(claim, path, target) for path, target in claim.targets.items()]


def _delivery(claim: Claim, path: str, target: Target) -> Delivery:
    return Delivery(
        volume_id=claim.volume,
        target=path,
        device=claim.device or claim.source,
        fstype=claim.use.fstype,
        options=_options(claim),
        read_only=target.read_only,
        group=target.mount_group if target.group_in_guest else "",
    )


def _options(claim: Claim) -> tuple[str, ...]:
    """Those that the volume was staged with, but for labels of the host's policy. A clone has its source's UUID, which
    XFS mounts once a kernel."""
    options = selinux.without(claim.use.mount_flags)
    return (*options, "nouuid") if claim.use.fstype == "xfs" and "nouuid" not in options else options


def only_store(claim: Claim, volume: Volume, why: str) -> Refused:
    """The answer where only the store of a volume that a sandbox has could be made as large as asked for.

    The runtime plugs the device in again for each container, asking nobody, so the host leaves device and filesystem
    alone while a sandbox lives. The file behind is longer, which whoever has it open does not see: the next publish,
    before it hands the device over, lets the filesystem take it.
    """
    return Refused(
        f"volume {claim.volume} belongs to the guest of {claim.owner}, so only its store grew, to "
        f"{volume.capacity_bytes} bytes: {why}; the guest gets the new size when the pod is deleted and made again"
    )


def of_superblock(claim: Claim) -> Usage:
    """What the filesystem's own records say, which a guest writes back now and then."""
    block = superblocks.space(claim.source)
    if block is None:
        raise VolumeNotFound(f"{claim.volume} (there is no filesystem on {claim.source})")
    return Usage(
        total_bytes=block.total_bytes,
        used_bytes=block.total_bytes - block.free_bytes,
        available_bytes=block.available_bytes,
        inodes=block.inodes,
        used_inodes=block.inodes - block.free_inodes,
        free_inodes=block.free_inodes,
    )
