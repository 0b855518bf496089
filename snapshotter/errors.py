"""What the snapshotter refuses, in the sentences that end in kubelet's events. One class a gRPC code."""

from __future__ import annotations


class SnapshotterError(Exception):
    """Root of this room's errors; by itself it means trouble of our own (INTERNAL)."""


class NotFound(SnapshotterError):
    """`hint`: what to do, where the caller cannot know it."""

    def __init__(self, key: str, what: str = "snapshot", hint: str = "") -> None:
        super().__init__(f"{what} {key!r} does not exist" + (f": {hint}" if hint else ""))


class AlreadyExists(SnapshotterError):
    """Only for a snapshot that really exists: containerd looks for it then."""

    def __init__(self, key: str) -> None:
        super().__init__(f"snapshot {key!r} already exists")


class BadRequest(SnapshotterError):
    """INVALID_ARGUMENT; names the field and its value."""

    def __init__(self, field: str, value: object, why: str) -> None:
        super().__init__(f"{field} = {value!r}: {why}")


class WrongState(SnapshotterError):
    """FAILED_PRECONDITION."""


class RowDamaged(WrongState):
    """What the store says of one snapshot is nothing that it can have written; all others are as they were."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(
            f"what the store says of snapshot {key!r} is damaged ({why}): remove the snapshot and make it anew; its "
            "device is quarantined then"
        )


class PoolFull(SnapshotterError):
    """RESOURCE_EXHAUSTED."""


class IdsUsedUp(PoolFull):
    """No device id is left in this epoch of the pool."""


class Unavailable(SnapshotterError):
    """UNAVAILABLE: trying again later may help; the message says what has to happen first."""


class TookTooLong(SnapshotterError):
    """DEADLINE_EXCEEDED, with the step that did not end."""


class NotOffered(SnapshotterError):
    """UNIMPLEMENTED."""


class StoreFailed(SnapshotterError):
    """The database cannot be used. `full`: for want of room on its disk."""

    full = False


class PoolRefused(SnapshotterError):
    """The pool is not the one that the store belongs to, or cannot be used as it is (FAILED_PRECONDITION)."""
