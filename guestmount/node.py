"""A volume's life on a node: stage, publish, unpublish, unstage, expand, whatever the façade.

Every verb may be repeated, comes in any order, and knows nothing but the claim, the disk and the kernel.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from blockdev import Deadline, DeviceBusy, ioctls, loops, mountinfo, mounts
from blockdev.errors import BlockdevError
from guestmount import agreement, paths, placeholder, volume_limit, ways
from guestmount.claims import Cell, Claim, Claims, Target, Use
from guestmount.cri import Sandboxes
from guestmount.detect import Detector
from guestmount.errors import TROUBLE, Refused, RuntimeUnknown
from guestmount.events import Events
from guestmount.giving import Giving
from guestmount.handoff import Dialect, Dialects
from guestmount.reach import Reach
from guestmount.requests import PublishRequest, StageRequest, check_capability, check_options
from guestmount.ways import disk_slots, exclusion
from guestmount.written import Trust, Written
from volumes import Catalog, InvalidParameter, SizeRange, Source, VolumeNotFound, VolumeUnfinished, parameters
from volumes.backend import Backend
from volumes.jobs import PATIENCE

log = logging.getLogger("runvol.node")


@dataclass(frozen=True, kw_only=True)
class Node:
    """What the verbs work with. `roots`: the directories under which requests may name paths.

    `reach` proves that kubelet sees what is mounted there; None where there is no kubelet.
    `rust_shared_block`: containers of one pod may share a block volume under Kata's Rust shim. `guest_filesystems`:
    what the host does with one that a guest has had; `check_patience`: seconds that a call waits for that.
    `copy_gives_way`: seconds for which a pod waits for a volume that is being copied. `max_volumes`: that may be staged
    here, those on NFS not counted; 0 for any number.
    """

    catalog: Catalog
    claims: Claims
    detector: Detector
    dialects: Sequence[Dialect]
    roots: Sequence[str]
    reach: Reach | None = None
    rust_shared_block: bool = False
    guest_filesystems: Trust = Trust.CHECKED
    check_patience: float = PATIENCE
    sandboxes: Sandboxes = field(default_factory=lambda: Sandboxes(endpoint=""))
    copy_gives_way: float = 120.0
    max_volumes: int = 0
    # Who tells pods and claims what they have to know; None where nobody is told.
    events: Events | None = None

    def __post_init__(self) -> None:
        self.catalog.watch_copies(self)

    @cached_property
    def means(self) -> ways.Means:
        """What the ways work with."""
        return ways.Means(
            claims=self.claims,
            dialects=Dialects(self.dialects),
            written=Written(catalog=self.catalog, trust=self.guest_filesystems, patience=self.check_patience),
            giving=Giving(patience=self.check_patience),
            rust_shared_block=self.rust_shared_block,
            sandboxes=self.sandboxes,
        )

    # -- stage and unstage

    def stage(self, request: StageRequest, deadline: Deadline) -> None:
        """The volume is ready to be published: attached, and formatted if it was provably blank. Mounts nothing."""
        staging = paths.check("staging_target_path", request.staging_path, self.roots)
        backend = self.catalog.of(request.volume_id, request.context)
        check_capability(request.capability, backend)
        with self.claims.locked(request.volume_id, deadline) as cell:
            source = backend.attach(request.volume_id, request.context)
            row = ways.of_source(source, raw=request.capability.raw)
            new = row.new_claim(request, source, deadline)
            claim = self.claims.remember(cell, request.volume_id)
            if claim is not None and claim.made_again:
                claim = cell.write(ways.completed(claim, new))
            if claim is not None and claim.staging_path != staging and not claim.targets:
                claim = self._restage(cell, staging, new.use, deadline)
            if claim is not None and row.is_other(claim, new):
                claim = self._go_on_with(cell, backend, request, new, deadline)
            if claim is None:
                _tell_passed_over(request)
                check_options(new.use.mount_flags)
                with volume_limit.placed(self.claims, new, self.max_volumes, deadline):
                    row.make_ready(backend, request, new, source, deadline, first=True)
                    cell.write(new)
                return
            agreement.check_same_stage(claim, staging, new.use)
            if claim.owner is None:  # else kubelet has restarted; nothing is opened for writing
                row.make_ready(backend, request, claim, source, deadline, first=False)

    def _go_on_with(
        self, cell: Cell, backend: Backend, request: StageRequest, new: Claim, deadline: Deadline
    ) -> Claim | None:  # fmt: skip
        """The claim, if its pods may go on with the source that they have; None once it is gone, as nobody has it."""
        exclusion.forget_vanished(cell, self.alive)
        claim = cell.present
        if claim.targets:
            ways.of_claim(claim).check_restage(claim, backend, request, new)
            return claim
        self._let_go(cell, deadline)
        cell.remove()
        return None

    def _restage(self, cell: Cell, staging: str, use: Use, deadline: Deadline) -> Claim | None:
        """The claim of a volume without targets that was staged elsewhere, or lingers since its unstage."""
        try:
            self._let_go(cell, deadline)
        except Refused:
            if cell.present.staging_path or cell.present.use != use:
                raise
            # Its last owner still has it, and may have it again; whether another may is asked at the publish.
            return cell.write(cell.present.but(staging_path=staging))
        if cell.claim is not None and not cell.claim.staging_path:
            cell.remove()
        return cell.claim

    def unstage(self, volume_id: str, staging_path: str, deadline: Deadline) -> None:
        """Nothing of the volume hangs at the staging path, and the device is free or its claim lingers until it is.

        Refused while it is published. A process that keeps the device open, or a mount namespace of its own that keeps
        the mount, holds up the next kernel, an expansion and the deletion, not this call: kubelet's part is done.
        """
        staging = paths.check("staging_target_path", staging_path, self.roots)
        with self.claims.locked(volume_id, deadline, ending=True) as cell:
            self._remembered(cell, volume_id)
            if cell.claim is None or cell.claim.staging_path != staging:
                if self._is_anothers(staging, volume_id):
                    return
                mounts.be_unmounted(staging, deadline)
            if cell.claim is None:
                self._drop_unclaimed(volume_id, deadline)
                return
            if cell.claim.staging_path not in (staging, ""):
                return
            try:
                self._let_go(cell, deadline)
            except Refused as error:
                claim = cell.present
                if claim.targets or mounts.is_mount_point(staging):
                    raise
                log.warning("the volume is still in use", extra={"volume": volume_id, "reason": str(error)})
                cell.less(claim.but(staging_path=""))
                return
            cell.remove()

    def _remembered(self, cell: Cell, volume_id: str) -> None:
        """As far as it can be, for who takes back: a pod may have the volume although its record was lost."""
        try:
            self.claims.remember(cell, volume_id)
        except TROUBLE as error:
            log.error("a lost claim cannot be made again", extra={"volume": volume_id, "why": str(error)})

    def _let_go(self, cell: Cell, deadline: Deadline) -> None:
        """Release an owner without targets; Refused while there are targets, or somebody still has the device."""
        exclusion.forget_vanished(cell, self.alive)
        claim = cell.claim
        if claim is None:
            return
        if claim.targets:
            raise Refused(
                f"volume {claim.volume} is still published at {', '.join(sorted(claim.targets))}; unpublish first"
            )
        self.means.giving.end(claim.volume)
        with exclusion.explained(claim):
            exclusion.release(cell, deadline)
        ways.of_claim(claim).let_go(claim)
        mounts.be_unmounted(claim.staging_path, deadline)

    # -- publish and unpublish

    def publish(self, request: PublishRequest, deadline: Deadline) -> None:
        """The volume is at the target: mounted there for a runc pod, handed to the guest for a sandboxed one."""
        path = paths.check("target_path", request.target, self.roots)
        paths.check("staging_target_path", request.staging_path, self.roots)
        backend = self.catalog.of(request.volume_id, request.context)
        check_capability(request.capability, backend)
        source = backend.attach(request.volume_id, request.context)  # its bytes are still there
        with self.claims.locked(request.volume_id, deadline) as cell:
            claim = self._staged(cell, request, source, deadline)
            target = agreement.target_of(request)
            if path in claim.targets and (
                claim.made_again or claim.targets[path].made_again or exclusion.is_unknown(claim)
            ):
                sure = ways.way_at(claim, path).hands_over
                claim = agreement.filled_in(claim, path, request, target, sure=sure)
                claim = cell.write(self._with_kernel(claim, path, request, deadline))
            old = claim.targets.get(path)
            ways.of_claim(claim).check_publish(claim, backend, request, source, old)
            agreement.check_same_publish(claim, request, old, target)
            way = ways.way_at(claim, path)
            if old is None or not way.holds(claim):
                self._publish_new(cell, request, path, target, deadline)
                return
            if not old.way:  # an older release's
                old = msgspec.structs.replace(old, way=way.name)
                claim = cell.write(claim.but(targets={**claim.targets, path: old}))
            try:
                way.deliver(self.means, cell, claim, path, old, deadline)
            except VolumeUnfinished:
                raise
            except BaseException:
                if not way.keeps(path):
                    self._undo(cell, path)
                raise

    def _with_kernel(self, claim: Claim, path: str, request: PublishRequest, deadline: Deadline) -> Claim:
        """Where the record was lost, which kernel has the volume is asked once more."""
        if not exclusion.is_unknown(claim):
            return claim
        try:
            runtime = self.detector.detect(request.pod, request.context.get("runtime", ""), deadline)
        except (RuntimeUnknown, Refused) as error:
            log.warning("which kernel has a volume stays unknown", extra={"volume": claim.volume, "why": str(error)})
            return claim
        arrival = ways.Arrival(request=request, runtime=runtime, path=path, target=claim.targets[path])
        return claim.but(owner=exclusion.owner_of(arrival))

    def _staged(self, cell: Cell, request: PublishRequest, source: Source, deadline: Deadline) -> Claim:
        """The claim of a volume that is staged where the request says; Refused otherwise."""
        claim = self.claims.remember(cell, request.volume_id)
        if claim is not None and claim.made_again:
            # kubelet publishes only what it has staged, and stages nothing again that it has.
            new = ways.of_source(source, raw=request.capability.raw).new_claim(request.staged, source, deadline)
            claim = cell.write(ways.completed(claim, new))
        if claim is None or claim.staging_path != request.staging_path:
            staged = claim is not None and claim.staging_path
            where = f"is staged at {staged}" if staged else "is not staged on this node"
            raise Refused(
                f"volume {request.volume_id} {where}; call NodeStageVolume with this staging_target_path first"
            )
        return claim

    def _publish_new(self, cell: Cell, request: PublishRequest, path: str, target: Target, deadline: Deadline) -> None:
        if self.reach is not None:
            self.reach.check()  # for new targets: what is delivered already stays so
        runtime = self.detector.detect(request.pod, request.context.get("runtime", ""), deadline)
        exclusion.forget_vanished(cell, self.alive)
        claim = cell.present
        check_options(claim.use.mount_flags)
        way = ways.of_claim(claim).way(claim, request, runtime)
        arrival = ways.Arrival(request=request, runtime=runtime, path=path, target=target)
        found, target = way.check(self.means, claim, arrival, deadline)
        if found != claim:
            cell.write(found)
        with disk_slots.placed(self.means, claim, arrival, deadline):
            self._take(cell, way, arrival, target, deadline)

    def _take(self, cell: Cell, way: ways.Way, arrival: ways.Arrival, target: Target, deadline: Deadline) -> None:
        """The volume is the pod's, and at its target."""
        claim, path = cell.present, arrival.path
        if claim.owner is None and ways.of_claim(claim).by_device:
            self._check_not_handed(cell.present)
        if way.hands_over:
            self.claims.handed.note(claim.volume)
        claim, named = way.admit(cell, arrival, deadline), msgspec.structs.replace(target, way=way.name)
        try:
            claim = way.prepare(self.means, claim, target, deadline)
        except VolumeUnfinished:
            cell.write(claim.but(targets={**claim.targets, path: named}))  # it is this pod's that goes on
            raise
        claim = cell.write(claim.but(targets={**claim.targets, path: named}))
        try:
            way.deliver(self.means, cell, claim, path, named, deadline)
        except VolumeUnfinished:
            raise  # what goes on is waited for by the next call
        except BaseException:
            self._undo(cell, path)
            raise

    def _check_not_handed(self, claim: Claim) -> None:
        """A record that was lost, or is an older one of itself, does not know of its hand-off."""
        if self.catalog.is_image(claim.volume) and not self.claims.handed.may_be(claim.volume):
            return
        exclusion.check_not_handed(claim, self.means.dialects.delivered().values())
        self.claims.handed.forget(claim.volume)

    def _undo(self, cell: Cell, path: str) -> None:
        with contextlib.suppress(BlockdevError, OSError):
            self._take_back(cell, path, Deadline.after(5))

    def unpublish(self, volume_id: str, target_path: str, deadline: Deadline) -> None:
        """Nothing is at the target. The claim stays until the guest's VMM has let go of the device."""
        path = paths.check("target_path", target_path, self.roots)
        with self.claims.locked(volume_id, deadline, ending=True) as cell:
            if (cell.claim is None or path not in cell.claim.targets) and self._is_anothers(path, volume_id):
                return
            self._take_back(cell, path, deadline)
            if cell.claim is None:
                self._drop_unclaimed(volume_id, deadline)

    def _is_anothers(self, path: str, volume_id: str) -> bool:
        """Whether what hangs at the path is another volume's, or nobody's that is known: nothing of this one is there,
        and what is stays."""
        if not mounts.is_mount_point(path) and self.means.dialects.at(path) is None:
            return False
        if self.means.dialects.at(path) is None and self._could_only_be_strangers(path, volume_id):
            log.warning("a path holds what is no volume's and stays", extra={"volume": volume_id, "path": path})
            return True
        for claim in self.claims.readable()[0]:
            if claim.volume != volume_id and (path in claim.targets or path == claim.staging_path):
                said = {"volume": volume_id, "path": path, "of": claim.volume}
                log.warning("a path belongs to another volume and stays", extra=said)
                return True
        return False

    def _could_only_be_strangers(self, path: str, volume_id: str) -> bool:
        """A volume that is a file reaches the host's paths by a loop device, its node, or the placeholder alone."""
        if not self.catalog.is_image(volume_id) or ioctls.is_block(path):
            return False
        found = mountinfo.at(path)
        return found is not None and found.source != placeholder.SOURCE and found.device[0] != loops.MAJOR

    def _take_back(self, cell: Cell, path: str, deadline: Deadline) -> None:
        self.means.dialects.withdraw(path)
        claim = cell.claim
        if claim is not None:
            self.means.giving.end(claim.volume)
            ways.way_at(claim, path).take_back(claim, path)
        mounts.be_unmounted(path, deadline)
        if claim is not None:
            if path in claim.targets:
                claim = cell.less(claim.but(targets={at: kept for at, kept in claim.targets.items() if at != path}))
            if not claim.targets:
                self.claims.handed.forget(claim.volume)
            if claim.lingers:
                try:
                    exclusion.release(cell, deadline)
                except DeviceBusy as error:
                    log.warning("the volume is still in use", extra={"volume": claim.volume, "reason": str(error)})
        # The last step: kubelet does not ask again once the path is gone.
        mounts.be_absent(path, deadline)

    def _drop_unclaimed(self, volume_id: str, deadline: Deadline) -> None:
        self.means.giving.end(volume_id)
        with contextlib.suppress(VolumeNotFound):
            ways.drop_unclaimed(self.catalog.of(volume_id), volume_id, deadline)

    def alive(self, path: str) -> bool:
        """Whether anything of a publish is left at its target."""
        return mounts.is_mount_point(path) or self.means.dialects.at(path) is not None

    # -- expansion and deletion

    def expand(self, volume_id: str, volume_path: str, size: SizeRange, deadline: Deadline) -> int:
        """The capacity after growing store, device and filesystem.

        Refused while a sandbox of a pod that has a target of the volume may live.
        """
        backend = self.catalog.of(volume_id)
        self.catalog.get(volume_id)
        path = paths.check("volume_path", paths.published(volume_path), self.roots)
        with self.claims.locked(volume_id, deadline) as cell:
            claim = self.claims.remember(cell, volume_id)
            if claim is None or (path not in claim.targets and path != claim.staging_path):
                raise VolumeNotFound(f"{volume_id} (it is not at {path})")
            backend.check_expand(volume_id, size)
            for target in claim.targets:
                capacity = ways.way_at(claim, target).expand(self.means, cell, backend, size, deadline)
                if capacity is not None:
                    return capacity
            return ways.of_claim(claim).grow(self.means, cell, backend, size, deadline)

    def check_copy(self, volume_id: str) -> None:
        """Refused while a pod may write to the volume at any moment. For callers that keep it `still`."""
        claim = self.claims.peek(volume_id)
        if claim is not None and claim.owner is not None and claim.targets:
            pods = ", ".join(sorted({f"pod {target.pod}" for target in claim.targets.values()}))
            has = f"belongs to the guest of {claim.owner}" if exclusion.in_guest(claim) else f"is in use by {pods}"
            raise Refused(
                f"volume {volume_id} {has}, which may write to it at any moment, and it cannot be copied in one step "
                "where it lies: delete the pod first, or keep volumes on a filesystem that shares blocks (XFS, btrfs)"
            )

    def check_unowned(self, volume_id: str) -> None:
        """Refused while a pod has the volume. For callers that keep it `still`."""
        claim = self.claims.peek(volume_id)
        if claim is not None and claim.owner is not None:
            raise Refused(f"volume {volume_id} is in use by {claim.owner}; unpublish it first")

    def make_way(self, volume_id: str) -> None:
        """VolumeUnfinished where a pod has waited long enough for a volume that is kept `still`, and is yet to come."""
        if self.claims.waited(volume_id) >= self.copy_gives_way:
            raise VolumeUnfinished(
                f"the copy of volume {volume_id} gives way to a pod that waits for the volume; ask again"
            )

    @contextlib.contextmanager
    def still(self, volume_ids: Sequence[str], deadline: Deadline) -> Iterator[None]:
        """Nobody gets, gives back or deletes these volumes before the block ends. Busy if somebody is doing it."""
        with contextlib.ExitStack() as stack:
            for volume_id in sorted(set(volume_ids)):
                self.make_way(volume_id)
                cell = stack.enter_context(self.claims.locked(volume_id, deadline))
                self.claims.remember(cell, volume_id)
            yield

    @contextlib.contextmanager
    def unused(self, volume_id: str, deadline: Deadline) -> Iterator[None]:
        """Nobody has the volume, nor gets it before the block ends; its claim is gone after it. Refused otherwise."""
        with self.claims.locked(volume_id, deadline) as cell:
            self.claims.remember(cell, volume_id)
            self._let_go(cell, deadline)
            if cell.claim is None:
                self._drop_unclaimed(volume_id, deadline)
            yield
            cell.remove()
            self.claims.handed.forget(volume_id)


def _tell_passed_over(request: StageRequest) -> None:
    """What a static volume's attributes say that means nothing on a node. An older release passed over it, and such a
    PersistentVolume cannot be changed: its pods go on."""
    try:
        parameters.check_delivered(request.context)
    except InvalidParameter as error:
        log.warning("a volume attribute is passed over", extra={"volume": request.volume_id, "why": str(error)})
