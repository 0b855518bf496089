"""What a request and a claim say of one volume, compared where they meet."""

from __future__ import annotations

import msgspec

from blockdev import selinux
from guestmount.claims import Claim, Target, Use
from guestmount.errors import Conflict, Refused
from guestmount.requests import PublishRequest


def check_same_stage(claim: Claim, staging: str, use: Use) -> None:
    """Refused, or Conflict, where the volume is staged already at another path or as something else."""
    if claim.staging_path != staging:
        raise Refused(f"volume {claim.volume} is staged at {claim.staging_path}; unstage it there first")
    _check_label(claim, selinux.context_of(use.mount_flags))
    if claim.use != use:
        raise Conflict(
            f"volume {claim.volume} is staged at {staging} with another capability ({claim.use}, asked for is {use}); "
            "unstage it first"
        )


def check_same_label(claim: Claim, request: PublishRequest) -> None:
    """Conflict where the host's kernel has the volume, or will have it, with another label than this pod's."""
    _check_label(claim, selinux.context_of(request.capability.mount_flags))


def _check_label(claim: Claim, asked: str) -> None:
    """kubelet waits for the end of the pods that have another one, and stages the volume again then."""
    has = selinux.context_of(claim.use.mount_flags)
    if asked and asked != has:
        pods = ", ".join(sorted({f"pod {target.pod}" for target in claim.targets.values()})) or "no pod has it now"
        staged = f"with the SELinux label {has}" if has else "without an SELinux label"
        raise Conflict(
            f"volume {claim.volume} is staged {staged}, asked for is {asked}, and a mounted filesystem has one: it can "
            f"have that once nobody uses it here ({pods}) and it is staged again"
        )


def check_same_publish(claim: Claim, request: PublishRequest, old: Target | None, new: Target) -> None:
    """Conflict where the volume is staged, or published at this target, as something else."""
    if not claim.use.serves(request.capability):
        raise Conflict(
            f"volume {claim.volume} is staged as {claim.use}; it cannot be published with another capability"
        )
    if old is not None and (old.read_only, old.mount_group) != (new.read_only, new.mount_group):
        raise Conflict(
            f"volume {claim.volume} is published at {request.target} with readonly = {old.read_only} and mount group "
            f"{old.mount_group!r} already; unpublish it first"
        )


def filled_in(claim: Claim, path: str, request: PublishRequest, target: Target, *, sure: bool) -> Claim:
    """A claim that was made again, with what kubelet says of a pod of its when it repeats the publish.

    `sure`: that it only reads was seen. A mount is read-only as well where its whole filesystem is.
    """
    old = claim.targets[path]
    read_only = old.read_only if sure or not old.read_only else target.read_only
    known = msgspec.structs.replace(target, read_only=read_only, way=old.way, group_in_guest=old.group_in_guest,
                                    shim=old.shim, on_node=old.on_node)  # fmt: skip
    owner = claim.owner
    if owner is not None and owner.pod_uid == request.pod_uid and not owner.pod_name:  # the host's has no pod
        owner = msgspec.structs.replace(owner, pod_namespace=request.pod.namespace, pod_name=request.pod.name)
    return claim.but(targets={**claim.targets, path: known}, owner=owner, made_again=False)


def target_of(request: PublishRequest) -> Target:
    """One publish, as the claim keeps it."""
    return Target(
        read_only=request.wants_read_only,
        pod_uid=request.pod_uid,
        pod_namespace=request.pod.namespace,
        pod_name=request.pod.name,
        mount_group=request.capability.mount_group,
    )
