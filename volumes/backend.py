"""The contract that every backend keeps.

All verbs can be repeated, interrupted and run beside themselves for different volumes; the callers serialise
calls for one volume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from blockdev import Deadline
from volumes.model import (
    Capability,
    ContentSource,
    Need,
    Past,
    SizeRange,
    Snapshot,
    SnapshotGroup,
    Source,
    Volume,
    VolumeKind,
)
from volumes.troubles import Trouble, Unfinished, logged


class Keeper(Protocol):
    """Who knows of a volume's owners on this node, for whoever copies its bytes."""

    def still(self, volume_ids: Sequence[str], deadline: Deadline) -> AbstractContextManager[None]:
        """Nobody gets, gives back or deletes these volumes before the block ends. Busy if somebody is doing it."""

    def check_copy(self, volume_id: str) -> None:
        """Refused while somebody may write to it in the middle of a copy. For callers that keep it `still`."""

    def check_unowned(self, volume_id: str) -> None:
        """Refused while a pod has the volume. For callers that keep it `still`."""

    def make_way(self, volume_id: str) -> None:
        """VolumeUnfinished where a pod has waited long enough for a volume that is kept `still`."""


class Unkept:
    """The keeper where nobody has owners."""

    def still(self, _volume_ids: Sequence[str], _deadline: Deadline) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def check_copy(self, volume_id: str) -> None:
        """Nobody has it."""

    def check_unowned(self, volume_id: str) -> None:
        """Nobody has it."""

    def make_way(self, volume_id: str) -> None:
        """Nobody waits."""


class Backend(Protocol):
    """One kind of place where bytes live."""

    name: str
    # What the ids of its volumes begin with.
    prefix: str
    kind: VolumeKind
    # Whether its volumes can be reached from several nodes.
    multi_node: bool

    def create(
        self,
        name: str,
        size: SizeRange,
        parameters: Mapping[str, str],
        uses: Sequence[Capability],
        source: ContentSource | None = None,
    ) -> Volume:
        """The volume called `name`, made now or before, with the content of `source`.

        Raises VolumeConflict, NoSpace, SizeNotAllowed, VolumeNotFound (of the source), DeviceBusy (it is in use),
        VolumeUnfinished while a copy takes longer: it goes on, and who asks again waits for it.
        """

    def delete(self, volume_id: str) -> None:
        """No such volume afterwards. Raises DeviceBusy while somebody has it open."""

    def get(self, volume_id: str) -> Volume | None:
        """None for a volume that is not there, or not whole yet."""

    def list(
        self, *, after: int = 0, limit: int = -1, trouble: Trouble = logged
    ) -> Sequence[tuple[int, Volume]]:  # fmt: skip
        """Volumes with their place in a stable order, those after the place `after`.

        `trouble` is told what is left out since its server, share or record cannot be read; it stops nothing else.
        """

    def available_bytes(self) -> int:
        """What can still be promised."""

    def expand(self, volume_id: str, size: SizeRange) -> Volume:
        """Grow the store of the bytes, never shrink it; not the filesystem on it."""

    def check_expand(self, volume_id: str, size: SizeRange) -> int:
        """The capacity that `expand` would give; raises what it would raise, and changes nothing."""

    def promise(self, volume_id: str, size: SizeRange) -> int:
        """`check_expand`, and what it answers is kept for the volume until `expand` comes, whatever is promised to
        others meanwhile. A backend whose controller expands needs nothing of the kind."""

    def problems(self, volume_id: str) -> Sequence[str]:
        """What is wrong with a volume that only its backend can see, in words. Waits for nothing."""

    def refuses(self, flag: str) -> str | None:
        """Why its volumes cannot be mounted with this option; None if they can."""

    def attach(self, volume_id: str, context: Mapping[str, str] | None = None, /) -> Source:
        """How this node gets at the bytes, for a volume with this context. Opens nothing."""

    def close(self) -> None:
        """Let go of the store."""

    def recover(self) -> Sequence[str]:
        """Finish or undo what a killed process left; what was done, in words. What cannot be done stops nothing."""

    def check_store(self) -> None:
        """StoreFailed if the store of its volumes cannot be read; asks no server."""

    def unfinished(self) -> Sequence[Unfinished]:
        """What `recover` would do now, and what it could not do."""

    def needs(self) -> Sequence[Need]:
        """What of this node decides whether its volumes work here."""

    def unknown_files(self) -> Sequence[str]:
        """What lies among the volumes although no row speaks of it; never removed by runvol."""


@runtime_checkable
class QuotaBackend(Backend, Protocol):
    """One whose sizes are quotas of a filesystem, by numbers (projects)."""

    @property
    def directory(self) -> str:
        """Where its volumes lie."""

    def left_quotas(self) -> Sequence[int]:
        """Numbers that have a limit although no volume has them."""

    def lift(self, project: int) -> None:
        """The limit of such a one goes."""


@runtime_checkable
class StoredBackend(Backend, Protocol):
    """One that has a store on this node, and a directory for what is in it."""

    def prepare(self) -> None:
        """Store and directory are there, and belong together. StoreAway where volumes are missed in it."""

    def forget(self, one_id: str) -> None:
        """What another store made under this id is lost for good: it counts as deleted from now on."""

    def has_name(self, name: str) -> bool:
        """Whether a volume of this name is, or is being made, in the store."""

    def holds(self, one_id: str) -> bool:
        """Whether the store has a volume, snapshot or group of this id."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the ids begin with that it gives, those of snapshots and groups among them."""


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """One whose volumes are block devices, or files that become some: what lies on one, somebody has written."""

    def past(self, volume_id: str) -> Past:
        """What is known of who has written the volume; the worst where nothing is."""

    def note(self, volume_id: str, *, foreign_written: bool | None = None, mount_group: str | None = None) -> None:
        """What `past` tells from now on, durably; None leaves it as it is."""


@runtime_checkable
class BlockBackend(Backend, Protocol):
    """One whose volumes are block devices, or files that become some."""

    def format(self, volume_id: str, fstype: str, deadline: Deadline) -> None:
        """Put a filesystem on a volume that is provably blank; finish what a killed process began.

        A volume that already holds `fstype` is left alone. Raises WrongFilesystem or NotBlank.
        """


@runtime_checkable
class ImageBackend(BlockBackend, Protocol):
    """One whose volumes are files of this node, which loop devices, hand-offs and copies of bytes speak of."""

    def images(self) -> Sequence[tuple[str, str]]:
        """Every volume's id with its file."""

    def volume_at(self, path: str) -> str | None:
        """The id of the volume that this file would be; None for a path that is no volume's of this backend."""

    def adopt(self, path: str, name: str) -> Volume:
        """Take over an existing image file, with its data and its filesystem."""


@runtime_checkable
class GroupBackend(Backend, Protocol):
    """One that takes snapshots of several volumes at one moment."""

    def create_group(self, name: str, volume_ids: Sequence[str], deadline: Deadline) -> SnapshotGroup:
        """The snapshots of volumes that nobody uses, taken now or before; all of them, or none.

        VolumeUnfinished while the copies take longer: they go on, and who asks again waits for them.
        """

    def group(self, group_id: str) -> SnapshotGroup:
        """VolumeNotFound where there is none."""

    def delete_group(self, group_id: str) -> None:
        """No such group, nor any of its snapshots, afterwards."""


@runtime_checkable
class DescribedBackend(Backend, Protocol):
    """One whose volumes nobody makes: a path describes each."""

    # What the path is called, in a façade's options and in the volume's context.
    key: str

    def id_of(self, path: str) -> str:
        """The volume's id; InvalidParameter for a path that is not allowed."""

    def let_go(self, volume_id: str) -> None:
        """Nothing of ours keeps the volume. For callers that know that it is in no use."""


@runtime_checkable
class SnapshotBackend(Backend, Protocol):
    """One that takes snapshots of its volumes, and makes volumes from them and from others."""

    # What the ids of its snapshots begin with.
    snapshot_prefix: str
    # Who knows of owners sets it.
    keeper: Keeper

    def take_snapshot(self, name: str, volume_id: str, deadline: Deadline) -> Snapshot:
        """The snapshot called `name`, taken now or before. VolumeConflict if the name is another volume's.

        VolumeUnfinished while a copy takes longer: it goes on, and who asks again waits for it.
        """

    def snapshot(self, snapshot_id: str) -> Snapshot:
        """VolumeNotFound where there is none."""

    def delete_snapshot(self, snapshot_id: str) -> None:
        """No such snapshot afterwards, whether there was one or not."""

    def snapshots(
        self, *, after: int = 0, limit: int = -1, source: str = "", trouble: Trouble = logged
    ) -> Sequence[tuple[int, Snapshot]]:  # fmt: skip
        """Snapshots with their places, as `list` has volumes; of one volume only, if `source` names it."""
