"""What each call means in a node's verbs.

`init` says `attach: false`, so kubelet makes three calls only: init, mount, unmount, and expandfs when a volume grows.
The others are answered "Not supported", which makes kubelet do nothing for them.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blockdev import Deadline, mountinfo, mounts, worldly
from blockdev.errors import BlockdevError
from flexvolume.options import Options, parse
from flexvolume.targets import Targets
from guestmount import BadRequest, GuestmountError, Node, PublishRequest, StageRequest, paths
from volumes import AccessMode, Capability, SizeRange, VolumeError, VolumeNotFound, parameters
from volumes.backend import DescribedBackend

NFS = "nfs"
# Seconds that a call waits for another one of its volume. This protocol has no word for "come again soon": each failure
# becomes an event of the pod's, and kubelet waits longer after each.
_PATIENCE = 30.0
# What fsck says has no bound of its own, and the executable reads 64 KiB; in JSON a character takes up to 12 bytes.
_LONGEST_MESSAGE = 5000


class Status(enum.StrEnum):
    """The protocol's words."""

    SUCCESS = "Success"
    FAILURE = "Failure"
    NOT_SUPPORTED = "Not supported"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The one JSON object that a call prints."""

    status: Status
    message: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        said = {"message": self.message[:_LONGEST_MESSAGE]} if self.message else {}
        return {"status": self.status.value} | said | self.more


CAPABILITIES = {
    "attach": False,
    # The driver gives the group itself: kubelet would do it to the placeholder.
    "fsGroup": False,
    "selinuxRelabel": False,
    "supportsMetrics": False,
    "requiresFSResize": True,
}
INIT = Reply(status=Status.SUCCESS, more={"capabilities": CAPABILITIES})
# How many words follow each call.
_NOTHING_TO_DO = {"attach": 2, "detach": 2, "waitforattach": 2, "isattached": 2, "mountdevice": 3, "unmountdevice": 1,
                  "expandvolume": 4}  # fmt: skip


class Driver:
    """The calls over one node. `name` is the one that the driver is installed under; `staging` a directory of ours."""

    def __init__(self, node: Node, *, directory: str, name: str = "runvol") -> None:
        self._staging = os.path.join(directory, "staging")
        self._node = replace(node, roots=(*node.roots, self._staging), claims=node.claims.patient(_PATIENCE))
        self._roots, self._targets, self._name = node.roots, Targets(os.path.join(directory, "targets")), name

    def answer(self, words: Sequence[str], deadline: Deadline) -> Reply:
        """The reply to one call; every error that a person can do something about is a Failure with its sentence."""
        try:
            return self._call(list(words), deadline)
        except (BlockdevError, GuestmountError, VolumeError) as error:
            return Reply(status=Status.FAILURE, message=str(error))
        except OSError as error:
            said = worldly.in_words(error)
            if said is None:
                raise
            return Reply(status=Status.FAILURE, message=said)

    def _call(self, words: list[str], deadline: Deadline) -> Reply:
        call, arguments = (words[0], words[1:]) if words else ("", [])
        if call == "init":
            return INIT
        if call in _NOTHING_TO_DO:
            return Reply(status=Status.NOT_SUPPORTED, message=f"{call}: nothing is attached (init says attach: false)")
        known: dict[str, tuple[int, Callable[..., Reply]]] = {
            "mount": (2, self._mount), "unmount": (1, self._unmount), "getvolumename": (1, self._name_of),
            "expandfs": (5, self._expand),
        }  # fmt: skip
        if call not in known:
            return Reply(status=Status.NOT_SUPPORTED, message=f"{call[:40]!r} is no call of FlexVolume's")
        count, method = known[call]
        if len(arguments) != count:
            raise BadRequest(f"{call}'s arguments", len(arguments), f"must be {count}")
        return method(*arguments, deadline)

    def _mount(self, target: str, text: str, deadline: Deadline) -> Reply:
        asked = parse(text, driver=self._name)
        path = paths.check("the target", target, self._roots)
        volume, context = self._meant(asked)
        use = _capability(asked)
        self._node.catalog.of(volume, context)
        if asked.volume:
            self._node.catalog.get(volume)
        with self._node.claims.turn(volume, deadline):
            # Of now: who was before us may have let the volume go from where it was staged.
            staging = self._staging_of(volume)
            self._targets.remember(path, volume)
            self._let_go_if_unclaimed(volume)
            name = os.path.basename(path)  # the pod's own, or that of a PersistentVolume
            pod = replace(asked.pod, pod_volume=name, persistent_volume=name)
            stage = StageRequest(volume_id=volume, staging_path=staging, capability=use, context=context)
            publish = PublishRequest(volume_id=volume, staging_path=staging, target=path, capability=use,
                                     read_only=asked.read_only, pod=pod, context=context)  # fmt: skip
            try:
                self._node.stage(stage, deadline)
                self._node.publish(publish, deadline)
            except BaseException:
                # Another call may have mounted it here before, and then the record is still true.
                if not mounts.is_mount_point(path):
                    self._targets.forget(path)
                    os.makedirs(path, mode=0o750, exist_ok=True)
                    with contextlib.suppress(BlockdevError, GuestmountError, VolumeError):
                        self._unstage_if_unused(volume, Deadline.after(5))
                raise
        return Reply(status=Status.SUCCESS)

    def _meant(self, asked: Options) -> tuple[str, dict[str, str]]:
        """The volume's id and its context; that of a described volume is made of what describes it."""
        runtime = parameters.check_context({"runtime": asked.runtime}) if asked.runtime else {}
        if asked.volume:
            return asked.volume, runtime
        described = dict(asked.described)
        if described["backend"] == NFS:
            import hashlib

            described = parameters.check_context(described)
            # Another version or option is another mount: two pods may want both.
            words = json.dumps([described, asked.mount_flags], sort_keys=True)
            volume = f"nfs-given-{hashlib.sha256(words.encode()).hexdigest()[:32]}"
        else:
            backend = self._node.catalog.named(described["backend"])
            if not isinstance(backend, DescribedBackend):
                raise BadRequest("the options", described["backend"], "describe no volume of this node")
            volume = backend.id_of(described[backend.key])
        return volume, {**described, **runtime}

    def _unmount(self, target: str, deadline: Deadline) -> Reply:
        """Nothing of the volume is at the target; unknown ones succeed, as kubelet asks until it hears so."""
        path = paths.check("the target", target, self._roots)
        volume = self._targets.volume_at(path) or self._claimed_at(path)
        if volume:
            with self._node.claims.turn(volume, deadline):
                self._node.unpublish(volume, path, deadline)
                self._unstage_if_unused(volume, deadline)
                self._targets.forget(path)
        else:
            staged = self._staged_like(path)
            for dialect in self._node.dialects:
                dialect.withdraw(path)
            mounts.be_unmounted(path, deadline)
            if staged:
                self._unstage_unclaimed(staged, deadline)
            self._targets.forget(path)
        return Reply(status=Status.SUCCESS)

    def _staged_like(self, path: str) -> str:
        """After a lost claim: our staging path of the filesystem that hangs at a target; empty for none."""
        table = mountinfo.table()
        devices = {mount.device for mount in table if mount.target == path}
        return next((one.target for one in table if one.device in devices and self._is_staging(one.target)), "")

    def _is_staging(self, path: str) -> bool:
        return path.startswith(self._staging + "/")

    def _unstage_unclaimed(self, staging: str, deadline: Deadline) -> None:
        """Nothing hangs at a staging path of ours any more, if no pod has its filesystem."""
        volume = os.path.basename(staging)
        with self._node.claims.turn(volume, deadline):
            self._unstage_if_unused(volume, deadline)

    def _unstage_if_unused(self, volume: str, deadline: Deadline) -> None:
        """For callers that have the volume's turn."""
        claim = self._node.claims.peek(volume)
        # What CSI has staged, CSI unstages.
        ours = claim is not None and self._is_staging(claim.staging_path)
        if claim is not None and ours and not claim.targets:
            # Where somebody still has the device, the claim lingers; kubelet does not ask again.
            self._node.unstage(volume, claim.staging_path, deadline)
        staging = os.path.join(self._staging, volume)
        if claim is None and _is_alone(staging):
            self._node.unstage(volume, staging, deadline)
        self._let_go_if_unclaimed(volume)

    def _let_go_if_unclaimed(self, volume: str) -> None:
        """What only a claim needs is not kept without one, whoever ended it, and whoever was killed meanwhile."""
        with contextlib.suppress(VolumeNotFound):
            backend = self._node.catalog.of(volume)
            if isinstance(backend, DescribedBackend) and self._node.claims.peek(volume) is None:
                backend.let_go(volume)

    def _claimed_at(self, path: str) -> str:
        """After a lost record: the claims know their targets too. Refused if the one that may can't be read."""
        claims, damaged = self._node.claims.readable()
        volume = next((claim.volume for claim in claims if path in claim.targets), "")
        if not volume and damaged:
            raise damaged[0]
        return volume

    def _name_of(self, text: str, _deadline: Deadline) -> Reply:
        volume, _ = self._meant(parse(text, driver=self._name))
        return Reply(status=Status.SUCCESS, more={"volumeName": volume})

    def _expand(self, text: str, _device: str, _place: str, new: str, _old: str, deadline: Deadline) -> Reply:
        asked = parse(text, driver=self._name)
        if not (new.isascii() and new.isdigit() and len(new) < 19):
            raise BadRequest("the new size", new[:40], "must be a number of bytes")
        volume, _ = self._meant(asked)
        claim = self._node.claims.peek(volume)
        if claim is None:
            raise VolumeNotFound(f"{volume} (it is not mounted on this node)")
        self._node.expand(volume, claim.staging_path, SizeRange(required=int(new)), deadline)
        return Reply(status=Status.SUCCESS)

    def _staging_of(self, volume: str) -> str:
        """Where the volume is staged already, else a place of our own."""
        claim = self._node.claims.peek(volume)
        if claim is not None and claim.staging_path.startswith(self._staging + "/"):
            return claim.staging_path
        os.makedirs(self._staging, mode=0o700, exist_ok=True)
        return os.path.join(self._staging, volume)


def _is_alone(staging: str) -> bool:
    """Whether something hangs at the path, and its filesystem nowhere else."""
    table = mountinfo.table()
    devices = {mount.device for mount in table if mount.target == staging}
    return bool(devices) and not any(mount.device in devices and mount.target != staging for mount in table)


def _capability(asked: Options) -> Capability:
    shared = asked.described.get("backend") == NFS
    return Capability(
        mode=AccessMode.MULTI_NODE_MULTI_WRITER if shared else AccessMode.SINGLE_NODE_MULTI_WRITER,
        fstype=asked.fstype,
        mount_flags=asked.mount_flags,
        mount_group=asked.group,
    )
