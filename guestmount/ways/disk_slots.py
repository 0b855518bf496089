"""How many block volumes the guest of one pod has places for, whoever's node it runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from blockdev import Deadline
from guestmount import preflight
from guestmount.claims import SANDBOX, Claim
from guestmount.errors import Refused
from guestmount.ways.base import Arrival, Means
from volumes import VolumeKind


@contextlib.contextmanager
def placed(means: Means, claim: Claim, arrival: Arrival, deadline: Deadline) -> Iterator[None]:
    """The volume counts as the pod's until the block ends, by when its target is recorded: kubelet publishes all of a
    pod's volumes in one moment. Refused, with the setting, for a pod that has as many block volumes of ours as its
    guest has places for.

    What else takes one (root filesystems that are devices, other drivers' disks) is not known here; the shim says so.
    """
    kata = arrival.runtime.kata if claim.kind is VolumeKind.BLOCK and arrival.runtime.kind == SANDBOX else None
    slots = kata.disk_slots(preflight.annotations_of(arrival.runtime)) if kata is not None else 0
    if kata is None or not slots:
        yield
        return
    pod, hypervisor, where = arrival.target.pod_uid, kata.hypervisor, f"{kata.table} of {kata.path}"

    def judge(coming: frozenset[str]) -> None:
        has = len((taken(means.claims.readable()[0], pod) | coming) - {claim.volume})
        if has < slots:
            return
        more = (
            "give the pod fewer volumes"
            if hypervisor == "firecracker"
            else f'set block_device_driver = "virtio-scsi", or more default_bridges, in {where}'
        )
        raise Refused(
            f"volume {claim.volume} has no place in the guest of pod {arrival.target.pod}: the runtime handler "
            f"{arrival.runtime.handler!r} plugs at most {slots} disks into a guest, and the pod has {has} block "
            f"volumes already. To have more, {more}"
        )

    with means.claims.placed(f"pod {pod}", claim.volume, judge, deadline):
        yield


def taken(claims: Iterable[Claim], pod_uid: str) -> set[str]:
    """The block volumes of ours that the pod has."""
    return {
        one.volume
        for one in claims
        if one.kind is VolumeKind.BLOCK and any(target.pod_uid == pod_uid for target in one.targets.values())
    }
