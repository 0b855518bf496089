"""Choosing a volume's size inside a caller's range."""

from __future__ import annotations

from volumes.errors import SizeNotAllowed, VolumeConflict
from volumes.model import GIBIBYTE, MEBIBYTE, SizeRange

DEFAULT_BYTES = GIBIBYTE
# The largest size that every step can still express; loff_t ends at 2^63.
LARGEST = 1 << 62
_GRAIN, _SECTOR = MEBIBYTE, 4096


def check(size: SizeRange) -> None:
    """SizeNotAllowed for a range that no size can satisfy."""
    for field, value in (("required_bytes", size.required), ("limit_bytes", size.limit)):
        if value < 0:
            raise SizeNotAllowed(f"{field} = {value} is negative; give a number of bytes, or 0 for no wish")
    if size.limit and size.required > size.limit:
        raise SizeNotAllowed(f"required_bytes = {size.required} is more than limit_bytes = {size.limit}")
    if size.required > LARGEST:
        raise SizeNotAllowed(f"required_bytes = {size.required} is more than a volume can have ({LARGEST})")


def choose(size: SizeRange, *, smallest: int) -> int:
    """Bytes of a new volume: the wish, at least `smallest`, rounded up to MiB where the limit lets it."""
    check(size)
    wanted = size.required or min(DEFAULT_BYTES, size.limit or DEFAULT_BYTES)
    wanted = max(wanted, smallest)
    for grain in (_GRAIN, _SECTOR):
        rounded = -(-wanted // grain) * grain
        if not size.limit or rounded <= size.limit:
            return rounded
    raise SizeNotAllowed(
        f"limit_bytes = {size.limit} leaves no size that fits: at least {smallest} bytes, in steps of {_SECTOR}"
    )


def grown(volume_id: str, capacity: int, size: SizeRange) -> int:
    """Bytes of a volume of `capacity` after it was grown into a range; its own if it is large enough already."""
    check(size)
    if size.limit and capacity > size.limit:
        raise SizeNotAllowed(f"limit_bytes = {size.limit}: volume {volume_id} has {capacity} bytes and never shrinks")
    return choose(size, smallest=capacity) if size.required > capacity else capacity


def check_fits(name: str, capacity: int, size: SizeRange) -> None:
    """VolumeConflict if the volume that has this name already lies outside of the range."""
    if capacity < size.required or (size.limit and capacity > size.limit):
        raise VolumeConflict(name, f"has {capacity} bytes, outside of {size.required} to {size.limit or '∞'}")


def about(count: int) -> str:
    """Bytes for a sentence that stays the same while others write to the disk: rounded down to GiB, or to MiB."""
    unit, name = (GIBIBYTE, "GiB") if count >= GIBIBYTE else (MEBIBYTE, "MiB")
    return f"about {max(0, count) // unit} {name}"
