"""The backends, one line each: a node's catalog, its parameters, its documentation and its repairs are made from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from volumes import directory, given, loop, nfs, nfs_parameters
from volumes.backend import Backend
from volumes.exports import Said
from volumes.model import VolumeKind
from volumes.parameter import Parameter


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the backends of a node keep what is theirs; limits in bytes, 0 for none.

    `given_...`: where volumes that are described by a path may lie; `held`: where those in use get names of our own.
    `nfs_exports`: exports that are known, as `server:/path`; `nfs_cluster`: who says which ones a cluster names.
    """

    state_dir: str
    # Their stores are only looked at.
    reading: bool = False
    capacity_limit: int = 0
    directory: str = ""
    directory_limit: int = 0
    given_directories: tuple[str, ...] = ()
    given_devices: tuple[str, ...] = ()
    held: str = ""
    nfs_exports: tuple[str, ...] = ()
    nfs_cluster: Callable[[], Sequence[Said]] | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`meaning`: what a StorageClass gets by naming it; empty for one that no class can name. `described_by`: what in
    its context says all of a volume that nobody made."""

    backend: type[Backend]
    open: Callable[[Settings], Backend]
    meaning: str = ""
    parameters: tuple[Parameter, ...] = ()
    described_by: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.backend.name


# A list of all volumes keeps the places of those behind, so new ones come last.
REGISTRY: tuple[Entry, ...] = (
    Entry(
        backend=loop.LoopBackend,
        open=lambda it: loop.LoopBackend(it.state_dir, capacity_limit=it.capacity_limit, reading=it.reading),
        meaning="one file a volume in a directory of the node, a block device.",
        parameters=loop.PARAMETERS,
    ),
    Entry(
        backend=directory.DirectoryBackend,
        open=lambda it: directory.DirectoryBackend(
            it.state_dir, directory=it.directory, capacity_limit=it.directory_limit, reading=it.reading
        ),
        meaning="one directory a volume, shared into sandboxes by virtio-fs.",
        parameters=directory.PARAMETERS,
    ),
    Entry(
        backend=nfs.NfsBackend,
        open=lambda it: nfs.NfsBackend(it.state_dir, exports_known=it.nfs_exports, cluster=it.nfs_cluster),
        meaning="a directory of an NFS export.",
        parameters=nfs_parameters.PARAMETERS,
        described_by=nfs_parameters.DESCRIBED_BY,
    ),
    Entry(
        backend=given.GivenDirectory,
        open=lambda it: given.GivenDirectory(allowed=it.given_directories),
        described_by=(given.GivenDirectory.key,),
    ),
    Entry(
        backend=given.GivenDevice,
        open=lambda it: given.GivenDevice(allowed=it.given_devices, held=it.held or f"{it.state_dir}/given"),
        described_by=(given.GivenDevice.key,),
    ),
)
# Those that a StorageClass can name; the first is the one of classes that name none.
NAMES = tuple(entry.name for entry in REGISTRY if entry.meaning)
# Those whose volumes may be described by their context alone.
DESCRIBING = frozenset(entry.name for entry in REGISTRY if entry.described_by)
# What ids begin with: of volumes whose path a pod's author may have written, and of block volumes that runvol made.
BY_PATH = tuple(entry.backend.prefix for entry in REGISTRY if entry.described_by and not entry.meaning)
DISKS = tuple(entry.backend.prefix for entry in REGISTRY if entry.meaning and entry.backend.kind is VolumeKind.BLOCK)
