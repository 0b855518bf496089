"""What speaks for a pod where no claim does.

Claims lie in a directory that can be lost while pods run. "No claim" is therefore never "no pod": kubelet's directory
of the pod, a device that somebody has open and a node that is bound at a target are asked first. A sandbox's claim is
made again from its hand-off and its pod's directory, so that the pod keeps the volume and nobody else gets it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

from blockdev import Deadline, exclusivity, ioctls, loops, mountinfo
from blockdev.mountinfo import Mount
from guestmount.claims import HOST, SANDBOX, UNKNOWN, Cell, Claim, Owner, Target, Use, told
from guestmount.errors import TROUBLE
from guestmount.handoff import Delivered
from guestmount.node import Node
from guestmount.ways import exclusion
from guestmount.ways.device_node import DeviceNode
from guestmount.ways.guest_device import GuestDevice
from guestmount.ways.mounted import Mounted
from volumes import AccessMode

log = logging.getLogger("runvol.witnesses")

_UID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
# kubelet keeps a pod's mounts in the pod's directory, and the devices of raw volumes by PersistentVolume and pod.
_IN_POD = re.compile(r"/pods/(?P<uid>[^/]+)/volumes/")
_OF_DEVICE = re.compile(rf"/volumeDevices/publish/[^/]+/(?P<uid>{_UID})\Z")


def pod_directory(target: str, roots: Sequence[str]) -> str:
    """The directory of kubelet's that the target's pod has as long as kubelet knows it.

    Empty for a target of no pod.
    """
    for root in roots:
        if not target.startswith(f"{root}/"):
            continue
        inside = target[len(root) :]
        if found := _IN_POD.match(inside):
            return f"{root}/pods/{found['uid']}"
        if found := _OF_DEVICE.search(inside):
            return f"{root}/pods/{found['uid']}"
    return ""


def pod_exists(target: str, roots: Sequence[str]) -> bool:
    """Whether kubelet still has the target's pod.

    It unpublishes what is there itself, and then removes the directory.
    """
    directory = pod_directory(target, roots)
    return bool(directory) and os.path.lexists(directory)


def device_in_use(path: str, *, looking: bool = False) -> bool:
    """Whether anybody has the file or block node open; False if it is gone. `looking`: it is not opened itself."""
    try:
        return not (exclusivity.seems_free(path) if looking else exclusivity.is_free(path))
    except FileNotFoundError:
        return False


def reclaim(node: Node, ours: Sequence[tuple[str, str, Delivered]], deadline: Deadline) -> list[str]:
    """Claims for hand-offs of pods that kubelet still has and that no claim speaks of; what was made, in words.

    `ours`: hand-offs of this driver's volumes, each with its volume's id and file. What a hand-off does not tell (where
    the volume is staged, its capability) comes with kubelet's next repeated stage and publish.
    """
    made = []
    for volume_id, path, one in ours:
        directory = pod_directory(one.target, node.roots)
        if not directory or not os.path.lexists(directory):
            continue
        try:
            with node.claims.locked(volume_id, deadline) as cell:
                if not _be_told(node, cell, _claim(volume_id, path, one, os.path.basename(directory))):
                    continue
        except TROUBLE as error:
            log.warning("not made again", extra={"volume": volume_id, "why": str(error)})
            continue  # somebody works on it, or its claim is damaged: it has one
        made.append(f"made the claim of volume {volume_id} again from its hand-off {one.place}")
    return made


def reclaim_mounted(node: Node, attached: Sequence[tuple[str, str, str]], deadline: Deadline) -> list[str]:
    """The same for volumes with a loop device (device, volume and file), as their mounts and bound nodes tell. One
    without a claim gets it with the first call for it."""
    told, table = [], mountinfo.table()
    for device, volume_id, path in attached:
        made = _mounted(node, volume_id, path, device, table)
        if made is None:
            continue
        try:
            with node.claims.locked(volume_id, deadline) as cell:
                if cell.claim is not None and _be_told(node, cell, made):
                    told.append(f"the claim of volume {volume_id} was older than its mounts")
        except TROUBLE as error:
            log.warning("not made again", extra={"volume": volume_id, "why": str(error)})
            continue
    return told


def _be_told(node: Node, cell: Cell, made: Claim) -> bool:
    """Whether the claim had to be changed for what stands: there was none, or it is older than the hand-off, as in a
    state directory that was restored."""
    old = cell.claim
    if old is None:
        cell.write(made)
        return True
    if made.targets.keys() <= old.targets.keys():
        return False
    exclusion.forget_vanished(cell, node.alive)
    left = cell.present
    if left.targets and left.owner is not None and made.owner is not None and not left.owner.is_same_kernel(made.owner):
        log.error("a volume is handed to a guest and published to others by its claim; neither is touched",
                  extra={"volume": left.volume, "targets": sorted({*left.targets, *made.targets})})  # fmt: skip
        return False
    cell.write(told(left, made))
    return True


def remade(node: Node, volume_id: str, ours: Sequence[tuple[str, str, Delivered]]) -> Claim | None:
    """The claim of a volume without a record, as far as its hand-offs (`ours`) or its mounts tell; None where neither
    speaks of a pod that is left."""
    made: Claim | None = None
    for _volume_id, path, one in ours:
        directory = pod_directory(one.target, node.roots)
        if directory and os.path.lexists(directory):
            claim = _claim(volume_id, path, one, os.path.basename(directory))
            made = claim if made is None else made.but(targets={**made.targets, **claim.targets})
    return made or _mounted_anywhere(node, volume_id)


def _mounted_anywhere(node: Node, volume_id: str) -> Claim | None:
    """By whatever loop device stands on the volume's file."""
    path = dict(node.catalog.images()).get(volume_id)
    if path is None:
        return None
    table = mountinfo.table()
    found = (_mounted(node, volume_id, path, device, table) for device in loops.find(path))
    return next((one for one in found if one is not None), None)


def _mounted(node: Node, volume_id: str, path: str, device: str, table: Sequence[Mount]) -> Claim | None:
    """Of a volume that the host's kernel has mounted, or whose device node is bound at targets."""
    numbers = _numbers(device)
    mounted = [one for one in table if one.device == numbers and _is_below(one.target, node.roots)]
    if mounted:
        targets = {one.target: _target(one.target, one.read_only, node, Mounted.name) for one in mounted
                   if pod_directory(one.target, node.roots)}  # fmt: skip
        # What kubelet binds for a subPath lies in its pod's directory, too.
        others = [one.target for one in mounted if one.target not in targets]
        staging = next((one for one in others if not any(one.startswith(f"{root}/pods/") for root in node.roots)), "")
        use = Use(mode=AccessMode.SINGLE_NODE_MULTI_WRITER.value, fstype=mounted[0].fstype)
        return Claim(volume=volume_id, source=path, device=device, staging_path=staging, use=use,
                     owner=Owner(kind=HOST), targets=targets, prepared=True, made_again=True)  # fmt: skip
    bound = [one for one in mountinfo.node_targets(device, table) if pod_directory(one, node.roots)]
    if not bound:
        return None
    read_only = ioctls.is_read_only(device)
    nodes = {one: _target(one, read_only, node, DeviceNode.name) for one in bound}
    # A bound node does not tell which kernel has it: nobody but its pod gets it, until kubelet repeats the publish.
    first = next(iter(nodes.values())).pod_uid
    return Claim(volume=volume_id, source=path, device=device, staging_path="",
                 use=Use(mode=AccessMode.SINGLE_NODE_MULTI_WRITER.value, raw=True),
                 owner=Owner(kind=UNKNOWN, pod_uid=first), targets=nodes, made_again=True)  # fmt: skip


def _numbers(device: str) -> tuple[int, int]:
    number = os.stat(device).st_rdev
    return os.major(number), os.minor(number)


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(path.startswith(f"{root}/") for root in roots)


def _target(path: str, read_only: bool, node: Node, way: str) -> Target:
    uid = os.path.basename(pod_directory(path, node.roots))
    return Target(read_only=read_only, pod_uid=uid, way=way, made_again=True)


def _claim(volume_id: str, path: str, one: Delivered, pod_uid: str) -> Claim:
    return Claim(
        volume=volume_id,
        source=path,
        device="" if one.device == path else one.device,
        staging_path="",
        use=Use(mode=AccessMode.SINGLE_NODE_MULTI_WRITER.value, fstype=one.fstype),
        owner=Owner(kind=SANDBOX, pod_uid=pod_uid, dialect=one.dialect),
        targets={
            one.target: Target(
                read_only="ro" in one.options,
                pod_uid=pod_uid,
                way=GuestDevice.name,
                made_again=True,
                mount_group=one.group,
                group_in_guest=bool(one.group),
            )
        },
        prepared=not one.closed,  # what it was closed for may not have ended
        made_again=True,
    )
