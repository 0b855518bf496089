"""All backends of a node as one: which of them a request or a volume id belongs to."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from volumes.backend import Backend, SnapshotBackend
from volumes.directory import DirectoryBackend
from volumes.errors import InvalidParameter, VolumeNotFound
from volumes.given import GivenDevice, GivenDirectory
from volumes.loop import LoopBackend
from volumes.model import VOLUME_ID, Snapshot, Volume
from volumes.nfs import NfsBackend
from volumes.troubles import EXPECTED, Trouble, Unfinished, log, logged

ALL = (LoopBackend.name, DirectoryBackend.name, NfsBackend.name)
# Those whose volumes may be described by their context alone.
_STATIC = frozenset({NfsBackend.name, GivenDirectory.name, GivenDevice.name})
# A place in the list of all volumes: the backend above, the place in its own list below.
_SHIFT = 56
E_co = TypeVar("E_co", covariant=True)


class Catalog:
    """The enabled backends; the first is the one of classes that name none. Lookups never make anything."""

    def __init__(
        self, loop: LoopBackend, directory: DirectoryBackend, *others: Backend, enabled: Sequence[str] = ALL
    ) -> None:
        self.loop, self.directory = loop, directory
        self._backends: tuple[Backend, ...] = (loop, directory, *others)
        self._by_name = {backend.name: backend for backend in self._backends}
        self._enabled = [name for name in enabled if any(one.name == name for one in self._backends)]

    @classmethod
    def open(
        cls, state_dir: str, *, capacity_limit: int = 0, directory: str = "", directory_limit: int = 0,
        enabled: Sequence[str] = ALL, given_directories: Sequence[str] = (), given_devices: Sequence[str] = (),
        held: str = "",
    ) -> Catalog:  # fmt: skip
        """The backends of a node under its state directory; limits in bytes, 0 for none.

        One that is not enabled makes no volumes, but those that it has made are still served. `given_…`: where volumes
        that are described by a path may lie; `held`: where those in use get names of our own.
        """
        return cls(
            LoopBackend(state_dir, capacity_limit=capacity_limit),
            DirectoryBackend(state_dir, directory=directory, capacity_limit=directory_limit),
            NfsBackend(state_dir),
            GivenDirectory(allowed=tuple(given_directories)),
            GivenDevice(allowed=tuple(given_devices), held=held or os.path.join(state_dir, "given")),
            enabled=enabled,
        )

    def close(self) -> None:
        for backend in self._backends:
            backend.close()

    def named(self, name: str) -> Backend:
        """One of the backends, by its name."""
        return self._by_name[name]

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
        return any(isinstance(backend, SnapshotBackend) for backend in self.backends)

    @property
    def takes_groups(self) -> bool:
        """Whether an enabled backend can take snapshots of several volumes at one moment."""
        return self.loop.name in self._enabled

    def of_snapshot(self, snapshot_id: str) -> SnapshotBackend:
        """The backend of a snapshot; VolumeNotFound if none can have made that id."""
        if VOLUME_ID.match(snapshot_id):
            for backend in self._backends:
                if isinstance(backend, SnapshotBackend) and snapshot_id.startswith(backend.snapshot_prefix):
                    return backend
        raise VolumeNotFound(snapshot_id)

    def snapshots(
        self, *, after: int = 0, limit: int = -1, source: str = "", trouble: Trouble = logged
    ) -> Sequence[tuple[int, Snapshot]]:  # fmt: skip
        """All snapshots with their places, those after the place `after`; of one volume, if `source` names it.
        `trouble` is told what is left out."""
        listers = [
            partial(backend.snapshots, source=source) if isinstance(backend, SnapshotBackend) else None
            for backend in self._backends
        ]
        return _joined(listers, after, limit, trouble)

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
        named = context.get("backend", "") if context else ""
        if named in _STATIC and named in self._by_name and VOLUME_ID.match(volume_id):
            return self._by_name[named]
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

    def list(
        self, *, after: int = 0, limit: int = -1, trouble: Trouble = logged
    ) -> Sequence[tuple[int, Volume]]:  # fmt: skip
        """All volumes with their places, those after the place `after`. `trouble` is told what is left out.

        Raises StoreFailed where a whole store cannot be read: a list without it would be taken for the truth.
        """
        return _joined([backend.list for backend in self._backends], after, limit, trouble)

    def check_stores(self) -> None:
        """StoreFailed if one cannot be read; asks no server."""
        for backend in (self.loop, self.directory):
            backend.list(limit=1)

    def recover(self) -> Sequence[str]:
        """What was finished or undone after a crash, in words. What cannot be is logged and stays `unfinished`."""
        return [said for backend in self._backends for said in backend.recover()]

    def unfinished(self) -> Sequence[Unfinished]:
        """What `recover` would do now, and what it could not do."""
        return [*self.loop.unfinished(), *self.directory.unfinished()]

    def unknown_files(self) -> Sequence[str]:
        """What lies among the volumes although no store knows it."""
        found: builtins.list[str] = []
        for backend in self._backends:
            try:
                found += backend.unknown_files()
            except EXPECTED as error:
                log.warning("not looked through for unknown files", extra={"what": backend.name, "why": str(error)})
        return found


class _Lister(Protocol[E_co]):
    def __call__(self, *, after: int, limit: int, trouble: Trouble) -> Sequence[tuple[int, E_co]]: ...


def _joined(
    listers: Sequence[_Lister[E_co] | None], after: int, limit: int, trouble: Trouble
) -> Sequence[tuple[int, E_co]]:  # fmt: skip
    """One list of several, in which every entry keeps its place whatever comes and goes in the others."""
    found: list[tuple[int, E_co]] = []
    for number, lister in enumerate(listers):
        first = number << _SHIFT
        if lister is None or after >= first + (1 << _SHIFT) or 0 <= limit <= len(found):
            continue
        rest = limit - len(found) if limit >= 0 else -1
        found += [
            (first + place, one) for place, one in lister(after=max(0, after - first), limit=rest, trouble=trouble)
        ]
    return found
