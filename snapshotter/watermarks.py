"""When a pool takes no more: what its status means, what is refused then, and what to do about it.

All by the numbers of a status; nothing here asks the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockdev.dm_targets import PoolStatus
from snapshotter.errors import PoolFull, Unavailable

# Mappings in a metadata block, at the least, when they are made here and there.
_MAPPINGS = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When new snapshots are refused, and when the pool is extended. Percent of the whole."""

    data_reserve: int = 3
    extend_above: int = 80
    extend_by: int = 20


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What makes the pool larger: a command that does, or what comes before it."""

    data: str = "`runvol pool extend`"
    metadata: str = "`runvol pool extend --metadata`"


@dataclass(frozen=True, kw_only=True)
class Health:
    """One finding about the pool. `state` is ok, warning or broken."""

    state: str
    mode: str
    message: str


def metadata_reserve(status: PoolStatus) -> int:
    """Metadata blocks that deletions may need, as delete too needs some."""
    return min(256, status.metadata_total // 8)


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """Those of the pool `name`."""

    name: str
    limits: Limits
    remedies: Remedies

    def health(self, status: PoolStatus) -> Health:
        """What is wrong with the pool and what to do, or that nothing is."""
        state, mode, message = self._said(status)
        return Health(state=state, mode=mode, message=f"pool {self.name} {message}")

    def _said(self, status: PoolStatus) -> tuple[str, str, str]:
        stopped = "stop the containers on it and runvol-snapshotter, then `runvol pool check --repair`"
        if status.mode in ("fail", "error"):
            lost = f"its metadata cannot be read or written: {stopped}"
            return "broken", "failed", f"has failed: {lost}, then check the filesystems"
        if status.needs_check:
            return "broken", "needs_check", f"had a metadata error and waits for a check: {stopped}"
        if status.mode == "ro" and status.metadata_free <= 0:
            full = f"is read-only, since its metadata device is full: {self.remedies.metadata}"
            return "broken", "out_of_metadata", full
        if status.mode == "ro":
            return "broken", "read_only", f"is read-only: {stopped}"
        if status.mode == "out_of_data_space":
            waits = "writes wait for space, and fail after a minute" if status.queues else "writes fail"
            full = f"has no free data blocks: {waits}. Remove images, or {self.remedies.data}"
            return "broken", "out_of_data_space", full
        used = status.data_used * 100 // max(1, status.data_total)
        kept = status.metadata_used * 100 // max(1, status.metadata_total)
        state = "warning" if max(used, kept) >= self.limits.extend_above else "ok"
        return state, status.mode, f"uses {used}% of its data and {kept}% of its metadata blocks"

    def refuse_broken(self, status: PoolStatus) -> None:
        """PoolFull where the pool has no room, Unavailable where it takes no writes else."""
        if status.mode == "rw" and not status.needs_check:
            return
        found = self.health(status)
        if found.state == "broken":
            full = found.mode in ("out_of_data_space", "out_of_metadata")
            raise (PoolFull if full else Unavailable)(found.message)

    def admit(self, status: PoolStatus) -> None:
        """Return if a new snapshot may be made. PoolFull before writes would hang, Unavailable as above."""
        self.refuse_broken(status)
        if status.data_free * 100 < status.data_total * self.limits.data_reserve:
            raise PoolFull(
                f"pool {self.name} is full: {status.data_free} of {status.data_total} blocks are free, and "
                f"{self.limits.data_reserve}% are kept for what is running. Remove images or containers, or "
                f"{self.remedies.data}"
            )
        if status.metadata_free < metadata_reserve(status):
            raise PoolFull(
                f"the metadata of pool {self.name} is full: {status.metadata_free} of {status.metadata_total} blocks "
                f"are free, and {metadata_reserve(status)} are kept for deletions. What to do: {self.remedies.metadata}"
            )

    def admit_writes(self, status: PoolStatus, blocks: int) -> None:
        """Count what a large filesystem costs, so many data blocks, before anybody has written to it: PoolFull."""
        kept = status.data_total * self.limits.data_reserve // 100
        metadata = blocks // _MAPPINGS + 1
        lacks_data = status.data_free - blocks < kept
        if lacks_data or status.metadata_free - metadata < metadata_reserve(status):
            remedy = self.remedies.data if lacks_data else self.remedies.metadata
            raise PoolFull(
                f"pool {self.name} has no room for a filesystem of this size: its own tables take up to {blocks} data "
                f"and {metadata} metadata blocks, and {max(0, status.data_free - kept)} and "
                f"{max(0, status.metadata_free - metadata_reserve(status))} may be used. Ask for less, or {remedy}"
            )
