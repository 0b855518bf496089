"""The rows of the table: what a source is on a node, whoever will use it, and which way it takes to which runtime."""

from __future__ import annotations

import dataclasses
import logging
import os

import msgspec

from blockdev import Deadline, DeviceBusy, filesystems, mounts, nfs, superblocks
from blockdev.errors import FilesystemDamaged
from guestmount.claims import HOST, SANDBOX, Cell, Claim, NfsMount, Target, Use
from guestmount.detect import Runtime
from guestmount.errors import BadRequest, Conflict, Refused
from guestmount.requests import PublishRequest, StageRequest
from guestmount.ways import exclusion, mounted, servers
from guestmount.ways.base import Means, Problem, Usage, Way, of_mount
from guestmount.ways.device_node import DeviceNode
from guestmount.ways.guest_device import GuestDevice, of_superblock
from guestmount.ways.guest_mount import GuestMount
from guestmount.ways.mounted import Mounted
from guestmount.ways.shared import Shared
from volumes import DirectorySource, NfsSource, SizeRange, Source, Volume, VolumeError, VolumeKind, parameters
from volumes.backend import Backend, BlockBackend
from volumes.nfs_described import make_path, set_mode

log = logging.getLogger("runvol.rows")

MOUNTED, DEVICE_NODE, GUEST_DEVICE, GUEST_MOUNT, SHARED = Mounted(), DeviceNode(), GuestDevice(), GuestMount(), Shared()
WAYS: dict[str, Way] = {way.name: way for way in (MOUNTED, DEVICE_NODE, GUEST_DEVICE, GUEST_MOUNT, SHARED)}


class Row:
    """One kind of source. What it does not define it does not need."""

    kind: VolumeKind
    # Of a target that no claim speaks of any more.
    usual: Way
    # Whether this node knows the volume without its claim.
    stored = True
    # Whether its device is what a pod gets.
    by_device = False

    def way(self, _claim: Claim, _request: PublishRequest, _runtime: Runtime) -> Way:
        """How the volume reaches a pod of this runtime."""
        return self.usual

    def way_of(self, _claim: Claim, _target: Target) -> Way:
        """How it reached a target of which an older release wrote nothing."""
        return self.usual

    def new_claim(self, request: StageRequest, source: Source, deadline: Deadline) -> Claim:
        """The record of a volume that is staged here for the first time."""
        return Claim(
            volume=request.volume_id,
            source=getattr(source, "path", ""),
            staging_path=request.staging_path,
            use=Use.of(request.capability, self._fstype(request, source, deadline)),
            kind=self.kind,
        )

    def _fstype(self, _request: StageRequest, _source: Source, _deadline: Deadline) -> str:
        return ""

    def completed(self, claim: Claim, new: Claim) -> Claim:
        """A claim that was made again, with what the one that a request would make (`new`) says of the volume."""
        use = msgspec.structs.replace(new.use, fstype=claim.use.fstype or new.use.fstype)
        there = not claim.staging_path or mounts.is_mount_point(new.staging_path)
        return claim.but(staging_path=new.staging_path if there else claim.staging_path, use=use)

    def is_other(self, _claim: Claim, _new: Claim) -> bool:
        """Whether a volume of the same id is staged, but as another source."""
        return False

    def check_restage(self, claim: Claim, backend: Backend, request: StageRequest, new: Claim) -> None:
        """Conflict unless pods that have the other source may go on with it."""

    def check_publish(
        self, claim: Claim, backend: Backend, request: PublishRequest, source: Source, old: Target | None
    ) -> None:
        """Conflict where the request speaks of another source than the one that is staged."""

    def make_ready(
        self, _backend: Backend, _request: StageRequest, _claim: Claim, _source: Source, _deadline: Deadline,
        *, first: bool,
    ) -> None:  # fmt: skip
        """What a stage does to the volume itself. `first`: no claim has it yet."""

    def let_go(self, claim: Claim) -> None:
        """What could hold up the unmount of the staging path."""

    def problems(self, _volume: Volume, _source: Source) -> list[Problem]:
        """What is wrong with the volume's bytes, whoever has it."""
        return []

    def grow(self, _means: Means, cell: Cell, backend: Backend, size: SizeRange, _deadline: Deadline) -> int:
        """The capacity of a volume that no way keeps from growing."""
        return backend.expand(cell.present.volume, size).capacity_bytes

    def usage(self, _claim: Claim, path: str, deadline: Deadline) -> Usage:
        """How full it is, asked at the staging path."""
        return of_mount(path, deadline)


class _Block(Row):
    kind = VolumeKind.BLOCK
    by_device = True

    def check_publish(
        self, claim: Claim, backend: Backend, request: PublishRequest, source: Source, old: Target | None
    ) -> None:
        del request, source, old
        volume = backend.get(claim.volume)
        if volume is not None and volume.formatting:
            raise Refused(f"volume {claim.volume} was being formatted when the driver ended; stage it again")

    def problems(self, volume: Volume, source: Source) -> list[Problem]:
        path, found = source.path, []
        if os.path.isfile(path) and os.stat(path).st_size < volume.capacity_bytes:
            found.append(Problem(reason="BackingFileTooSmall", message=f"{path} is smaller than its volume", lost=True))
        try:
            block = superblocks.read(path)
        except FilesystemDamaged as error:
            return [*found, Problem(reason="FilesystemDamaged", message=str(error), lost=True)]
        if block is not None and block.errors:
            message = f"the kernel has recorded errors in the {block.fstype} on {path}"
            found.append(Problem(reason="FilesystemErrors", message=message))
        return found

    def grow(self, means: Means, cell: Cell, backend: Backend, size: SizeRange, deadline: Deadline) -> int:
        claim = cell.present
        with exclusion.explained(claim):
            exclusion.release(cell, deadline)
            claim = cell.present
            if claim.owner is None:
                exclusion.guest_has_let_go(claim)
        volume = backend.expand(claim.volume, size)
        self._grow(means, claim, deadline)
        return volume.capacity_bytes

    def _grow(self, means: Means, claim: Claim, deadline: Deadline) -> None:
        mounted.grow(means, claim, deadline)


class Filesystem(_Block):
    """A filesystem on a block device or in an image file."""

    usual = MOUNTED

    def way(self, _claim: Claim, _request: PublishRequest, runtime: Runtime) -> Way:
        return GUEST_DEVICE if runtime.kind == SANDBOX else MOUNTED

    def way_of(self, claim: Claim, _target: Target) -> Way:
        return GUEST_DEVICE if claim.owner is not None and claim.owner.kind == SANDBOX else MOUNTED

    def _fstype(self, request: StageRequest, source: Source, deadline: Deadline) -> str:
        wanted = request.capability.fstype or request.context.get(parameters.FSTYPE, "")
        if wanted:
            return wanted
        found = filesystems.found_on(source.path, deadline)
        return found if found in filesystems.SUPPORTED else filesystems.DEFAULT

    def make_ready(
        self, backend: Backend, request: StageRequest, claim: Claim, _source: Source, deadline: Deadline,
        *, first: bool,
    ) -> None:  # fmt: skip
        del first
        if isinstance(backend, BlockBackend):
            exclusion.acquire(claim, deadline)
            backend.format(request.volume_id, claim.use.fstype, deadline)

    def usage(self, claim: Claim, path: str, deadline: Deadline) -> Usage:
        on_host = claim.owner is not None and claim.owner.kind == HOST
        return of_mount(path, deadline) if on_host else of_superblock(claim)


class RawDevice(_Block):
    """A block device without a filesystem of ours (volumeMode: Block)."""

    usual = DEVICE_NODE

    def _grow(self, _means: Means, claim: Claim, _deadline: Deadline) -> None:
        mounted.grow_device(claim)

    def usage(self, claim: Claim, path: str, deadline: Deadline) -> Usage:
        return DEVICE_NODE.usage(claim, path, deadline)


class Directory(Row):
    """A directory of this node."""

    kind = VolumeKind.FILES
    usual = SHARED


class Export(Row):
    """A directory that an NFS server exports. Its claim alone says what it is; the server is asked by whoever mounts.

    A dead one would cost every look at the volume its patience.
    """

    kind = VolumeKind.FILES
    usual = SHARED
    stored = False

    def way(self, _claim: Claim, request: PublishRequest, runtime: Runtime) -> Way:
        if runtime.kind == SANDBOX and request.context.get("inSandbox") != "share":
            return GUEST_MOUNT
        return SHARED

    def way_of(self, _claim: Claim, target: Target) -> Way:
        return GUEST_MOUNT if target.dialect else SHARED

    def new_claim(self, request: StageRequest, source: Source, deadline: Deadline) -> Claim:
        """A version among the mount options, as mount(8) takes it, becomes the mount's."""
        new = super().new_claim(request, source, deadline)
        mount = _mount(source)
        asked, flags = nfs.version_among(new.use.mount_flags)
        if asked:
            named = request.context.get("vers", "")
            if named and named != asked:
                raise BadRequest("mount_flags", f"vers={asked}", f"contradicts the volume's parameter vers = {named}")
            mount = msgspec.structs.replace(mount, version=asked)
            new = new.but(use=msgspec.structs.replace(new.use, mount_flags=flags))
        return new.but(nfs=mount, source=mount.export.source)

    def completed(self, claim: Claim, new: Claim) -> Claim:
        """How it is mounted is not all seen in the mount."""
        return super().completed(claim, new).but(nfs=new.nfs, source=new.source)

    def is_other(self, claim: Claim, new: Claim) -> bool:
        return claim.nfs is not None and new.nfs is not None and not claim.nfs.is_same(new.nfs)

    def check_restage(self, claim: Claim, backend: Backend, request: StageRequest, new: Claim) -> None:
        if new.nfs is not None:
            _check_same(claim, new.nfs, _as_before(backend, request, new.nfs))

    def check_publish(
        self, claim: Claim, backend: Backend, request: PublishRequest, source: Source, old: Target | None
    ) -> None:
        asked = _mount(source)
        if claim.nfs is not None and not request.context.get("vers"):
            # Without a version in the context, that of the mount options counts, which staging has seen.
            asked = msgspec.structs.replace(asked, version=claim.nfs.version)
        _check_same(claim, asked, _as_before(backend, request, asked) if old is not None else None)

    def make_ready(
        self, _backend: Backend, request: StageRequest, claim: Claim, source: Source, deadline: Deadline,
        *, first: bool,
    ) -> None:  # fmt: skip
        if not first or not isinstance(source, NfsSource) or claim.nfs is None:
            return
        meant = dataclasses.replace(source, version=claim.nfs.version)
        if request.context.get("makePath") == "true":
            make_path(meant, deadline)
        if request.context.get("mode"):
            recursive = request.context.get("modeType") == "recursive"
            set_mode(meant, int(request.context["mode"], 8), deadline, recursive=recursive)

    def usage(self, claim: Claim, path: str, deadline: Deadline) -> Usage:
        return servers.usage(claim, path, deadline)

    def let_go(self, claim: Claim) -> None:
        # A mount that hung past its call's deadline may have come about since.
        mounts.be_let_go(claim.staging_path)


def _mount(source: Source) -> NfsMount:
    if not isinstance(source, NfsSource):
        raise Refused(f"{source.path} is no NFS export")
    return NfsMount(server=source.server, path=source.path, version=source.version, options=source.options)


def _as_before(backend: Backend, request: StageRequest | PublishRequest, asked: NfsMount) -> NfsMount | None:
    """What a release that passed over `subDir` has delivered for this context; it stays delivered."""
    if "subDir" not in request.context:
        return None
    context = {key: value for key, value in request.context.items() if key != "subDir"}
    found = _mount(backend.attach(request.volume_id, context))
    return msgspec.structs.replace(found, version=asked.version)


def _check_same(claim: Claim, asked: NfsMount, before: NfsMount | None) -> None:
    if claim.nfs is None or claim.nfs.is_same(asked) or (before is not None and claim.nfs.is_same(before)):
        return
    raise Conflict(
        f"volume {claim.volume} is {claim.nfs} on this node, asked for is {asked}; unpublish its pods and stage it "
        "again, or give the other export a volumeHandle of its own"
    )


_FILESYSTEM, _RAW, _DIRECTORY, _EXPORT = Filesystem(), RawDevice(), Directory(), Export()


def of_source(source: Source, *, raw: bool) -> Row:
    """The row of a volume that is about to be staged."""
    if isinstance(source, NfsSource):
        return _EXPORT
    if isinstance(source, DirectorySource):
        return _DIRECTORY
    return _RAW if raw else _FILESYSTEM


def of_claim(claim: Claim) -> Row:
    """The row of a volume that is staged."""
    if claim.kind is VolumeKind.FILES:
        return _EXPORT if claim.nfs is not None else _DIRECTORY
    return _RAW if claim.use.raw else _FILESYSTEM


def completed(claim: Claim, new: Claim) -> Claim:
    """`Row.completed`; Conflict where what stands is another kind of volume."""
    row = of_claim(claim)
    if of_claim(new) is not row:
        raise Conflict(f"volume {claim.volume} is {claim.use} on this node; it cannot be had with another capability")
    return row.completed(claim, new)


def way_at(claim: Claim, path: str) -> Way:
    """How the volume reached the target `path`; the usual way of its kind, where the claim knows no such target."""
    target, row = claim.targets.get(path), of_claim(claim)
    if target is None:
        return row.usual
    return WAYS[target.way] if target.way in WAYS else row.way_of(claim, target)


def in_guests(claim: Claim) -> list[str]:
    """The targets whose volume a guest has, and the host's kernel has not."""
    sandboxed = claim.owner is not None and claim.owner.kind != HOST
    return [path for path in claim.targets if sandboxed or way_at(claim, path) in (GUEST_DEVICE, GUEST_MOUNT)]


def by_others(claim: Claim) -> bool:
    """Whether somebody else than the host's kernel may write the volume's bytes, or might until a moment ago."""
    if claim.owner is not None and claim.owner.kind != HOST:
        return True
    return any(way_at(claim, path) in (GUEST_DEVICE, DEVICE_NODE) for path in claim.targets)


def drop_unclaimed(backend: Backend, volume_id: str, deadline: Deadline) -> None:
    """After a lost claim: loop devices on the volume's file that nobody uses. What is used by somebody stays."""
    try:
        if backend.kind is VolumeKind.BLOCK:
            exclusion.drop_leftovers(backend.attach(volume_id).path, deadline)
    except VolumeError:
        return  # there is no whole volume that could have left something
    except DeviceBusy as error:
        log.warning("the volume is still in use", extra={"volume": volume_id, "reason": str(error)})
