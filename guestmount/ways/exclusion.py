"""Who may have a volume next: the claim and the kernel together.

`admit` judges by the record, `acquire` asks the kernel before a new owner is written, `release` asks it before an
old one is forgotten. `OneKernel` is what the ways of a block volume have in common, `AnyKernel` those of files.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator

import msgspec

from blockdev import Deadline, DeviceBusy, exclusivity, ioctls, loops, mountinfo, mounts
from guestmount.claims import HOST, SANDBOX, UNKNOWN, Cell, Claim, Owner, Target
from guestmount.errors import Refused
from guestmount.handoff import Delivered
from guestmount.ways.base import Arrival, Means
from volumes import AccessMode

log = logging.getLogger("runvol.exclusion")


class OneKernel:
    """A block volume belongs to the host's kernel or to one guest's."""

    # Whether the kernels of one kind may have it together, where the access mode says so.
    shareable = False
    hands_over = False

    def admit(self, cell: Cell, arrival: Arrival, deadline: Deadline) -> Claim:
        """The claim with its owner, new or as it was; whoever lingered and is another kernel has let go."""
        claim, owner = cell.present, owner_of(arrival)
        if claim.lingers and claim.owner is not None and not claim.owner.is_same_kernel(owner):
            with explained(claim):
                release(cell, deadline)
            claim = cell.present
        admit(claim, owner, arrival.path, arrival.target, shareable=self.shareable)
        if claim.owner is None:
            acquire(claim, deadline)
            claim = claim.but(owner=owner, prepared=False, proved=False)
        return claim

    def prepare(self, _means: Means, claim: Claim, _target: Target, _deadline: Deadline) -> Claim:
        return claim

    def holds(self, claim: Claim) -> bool:
        return claim.owner is not None

    def keeps(self, _path: str) -> bool:
        return True

    def take_back(self, _claim: Claim, _path: str) -> None:
        """The unmount is all; the staging path goes with the owner."""


def owner_of(arrival: Arrival) -> Owner:
    """The kernel that the target is for."""
    if arrival.runtime.kind == HOST:
        return Owner(kind=HOST, handler=arrival.runtime.handler)
    request = arrival.request
    return Owner(
        kind=SANDBOX,
        pod_uid=request.pod_uid,
        pod_namespace=request.pod.namespace,
        pod_name=request.pod.name,
        handler=arrival.runtime.handler,
        dialect=arrival.runtime.dialect,
    )


def is_unknown(claim: Claim) -> bool:
    """Whether a kernel has the volume of which the lost record alone knew."""
    return claim.owner is not None and claim.owner.kind == UNKNOWN


class AnyKernel:
    """Any number of kernels may have a volume of files; each target names its handler."""

    hands_over = False

    def admit(self, cell: Cell, arrival: Arrival, _deadline: Deadline) -> Claim:
        """Refused only where ReadWriteOncePod says so."""
        claim = cell.present
        others = [at for at in claim.targets if at != arrival.path]
        if others and claim.use.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
            raise Refused(_once(claim))
        return claim

    def prepare(self, _means: Means, claim: Claim, _target: Target, _deadline: Deadline) -> Claim:
        return claim

    def holds(self, _claim: Claim) -> bool:
        return True

    def keeps(self, path: str) -> bool:
        return mounts.in_table(path)


def with_handler(arrival: Arrival, *, dialect: str = "") -> Target:
    """A target of a volume without an owner: it says itself what its pod's runtime is."""
    return msgspec.structs.replace(arrival.target, handler=arrival.runtime.handler, dialect=dialect)


def in_guest(claim: Claim) -> bool:
    """Whether a sandbox has a target of the volume, and so may write to it at any moment."""
    return claim.owner is not None and claim.owner.kind != HOST and bool(claim.targets)


@contextlib.contextmanager
def explained(claim: Claim) -> Iterator[None]:
    """DeviceBusy, told as what it means for the volume."""
    try:
        yield
    except DeviceBusy as error:
        by = f"held by {', '.join(map(str, error.holders))}; " if error.holders else ""
        who = f"the guest of {claim.owner}" if claim.owner is not None and claim.owner.kind != HOST else "a process"
        raise Refused(
            f"volume {claim.volume} is in use: {who} still has it open ({by}{error.path}: {error.why}). It is free "
            "again when that process ends"
        ) from error


def admit(claim: Claim, owner: Owner, path: str, target: Target, *, shareable: bool) -> None:
    """Refused, with the holder's name, if `owner` may not have the volume (too) at `path`."""
    current = claim.owner
    if current is None or path in claim.targets:
        return
    mode = claim.use.access_mode
    if shareable and mode.is_shared and current.kind == owner.kind:
        return
    if mode is AccessMode.SINGLE_NODE_SINGLE_WRITER and claim.targets:
        raise Refused(_once(claim))
    if current.is_same_kernel(owner):
        return
    if current.kind == HOST:
        raise Refused(
            f"volume {claim.volume} is mounted by the host's kernel for {_names(claim)}; {owner} can have it once no "
            "runc pod of this node uses it"
        )
    has, wants = str(current), f"pod {target.pod}" if owner.kind == HOST else str(owner)
    if current.kind == UNKNOWN:
        raise Refused(
            f"volume {claim.volume} belongs to {has}; {wants} can have it once that pod is gone, or kubelet has "
            "repeated its NodePublishVolume (as it does when it starts)"
        )
    if current.pod_name and (current.pod_namespace, current.pod_name) == (target.pod_namespace, target.pod_name):
        # A pod that was made again keeps its name (a StatefulSet's).
        has, wants = f"{has} with the uid {current.pod_uid}", f"the pod of that name with the uid {target.pod_uid}"
    raise Refused(
        f"volume {claim.volume} belongs to the guest of {has}; a block volume has one kernel at a time, so {wants} has "
        "to wait until that pod is gone (a Deployment needs strategy Recreate, or maxSurge 0)"
    )


def _once(claim: Claim) -> str:
    return (
        f"volume {claim.volume} has access mode SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) and is published to "
        f"{_names(claim)} already"
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


def check_not_handed(claim: Claim, handed: Iterable[Delivered]) -> None:
    """Refused where a hand-off that still stands names the volume's device, whatever was lost of its claim."""
    facts = os.stat(claim.source)
    for one in handed:
        if not os.path.lexists(one.target):
            continue
        try:
            there = os.stat(one.device)
        except OSError:
            continue
        same = (there.st_rdev == facts.st_rdev) if ioctls.is_block(claim.source) else os.path.samestat(there, facts)
        if same or loops.stands_on(one.device, claim.source):
            raise Refused(
                f"volume {claim.volume} is handed to the guest of the pod at {one.target}, which may take it at any "
                "moment; it is free once that pod is gone"
            )


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
        cell.less(claim.but(targets={path: kept for path, kept in claim.targets.items() if path not in gone}))


def release(cell: Cell, deadline: Deadline) -> None:
    """Forget an owner without targets; DeviceBusy, with the claim as it was, while the kernel disagrees."""
    claim = cell.claim
    if claim is None or claim.owner is None or claim.targets:
        return
    if claim.owner.kind == HOST and not claim.use.raw:
        mounts.be_unmounted(claim.staging_path, deadline)
    if not os.path.exists(claim.source):
        cell.less(claim.but(owner=None, prepared=False, proved=False, device="", handed_out=False))
        return
    if claim.device:
        if claim.owner.kind != HOST:
            exclusivity.prove_free(claim.device, past_known=False)
        loops.detach(claim.device, claim.source, deadline)
    try:
        exclusivity.prove_free(claim.source, past_known=False)
    except DeviceBusy:
        if not drop_leftovers(claim.source, deadline):
            raise
        exclusivity.prove_free(claim.source, past_known=False)
    cell.less(claim.but(owner=None, prepared=False, proved=True, device="", handed_out=False))


def guest_has_let_go(claim: Claim) -> None:
    """DeviceBusy while a guest's VMM has the volume open."""
    exclusivity.prove_free(claim.device or claim.source, past_known=False)
