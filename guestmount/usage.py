"""How full and how well a published volume is, on either side of the guest's border."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blockdev import Deadline, ioctls, mounts, superblocks
from blockdev.deadlines import bounded
from blockdev.errors import FilesystemDamaged
from guestmount import placeholder
from guestmount.claims import HOST, Claim
from guestmount.errors import BadRequest, Refused
from guestmount.node import Node
from volumes import Volume, VolumeKind, VolumeNotFound


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Bytes and inodes; `inodes` is 0 for a raw device."""

    total_bytes: int
    used_bytes: int
    available_bytes: int
    inodes: int = 0
    used_inodes: int = 0
    free_inodes: int = 0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with a volume. `lost`: the data may be; `unreachable`: nobody can get at it."""

    reason: str
    message: str
    lost: bool = False
    unreachable: bool = False


def published(node: Node, volume_id: str, path: str) -> Claim:
    """The claim of a volume that is at `path`; VolumeNotFound otherwise."""
    claim = node.claims.peek(volume_id)
    if claim is None or claim.nfs is None:
        node.catalog.get(volume_id)
    if claim is None or (path not in claim.targets and path != claim.staging_path):
        raise VolumeNotFound(f"{volume_id} (it is not at {path})")
    return claim


def measure(claim: Claim, path: str, deadline: Deadline) -> Usage:
    """From the mount where the host has it, else from the superblock, which a guest writes back now and then."""
    if claim.use.raw:
        size = ioctls.size_bytes(claim.source)
        return Usage(total_bytes=size, used_bytes=os.stat(claim.source).st_blocks * 512, available_bytes=0)
    if claim.kind is VolumeKind.FILES or (claim.owner is not None and claim.owner.kind == HOST):
        facts = bounded(f"measuring {path}", deadline, lambda: os.statvfs(path))
        return Usage(
            total_bytes=facts.f_blocks * facts.f_frsize,
            used_bytes=(facts.f_blocks - facts.f_bfree) * facts.f_frsize,
            available_bytes=facts.f_bavail * facts.f_frsize,
            inodes=facts.f_files,
            used_inodes=facts.f_files - facts.f_ffree,
            free_inodes=facts.f_favail,
        )
    block = superblocks.read(claim.source)
    if block is None:
        raise VolumeNotFound(f"{claim.volume} (there is no filesystem on {claim.source})")
    return Usage(
        total_bytes=block.total_bytes,
        used_bytes=block.total_bytes - block.free_bytes,
        available_bytes=block.free_bytes,
        inodes=block.inodes,
        used_inodes=block.inodes - block.free_inodes,
        free_inodes=block.free_inodes,
    )


def problems(node: Node, volume_id: str) -> list[Problem]:
    """What is wrong with a volume on this node; nothing for a healthy one. VolumeNotFound for an unknown one."""
    peeked = _peeked(node, volume_id)
    if peeked is not None and peeked.nfs is not None:
        # The server is not asked: a dead one would cost every look at the volume its patience.
        return _delivery_problems(node, peeked)
    volume, backend = node.catalog.get(volume_id), node.catalog.of(volume_id)
    try:
        source = backend.attach(volume_id).path
    except VolumeNotFound as error:
        return [Problem(reason="BackingFileMissing", message=str(error), lost=True)]
    found = _device_problems(volume, source) if backend.kind is VolumeKind.BLOCK else []
    try:
        claim = node.claims.peek(volume_id)
    except Refused as error:  # one damaged claim must not hide the other volumes of a list
        return [*found, Problem(reason="ClaimDamaged", message=str(error), unreachable=True)]
    return found + (_delivery_problems(node, claim) if claim is not None else [])


def _peeked(node: Node, volume_id: str) -> Claim | None:
    try:
        return node.claims.peek(volume_id)
    except (BadRequest, Refused):
        return None


def _device_problems(volume: Volume, source: str) -> list[Problem]:
    found = []
    if os.path.isfile(source) and os.stat(source).st_size < volume.capacity_bytes:
        found.append(Problem(reason="BackingFileTooSmall", message=f"{source} is smaller than its volume", lost=True))
    try:
        block = superblocks.read(source)
    except FilesystemDamaged as error:
        return [*found, Problem(reason="FilesystemDamaged", message=str(error), lost=True)]
    if block is not None and block.errors:
        found.append(
            Problem(
                reason="FilesystemErrors", message=f"the kernel has recorded errors in the {block.fstype} on {source}"
            )
        )
    return found


def _delivery_problems(node: Node, claim: Claim) -> list[Problem]:
    found: list[Problem] = []
    if claim.use.raw or (claim.owner is None and claim.kind is VolumeKind.BLOCK):
        return found
    handed = {one.target: one for dialect in node.dialects for one in dialect.delivered()}
    for path in claim.targets:
        if claim.owner is None or claim.owner.kind == HOST:
            if not mounts.is_mount_point(path):
                found.append(Problem(reason="MountMissing", message=f"nothing is mounted at {path}", unreachable=True))
            continue
        if not placeholder.stands(path):
            found.append(Problem(reason="PlaceholderMissing", message=f"no read-only placeholder stands at {path}"))
        if path not in handed or handed[path].problem:
            why = handed[path].problem if path in handed else "it is missing"
            found.append(Problem(reason="HandOffDamaged", message=f"the hand-off for {path}: {why}", unreachable=True))
    return found
