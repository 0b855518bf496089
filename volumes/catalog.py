"""All backends of a node as one: which of them a request or a volume id belongs to."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from volumes.backend import (
    Backend,
    GroupBackend,
    ImageBackend,
    Keeper,
    QuotaBackend,
    SnapshotBackend,
    StoredBackend,
)
from volumes.errors import InvalidParameter, OfANode, OfAnotherDriver, VolumeConflict, VolumeError, VolumeNotFound
from volumes.model import VOLUME_ID, Snapshot, Volume
from volumes.registry import DESCRIBING, NAMES, REGISTRY, Settings
from volumes.troubles import EXPECTED, Trouble, Unfinished, log, logged

# A place in the list of all volumes: the backend above, the place in its own list below.
_SHIFT = 56
E_co = TypeVar("E_co", covariant=True)


@dataclass(frozen=True)
class _Others:
    """What a part of the backends says of the rest: what their ids begin with, the error for one, and why a class
    cannot name one of them."""

    prefixes: tuple[str, ...]
    of_id: Callable[[str], VolumeError]
    of_backend: str


class Catalog:
    """The enabled backends; the first is the one of classes that name none. Lookups never make anything."""

    def __init__(self, backends: Sequence[Backend], *, enabled: Sequence[str] = NAMES) -> None:
        self._backends = tuple(backends)
        self._by_name = {backend.name: backend for backend in self._backends}
        self._enabled = [name for name in enabled if name in self._by_name]
        self._others: _Others | None = None

    @classmethod
    def open(cls, settings: Settings | str, *, enabled: Sequence[str] = NAMES) -> Catalog:
        """Every backend that there is; a state directory alone stands for the settings that hold without others.

        One that is not enabled makes no volumes, but those that it has made are still served.
        """
        it = Settings(state_dir=settings) if isinstance(settings, str) else settings
        return cls([entry.open(it) for entry in REGISTRY], enabled=enabled)

    def only(self, name: str, *, others_driver: str) -> Catalog:
        """One backend alone, enabled or not, for a driver of its own: OfAnotherDriver for the ids of all others."""
        return self._part(
            [name],
            lambda one_id: OfAnotherDriver(one_id, others_driver),
            f"is one of the driver {others_driver}; name that as the StorageClass's provisioner",
        )

    def central(self) -> Catalog:
        """What any controller can make, for one that serves no node: OfANode for the ids of all others."""
        return self._part(
            [backend.name for backend in self._backends if backend.multi_node],
            OfANode,
            "makes volumes of one node, and this controller serves none; its provisioner runs on each node "
            "(--node-deployment)",
        )

    def _part(self, names: Sequence[str], of_id: Callable[[str], VolumeError], of_backend: str) -> Catalog:
        made = Catalog([self._by_name[name] for name in names], enabled=names)
        others = [backend for backend in self._backends if backend.name not in names]
        made._others = _Others(tuple(prefix for one in others for prefix in _prefixes(one)), of_id, of_backend)
        return made

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
    def grouping(self) -> GroupBackend | None:
        """The backend that takes snapshots of several volumes at one moment."""
        return next((backend for backend in self._backends if isinstance(backend, GroupBackend)), None)

    @property
    def takes_groups(self) -> bool:
        """Whether it is enabled."""
        return self.grouping is not None and self.grouping.name in self._enabled

    @property
    def _of_images(self) -> builtins.list[ImageBackend]:
        return [backend for backend in self._backends if isinstance(backend, ImageBackend)]

    @property
    def loop(self) -> ImageBackend:
        """The backend whose volumes are files of this node."""
        return self._of_images[0]

    def watch_copies(self, keeper: Keeper) -> None:
        """`keeper` knows of owners: it is asked before a volume's bytes are copied."""
        for backend in self._backends:
            if isinstance(backend, SnapshotBackend):
                backend.keeper = keeper

    def images(self) -> Sequence[tuple[str, str]]:
        """Every volume that is a file of this node, with the file."""
        return [one for backend in self._of_images for one in backend.images()]

    def volume_at(self, path: str) -> str | None:
        """The id of the volume that this file would be; None for what is no volume's file of ours."""
        return next((found for one in self._of_images if (found := one.volume_at(path)) is not None), None)

    def is_image(self, volume_id: str) -> bool:
        """Whether the id is one of volumes that are files of this node."""
        return bool(VOLUME_ID.match(volume_id)) and volume_id.startswith(tuple(one.prefix for one in self._of_images))

    def adopt(self, path: str, name: str) -> Volume:
        """Take over an existing image file."""
        return self.loop.adopt(path, name)

    def of_snapshot(self, snapshot_id: str) -> SnapshotBackend:
        """The backend of a snapshot; VolumeNotFound if none can have made that id."""
        if VOLUME_ID.match(snapshot_id):
            for backend in self._backends:
                if isinstance(backend, SnapshotBackend) and snapshot_id.startswith(backend.snapshot_prefix):
                    return backend
        raise self._not_found(snapshot_id)

    def snapshot(self, snapshot_id: str) -> Snapshot:
        """VolumeNotFound where there is none."""
        return self.of_snapshot(snapshot_id).snapshot(snapshot_id)

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
        if self._others is not None:
            raise InvalidParameter("backend", name, self._others.of_backend)
        raise InvalidParameter("backend", name, f"is not enabled here (setting volumes.backends: {self._enabled})")

    def of(self, volume_id: str, context: Mapping[str, str] | None = None) -> Backend:
        """The backend of a volume; VolumeNotFound if none can have made that id.

        A static volume's id may be anything: its context says what it is.
        """
        named = context.get("backend", "") if context else ""
        if named in DESCRIBING and named in self._by_name and VOLUME_ID.match(volume_id):
            return self._by_name[named]
        if VOLUME_ID.match(volume_id):
            for backend in self._backends:
                if volume_id.startswith(backend.prefix):
                    return backend
        raise self._not_found(volume_id)

    def _not_found(self, one_id: str) -> Exception:
        others = self._others
        is_other = others is not None and VOLUME_ID.match(one_id) and one_id.startswith(others.prefixes)
        return others.of_id(one_id) if others is not None and is_other else VolumeNotFound(one_id)

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

    def prepare(self) -> None:
        """Stores and their directories are there. One that is away is told, and refuses its own calls."""
        for backend in self._backends:
            if isinstance(backend, StoredBackend):
                try:
                    backend.prepare()
                except EXPECTED as error:
                    log.error("a store's volumes are not there", extra={"backend": backend.name, "why": str(error)})

    def check_name(self, name: str, backend: Backend) -> None:
        """VolumeConflict for a name that a volume of another backend's has on this node."""
        for other in self._backends:
            if other is not backend and isinstance(other, StoredBackend) and other.has_name(name):
                raise VolumeConflict(name, f"is of the backend {other.name}, not {backend.name}")

    def forget(self, one_id: str) -> str:
        """A volume, snapshot or group whose store is lost for good counts as deleted; the backend's name.
        VolumeConflict for one that is there, VolumeNotFound for an id that no store of this node's gives."""
        for backend in self._backends:
            if isinstance(backend, StoredBackend) and VOLUME_ID.match(one_id) and one_id.startswith(backend.prefixes):
                if backend.holds(one_id):
                    raise VolumeConflict(one_id, "is in the store of this node; delete it instead")
                backend.forget(one_id)
                return backend.name
        raise VolumeNotFound(one_id)

    def check_stores(self) -> None:
        """StoreFailed if one cannot be read; asks no server."""
        for backend in self._backends:
            backend.check_store()

    def recover(self) -> Sequence[str]:
        """What was finished or undone after a crash, in words. What cannot be is logged and stays `unfinished`."""
        return [said for backend in self._backends for said in backend.recover()]

    def unfinished(self) -> Sequence[Unfinished]:
        """What `recover` would do now, and what it could not do."""
        return [one for backend in self._backends for one in backend.unfinished()]

    def left_quotas(self) -> Sequence[tuple[QuotaBackend, int]]:
        """Limits that no volume has any more."""
        return [
            (backend, project)
            for backend in self._backends
            if isinstance(backend, QuotaBackend)
            for project in backend.left_quotas()
        ]

    def unknown_files(self) -> Sequence[str]:
        """What lies among the volumes although no store knows it."""
        found: builtins.list[str] = []
        for backend in self._backends:
            try:
                found += backend.unknown_files()
            except EXPECTED as error:
                log.warning("not looked through for unknown files", extra={"what": backend.name, "why": str(error)})
        return found


def _prefixes(backend: Backend) -> builtins.list[str]:
    """What the ids begin with of all that it makes."""
    return [backend.prefix, *(backend.prefixes if isinstance(backend, StoredBackend) else ())]


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
