"""The contract that every backend keeps.

All verbs can be repeated, interrupted and run beside themselves for different volumes; the callers serialise
calls for one volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from blockdev import Deadline
from volumes.model import BlockSource, Capability, ContentSource, SizeRange, Volume


class Backend(Protocol):
    """One kind of place where bytes live."""

    name: str

    def create(
        self,
        name: str,
        size: SizeRange,
        parameters: Mapping[str, str],
        uses: Sequence[Capability],
        source: ContentSource | None = None,
    ) -> Volume:
        """The volume called `name`, made now or before, with the content of `source`.

        Raises VolumeConflict, NoSpace, SizeNotAllowed, VolumeNotFound (of the source), DeviceBusy (it is in use).
        """

    def delete(self, volume_id: str) -> None:
        """No such volume afterwards. Raises DeviceBusy while somebody has it open."""

    def get(self, volume_id: str) -> Volume | None:
        """None for a volume that is not there, or not whole yet."""

    def list(self, *, after: int = 0, limit: int = -1) -> Sequence[tuple[int, Volume]]:
        """Volumes with their place in a stable order, those after the place `after`."""

    def available_bytes(self) -> int:
        """What can still be promised."""

    def expand(self, volume_id: str, size: SizeRange) -> Volume:
        """Grow the store of the bytes, never shrink it; not the filesystem on it."""

    def check_expand(self, volume_id: str, size: SizeRange) -> int:
        """The capacity that `expand` would give; raises what it would raise, and changes nothing."""

    def attach(self, volume_id: str) -> BlockSource:
        """How this node gets at the bytes. Opens nothing."""

    def format(self, volume_id: str, fstype: str, deadline: Deadline) -> None:
        """Put a filesystem on a volume that is provably blank; finish what a killed process began.

        A volume that already holds `fstype` is left alone. Raises WrongFilesystem or NotBlank.
        """

    def recover(self) -> Sequence[str]:
        """Finish or undo what a killed process left; what was done, in words."""
