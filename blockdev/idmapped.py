"""Whether a mount can be had with other users and groups, as a runtime has it for a pod with a user namespace.

mount_setattr(2) with MOUNT_ATTR_IDMAP (Linux 5.12). Each filesystem says in the kernel whether it can (FS_ALLOW_IDMAP):
ext4 and XFS since 5.12, tmpfs since 6.3, the NFS client not. No table of the kernel's tells, so it is tried on a copy
of the mount that hangs nowhere. The namespace takes a process of its own.
"""

from __future__ import annotations

import errno
import os

from blockdev import isolated
from blockdev.deadlines import Deadline

_PROGRAM = os.path.join(os.path.dirname(__file__), "idmap_probe.py")
_PATIENCE = 5.0


def is_possible(directory: int, deadline: Deadline) -> bool:
    """For the mount that a descriptor of a directory is of. True where it cannot be tried: the runtime will say so."""
    limit = Deadline.after(min(_PATIENCE, deadline.remaining()))
    try:
        isolated.run(_PROGRAM, str(directory), what="trying an idmapped mount", deadline=limit, keep=[directory])
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
