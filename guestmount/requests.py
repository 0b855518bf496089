"""What a façade (CSI, FlexVolume) asks of a node, in no protocol's words, and who runs into it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blockdev import mounts, selinux
from guestmount.errors import BadRequest, Refused
from guestmount.pods import PodRef
from volumes import Capability, VolumeKind, parameters
from volumes.backend import Backend

_POD_IN_PATH = re.compile(
    r"/(?:pods/|publish/[^/]+/)([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(?:/|\Z)"
)
# 2^32-1 is chown's word for "leave it".
_GROUP_LIMIT = 2**32 - 2


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """`context` is the volume context without Kubernetes' own keys, checked."""

    volume_id: str
    staging_path: str
    capability: Capability
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PublishRequest:
    """The same, and one pod's target."""

    volume_id: str
    staging_path: str
    target: str
    capability: Capability
    read_only: bool = False
    pod: PodRef = field(default_factory=PodRef)
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def staged(self) -> StageRequest:
        """The stage that went before it."""
        return StageRequest(volume_id=self.volume_id, staging_path=self.staging_path, capability=self.capability,
                            context=self.context)  # fmt: skip

    @property
    def pod_uid(self) -> str:
        """The pod's uid as given, else as kubelet's path tells it, else the path: two paths are then two pods."""
        if self.pod.uid:
            return self.pod.uid
        found = _POD_IN_PATH.search(self.target)
        return found.group(1) if found else self.target

    @property
    def wants_read_only(self) -> bool:
        return self.read_only or self.capability.mode.is_read_only


def check_capability(capability: Capability, backend: Backend) -> None:
    """BadRequest or Refused for what no volume of this backend can be."""
    for flag in capability.mount_flags:
        if (
            not flag
            or flag in mounts.FORBIDDEN
            or "\0" in flag
            or len(mounts.words(flag)) > 1
            or not flag.isprintable()
        ):
            raise BadRequest("mount_flags", flag, "is not a mount option that a volume can have")
        refusal = backend.refuses(flag)
        if refusal is not None:
            raise BadRequest("mount_flags", flag, refusal)
    group = capability.mount_group
    if group and not (group.isascii() and group.isdigit() and len(group) <= 10 and 0 < int(group) <= _GROUP_LIMIT):
        raise BadRequest("volume_mount_group", group, f"must be a group id from 1 to {_GROUP_LIMIT}")
    # A provisioner fills the field in by itself; for a volume of files it means nothing.
    is_block = backend.kind is VolumeKind.BLOCK
    if is_block and capability.fstype and capability.fstype not in parameters.SUPPORTED_FSTYPES:
        raise BadRequest("fs_type", capability.fstype, f"takes {', '.join(parameters.SUPPORTED_FSTYPES)}")
    reason = capability.refusal(backend.kind, multi_node=backend.multi_node)
    if reason is not None:
        raise Refused(reason)


def check_options(flags: Sequence[str]) -> None:
    """BadRequest for a mount option that no new volume or target gets; what has it already keeps it."""
    for flag in flags:
        if mounts.is_unsafe(flag):
            raise BadRequest(
                "mount_flags",
                flag,
                "a damaged filesystem could take the node down with it, or it names a second device; remove it",
            )
    if found := selinux.wrong(flags):
        raise BadRequest("mount_flags", *found)


def exists(path: str) -> bool:
    """Whether `path` is there, a dead mount included."""
    return os.path.lexists(path) or mounts.is_mount_point(path)
