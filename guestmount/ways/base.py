"""What every way from a volume to a pod says of itself: check, exclude, deliver, take back, usage, problems."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from blockdev import Deadline
from blockdev.deadlines import bounded
from guestmount.claims import Cell, Claim, Claims, Target
from guestmount.cri import Sandboxes
from guestmount.detect import Runtime
from guestmount.giving import Giving
from guestmount.handoff import Delivered, Dialects
from guestmount.requests import PublishRequest
from guestmount.written import Written
from volumes import SizeRange
from volumes.backend import Backend

_MOST = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a way needs of the node. `rust_shared_block`: containers of one pod may share a block volume under Kata's
    Rust shim."""

    claims: Claims
    dialects: Dialects
    written: Written
    giving: Giving = field(default_factory=Giving)
    rust_shared_block: bool = False
    sandboxes: Sandboxes = field(default_factory=lambda: Sandboxes(endpoint=""))


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A target that the volume does not have yet, and the runtime of its pod."""

    request: PublishRequest
    runtime: Runtime
    path: str
    target: Target


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


class Way(Protocol):
    """How a volume reaches one target. Every verb may be repeated; the volume's lock is held for those with a cell."""

    # As the claim's target keeps it.
    name: str
    # Whether a hand-off names the volume's device.
    hands_over: bool

    def check(self, means: Means, claim: Claim, arrival: Arrival, deadline: Deadline) -> tuple[Claim, Target]:
        """Raises, in words, for what cannot reach this pod so; else the claim and the target with all that it takes.

        Nothing is changed but what is returned.
        """

    def admit(self, cell: Cell, arrival: Arrival, deadline: Deadline) -> Claim:
        """The claim with the owner that the volume has then. Raises for a target that others exclude."""

    def prepare(self, means: Means, claim: Claim, target: Target, deadline: Deadline) -> Claim:
        """The claim after what can be done to the volume before anybody is given it; nothing of it is recorded yet."""

    def holds(self, claim: Claim) -> bool:
        """Whether a repeated publish finds the volume still its pod's, and nothing has to be acquired again."""

    def deliver(self, means: Means, cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        """What the claim says of the target is true on the disk and in the kernel; what stands there was compared."""

    def keeps(self, path: str) -> bool:
        """Whether a repeated publish that failed must leave what the pod has at the target."""

    def take_back(self, claim: Claim, path: str) -> None:
        """Before the target is unmounted: what of this way would hold that up."""

    def expand(self, means: Means, cell: Cell, backend: Backend, size: SizeRange, deadline: Deadline) -> int | None:
        """The capacity, or Refused, where the volume is this pod's alone; None where the host may grow it."""

    def usage(self, claim: Claim, path: str, deadline: Deadline) -> Usage:
        """How full the volume is, as far as this side of a guest's border can see."""

    def problems(self, claim: Claim, path: str, handed: Mapping[str, Delivered]) -> list[Problem]:
        """What is wrong with the target; `handed`: the hand-offs of this node by target."""


def of_mount(path: str, deadline: Deadline) -> Usage:
    """What the filesystem that is mounted at `path` says; a server that does not answer costs the call its deadline,
    and one that does may say anything."""
    facts = bounded(f"measuring {path}", deadline, lambda: os.statvfs(path))
    return Usage(
        total_bytes=_counted(facts.f_blocks * facts.f_frsize),
        used_bytes=_counted((facts.f_blocks - facts.f_bfree) * facts.f_frsize),
        available_bytes=_counted(facts.f_bavail * facts.f_frsize),
        inodes=_counted(facts.f_files),
        used_inodes=_counted(facts.f_files - facts.f_ffree),
        free_inodes=_counted(facts.f_favail),
    )


def _counted(number: int) -> int:
    """As much of it as CSI's fields hold."""
    return max(0, min(number, _MOST))
