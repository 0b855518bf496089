"""The block node of a volume, where a way needs one: the volume itself, or a loop device on its file."""

from __future__ import annotations

import logging

from blockdev import Deadline, ioctls, loops, mountinfo, mounts
from guestmount import placeholder as placeholders
from guestmount.claims import Cell, Claim
from guestmount.errors import Conflict
from guestmount.requests import exists

log = logging.getLogger("runvol.attached")


def be_attached(cell: Cell, claim: Claim, deadline: Deadline, *, read_only: bool = False) -> Claim:
    """A loop device stands on the volume's file, and the claim names it."""
    if ioctls.is_block(claim.source):
        return claim if claim.device == claim.source else cell.write(claim.but(device=claim.source))
    if claim.device and loops.be_kept(claim.device, claim.source):
        return claim
    return cell.write(claim.but(device=_attach(cell, claim.source, deadline, read_only=read_only)))


def _attach(cell: Cell, source: str, deadline: Deadline, *, read_only: bool) -> str:
    """A loop device of a number that no other volume's pod would open."""
    passed_over: list[str] = []
    try:
        while _is_anothers(cell, device := loops.attach(source, deadline=deadline, read_only=read_only)):
            log.error("a loop device was taken from a volume whose pod has it; its number is passed over",
                      extra={"device": device, "for": source})  # fmt: skip
            passed_over.append(device)
    finally:
        for taken in passed_over:
            loops.detach(taken, source, deadline)
    return device


def _is_anothers(cell: Cell, device: str) -> bool:
    """Whether another volume's claim names the device, or its node is bound where the volume's own claim knows of no
    target."""
    if cell.has_another(device):
        return True
    if not mountinfo.may_be_bound(device):
        return False
    # kubelet binds a target a second time, under the pod's uid.
    own = {*cell.present.targets, *(target.pod_uid for target in cell.present.targets.values())} - {""}
    return not all(own & {place, *place.split("/")} for place in mountinfo.node_targets(device))


def check_nothing_at(claim: Claim, path: str, *, placeholder: bool = False) -> None:
    """Conflict where something hangs at a target that the claim does not know; a `placeholder` of ours may be."""
    if path in claim.targets or not exists(path) or not mounts.is_mount_point(path):
        return
    if not (placeholder and placeholders.stands(path)):
        raise Conflict(f"something else is mounted at {path}; unmount it first")


def is_ours(claim: Claim) -> bool:
    """Whether the claim's device still stands on the volume's bytes."""
    return claim.device == claim.source or loops.be_kept(claim.device, claim.source)
