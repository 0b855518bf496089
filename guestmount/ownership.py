"""Who may have a volume next: the claim and the kernel together.

`admit` judges by the record, `acquire` asks the kernel before a new owner is written, `release` asks it before an
old one is forgotten.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from blockdev import Deadline, DeviceBusy, exclusivity, loops, mountinfo, mounts
from guestmount.claims import HOST, SANDBOX, Cell, Claim, Owner, Target
from guestmount.errors import Refused
from volumes import AccessMode

log = logging.getLogger("runvol.ownership")


def admit_files(claim: Claim, path: str) -> None:
    """Refused if a volume of files may not have another target: only ReadWriteOncePod says so."""
    others = [at for at in claim.targets if at != path]
    if others and claim.use.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
        raise Refused(
            f"volume {claim.volume} has access mode SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) and is published to "
            f"{_names(claim)} already"
        )


def admit(claim: Claim, owner: Owner, path: str, target: Target) -> None:
    """Refused, with the holder's name, if `owner` may not have the volume (too) at `path`."""
    current = claim.owner
    if current is None or path in claim.targets:
        return
    mode = claim.use.access_mode
    if claim.use.raw and mode.is_shared and current.kind == owner.kind:
        return
    if mode is AccessMode.SINGLE_NODE_SINGLE_WRITER and claim.targets:
        raise Refused(
            f"volume {claim.volume} has access mode SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) and is published to "
            f"{_names(claim)} already"
        )
    if current.is_same_kernel(owner):
        return
    if current.kind == HOST:
        raise Refused(
            f"volume {claim.volume} is mounted by the host's kernel for {_names(claim)}; {owner} can have it once no "
            "runc pod of this node uses it"
        )
    raise Refused(
        f"volume {claim.volume} belongs to the guest of {current}; a block volume has one kernel at a time, so "
        f"{target.pod if owner.kind == HOST else owner} has to wait until that pod is gone (a Deployment needs "
        "strategy Recreate, or maxSurge 0)"
    )


def _names(claim: Claim) -> str:
    return ", ".join(sorted({f"pod {target.pod}" for target in claim.targets.values()})) or str(claim.owner)


def acquire(claim: Claim, deadline: Deadline) -> None:
    """The kernel agrees that nobody has the volume; DeviceBusy with the holder otherwise.

    A loop device that a killed process left, mounted nowhere, is taken away first.
    """
    try:
        exclusivity.prove_free(claim.source, past_known=claim.proved)
    except DeviceBusy:
        if not drop_leftovers(claim.source, deadline):
            raise
        exclusivity.prove_free(claim.source, past_known=False)


def drop_leftovers(source: str, deadline: Deadline) -> bool:
    """Detach loop devices that stand on the file and that nobody uses; whether there were any.

    One whose node is bound somewhere is a pod's (volumeMode: Block), who may open it at any moment.
    """
    dropped = False
    for device in loops.find(source):
        if exclusivity.is_free(device) and not mountinfo.node_targets(device):
            loops.detach(device, source, deadline)
            log.warning("detached a loop device that nobody used", extra={"device": device, "source": source})
            dropped = True
    return dropped


def forget_vanished(cell: Cell, alive: Callable[[str], bool]) -> None:
    """Drop targets of pods that are gone without an unpublish: nothing of theirs is left on the node."""
    claim = cell.claim
    if claim is None:
        return
    gone = [path for path in claim.targets if not alive(path)]
    if gone:
        log.warning("targets vanished without an unpublish", extra={"volume": claim.volume, "targets": gone})
        cell.write(claim.but(targets={path: kept for path, kept in claim.targets.items() if path not in gone}))


def release(cell: Cell, deadline: Deadline) -> None:
    """Forget an owner without targets; DeviceBusy, with the claim as it was, while the kernel disagrees."""
    claim = cell.claim
    if claim is None or claim.owner is None or claim.targets:
        return
    if claim.owner.kind == HOST and not claim.use.raw:
        mounts.be_unmounted(claim.staging_path, deadline)
    if not os.path.exists(claim.source):
        cell.write(claim.but(owner=None, prepared=False, proved=False, device=""))
        return
    if claim.device:
        if claim.owner.kind == SANDBOX:
            exclusivity.prove_free(claim.device, past_known=False)
        loops.detach(claim.device, claim.source, deadline)
    try:
        exclusivity.prove_free(claim.source, past_known=False)
    except DeviceBusy:
        if not drop_leftovers(claim.source, deadline):
            raise
        exclusivity.prove_free(claim.source, past_known=False)
    cell.write(claim.but(owner=None, prepared=False, proved=True, device=""))


def guest_has_let_go(claim: Claim) -> None:
    """DeviceBusy while a guest's VMM has the volume open."""
    exclusivity.prove_free(claim.device or claim.source, past_known=False)
