"""What can go wrong with a volume. Each class is one answer of a protocol; `str()` is the sentence for the user."""

from __future__ import annotations


class VolumeError(Exception):
    """Root of this room's errors."""


class VolumeNotFound(VolumeError):
    def __init__(self, volume_id: str) -> None:
        super().__init__(f"volume {volume_id!r} does not exist on this node")


class VolumeConflict(VolumeError):
    """The name is taken by a volume that differs."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"a volume named {name!r} exists already and {why}; choose another name or the same arguments")


class InvalidParameter(VolumeError):
    """A parameter that is unknown, or a value that it cannot have."""

    def __init__(self, key: str, value: str | None, rule: str) -> None:
        shown = "" if value is None else f" = {value[:80]!r}"
        super().__init__(f"parameter {key[:80]!r}{shown}: {rule}")


class SizeNotAllowed(VolumeError):
    """A size that no volume of this backend can have."""


class NoSpace(VolumeError):
    """The backend cannot promise that many bytes."""


class VolumeUnfinished(VolumeError):
    """The volume is in the middle of being made, formatted or deleted."""


class StoreFailed(VolumeError):
    """The store of volumes cannot be read or written."""


class StoreAway(VolumeError):
    """The store that is here is not the one that an id or a directory belongs to."""


class OfAnotherDriver(VolumeError):
    """An id that another of runvol's drivers has given: whether there is such a volume, only that one knows."""

    def __init__(self, one_id: str, driver: str) -> None:
        super().__init__(
            f"{one_id!r} is an id of the driver {driver}; this one neither finds nor deletes it (is it named by the "
            "StorageClass's provisioner, or by the PersistentVolume?)"
        )


class OfANode(VolumeError):
    """An id of a volume that lives on a node, for a controller that serves none: only that node knows more."""

    def __init__(self, one_id: str) -> None:
        super().__init__(
            f"{one_id!r} lives on a node: the controller there makes and deletes it (provisioner and snapshotter with "
            "--node-deployment); this one serves no node"
        )


class ExportUnknown(StoreFailed):
    """An id that names an export which this controller has never worked on: what lies there cannot be looked at."""

    def __init__(self, one_id: str, place: str, unasked: str = "") -> None:
        also = f" ({unasked})" if unasked else ""
        super().__init__(
            f"no export known for this id ({one_id!r}): this controller cannot look for it, and deletes nothing{also}. "
            f"Name it in the setting nfs.exports, bring {place} here from the controller that made it, or have this "
            "one make a volume of the same StorageClass"
        )
