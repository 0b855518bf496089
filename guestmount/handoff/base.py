"""What every hand-off dialect does: deliver, withdraw, list what is delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A block filesystem on its way to one guest, in no dialect's words."""

    volume_id: str
    target: str
    device: str
    fstype: str
    options: tuple[str, ...] = ()
    read_only: bool = False
    # The guest's agent gives the files to this group; empty for none.
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class NfsDelivery:
    """An NFS export on its way to one guest. `options` without those that each dialect says in its own way."""

    volume_id: str
    target: str
    server: str
    path: str
    version: str
    options: tuple[str, ...] = ()
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """One hand-off as it lies on the disk."""

    dialect: str
    target: str
    place: str
    device: str
    fstype: str
    options: tuple[str, ...]
    sandboxes: tuple[str, ...] = ()
    problem: str = ""
    # It names a device that does not exist, so that no container takes the volume now; `device` is the one that it had.
    closed: bool = False
    # The group that the guest's agent gives the files to; empty for none.
    group: str = ""


class Dialect(Protocol):
    """One runtime's format. All verbs can be repeated."""

    name: str
    # Whether the runtime wants a block node, where the volume is a file.
    needs_node: bool

    def check(self, delivery: Delivery) -> None:
        """Raises Unsupported, by name, for what the format cannot carry."""

    def deliver(self, delivery: Delivery) -> None:
        """The hand-off lies there, whole, when this returns."""

    def check_nfs(self, delivery: NfsDelivery) -> None:
        """The same for an export."""

    def deliver_nfs(self, delivery: NfsDelivery) -> None:
        """The same for an export."""

    def withdraw(self, target: str) -> None:
        """Nothing lies there, whatever dialect is configured now."""

    def delivered(self) -> Sequence[Delivered]:
        """What lies there now."""

    def at(self, target: str) -> Delivered | None:
        """What lies there for this target; costs the same among any number of others."""

    def sweep(self) -> None:
        """Remove what a killed process was writing; nothing that another driver could own."""


@runtime_checkable
class Closing(Protocol):
    """A dialect whose hand-offs can be closed for a while."""

    def close(self, delivery: Delivery) -> None:
        """A container that comes is refused, as the device that lies there does not exist, until it is delivered
        again."""
