"""Short work on a volume whose hand-off stands: no container can take it meanwhile.

A runtime plugs the device in for each container, from the hand-off, asking nobody. So the hand-off is replaced, whole,
by one whose device does not exist: a container that comes is refused and tried again. Without any it would start on the
placeholder and keep it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from blockdev import Deadline
from guestmount.claims import Claim
from guestmount.handoff import Closing, Delivery
from guestmount.kata_config import GO
from guestmount.ways import exclusion
from guestmount.ways.base import Means

log = logging.getLogger("runvol.closing")


def obstacle(means: Means, claim: Claim, deadline: Deadline) -> str:
    """Why the host must not work on a volume that a sandbox has, in words; empty where no sandbox of its pod lives."""
    owner = claim.owner
    if owner is None:
        return ""
    if not isinstance(means.dialects.of(owner.dialect, owner.handler), Closing):
        return f"a hand-off of the dialect {owner.dialect!r} cannot be closed meanwhile"
    if means.rust_shared_block and any(target.shim != GO for target in claim.targets.values()):
        # A creation that fails and is repeated gives Kata's Rust shim a second disk for what a sibling writes to.
        return 'kata.rust_shared_block is "allow", and a container that is refused meanwhile could hurt another one'
    return living(means, claim, deadline)


def living(means: Means, claim: Claim, deadline: Deadline) -> str:
    """Why a sandbox that has the volume may live, in words."""
    return means.sandboxes.doubt({target.pod_uid for target in claim.targets.values()}, deadline)


def close(means: Means, claim: Claim, deliveries: Sequence[Delivery], deadline: Deadline) -> str:
    """No container gets the volume from now on, until its targets are delivered again; an obstacle that has come about
    meanwhile, in words. DeviceBusy while somebody has the device open."""
    owner = claim.owner
    dialect = means.dialects.of(owner.dialect, owner.handler) if owner is not None else None
    if isinstance(dialect, Closing):
        for delivery in deliveries:
            dialect.close(delivery)
    log.info("a hand-off is closed for a while", extra={"volume": claim.volume, "targets": sorted(claim.targets)})
    # Only now: whoever read the hand-off before it was closed has a sandbox that is listed.
    found = obstacle(means, claim, deadline)
    if not found:
        exclusion.guest_has_let_go(claim)
    return found
