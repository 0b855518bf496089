"""All backends of a node as one: which of them a request or a volume id belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from volumes.backend import Backend
from volumes.errors import VolumeNotFound
from volumes.loop import LoopBackend
from volumes.model import VOLUME_ID, Volume


class Catalog:
    """The enabled backends. Lookups never make anything."""

    def __init__(self, loop: LoopBackend) -> None:
        self.loop = loop

    @classmethod
    def open(cls, state_dir: str, *, capacity_limit: int = 0) -> Catalog:
        """What a node has without any configuration: the backend `loop` under its state directory."""
        return cls(LoopBackend(state_dir, capacity_limit=capacity_limit))

    def close(self) -> None:
        self.loop.close()

    def for_parameters(self, parameters: Mapping[str, str]) -> Backend:
        """The backend that a StorageClass names; its parameters are checked already."""
        return {"loop": self.loop}[parameters.get("backend", "loop")]

    def of(self, volume_id: str) -> Backend:
        """The backend of a volume; VolumeNotFound if none can have made that id."""
        if not VOLUME_ID.match(volume_id) or not volume_id.startswith("loop-"):
            raise VolumeNotFound(volume_id)
        return self.loop

    def get(self, volume_id: str) -> Volume:
        """VolumeNotFound where there is none."""
        volume = self.of(volume_id).get(volume_id)
        if volume is None:
            raise VolumeNotFound(volume_id)
        return volume

    def list(self, *, after: int = 0, limit: int = -1) -> Sequence[tuple[int, Volume]]:
        return self.loop.list(after=after, limit=limit)

    def recover(self) -> Sequence[str]:
        """What was finished or undone after a crash, in words."""
        return self.loop.recover()
