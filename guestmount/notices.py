"""What is told of volumes to those who have them, as events: each once it has lasted, and again as long as it lasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from blockdev import Deadline
from guestmount.errors import TROUBLE
from guestmount.events import NORMAL, WARNING, About, Events
from guestmount.known_pods import KnownPods
from guestmount.node import Node
from guestmount.survey import Seen, Surveyed, User, user_of
from volumes import VolumeKind

# How full is almost full, and in how many looks one after the other something has to be so.
_FULL = 0.95
_LOOKS = {"HandOffLost": 3, "VolumeUnreachable": 3}
# Seconds for which a call waits to know whom it has to tell.
_ASKING = 1.0

# Every reason, and what it says: docs/metrics.md has the table.
REASONS = {
    "VolumeAlmostFull": "less than 5 % of the volume's bytes are left; on the pod and the claim",
    "VolumeInodesAlmostGone": "less than 5 % of the volume's inodes are left; on the pod and the claim",
    "HandOffLost": "the hand-off of a sandboxed pod's volume is gone or damaged: its next container would not get it; "
    "on the pod",
    "VolumeUnreachable": "the volume's server does not answer, or its filesystem cannot be read; on the pod",
    "VolumeMissing": "a container of a sandboxed pod was made while the NRI plugin was away, and has no NFS volume; on "
    "the pod",
    "SnapshotOfVolumeInUse": "a snapshot was taken while a pod had the volume: it is what a power cut would have left; "
    "on the claim",
}  # fmt: skip


class Notices:
    """Told of each look at the node's volumes."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._lasted: Counter[tuple[str, str]] = Counter()

    def looked(self, seen: Seen) -> None:
        found = {(user.target, reason): (user, reason, message) for one in seen.volumes
                 for user, reason, message in _troubles(one, seen)}  # fmt: skip
        self._lasted = Counter({key: self._lasted[key] + 1 for key in found})
        for key, (user, reason, message) in found.items():
            if self._lasted[key] < _LOOKS.get(reason, 1):
                continue
            self._events.tell(_pod(user), WARNING, reason, message)
            if reason in ("VolumeAlmostFull", "VolumeInodesAlmostGone"):
                self._events.tell(_claim(user), WARNING, reason, message)


def _troubles(one: Surveyed, seen: Seen) -> Iterator[tuple[User, str, str]]:
    called = f"volume {one.volume}"
    for user in one.users:
        if user.target in seen.lost:
            yield user, "HandOffLost", (
                f"{called} was handed to this pod's sandbox, and its hand-off is gone or damaged: a container that "
                "starts now does not get it; kubelet's next publish writes it again, or restart the pod"
            )  # fmt: skip
        if one.trouble:
            yield user, "VolumeUnreachable", f"{called} cannot be looked at: {one.trouble}"
        for reason, message in _full(one):
            yield user, reason, f"{called} {message}"


def _full(one: Surveyed) -> Iterator[tuple[str, str]]:
    usage = one.usage
    if usage is None or not usage.inodes or not usage.total_bytes:
        return  # a raw device is as full as it is large
    if usage.used_bytes > _FULL * usage.total_bytes:
        more = "it grows with the pod's next start" if one.owner == "sandbox" else "it grows while the pod runs"
        what = "lies where less than 5 % of the bytes are left" if one.files else (
            f"has less than 5 % of its bytes left; ask for more in its claim: {more}"
        )  # fmt: skip
        yield "VolumeAlmostFull", what
    if usage.used_inodes > _FULL * usage.inodes:
        where = "lies where" if one.files else "has"
        yield "VolumeInodesAlmostGone", f"{where} less than 5 % of the inodes are left: it takes few files more"


def _pod(user: User) -> About:
    return About(kind="Pod", namespace=user.namespace, name=user.pod, uid=user.pod_uid)


def _claim(user: User) -> About:
    return About(
        kind="PersistentVolumeClaim", namespace=user.namespace, name=user.persistent_volume_claim, uid=user.claim_uid
    )


def snapshot_taken(node: Node, snapshot_id: str, volume_id: str) -> None:
    """A snapshot is there; it is told to the claim of a volume that pods have. Never fails a call."""
    events = node.events
    if events is None:
        return
    pods = node.detector.pods
    try:
        claim = node.claims.peek(volume_id)
    except TROUBLE:
        return  # whose volume it is cannot be read
    if claim is None or claim.kind is not VolumeKind.BLOCK or not claim.targets:
        return
    names = ", ".join(sorted({target.pod for target in claim.targets.values()}))
    until = Deadline.after(_ASKING)
    for path, target in claim.targets.items():
        user = user_of(path, target, pods if isinstance(pods, KnownPods) else None, until.remaining())
        events.tell(
            _claim(user), NORMAL, "SnapshotOfVolumeInUse",
            f"snapshot {snapshot_id} of volume {volume_id} was taken while {names} had it: it is what a power cut at "
            "that moment would have left",
        )  # fmt: skip


def volume_missing(events: Events, user: User, container: str) -> None:
    """A container was made while nobody could give its guest the volume."""
    events.tell(
        _pod(user), WARNING, "VolumeMissing",
        f"container {container} was made while runvol's NRI plugin was away, and has an empty read-only directory in "
        "the place of its NFS volume; restart the pod",
    )  # fmt: skip
