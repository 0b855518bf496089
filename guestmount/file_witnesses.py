"""What speaks for a pod that has a volume of files, where no claim does: what is mounted in the pod's directory.

A directory of this node is known there by its inode. An NFS mount is known by what kubelet has written beside it
(`vol_data.json`, with the volume's handle): two volumes of one server may be mounted alike.
"""

from __future__ import annotations

import os

import msgspec

from blockdev import durable, mountinfo
from blockdev.mountinfo import Mount
from guestmount.claims import Claim, NfsMount, Target, Use
from guestmount.node import Node
from guestmount.ways.shared import Shared
from guestmount.witnesses import pod_directory
from volumes import AccessMode, DirectorySource, VolumeError, VolumeKind, VolumeNotFound, own_id
from volumes.backend import Backend, StoredBackend

_RECORD = "vol_data.json"
_LONGEST = 1 << 16


class _VolumeData(msgspec.Struct, frozen=True):
    volumeHandle: str = ""  # noqa: N815


def remade(node: Node, volume_id: str) -> Claim | None:
    """The claim of a volume of files, as far as its mounts in pods' directories tell; None where there are none."""
    try:
        backend = node.catalog.of(volume_id)
    except VolumeNotFound:
        return None
    if backend.kind is not VolumeKind.FILES:
        return None
    path = _directory(backend, volume_id)
    identity = _identity(path)
    mounted = [one for one in mountinfo.table() if pod_directory(one.target, node.roots)
               and (_is_of(one, identity) if identity is not None else _is_named(one, volume_id))]  # fmt: skip
    if not mounted:
        return None
    targets = {
        one.target: Target(
            read_only=one.read_only,
            pod_uid=os.path.basename(pod_directory(one.target, node.roots)),
            way=Shared.name,
            made_again=True,
        )
        for one in mounted
    }
    return Claim(
        volume=volume_id,
        source=path or mounted[0].source,
        staging_path="",
        use=Use(mode=AccessMode.SINGLE_NODE_MULTI_WRITER.value),
        targets=targets,
        kind=VolumeKind.FILES,
        nfs=None if identity is not None else _export(mounted[0]),
        made_again=True,
    )


def _directory(backend: Backend, volume_id: str) -> str:
    """Where a volume that is a directory of this node lies; empty for any other."""
    if not isinstance(backend, StoredBackend):
        return ""
    try:
        source = backend.attach(volume_id)
    except VolumeError:
        return ""
    return source.path if isinstance(source, DirectorySource) else ""


def _identity(path: str) -> tuple[int, int] | None:
    if not path:
        return None
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _is_of(mount: Mount, identity: tuple[int, int]) -> bool:
    """Only a mount of the same filesystem is looked at: another one's server may be dead."""
    if os.makedev(*mount.device) != identity[0]:
        return False
    return _identity(mount.target) == identity


def _is_named(mount: Mount, volume_id: str) -> bool:
    if not mount.fstype.startswith("nfs") or os.path.basename(mount.target) != "mount":
        return False
    try:
        raw = durable.read(os.path.join(os.path.dirname(mount.target), _RECORD), _LONGEST)
        return own_id(msgspec.json.decode(raw, type=_VolumeData).volumeHandle) == volume_id
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False


def _export(mount: Mount) -> NfsMount:
    server, _, path = mount.source.rpartition(":/")
    version = next((word[5:] for word in mount.super_options if word.startswith("vers=")), "")
    return NfsMount(server=server.strip("[]"), path=f"/{path}", version=version)
