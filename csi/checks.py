"""The fields of requests: the specification's limits, and what a request must have."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from blockdev import mounts
from guestmount import BadRequest, PodRef
from runvol_proto import csi_pb2
from volumes import AccessMode, Capability, SizeRange, own_id

log = logging.getLogger("runvol.csi")

_STRING, _MAP, _NODE_ID = 128, 4096, 256
_CONTEXT = "csi.storage.k8s.io/"
_TARGET = re.compile(r"/pods/[^/]+/volumes/kubernetes\.io~csi/(?P<volume>[^/]+)/mount\Z")


def required(field: str, value: str) -> str:
    """A string that must be there, within the specification's 128 bytes and without control characters."""
    if not value:
        raise BadRequest(field, value, "must be given")
    if len(value.encode()) > _STRING:
        raise BadRequest(field, value, f"is longer than {_STRING} bytes")
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise BadRequest(field, value, "holds a control character")
    return value


def volume_id(value: str) -> str:
    """The volume's name here. Of a static volume anybody may have chosen its id."""
    own = own_id(required("volume_id", value))
    if own != value:
        log.debug("a volume's id is no name of a file", extra={"id": value, "called": own})
    return own


def bounded_map(field: str, values: Mapping[str, str], *, secret: bool = False) -> dict[str, str]:
    """A map within the specification's 4 KiB in total."""
    total = sum(len(key.encode()) + len(value.encode()) for key, value in values.items())
    if total > _MAP:
        raise BadRequest(field, f"{len(values)} entries" if secret else sorted(values), f"is larger than {_MAP} bytes")
    return dict(values)


def capability(field: str, message: csi_pb2.VolumeCapability, *, given: bool = True) -> Capability:
    """A capability that says everything it must."""
    if not given:
        raise BadRequest(field, None, "must be given")
    kind = message.WhichOneof("access_type")
    if kind is None:
        raise BadRequest(f"{field}.access_type", None, "must be mount or block")
    mode = message.access_mode.mode
    names = csi_pb2.VolumeCapability.AccessMode.Mode
    if mode not in names.values() or mode == names.UNKNOWN:
        raise BadRequest(f"{field}.access_mode.mode", mode, "is no access mode that this driver knows")
    access_mode = AccessMode(names.Name(mode).lower())
    if kind == "block":
        return Capability(mode=access_mode, raw=True)
    total = sum(len(flag.encode()) for flag in message.mount.mount_flags)
    if total > _MAP:
        raise BadRequest(f"{field}.mount.mount_flags", f"{total} bytes", f"is larger than {_MAP} bytes")
    return Capability(
        mode=access_mode,
        fstype=message.mount.fs_type,
        # mount(8) takes several in one word, so people write them like that.
        mount_flags=tuple(word for flag in message.mount.mount_flags for word in mounts.words(flag)),
        mount_group=message.mount.volume_mount_group,
    )


def size_range(message: csi_pb2.CapacityRange) -> SizeRange:
    return SizeRange(required=message.required_bytes, limit=message.limit_bytes)


def pod_of(context: Mapping[str, str], target: str) -> PodRef:
    """The pod as kubelet names it (`podInfoOnMount`), and the PersistentVolume as its target's path does."""
    found = _TARGET.search(target)
    return PodRef(
        persistent_volume=found["volume"] if found else "",
        namespace=context.get(f"{_CONTEXT}pod.namespace", ""),
        name=context.get(f"{_CONTEXT}pod.name", ""),
        uid=context.get(f"{_CONTEXT}pod.uid", ""),
    )


def has(message: Any, field: str) -> bool:
    return bool(message.HasField(field))
