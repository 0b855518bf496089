"""What can go wrong on a volume's way to a pod. Each class is one answer of a protocol."""

from __future__ import annotations

from volumes.troubles import EXPECTED


class GuestmountError(Exception):
    """Root of this room's errors; `str()` is what `kubectl describe pod` shows."""


class BadRequest(GuestmountError):
    """A field of the request that no call can succeed with; names field, value and rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        shown = repr(value)
        super().__init__(f"{field} = {shown if len(shown) <= 220 else shown[:220] + '…'}: {rule}")


class Conflict(GuestmountError):
    """The same path is in use for the same volume with other arguments."""


class Refused(GuestmountError):
    """The state of the volume, of the node or of its configuration forbids it; the sentence says what to change."""


class NoPlace(GuestmountError):
    """The node has as many volumes as it may have."""


class ClaimDamaged(Refused):
    """The record of a volume's owner cannot be read."""


class Busy(GuestmountError):
    """Another call for this volume is under way."""

    def __init__(self, volume_id: str) -> None:
        super().__init__(f"another operation on volume {volume_id} is under way; try again when it has ended")


class RuntimeUnknown(GuestmountError):
    """Nobody can tell which runtime will run the pod, and guessing would cost data."""


class Unsupported(GuestmountError):
    """The hand-off's format cannot carry this."""


# What goes wrong with one volume, and stops no look at the others.
TROUBLE = (*EXPECTED, GuestmountError)
