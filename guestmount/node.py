"""A volume's life on a node: stage, publish, unpublish, unstage, expand, whatever the façade.

Every verb may be repeated, comes in any order, and knows nothing but the claim, the disk and the kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from blockdev import Deadline, DeviceBusy, filesystems, ioctls, mounts, nfs
from blockdev.detached import private_mount
from blockdev.errors import BlockdevError
from guestmount import agreement, file_delivery, groups, host_delivery, ownership, paths, placeholder, preflight
from guestmount.claims import HOST, SANDBOX, Cell, Claim, Claims, Owner, Target, Use
from guestmount.detect import Detector, Runtime
from guestmount.errors import Refused
from guestmount.handoff import Dialect, KataDialect
from guestmount.reach import Reach
from guestmount.requests import PublishRequest, StageRequest, check_capability, check_options
from volumes import (
    Catalog,
    InvalidParameter,
    NfsSource,
    SizeRange,
    Source,
    VolumeError,
    VolumeKind,
    VolumeNotFound,
    parameters,
)
from volumes.backend import Backend, BlockBackend
from volumes.nfs import set_mode

log = logging.getLogger("runvol.node")


@dataclass(frozen=True, kw_only=True)
class Node:
    """What the verbs work with. `roots`: the directories under which requests may name paths.

    `reach` proves that kubelet sees what is mounted there; None where there is no kubelet.
    `rust_shared_block`: containers of one pod may share a block volume under Kata's Rust shim.
    """

    catalog: Catalog
    claims: Claims
    detector: Detector
    dialects: Sequence[Dialect]
    roots: Sequence[str]
    reach: Reach | None = None
    rust_shared_block: bool = False

    def __post_init__(self) -> None:
        self.catalog.loop.check_copy = self.check_copy

    # -- stage and unstage

    def stage(self, request: StageRequest, deadline: Deadline) -> None:
        """The volume is ready to be published: attached, and formatted if it was provably blank. Mounts nothing."""
        staging = paths.check("staging_target_path", request.staging_path, self.roots)
        backend = self.catalog.of(request.volume_id, request.context)
        check_capability(request.capability, backend)
        with self.claims.locked(request.volume_id, deadline) as cell:
            attached = backend.attach(request.volume_id, request.context)
            source = attached.path
            claim = cell.claim
            fstype = self._fstype(request, source, deadline) if backend.kind is VolumeKind.BLOCK else ""
            use = Use.of(request.capability, fstype)
            if isinstance(attached, NfsSource):
                attached, use = agreement.with_version(attached, use, request.context.get("vers", ""))
            if claim is not None and claim.made_again:
                claim = cell.write(claim.but(staging_path=staging, use=use))
            if claim is not None and claim.staging_path != staging and not claim.targets:
                claim = self._restage(cell, staging, use, deadline)
            if claim is not None and agreement.other_export(claim, attached):
                claim = self._of_this_export(cell, request, attached, deadline)
            if claim is None:
                _tell_passed_over(request)
                check_options(use.mount_flags)
            else:
                agreement.check_same_stage(claim, staging, use)
                if claim.owner is not None:
                    return  # kubelet has restarted; nothing is opened for writing
            new = agreement.new_claim(request, attached, use, backend.kind)
            if isinstance(backend, BlockBackend) and not request.capability.raw:
                ownership.acquire(claim or new, deadline)
                backend.format(request.volume_id, fstype, deadline)
            if claim is None:
                if isinstance(attached, NfsSource) and request.context.get("mode"):
                    set_mode(attached, int(request.context["mode"], 8), deadline,
                             recursive=request.context.get("modeType") == "recursive")  # fmt: skip
                cell.write(new)

    def _of_this_export(
        self, cell: Cell, request: StageRequest, attached: Source, deadline: Deadline
    ) -> Claim | None:  # fmt: skip
        """The claim, if its pods may go on with the export that they have; None once it is gone, as nobody has it."""
        ownership.forget_vanished(cell, self._alive)
        claim = agreement.present(cell)
        if claim.targets:
            agreement.check_same_export(claim, attached, self._as_before(request, attached))
            return claim
        self._let_go(cell, deadline)
        cell.remove()
        return None

    def _as_before(self, request: StageRequest | PublishRequest, attached: Source) -> Source | None:
        """What a release that passed over `subDir` has delivered for this context; it stays delivered."""
        if not isinstance(attached, NfsSource) or "subDir" not in request.context:
            return None
        context = {key: value for key, value in request.context.items() if key != "subDir"}
        found = self.catalog.of(request.volume_id, context).attach(request.volume_id, context)
        return dataclasses.replace(found, version=attached.version) if isinstance(found, NfsSource) else None

    def _fstype(self, request: StageRequest, source: str, deadline: Deadline) -> str:
        if request.capability.raw:
            return ""
        wanted = request.capability.fstype or request.context.get(parameters.FSTYPE, "")
        if wanted:
            return wanted
        found = filesystems.found_on(source, deadline)
        return found if found in filesystems.SUPPORTED else filesystems.DEFAULT

    def _restage(self, cell: Cell, staging: str, use: Use, deadline: Deadline) -> Claim | None:
        """The claim of a volume without targets that was staged elsewhere, or lingers since its unstage."""
        try:
            self._let_go(cell, deadline)
        except Refused:
            if agreement.present(cell).staging_path or agreement.present(cell).use != use:
                raise
            # Its last owner still has it, and may have it again; whether another may is asked at the publish.
            return cell.write(agreement.present(cell).but(staging_path=staging))
        if cell.claim is not None and not cell.claim.staging_path:
            cell.remove()
        return cell.claim

    def unstage(self, volume_id: str, staging_path: str, deadline: Deadline) -> None:
        """Nothing of the volume hangs at the staging path, and the device is free or its claim lingers until it is.

        Refused while it is published. A process that keeps the device open, or a mount namespace of its own that keeps
        the mount, holds up the next kernel, an expansion and the deletion, not this call: kubelet's part is done.
        """
        staging = paths.check("staging_target_path", staging_path, self.roots)
        with self.claims.locked(volume_id, deadline) as cell:
            if cell.claim is None or cell.claim.staging_path != staging:
                mounts.be_unmounted(staging, deadline)
            if cell.claim is None:
                self._drop_unclaimed(volume_id, deadline)
                return
            if cell.claim.staging_path not in (staging, ""):
                return
            try:
                self._let_go(cell, deadline)
            except Refused as error:
                claim = agreement.present(cell)
                if claim.targets or mounts.is_mount_point(staging):
                    raise
                log.warning("the volume is still in use", extra={"volume": volume_id, "reason": str(error)})
                cell.write(claim.but(staging_path=""))
                return
            cell.remove()

    def _let_go(self, cell: Cell, deadline: Deadline) -> None:
        """Release an owner without targets; Refused while there are targets, or somebody still has the device."""
        ownership.forget_vanished(cell, self._alive)
        claim = cell.claim
        if claim is None:
            return
        if claim.targets:
            raise Refused(
                f"volume {claim.volume} is still published at {', '.join(sorted(claim.targets))}; unpublish first"
            )
        with _explaining_guest(claim):
            ownership.release(cell, deadline)
        if claim.nfs is not None:
            # A mount that hung past its call's deadline may have come about since.
            mounts.be_let_go(claim.staging_path)
        mounts.be_unmounted(claim.staging_path, deadline)

    # -- publish and unpublish

    def publish(self, request: PublishRequest, deadline: Deadline) -> None:
        """The volume is at the target: mounted there for a runc pod, handed to the guest for a sandboxed one."""
        path = paths.check("target_path", request.target, self.roots)
        paths.check("staging_target_path", request.staging_path, self.roots)
        backend = self.catalog.of(request.volume_id, request.context)
        check_capability(request.capability, backend)
        if isinstance(backend, BlockBackend) and self.catalog.get(request.volume_id).formatting:
            raise Refused(f"volume {request.volume_id} was being formatted when the driver ended; stage it again")
        attached = backend.attach(request.volume_id, request.context)  # its bytes are still there
        with self.claims.locked(request.volume_id, deadline) as cell:
            claim = cell.claim
            if claim is None or claim.staging_path != request.staging_path:
                staged = claim is not None and claim.staging_path
                where = f"is staged at {staged}" if staged else "is not staged on this node"
                raise Refused(
                    f"volume {request.volume_id} {where}; call NodeStageVolume with this staging_target_path first"
                )
            target = agreement.target_of(request)
            if claim.made_again and path in claim.targets:
                known = msgspec.structs.replace(target, read_only=claim.targets[path].read_only)
                claim = cell.write(claim.but(targets={**claim.targets, path: known}, made_again=False))
            old = claim.targets.get(path)
            if isinstance(attached, NfsSource):
                # Without a version in the context, that of the mount options counts, which staging has seen.
                asked = attached if request.context.get("vers") else agreement.in_version_of(claim, attached)
                before = self._as_before(request, asked) if old is not None else None
                agreement.check_same_export(claim, asked, before)
            agreement.check_same_publish(claim, request, old, target)
            if claim.kind is VolumeKind.FILES:
                self._publish_files(cell, request, path, old or target, deadline)
                return
            if old is not None and claim.owner is not None:
                self._deliver(cell, claim, path, target, deadline)
                return
            self._publish_new(cell, request, path, target, deadline)

    def _publish_new(self, cell: Cell, request: PublishRequest, path: str, target: Target, deadline: Deadline) -> None:
        self._check_reach()
        runtime = self.detector.detect(request.pod, request.context.get("runtime", ""), deadline)
        ownership.forget_vanished(cell, self._alive)
        claim = agreement.present(cell)
        check_options(claim.use.mount_flags)
        owner = agreement.owner_of(request, runtime)
        if runtime.kind == SANDBOX and not claim.use.raw:
            preflight.check(
                runtime,
                pv_name=claim.volume,
                read_only=target.read_only,
                rust_shared_block=self.rust_shared_block,
            )
            self._dialect(owner).check(agreement.delivery_of(claim, path, target))
        if claim.lingers and claim.owner is not None and not claim.owner.is_same_kernel(owner):
            with _explaining_guest(claim):
                ownership.release(cell, deadline)
            claim = agreement.present(cell)
        ownership.admit(claim, owner, path, target)
        if claim.owner is None:
            ownership.acquire(claim, deadline)
            claim = claim.but(owner=owner, prepared=False, proved=False)
        claim = cell.write(claim.but(targets={**claim.targets, path: target}))
        try:
            self._deliver(cell, claim, path, target, deadline)
        except BaseException:
            with contextlib.suppress(BlockdevError, OSError):
                self._take_back(cell, path, Deadline.after(5))
            raise

    def _publish_files(
        self, cell: Cell, request: PublishRequest, path: str, target: Target, deadline: Deadline
    ) -> None:
        claim = agreement.present(cell)
        repeated = path in claim.targets
        if not repeated:
            self._check_reach()
            runtime = self.detector.detect(request.pod, request.context.get("runtime", ""), deadline)
            if runtime.kind == SANDBOX:
                claim, target = self._for_guest(cell, request, path, target, runtime, deadline)
            ownership.forget_vanished(cell, self._alive)
            claim = agreement.present(cell)
            ownership.admit_files(claim, path)
            target = msgspec.structs.replace(target, handler=runtime.handler)
            claim = cell.write(claim.but(targets={**claim.targets, path: target}))
        try:
            if target.dialect:
                self._hand_over_export(claim, path, target, deadline)
            else:
                file_delivery.bind(claim, path, target, deadline)
        except BaseException:
            if repeated and mounts.in_table(path):
                raise  # what its pod has is not taken from it
            with contextlib.suppress(BlockdevError, OSError):
                self._take_back(cell, path, Deadline.after(5))
            raise

    def _check_reach(self) -> None:
        """For new targets: what is delivered already stays so."""
        if self.reach is not None:
            self.reach.check()

    def _for_guest(
        self, cell: Cell, request: PublishRequest, path: str, target: Target, runtime: Runtime, deadline: Deadline
    ) -> tuple[Claim, Target]:  # fmt: skip
        """How a volume of files reaches this sandbox: mounted by the guest if the target has a dialect, else shared."""
        claim = agreement.present(cell)
        if claim.nfs is None or request.context.get("inSandbox") == "share":
            preflight.check_share(runtime, pv_name=claim.volume)
            return claim, target
        self._dialect_of(runtime.dialect, runtime.handler).check_nfs(agreement.export_of(claim, path, target))
        preflight.check_mounts(runtime, pv_name=claim.volume)
        if request.context.get("probe", "host") == "host":
            # Said here in words; a guest that waits for a dead server says nothing for minutes.
            nfs.probe(claim.nfs.server, nfs.resolve(claim.nfs.server, deadline), claim.nfs.version, deadline)
        if runtime.dialect == KataDialect.name:
            preflight.check_guest_nfs(runtime, claim.nfs.version, pv_name=claim.volume)
            # No helper runs in the guest, so what it would find out is found out here.
            address = nfs.resolve(claim.nfs.server, deadline)
            port = nfs.mountd_port(claim.nfs.server, address, deadline) if claim.nfs.version == "3" else 0
            found = msgspec.structs.replace(claim.nfs, address=address, mount_port=port)
            claim = cell.write(claim.but(nfs=found))
        return claim, msgspec.structs.replace(target, dialect=runtime.dialect)

    def _hand_over_export(self, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        os.makedirs(path, mode=0o750, exist_ok=True)
        placeholder.be_placed(path, deadline)
        self._dialect_of(target.dialect, target.handler).deliver_nfs(agreement.export_of(claim, path, target))

    def _deliver(self, cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        """What the claim says is true on the disk and in the kernel."""
        if claim.owner is None:
            raise Refused(f"volume {claim.volume} has no owner")
        if claim.use.raw:
            host_delivery.place_node(cell, claim, path, target, deadline)
        elif claim.owner.kind == HOST:
            host_delivery.mount_filesystem(cell, claim, path, target, deadline)
        else:
            self._hand_over(cell, claim, path, target, deadline)

    def _hand_over(self, cell: Cell, claim: Claim, path: str, target: Target, deadline: Deadline) -> None:
        if claim.owner is None:
            raise Refused(f"volume {claim.volume} has no owner")
        if not claim.prepared:
            # No guest can have it yet: the hand-off is written below, for the first time.
            filesystems.check(claim.source, claim.use.fstype, deadline)
            filesystems.grow(claim.source, deadline)
            if target.mount_group and not target.read_only:
                with private_mount(claim.source, claim.use.fstype, deadline=deadline) as root:
                    groups.apply(root, int(target.mount_group), deadline)
            claim = cell.write(claim.but(prepared=True))
        if not mounts.is_mount_point(path):
            os.makedirs(path, mode=0o750, exist_ok=True)
        placeholder.be_placed(path, deadline)
        dialect = self._dialect(claim.owner)
        if dialect.needs_node:
            claim = host_delivery.be_attached(cell, claim, deadline)
        dialect.deliver(agreement.delivery_of(claim, path, target))

    def _dialect(self, owner: Owner | None) -> Dialect:
        return self._dialect_of(owner.dialect, owner.handler) if owner is not None else self._dialect_of("", "")

    def _dialect_of(self, name: str, handler: str) -> Dialect:
        for dialect in self.dialects:
            if dialect.name == name:
                return dialect
        known = ", ".join(dialect.name for dialect in self.dialects)
        raise Refused(
            f"the runtime handler {handler!r} speaks the hand-off dialect {name!r}, which this "
            f"release does not write (it writes {known}); run the pod with another RuntimeClass"
        )

    def unpublish(self, volume_id: str, target_path: str, deadline: Deadline) -> None:
        """Nothing is at the target. The claim stays until the guest's VMM has let go of the device."""
        path = paths.check("target_path", target_path, self.roots)
        with self.claims.locked(volume_id, deadline) as cell:
            self._take_back(cell, path, deadline)
            if cell.claim is None:
                self._drop_unclaimed(volume_id, deadline)

    def _take_back(self, cell: Cell, path: str, deadline: Deadline) -> None:
        for dialect in self.dialects:
            dialect.withdraw(path)
        claim = cell.claim
        if claim is not None and claim.kind is VolumeKind.FILES:
            file_delivery.take_back(claim, path)
        mounts.be_unmounted(path, deadline)
        if claim is not None:
            if path in claim.targets:
                claim = cell.write(claim.but(targets={at: kept for at, kept in claim.targets.items() if at != path}))
            if claim.lingers:
                try:
                    ownership.release(cell, deadline)
                except DeviceBusy as error:
                    log.warning("the volume is still in use", extra={"volume": claim.volume, "reason": str(error)})
        # The last step: kubelet does not ask again once the path is gone.
        mounts.be_absent(path, deadline)

    def _drop_unclaimed(self, volume_id: str, deadline: Deadline) -> None:
        """After a lost claim: loop devices on the volume's file that nobody uses. What is used by somebody stays."""
        try:
            backend = self.catalog.of(volume_id)
            if backend.kind is VolumeKind.BLOCK:
                ownership.drop_leftovers(backend.attach(volume_id).path, deadline)
        except VolumeError:
            return  # there is no whole volume that could have left something
        except DeviceBusy as error:
            log.warning("the volume is still in use", extra={"volume": volume_id, "reason": str(error)})

    def _alive(self, path: str) -> bool:
        """Whether anything of a publish is left at its target."""
        return mounts.is_mount_point(path) or any(one.target == path for d in self.dialects for one in d.delivered())

    # -- expansion and deletion

    def expand(self, volume_id: str, volume_path: str, size: SizeRange, deadline: Deadline) -> int:
        """The capacity after growing store, device and filesystem.

        Refused while a sandbox has a target of the volume.
        """
        backend = self.catalog.of(volume_id)
        self.catalog.get(volume_id)
        path = paths.check("volume_path", volume_path, self.roots)
        with self.claims.locked(volume_id, deadline) as cell:
            claim = cell.claim
            if claim is None or (path not in claim.targets and path != claim.staging_path):
                raise VolumeNotFound(f"{volume_id} (it is not at {path})")
            backend.check_expand(volume_id, size)
            if claim.kind is VolumeKind.FILES:
                return backend.expand(volume_id, size).capacity_bytes
            if claim.owner is not None and claim.owner.kind == SANDBOX and claim.targets:
                return self._expand_in_guest(claim, backend, size)
            with _explaining_guest(claim):
                ownership.release(cell, deadline)
                claim = agreement.present(cell)
                if claim.owner is None:
                    ownership.guest_has_let_go(claim)
            volume = backend.expand(volume_id, size)
            host_delivery.grow(claim, deadline)
            return volume.capacity_bytes

    def _expand_in_guest(self, claim: Claim, backend: Backend, size: SizeRange) -> int:
        """The capacity of a volume that a sandbox has, if it needs no growth; Refused otherwise.

        The runtime plugs the device in again for each container, asking nobody, so the host leaves device and
        filesystem alone, whether they are open now or not. Only the file behind gets longer, which whoever has it open
        does not see: the next publish, before it hands the device over, lets the filesystem take it.
        """
        wanted = backend.check_expand(claim.volume, size)
        have = ioctls.size_bytes(claim.device or claim.source)
        if have >= wanted and (claim.use.raw or not filesystems.lags(claim.source)):
            return wanted
        volume = backend.expand(claim.volume, size)
        raise Refused(
            f"volume {claim.volume} belongs to the guest of {claim.owner}, so only its store grew, to "
            f"{volume.capacity_bytes} bytes; the guest gets the new size when the pod is deleted and made again"
        )

    def check_copy(self, volume_id: str) -> None:
        """Refused while a sandbox may write to the volume at any moment. For callers that keep it `still`."""
        claim = self.claims.peek(volume_id)
        if claim is not None and claim.owner is not None and claim.owner.kind == SANDBOX and claim.targets:
            raise Refused(
                f"volume {volume_id} belongs to the guest of {claim.owner}, which may write to it at any moment, and "
                "it cannot be copied in one step where it lies: delete the pod first, or keep volumes on a filesystem "
                "that shares blocks (XFS, btrfs)"
            )

    def check_unowned(self, volume_id: str) -> None:
        """Refused while a pod has the volume. For callers that keep it `still`."""
        claim = self.claims.peek(volume_id)
        if claim is not None and claim.owner is not None:
            raise Refused(f"volume {volume_id} is in use by {claim.owner}; unpublish it first")

    @contextlib.contextmanager
    def still(self, volume_ids: Sequence[str], deadline: Deadline) -> Iterator[None]:
        """Nobody gets, gives back or deletes these volumes before the block ends. Busy if somebody is doing it."""
        with contextlib.ExitStack() as stack:
            for volume_id in sorted(set(volume_ids)):
                stack.enter_context(self.claims.locked(volume_id, deadline))
            yield

    @contextlib.contextmanager
    def unused(self, volume_id: str, deadline: Deadline) -> Iterator[None]:
        """Nobody has the volume, nor gets it before the block ends; its claim is gone after it. Refused otherwise."""
        with self.claims.locked(volume_id, deadline) as cell:
            self._let_go(cell, deadline)
            if cell.claim is None:
                self._drop_unclaimed(volume_id, deadline)
            yield
            cell.remove()


def _tell_passed_over(request: StageRequest) -> None:
    """What a static volume's attributes say that means nothing on a node. An older release passed over it, and such a
    PersistentVolume cannot be changed: its pods go on."""
    try:
        parameters.check_delivered(request.context)
    except InvalidParameter as error:
        log.warning("a volume attribute is passed over", extra={"volume": request.volume_id, "why": str(error)})


@contextlib.contextmanager
def _explaining_guest(claim: Claim) -> Iterator[None]:
    """DeviceBusy, told as what it means for the volume."""
    try:
        yield
    except DeviceBusy as error:
        by = ", ".join(map(str, error.holders)) or "an unknown process"
        who = f"the guest of {claim.owner}" if claim.owner is not None and claim.owner.kind == SANDBOX else "a process"
        raise Refused(
            f"volume {claim.volume} is in use: {who} still has it open (held by {by}; {error}). It is free again when "
            "that process ends"
        ) from error
