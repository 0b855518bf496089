"""The block node of a volume, where a way needs one: the volume itself, or a loop device on its file."""

from __future__ import annotations

from blockdev import Deadline, ioctls, loops
from guestmount.claims import Cell, Claim


def be_attached(cell: Cell, claim: Claim, deadline: Deadline, *, read_only: bool = False) -> Claim:
    """A loop device stands on the volume's file, and the claim names it."""
    if ioctls.is_block(claim.source):
        return claim if claim.device == claim.source else cell.write(claim.but(device=claim.source))
    if claim.device and loops.be_kept(claim.device, claim.source):
        return claim
    device = loops.attach(claim.source, deadline=deadline, read_only=read_only)
    return cell.write(claim.but(device=device))


def is_ours(claim: Claim) -> bool:
    """Whether the claim's device still stands on the volume's bytes."""
    return claim.device == claim.source or loops.be_kept(claim.device, claim.source)
