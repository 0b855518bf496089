"""What a snapshot is: containerd's words, with the thin device behind each."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_NAMED_BY_CHAIN = re.compile(r"[^/]+/\d+/(sha256:[0-9a-f]{64})\Z")
LABEL_REF = "containerd.io/snapshot.ref"
# The chain id of the layer below, as the unpacker gives it.
LABEL_PARENT_CHAIN = "containerd.io/snapshot/parent-chain-id"
LABEL_PREFIX = "containerd.io/snapshot/"
# A limit in bytes for one snapshot's filesystem; containerd's own name for it from 2.4 on.
LABEL_SIZE = "containerd.io/snapshot/max-size"
LABEL_FSTYPE = "containerd.io/snapshot/devmapper/fstype"


class Kind(enum.IntEnum):
    """Numbers are those on the wire."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class State(enum.IntEnum):
    """PREPARING: the row is an intent, its device may not exist yet. RECOVERED: found whole by a later process, which
    cannot know whether the caller ever heard of it, so a repeated Prepare is answered with it."""

    PREPARING = 0
    READY = 1
    RECOVERED = 2


@dataclass(frozen=True, kw_only=True)
class Mount:
    fstype: str
    source: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A row of the store. `device` is the thin id, `size` the length in bytes of device and filesystem.

    Times are nanoseconds since 1970. `image` is the chain id of the shared image that lies under the device, if any;
    a snapshot that is such an image itself has no device of the pool (0).
    """

    key: str
    parent: str
    kind: Kind
    state: State
    device: int
    size: int
    fstype: str
    created: int
    updated: int
    image: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def chain_of(row: Snapshot) -> str:
    """The chain id of an unpacked layer; empty for what was not unpacked from an image.

    containerd commits a layer under its chain id, which its own store turns into `<namespace>/<number>/<chain id>`; the
    label is there only while it is extracted, and on layers that were answered from shared storage.
    """
    named = _NAMED_BY_CHAIN.match(row.key)
    return row.labels.get(LABEL_REF, "") or (named[1] if named else "")
