"""What a volume is and where its bytes live: one module a backend. Knows blockdev, and nothing of pods."""

from volumes import parameters
from volumes.catalog import Catalog
from volumes.errors import (
    InvalidParameter,
    NoSpace,
    SizeNotAllowed,
    StoreFailed,
    VolumeConflict,
    VolumeError,
    VolumeNotFound,
    VolumeUnfinished,
)
from volumes.model import (
    VOLUME_ID,
    AccessMode,
    BlockSource,
    Capability,
    ContentSource,
    SizeRange,
    Snapshot,
    SnapshotGroup,
    Volume,
)

__all__ = [
    "VOLUME_ID",
    "AccessMode",
    "BlockSource",
    "Capability",
    "Catalog",
    "ContentSource",
    "InvalidParameter",
    "NoSpace",
    "SizeNotAllowed",
    "SizeRange",
    "Snapshot",
    "SnapshotGroup",
    "StoreFailed",
    "Volume",
    "VolumeConflict",
    "VolumeError",
    "VolumeNotFound",
    "VolumeUnfinished",
    "parameters",
]
