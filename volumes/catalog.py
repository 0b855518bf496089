"""All backends of a node as one: which of them a request or a volume id belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from volumes.backend import Backend
from volumes.directory import DirectoryBackend
from volumes.errors import InvalidParameter, VolumeNotFound
from volumes.loop import LoopBackend
from volumes.model import VOLUME_ID, Volume
from volumes.nfs import NfsBackend

ALL = (LoopBackend.name, DirectoryBackend.name, NfsBackend.name)
# A place in the list of all volumes: the backend above, the place in its own list below.
_SHIFT = 56


class Catalog:
    """The enabled backends; the first is the one of classes that name none. Lookups never make anything."""

    def __init__(
        self, loop: LoopBackend, directory: DirectoryBackend, *others: Backend, enabled: Sequence[str] = ALL
    ) -> None:
        self.loop, self.directory = loop, directory
        self._backends: tuple[Backend, ...] = (loop, directory, *others)
        self._enabled = [name for name in enabled if any(one.name == name for one in self._backends)]

    @classmethod
    def open(
        cls, state_dir: str, *, capacity_limit: int = 0, directory: str = "", directory_limit: int = 0,
        enabled: Sequence[str] = ALL,
    ) -> Catalog:  # fmt: skip
        """The backends of a node under its state directory; limits in bytes, 0 for none.

        One that is not enabled makes no volumes, but those that it has made are still served.
        """
        return cls(
            LoopBackend(state_dir, capacity_limit=capacity_limit),
            DirectoryBackend(state_dir, directory=directory, capacity_limit=directory_limit),
            NfsBackend(state_dir),
            enabled=enabled,
        )

    def close(self) -> None:
        for backend in self._backends:
            backend.close()

    @property
    def backends(self) -> Sequence[Backend]:
        """Those that make volumes."""
        return [one for one in self._backends if one.name in self._enabled]

    @property
    def default(self) -> str:
        """The backend of classes that name none."""
        return self._enabled[0]

    @property
    def takes_snapshots(self) -> bool:
        """Whether an enabled backend can snapshot and clone."""
        return self.loop.name in self._enabled

    def for_parameters(self, parameters: Mapping[str, str]) -> Backend:
        """The backend that a StorageClass names; its parameters are checked already."""
        name = parameters.get("backend", self.default)
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise InvalidParameter("backend", name, f"is not enabled here (setting volumes.backends: {self._enabled})")

    def of(self, volume_id: str, context: Mapping[str, str] | None = None) -> Backend:
        """The backend of a volume; VolumeNotFound if none can have made that id.

        A static volume's id may be anything: its context says what it is.
        """
        if context and context.get("backend") == NfsBackend.name and VOLUME_ID.match(volume_id):
            return next(one for one in self._backends if one.name == NfsBackend.name)
        if VOLUME_ID.match(volume_id):
            for backend in self._backends:
                if volume_id.startswith(backend.prefix):
                    return backend
        raise VolumeNotFound(volume_id)

    def get(self, volume_id: str) -> Volume:
        """VolumeNotFound where there is none."""
        volume = self.of(volume_id).get(volume_id)
        if volume is None:
            raise VolumeNotFound(volume_id)
        return volume

    def list(self, *, after: int = 0, limit: int = -1) -> Sequence[tuple[int, Volume]]:
        """All volumes with their places, those after the place `after`."""
        found: list[tuple[int, Volume]] = []
        for number, backend in enumerate(self._backends):
            first = number << _SHIFT
            if after >= first + (1 << _SHIFT) or 0 <= limit <= len(found):
                continue
            rest = limit - len(found) if limit >= 0 else -1
            found += [(first + place, one) for place, one in backend.list(after=max(0, after - first), limit=rest)]
        return found

    def recover(self) -> Sequence[str]:
        """What was finished or undone after a crash, in words."""
        return [said for backend in self._backends for said in backend.recover()]

    def unknown_files(self) -> Sequence[str]:
        """What lies among the volumes although no store knows it."""
        return [path for backend in self._backends for path in backend.unknown_files()]
