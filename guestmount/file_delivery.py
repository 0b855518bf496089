"""A volume of files for any pod: a directory of the node, bound to the target.

For a runc pod that is the volume. For a sandbox the runtime shares what is bound there into the guest, by virtio-fs;
`preflight` has refused a runtime that would do it by 9p, or not at all.
"""

from __future__ import annotations

import os

from blockdev import Deadline, mounts
from guestmount import groups
from guestmount.claims import Claim, Target


def bind(claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
    """The directory hangs at `path`; nothing happens if it does already."""
    if target.mount_group and not target.read_only:
        root = os.open(claim.source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            groups.apply(root, int(target.mount_group), deadline)
        finally:
            os.close(root)
    if not mounts.is_mount_point(path):
        os.makedirs(path, mode=0o750, exist_ok=True)
        mounts.bind(claim.source, path, read_only=target.read_only)
