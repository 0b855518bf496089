"""What a request, a claim and a hand-off say of one volume: one made from the other, and compared where they meet."""

from __future__ import annotations

import dataclasses

import msgspec

from blockdev import mounts, nfs
from guestmount.claims import HOST, SANDBOX, Cell, Claim, NfsMount, Owner, Target, Use
from guestmount.detect import Runtime
from guestmount.errors import BadRequest, Conflict, Refused
from guestmount.handoff import Delivery, NfsDelivery
from guestmount.requests import PublishRequest, StageRequest, exists
from volumes import NfsSource, Source, VolumeKind


def present(cell: Cell) -> Claim:
    """The claim of a volume that must have one."""
    if cell.claim is None:
        raise Refused("the volume's claim has vanished; stage the volume again")
    return cell.claim


def new_claim(request: StageRequest, source: Source, use: Use, kind: VolumeKind) -> Claim:
    """The record of a volume that is staged here for the first time."""
    mount, name = None, source.path
    if isinstance(source, NfsSource):
        mount = NfsMount(server=source.server, path=source.path, version=source.version, options=source.options)
        name = mount.export.source
    return Claim(
        volume=request.volume_id, source=name, staging_path=request.staging_path, use=use, kind=kind, nfs=mount
    )


def with_version(source: NfsSource, use: Use, named: str) -> tuple[NfsSource, Use]:
    """An NFS version that stands among the mount options, as mount(8) takes it, becomes the mount's."""
    asked, flags = nfs.version_among(use.mount_flags)
    if not asked:
        return source, use
    if named and named != asked:
        raise BadRequest("mount_flags", f"vers={asked}", f"contradicts the volume's parameter vers = {named}")
    return dataclasses.replace(source, version=asked), msgspec.structs.replace(use, mount_flags=flags)


def other_export(claim: Claim, source: Source) -> bool:
    """Whether the claim is of another export than `source`, or of the same in another version or with other options."""
    if claim.nfs is None or not isinstance(source, NfsSource):
        return False
    old = claim.nfs
    return (old.server, old.path, old.version, old.options) != (
        source.server, source.path, source.version, source.options,
    )  # fmt: skip


def in_version_of(claim: Claim, source: NfsSource) -> NfsSource:
    """The same export in the version that the claim was staged with."""
    return source if claim.nfs is None else dataclasses.replace(source, version=claim.nfs.version)


def check_same_export(claim: Claim, source: Source, before: Source | None) -> None:
    """Conflict where the volume's context speaks of another export than the one that its pods have."""
    if claim.nfs is None or not isinstance(source, NfsSource) or not other_export(claim, source):
        return
    if before is not None and not other_export(claim, before):
        return
    asked = NfsMount(server=source.server, path=source.path, version=source.version, options=source.options)
    raise Conflict(
        f"volume {claim.volume} is {_export_words(claim.nfs)} on this node, asked for is {_export_words(asked)}; "
        "unpublish its pods and stage it again, or give the other export a volumeHandle of its own"
    )


def _export_words(mount: NfsMount) -> str:
    options = f", options {','.join(mount.options)}" if mount.options else ""
    return f"{mount.export.source} (NFS {mount.version}{options})"


def check_same_stage(claim: Claim, staging: str, use: Use) -> None:
    """Refused, or Conflict, where the volume is staged already at another path or as something else."""
    if claim.staging_path != staging:
        raise Refused(f"volume {claim.volume} is staged at {claim.staging_path}; unstage it there first")
    if (claim.use.raw, claim.use.fstype, claim.use.mode, claim.use.mount_flags) != (
        use.raw,
        use.fstype,
        use.mode,
        use.mount_flags,
    ):
        raise Conflict(
            f"volume {claim.volume} is staged at {staging} with another capability ({_words(claim.use)}, asked for is "
            f"{_words(use)}); unstage it first"
        )


def _words(use: Use) -> str:
    kind = "raw block" if use.raw else f"filesystem {use.fstype}, options [{len(use.mount_flags)}]"
    return f"{use.access_mode}, {kind}"


def check_same_publish(claim: Claim, request: PublishRequest, old: Target | None, new: Target) -> None:
    """Conflict where the volume is staged, or published at this target, as something else."""
    capability = request.capability
    same_fstype = claim.kind is VolumeKind.FILES or capability.fstype in ("", claim.use.fstype)
    same = capability.raw == claim.use.raw and same_fstype
    if not same or capability.mode.value != claim.use.mode:
        raise Conflict(
            f"volume {claim.volume} is staged as {_words(claim.use)}; it cannot be published with another capability"
        )
    if old is not None and (old.read_only, old.mount_group) != (new.read_only, new.mount_group):
        raise Conflict(
            f"volume {claim.volume} is published at {request.target} with readonly = {old.read_only} and mount group "
            f"{old.mount_group!r} already; unpublish it first"
        )
    if old is None and exists(request.target) and mounts.is_mount_point(request.target):
        raise Conflict(f"something else is mounted at {request.target}; unmount it first")


def target_of(request: PublishRequest) -> Target:
    """One publish, as the claim keeps it."""
    return Target(
        read_only=request.wants_read_only,
        pod_uid=request.pod_uid,
        pod_namespace=request.pod.namespace,
        pod_name=request.pod.name,
        mount_group=request.capability.mount_group,
    )


def owner_of(request: PublishRequest, runtime: Runtime) -> Owner:
    """The kernel that a publish is for."""
    if runtime.kind == HOST:
        return Owner(kind=HOST, handler=runtime.handler)
    return Owner(
        kind=SANDBOX,
        pod_uid=request.pod_uid,
        pod_namespace=request.pod.namespace,
        pod_name=request.pod.name,
        handler=runtime.handler,
        dialect=runtime.dialect,
    )


def delivery_of(claim: Claim, path: str, target: Target) -> Delivery:
    """The block volume of a claim on its way to the guest that has this target."""
    return Delivery(
        volume_id=claim.volume,
        target=path,
        device=claim.device or claim.source,
        fstype=claim.use.fstype,
        options=claim.use.mount_flags,
        read_only=target.read_only,
    )


def export_of(claim: Claim, path: str, target: Target) -> NfsDelivery:
    """The export of a claim on its way to the guest that has this target."""
    if claim.nfs is None:
        raise Refused(f"volume {claim.volume} is no NFS export")
    return NfsDelivery(
        volume_id=claim.volume,
        target=path,
        server=claim.nfs.server,
        path=claim.nfs.path,
        version=claim.nfs.version,
        options=(*claim.nfs.options, *(flag for flag in claim.use.mount_flags if flag not in ("ro", "rw", "defaults"))),
        read_only=target.read_only,
    )
