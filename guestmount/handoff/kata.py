"""Kata Containers' direct volumes, for the Go and the Rust shim (2.4 and later).

`<root>/<base64url(target)>/mountInfo.json`; the shim looks the OCI mount's source up byte for byte. Every other
name in that directory is taken for a sandbox's id, so the file is built elsewhere and the directory renamed into place.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Sequence

import msgspec

from blockdev import durable
from guestmount.errors import BadRequest, Refused, Unsupported
from guestmount.handoff.base import Delivered, Delivery, NfsDelivery

DEFAULT_ROOT = "/run/kata-containers/shared/direct-volumes"
# 189 bytes are 252 characters of base64; 190 are 256, more than NAME_MAX, and runtime-rs then shares in silence.
LONGEST_TARGET = 189
_FILE = "mountInfo.json"
_TEMPORARY = ".runvol-"
# Go would hand these to its agent, which then binds a device onto a directory, or refuses.
_NEVER = frozenset({"bind", "rbind", "loop"})
# The device of a hand-off that is closed, and where it keeps the one that it had; no shim reads the latter.
_CLOSED, _WAS = "/nonexistent/closed-while-the-volume-grows", "runvol.closed"
# What the filesystem's own option parser in the guest does not know.
_HOST_ONLY = frozenset({"_netdev", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group", "defaults"})


class MountInfo(msgspec.Struct, frozen=True, kw_only=True, rename={"volume_type": "volume-type"}):
    """The file. `metadata` is read by the Go shim only; unknown keys are ignored."""

    volume_type: str = "directvol"
    device: str
    fstype: str
    metadata: dict[str, str] = {}
    options: list[str] = []


def key_of(target: str) -> str:
    """The directory's name for a target path: base64url with padding."""
    return base64.urlsafe_b64encode(os.fsencode(target)).decode()


def target_of(key: str) -> str | None:
    """The other way; None for a name that is no key."""
    try:
        return os.fsdecode(base64.b64decode(key.encode(), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        return None


class KataDialect:
    """Direct volumes under one root."""

    name = "kata"
    needs_node = False

    def __init__(self, root: str = DEFAULT_ROOT, *, nri_alive: Callable[[], bool] = lambda: False) -> None:
        """`nri_alive`: whether the plugin that puts NFS mounts into containers is registered (`guestmount.nri`)."""
        self._root, self._nri_alive = root, nri_alive

    def check(self, delivery: Delivery) -> None:
        length = len(os.fsencode(delivery.target))
        if length > LONGEST_TARGET:
            raise BadRequest(
                "target_path",
                delivery.target,
                f"has {length} bytes; Kata finds a direct volume only by a path of at most {LONGEST_TARGET}. "
                "Use a shorter kubelet root or PersistentVolume name",
            )
        for option in delivery.options:
            if option in _NEVER:
                raise Unsupported(f"mount option {option!r} cannot be handed to a Kata guest; remove it")

    def deliver(self, delivery: Delivery) -> None:
        self.check(delivery)
        self._put(delivery.target, _mount_info(delivery))

    def close(self, delivery: Delivery) -> None:
        info = _mount_info(delivery)
        self._put(delivery.target, msgspec.structs.replace(info, device=_CLOSED, metadata={_WAS: info.device}))

    def _put(self, target: str, info: MountInfo) -> None:
        content = msgspec.json.encode(info)
        place = os.path.join(self._root, key_of(target))
        try:
            if durable.read(os.path.join(place, _FILE)) == content:
                return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, *durable.NO_RECORD):
                raise
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        new = os.path.join(self._root, _TEMPORARY + uuid.uuid4().hex)
        os.mkdir(new, 0o700)
        try:
            durable.write(os.path.join(new, _FILE), content)
            if os.path.isdir(place):
                # The shim may already have left its sandbox's id there, so only the file is replaced.
                os.rename(os.path.join(new, _FILE), os.path.join(place, _FILE))
            else:
                os.rename(new, place)
            durable.sync_directory(self._root)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def check_nfs(self, delivery: NfsDelivery) -> None:
        """A container that is created while the plugin is away would start with the placeholder."""
        if not self._nri_alive():
            raise Refused(
                f"volume {delivery.volume_id} is an NFS export, which an NRI plugin has the guest mount, and none is "
                "registered with the container runtime: run `runvol nri` on this node (nri.enabled=true of the chart). "
                "With the class's parameter `inSandbox: share` the host's mount is shared into the guest by virtio-fs "
                "instead"
            )

    def deliver_nfs(self, delivery: NfsDelivery) -> None:
        """The claim is the hand-off: the plugin reads it when a container is created."""
        self.check_nfs(delivery)

    def withdraw(self, target: str) -> None:
        place = os.path.join(self._root, key_of(target))
        if len(os.path.basename(place)) > 255:
            return
        gone = os.path.join(self._root, _TEMPORARY + uuid.uuid4().hex)
        try:
            # A directory without its file makes runtime-rs fail, so the directory goes in one step.
            os.rename(place, gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone)

    def delivered(self) -> Sequence[Delivered]:
        try:
            names = sorted(os.listdir(self._root))
        except FileNotFoundError:
            return []
        found = []
        for name in names:
            target = None if name.startswith(".") else target_of(name)
            if target is not None:
                found.append(self._look(name, target))
        return found

    def at(self, target: str) -> Delivered | None:
        name = key_of(target)
        if len(name) > 255 or not os.path.isdir(os.path.join(self._root, name)):
            return None
        return self._look(name, target, sure=True)

    def _look(self, name: str, target: str, *, sure: bool = False) -> Delivered:
        """`sure`: OSError where it cannot be read in this moment; otherwise that is its problem."""
        place = os.path.join(self._root, name)
        info, problem = None, ""
        try:
            info = msgspec.json.decode(durable.read(os.path.join(place, _FILE)), type=MountInfo)
        except FileNotFoundError:
            problem = "no mountInfo.json: Kata's Rust shim refuses to start a container with it"
        except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            if sure and isinstance(error, OSError) and error.errno not in durable.NO_RECORD:
                raise
            problem = f"mountInfo.json cannot be read: {error}"
        others: list[str] = []
        with contextlib.suppress(OSError):
            others = sorted(entry for entry in os.listdir(place) if entry != _FILE)
        return Delivered(
            dialect=self.name,
            target=target,
            place=place,
            device=info.metadata.get(_WAS, info.device) if info else "",
            fstype=info.fstype if info else "",
            options=tuple(info.options) if info else (),
            sandboxes=tuple(others),
            problem=problem,
            closed=info is not None and _WAS in info.metadata,
            group=info.metadata.get("fsGroup", "") if info else "",
        )

    def sweep(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._root):
                if name.startswith(_TEMPORARY):
                    shutil.rmtree(os.path.join(self._root, name), ignore_errors=True)


def _mount_info(delivery: Delivery) -> MountInfo:
    kept = [option for option in delivery.options if option not in ("ro", "rw", *_HOST_ONLY)
            and not option.partition("=")[0].endswith("context")]  # fmt: skip
    return MountInfo(
        device=delivery.device,
        fstype=delivery.fstype,
        options=["ro" if delivery.read_only else "rw", *kept],
        metadata={"fsGroup": delivery.group, "fsGroupChangePolicy": "OnRootMismatch"} if delivery.group else {},
    )
