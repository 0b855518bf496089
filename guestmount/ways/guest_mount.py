"""An NFS export that a guest mounts itself: a placeholder stands at the target, a hand-off says what to mount."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import msgspec

from blockdev import Deadline, mounts, nfs, selinux
from blockdev.errors import FilesystemUnknown
from guestmount import placeholder, preflight
from guestmount.claims import Cell, Claim, Target
from guestmount.errors import Refused
from guestmount.handoff import Delivered, KataDialect, NfsDelivery
from guestmount.ways.attached import check_nothing_at
from guestmount.ways.base import Arrival, Means, Problem, Usage, of_mount
from guestmount.ways.exclusion import AnyKernel, with_handler
from guestmount.ways.guest_device import no_placeholder
from guestmount.ways.shared import let_go
from volumes import SizeRange
from volumes.backend import Backend


class GuestMount(AnyKernel):
    """The host has no mount of it for this pod, though it may have one for others."""

    name = "guest-mount"

    def check(self, means: Means, claim: Claim, arrival: Arrival, deadline: Deadline) -> tuple[Claim, Target]:
        check_nothing_at(claim, arrival.path, placeholder=True)
        runtime = arrival.runtime
        preflight.check_users(runtime)  # first: nothing that the others ask for would help
        means.dialects.of(runtime.dialect, runtime.handler).check_nfs(_delivery(claim, arrival.path, arrival.target))
        preflight.check_mounts(runtime, pv_name=claim.volume)
        mount = claim.nfs
        if mount is not None and arrival.request.context.get("probe", "host") == "host":
            # Said here in words; a guest that waits for a dead server says nothing for minutes.
            port = nfs.port_among([*mount.options, *claim.use.mount_flags])
            nfs.probe(mount.server, nfs.resolve(mount.server, deadline), mount.version, deadline, port=port)
        if mount is not None and runtime.dialect == KataDialect.name:
            preflight.check_guest_nfs(runtime, mount.version, pv_name=claim.volume)
            # No helper runs in the guest, so what it would find out is found out here.
            address = nfs.resolve(mount.server, deadline)
            port = nfs.mountd_port(mount.server, address, deadline) if mount.version == "3" else 0
            claim = claim.but(nfs=msgspec.structs.replace(mount, address=address, mount_port=port))
        return claim, with_handler(arrival, dialect=runtime.dialect)

    def deliver(self, means: Means, _cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        if (group := claim.group_of(target)) and not mounts.in_table(path):
            _give(means, claim, group, deadline)
        os.makedirs(path, mode=0o750, exist_ok=True)
        placeholder.be_placed(path, deadline, label=selinux.context_of(claim.use.mount_flags))
        means.dialects.of(target.dialect, target.handler).deliver_nfs(_delivery(claim, path, target))

    def take_back(self, claim: Claim, path: str) -> None:
        let_go(claim, path)

    def expand(
        self, _means: Means, cell: Cell, backend: Backend, size: SizeRange, _deadline: Deadline
    ) -> int | None:  # fmt: skip
        return backend.expand(cell.present.volume, size).capacity_bytes

    def usage(self, _claim: Claim, path: str, deadline: Deadline) -> Usage:
        return of_mount(path, deadline)

    def problems(self, _claim: Claim, path: str, _handed: Mapping[str, Delivered]) -> list[Problem]:
        return no_placeholder(path)


def _give(means: Means, claim: Claim, group: str, deadline: Deadline) -> None:
    """The files belong to the pod's group before its guest mounts them: no guest does that. The host mounts the export
    for that long, where nobody sees it. VolumeUnfinished while it goes on; Refused where the host cannot."""
    if claim.nfs is None:
        return
    export = dataclasses.replace(claim.nfs.export, options=_options(claim))
    try:
        with nfs.opened(export, deadline) as root:
            means.giving.files(claim.volume, root, group, deadline)
    except (nfs.ServerSilent, FilesystemUnknown) as error:
        raise Refused(
            f"volume {claim.volume}: its files cannot be given to the pod's group {group}, which this node does before "
            f"a guest mounts them ({error}); leave fsGroup out, or let this node reach the server"
        ) from error


def is_of_kata(claim: Claim, target: Target) -> bool:
    """Whether a Kata guest mounts the target's export when its container is created."""
    return claim.nfs is not None and target.dialect == KataDialect.name


def _options(claim: Claim) -> tuple[str, ...]:
    """Those of the export and of the stage. No label of the host's: nobody sees its own mount, and a guest has a policy
    of its own."""
    nfs_options = claim.nfs.options if claim.nfs is not None else ()
    return selinux.without((*nfs_options, *claim.use.mount_flags))


def _delivery(claim: Claim, path: str, target: Target) -> NfsDelivery:
    if claim.nfs is None:
        raise Refused(f"volume {claim.volume} is no NFS export")
    return NfsDelivery(
        volume_id=claim.volume,
        target=path,
        server=claim.nfs.server,
        path=claim.nfs.path,
        version=claim.nfs.version,
        options=tuple(option for option in _options(claim) if option not in ("ro", "rw", "defaults")),
        read_only=target.read_only,
    )
