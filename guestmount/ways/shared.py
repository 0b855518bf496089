"""A volume of files of which the host has a mount: a directory of the node, or an NFS mount, bound to the target.

For a runc pod that is the volume. For a sandbox the runtime shares what is bound there into the guest, by virtio-fs; a
runtime that would do it by 9p, or not at all, is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping

from blockdev import Deadline, beneath, idmapped, mountinfo, mounts, nfs, selinux, syscalls
from guestmount import agreement, preflight
from guestmount.claims import SANDBOX, Cell, Claim, Target
from guestmount.errors import Refused
from guestmount.handoff import Delivered
from guestmount.ways import servers
from guestmount.ways.base import Arrival, Means, Problem, Usage
from guestmount.ways.exclusion import AnyKernel, with_handler
from guestmount.ways.mounted import nothing_mounted
from volumes import SizeRange
from volumes.backend import Backend
from volumes.registry import BY_PATH


class Shared(AnyKernel):
    """What is bound at the target is the volume; a sandbox's runtime shares it from there."""

    name = "shared"

    def check(self, _means: Means, claim: Claim, arrival: Arrival, deadline: Deadline) -> tuple[Claim, Target]:
        if arrival.runtime.kind == SANDBOX:
            preflight.check_share(arrival.runtime, pv_name=claim.volume)
        else:
            agreement.check_same_label(claim, arrival.request)
        _check_users(claim, arrival, deadline)
        return claim, with_handler(arrival)

    def deliver(self, means: Means, _cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        _bind(means, claim, path, target, deadline)

    def take_back(self, claim: Claim, path: str) -> None:
        let_go(claim, path)

    def expand(
        self, _means: Means, cell: Cell, backend: Backend, size: SizeRange, _deadline: Deadline
    ) -> int | None:  # fmt: skip
        return backend.expand(cell.present.volume, size).capacity_bytes

    def usage(self, claim: Claim, path: str, deadline: Deadline) -> Usage:
        return servers.usage(claim, path, deadline)

    def problems(self, claim: Claim, path: str, _handed: Mapping[str, Delivered]) -> list[Problem]:
        return nothing_mounted(path) or servers.problems(claim, path)


def _check_users(claim: Claim, arrival: Arrival, deadline: Deadline) -> None:
    """Refused for a pod with a user namespace where nothing can map the volume's owners for it."""
    preflight.check_users(arrival.runtime)
    pod = arrival.runtime.pod
    if pod is None or pod.host_users:
        return
    if claim.nfs is not None:
        raise Refused(preflight.unmapped(claim.volume, "an NFS export, and the kernel's NFS client"))
    with _opened(claim) as source:
        if idmapped.is_possible(source, deadline):
            return
    found = mountinfo.covering(claim.source, mountinfo.table())
    kind = found.fstype if found is not None else "a filesystem of this node"
    raise Refused(preflight.unmapped(claim.volume, f"the directory {claim.source} on {kind}, which"))


def _bind(means: Means, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
    """The directory hangs at `path`; nothing happens if it does already, and Refused if something else does."""
    if mounts.in_table(path):
        _check_what_hangs(claim, path)
        return
    if claim.nfs is not None:
        _be_mounted(claim, path, deadline)
    with _opened(claim) as source:
        if group := claim.group_of(target):
            root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=source)
            try:
                means.giving.files(claim.volume, root, group, deadline)
            finally:
                os.close(root)
        os.makedirs(path, mode=0o750, exist_ok=True)
        mounts.bind(_place(claim), path, read_only=target.read_only, opened=source)


def _place(claim: Claim) -> str:
    return claim.source if claim.nfs is None else claim.staging_path


@contextlib.contextmanager
def _opened(claim: Claim) -> Iterator[int]:
    """A descriptor (O_PATH) of the volume's directory.

    On the way to one that a path describes pods may have changed names since the path was looked at, so no link is
    followed there; on the way to the others only an operator can have made one.
    """
    with contextlib.ExitStack() as stack:
        if claim.volume.startswith(BY_PATH):
            try:
                fd = stack.enter_context(beneath.opened(claim.source, os.O_PATH | os.O_DIRECTORY))
            except OSError as error:
                why = os.strerror(error.errno or 0)
                raise Refused(
                    f"volume {claim.volume}: {claim.source} is not the directory any more that was described ({why}); "
                    "no part of its path may be a link"
                ) from None
        else:
            fd = os.open(_place(claim), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        yield fd


def _check_what_hangs(claim: Claim, path: str) -> None:
    """Refused unless what hangs at `path` is the volume; no server is asked."""
    if claim.nfs is not None:
        mounted = {mount.target: mount for mount in mountinfo.table()}
        here, staged = mounted.get(path), mounted.get(claim.staging_path)
        same = here is not None and here.fstype.startswith("nfs")
        # Without the volume's own mount nothing tells one export from another.
        if here is not None and staged is not None:
            # Volumes of one server are one device, and their roots are all "/": the source tells them apart.
            same = (here.device, here.root, here.source) == (staged.device, staged.root, staged.source)
    else:
        facts = syscalls.statx(path)
        with _opened(claim) as source:
            meant = os.fstat(source)
        same = (*facts.device, facts.inode) == (os.major(meant.st_dev), os.minor(meant.st_dev), meant.st_ino)
    if not same:
        raise Refused(
            f"volume {claim.volume}: something else than {_place(claim)} is mounted at {path}; end the pod, or "
            "unmount it by hand"
        )


def _be_mounted(claim: Claim, path: str, deadline: Deadline) -> None:
    """The export is mounted once for the volume, at its staging path; anew where its server has lost what was mounted
    there, and nobody but `path` has it."""
    if claim.nfs is None:
        return
    if mounts.in_table(claim.staging_path) and servers.is_stale(claim.staging_path, deadline):
        others = [at for at in claim.targets if at != path]
        if others:
            raise Refused(servers.stale(claim))
        mounts.be_let_go(claim.staging_path)
    if not mounts.in_table(claim.staging_path):
        os.makedirs(claim.staging_path, mode=0o750, exist_ok=True)
        options = selinux.of_host((*claim.nfs.options, *claim.use.mount_flags))
        export = dataclasses.replace(claim.nfs.export, options=options)
        nfs.mount(export, claim.staging_path, deadline)


def let_go(claim: Claim, path: str) -> None:
    """Nothing hangs at `path`, nor at the staging path once nobody else needs it; a dead server is not waited for."""
    mounts.be_let_go(path)
    if claim.nfs is not None and not [at for at in claim.targets if at != path]:
        mounts.be_let_go(claim.staging_path)
