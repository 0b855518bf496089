"""What a volume is, what may be asked of it, and how a node gets at its bytes."""

from __future__ import annotations

import enum
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

# Opaque, at most the CSI's 128 bytes, and never a path: what we give, and what stands here for ids that others choose.
VOLUME_ID = re.compile(r"(?=.{1,128}\Z)[a-z0-9](?:[a-z0-9-]|\.(?!\.))*\Z")
_OF_OTHERS = "any-"


def own_id(handle: str) -> str:
    """What a volume is called here whose id others have chosen (a static PersistentVolume's `volumeHandle` may hold any
    character): itself, where it can be the name of a file."""
    if VOLUME_ID.match(handle):
        return handle
    return _OF_OTHERS + hashlib.sha256(os.fsencode(handle)).hexdigest()[:40]


class AccessMode(enum.StrEnum):
    """CSI's access modes, by their own names."""

    SINGLE_NODE_WRITER = enum.auto()
    SINGLE_NODE_READER_ONLY = enum.auto()
    MULTI_NODE_READER_ONLY = enum.auto()
    MULTI_NODE_SINGLE_WRITER = enum.auto()
    MULTI_NODE_MULTI_WRITER = enum.auto()
    SINGLE_NODE_SINGLE_WRITER = enum.auto()
    SINGLE_NODE_MULTI_WRITER = enum.auto()

    @property
    def is_multi_node(self) -> bool:
        return self.value.startswith("multi_node")

    @property
    def is_shared(self) -> bool:
        """Whether several pods may have a raw device at once."""
        return self.is_multi_node or self is AccessMode.SINGLE_NODE_MULTI_WRITER

    @property
    def is_read_only(self) -> bool:
        return self in (AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY)

    @property
    def claimed(self) -> str:
        """Its name, and what a claim calls it."""
        word = _CLAIMED.get(self.value)
        return f"{self} ({word})" if word else str(self)

    def __str__(self) -> str:
        return self.value.upper()


_CLAIMED = {"multi_node_reader_only": "ReadOnlyMany", "multi_node_multi_writer": "ReadWriteMany"}


class VolumeKind(enum.StrEnum):
    """BLOCK: one kernel at a time. FILES: as many as like, each through a mount or a share."""

    BLOCK = enum.auto()
    FILES = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Capability:
    """How a volume is to be used. `raw` is volumeMode Block; the rest of the fields is for filesystems."""

    mode: AccessMode
    raw: bool = False
    fstype: str = ""
    mount_flags: tuple[str, ...] = ()
    mount_group: str = ""

    def refusal(self, kind: VolumeKind, *, multi_node: bool) -> str | None:
        """Why no volume of this kind can be used like this; None if one can.

        A filesystem on a block device belongs to one kernel, so no mode of several nodes can be true for it.
        """
        if kind is VolumeKind.FILES:
            if self.raw:
                return "a volume of files has no block device (volumeMode: Block); use backend loop"
            if self.mode.is_multi_node and not multi_node:
                return (
                    f"access mode {self.mode.claimed} needs a volume that several nodes reach, and this one "
                    "lives on one node: claim it as ReadWriteOnce, or from a class of the driver nfs.csi.runvol.io"
                )
            return None
        if not self.raw and self.mode.is_multi_node:
            return (
                f"access mode {self.mode.claimed} needs a filesystem that several nodes can share: claim it "
                "as ReadWriteOnce, or from a class of the driver nfs.csi.runvol.io"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class SizeRange:
    """Bytes that a volume must and may have; 0 means no wish. Raises nothing: `choose` judges."""

    required: int = 0
    limit: int = 0


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume as its store knows it."""

    volume_id: str
    name: str
    backend: str
    capacity_bytes: int
    parameters: Mapping[str, str] = field(default_factory=dict)
    formatting: bool = False
    allocated_bytes: int = 0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A volume as it was; `created` in seconds since 1970, `group` empty for one that was taken alone.

    One that is not `ready` is still being copied.
    """

    snapshot_id: str
    source: str
    size_bytes: int
    created: float
    group: str = ""
    ready: bool = True


@dataclass(frozen=True, kw_only=True)
class SnapshotGroup:
    """Snapshots that were taken together."""

    group_id: str
    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, kw_only=True)
class ContentSource:
    """What a new volume starts with: `kind` is `snapshot` or `volume`."""

    kind: str
    source_id: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.source_id}"


@dataclass(frozen=True)
class Past:
    """`foreign_written`: a guest, or a pod with the raw device, may have written the bytes since the node last checked
    them. `mount_group`: the group that its files were last given here; empty for none."""

    foreign_written: bool = True
    mount_group: str = ""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a backend needs of its node, and whether the node has it: a word for programs (one of `runvol doctor`'s
    `volumes.…`) and a sentence for people."""

    met: bool
    what: str
    finding: str
    # What to do; empty for what is usual.
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class BlockSource:
    """A regular file or a block node; `path` is the one name that the volume's bytes have for its whole life."""

    path: str


@dataclass(frozen=True, kw_only=True)
class DirectorySource:
    """A directory of this node."""

    path: str


@dataclass(frozen=True, kw_only=True)
class NfsSource:
    """A directory that an NFS server exports; `options` are the class's own mount options."""

    server: str
    path: str
    version: str
    options: tuple[str, ...] = ()


Source = BlockSource | DirectorySource | NfsSource
