"""Linux storage: loop devices, filesystems, mounts, and who uses a device.

Knows no pod, no volume and no gRPC. Every call that can wait takes a `Deadline`.
"""

from blockdev import (
    blankness,
    durable,
    exclusivity,
    filesystems,
    holders,
    ioctls,
    loops,
    mounts,
    nfs,
    quotas,
    sparse,
    superblocks,
    trees,
)
from blockdev.deadlines import Deadline
from blockdev.errors import (
    BlockdevError,
    CapabilityMissing,
    CommandFailed,
    CommandMissing,
    DeviceBusy,
    FilesystemDamaged,
    Holder,
    MountFailed,
    NotBlank,
    NotRemoved,
    WaitExpired,
    WrongFilesystem,
)

__all__ = [
    "BlockdevError",
    "CapabilityMissing",
    "CommandFailed",
    "CommandMissing",
    "Deadline",
    "DeviceBusy",
    "FilesystemDamaged",
    "Holder",
    "MountFailed",
    "NotBlank",
    "NotRemoved",
    "WaitExpired",
    "WrongFilesystem",
    "blankness",
    "durable",
    "exclusivity",
    "filesystems",
    "holders",
    "ioctls",
    "loops",
    "mounts",
    "nfs",
    "quotas",
    "sparse",
    "superblocks",
    "trees",
]
