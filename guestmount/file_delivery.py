"""A volume of files for any pod: a directory of the node, or an NFS mount, bound to the target.

For a runc pod that is the volume. For a sandbox the runtime shares what is bound there into the guest, by virtio-fs;
`preflight` has refused a runtime that would do it by 9p, or not at all.
"""

from __future__ import annotations

import dataclasses
import os

from blockdev import Deadline, mounts, nfs
from guestmount import groups
from guestmount.claims import Claim, Target


def bind(claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
    """The directory hangs at `path`; nothing happens if it does already."""
    source = claim.source if claim.nfs is None else _mounted(claim, deadline)
    if mounts.in_table(path):
        return
    if target.mount_group and not target.read_only:
        root = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            groups.apply(root, int(target.mount_group), deadline)
        finally:
            os.close(root)
    os.makedirs(path, mode=0o750, exist_ok=True)
    mounts.bind(source, path, read_only=target.read_only)


def _mounted(claim: Claim, deadline: Deadline) -> str:
    """The export is mounted once for the volume, at its staging path."""
    if claim.nfs is not None and not mounts.in_table(claim.staging_path):
        os.makedirs(claim.staging_path, mode=0o750, exist_ok=True)
        export = dataclasses.replace(claim.nfs.export, options=(*claim.nfs.options, *claim.use.mount_flags))
        nfs.mount(export, claim.staging_path, deadline)
    return claim.staging_path


def take_back(claim: Claim, path: str) -> None:
    """Nothing hangs at `path`, nor at the staging path once nobody else needs it; a dead server is not waited for."""
    mounts.be_let_go(path)
    if claim.nfs is not None and not [at for at in claim.targets if at != path]:
        mounts.be_let_go(claim.staging_path)
