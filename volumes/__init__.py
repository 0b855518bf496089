"""What a volume is and where its bytes live: one module a backend. Knows blockdev, and nothing of pods."""

from volumes import parameters
from volumes.catalog import Catalog
from volumes.errors import (
    InvalidParameter,
    NoSpace,
    SizeNotAllowed,
    StoreAway,
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
    DirectorySource,
    NfsSource,
    SizeRange,
    Snapshot,
    SnapshotGroup,
    Source,
    Volume,
    VolumeKind,
    own_id,
)

__all__ = [
    "VOLUME_ID",
    "AccessMode",
    "BlockSource",
    "Capability",
    "Catalog",
    "ContentSource",
    "DirectorySource",
    "InvalidParameter",
    "NfsSource",
    "NoSpace",
    "SizeNotAllowed",
    "SizeRange",
    "Snapshot",
    "SnapshotGroup",
    "Source",
    "StoreAway",
    "StoreFailed",
    "Volume",
    "VolumeConflict",
    "VolumeError",
    "VolumeKind",
    "VolumeNotFound",
    "VolumeUnfinished",
    "own_id",
    "parameters",
]
