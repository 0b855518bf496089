"""How many block volumes the guest of one pod has places for, whoever's node it runs on."""

from __future__ import annotations

from collections.abc import Iterable

from guestmount import preflight
from guestmount.claims import Claim
from guestmount.errors import Refused
from guestmount.ways.base import Arrival, Means
from volumes import VolumeKind


def check(means: Means, claim: Claim, arrival: Arrival) -> None:
    """Refused, with the setting, for a pod that has as many block volumes of ours as its guest has places for.

    What else takes one (root filesystems that are devices, other drivers' disks) is not known here; the shim says so.
    """
    kata = arrival.runtime.kata
    slots = kata.disk_slots(preflight.annotations_of(arrival.runtime)) if kata is not None else 0
    if kata is None or not slots:
        return
    has = taken(means.claims.readable()[0], arrival.target.pod_uid) - {claim.volume}
    if len(has) >= slots:
        more = (
            "give the pod fewer volumes"
            if kata.hypervisor == "firecracker"
            else f'set block_device_driver = "virtio-scsi", or more default_bridges, in {kata.table} of {kata.path}'
        )
        raise Refused(
            f"volume {claim.volume} has no place in the guest of pod {arrival.target.pod}: the runtime handler "
            f"{arrival.runtime.handler!r} plugs at most {slots} disks into a guest, and the pod has {len(has)} block "
            f"volumes already. To have more, {more}"
        )


def taken(claims: Iterable[Claim], pod_uid: str) -> set[str]:
    """The block volumes of ours that the pod has."""
    return {
        one.volume
        for one in claims
        if one.kind is VolumeKind.BLOCK and any(target.pod_uid == pod_uid for target in one.targets.values())
    }
