"""What is known of a pod, and who can be asked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from blockdev import Deadline
from volumes.registry import DISKS

log = logging.getLogger("runvol.pods")

UNTRUSTED = "io.kubernetes.cri.untrusted-workload"
# Those that Kata reads; no value that means something to it is nearly so long.
_KATA, _LONGEST_VALUE = "io.katacontainers.config", 256


@dataclass(frozen=True, kw_only=True)
class PodRef:
    """A pod as kubelet names it in a publish (`podInfoOnMount`); every field may be empty."""

    namespace: str = ""
    name: str = ""
    uid: str = ""
    # The PersistentVolume, or the pod's own name of an inline volume, as the target's path tells; else empty.
    persistent_volume: str = ""
    pod_volume: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else (self.uid or "a pod that nobody named")


@dataclass(frozen=True, kw_only=True)
class MountFacts:
    """One volumeMount of one container.

    `ends`: of an ordinary init container, which has ended before the next container starts; a sidecar
    (`restartPolicy: Always`) is none. `writes`: neither the mount nor the pod's volume is read-only.
    """

    container: str
    volume: str
    path: str = ""
    read_only: bool = False
    ends: bool = False
    writes: bool = True
    sub_path: str = ""
    propagation: str = ""


@dataclass(frozen=True, kw_only=True)
class PodFacts:
    """The part of a pod that decides about its storage; `mounts` are in the order in which the containers start.

    `claims`: pod volume name to PersistentVolumeClaim. `disks`: pod volume name to what may be a block volume of ours,
    in words: the claims, those that the pod's generic ephemeral volumes are given, and FlexVolumes. `claims` has those
    of generic ephemeral volumes too.
    """

    uid: str
    # Empty where it is not known.
    node: str = ""
    # Whether its users are the host's: false for a pod with a user namespace of its own (`hostUsers: false`).
    host_users: bool = True
    runtime_class: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[MountFacts, ...] = ()
    claims: Mapping[str, str] = field(default_factory=dict)
    disks: Mapping[str, str] = field(default_factory=dict)
    # The names that the pod gives the volume in question; None where that is not known.
    own: frozenset[str] | None = None

    @property
    def untrusted(self) -> bool:
        return self.annotations.get(UNTRUSTED) == "true"


class PodUnknown(Exception):
    """The source cannot tell; why."""


class NotThere(PodUnknown):
    """The source can tell: there is none, or another. Nothing that was known before is believed over it."""


class PodSource(Protocol):
    """Somebody who knows pods: an API server, a kubelet."""

    def pod(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        """Raises PodUnknown."""

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        """The handler of a RuntimeClass. Raises PodUnknown."""

    def claim_of(self, persistent_volume: str, deadline: Deadline, *, anew: bool = False) -> tuple[str, str]:
        """Namespace and name of the claim that a PersistentVolume is bound to; `anew`: what is known already is not so.
        Raises PodUnknown."""

    def followed(self, uid: str) -> PodFacts | None:
        """What is known of a pod without a question to anybody."""

    def warm(self) -> None:
        """Begin what the first question would wait for."""


def with_own(pod: PodFacts, ref: PodRef, source: PodSource, deadline: Deadline) -> PodFacts:
    """The facts, with the names that the pod gives the volume that is published, as far as they are known."""
    if ref.pod_volume and ref.pod_volume in {mount.volume for mount in pod.mounts}:
        return replace(pod, own=frozenset({ref.pod_volume}))
    if not ref.persistent_volume:
        return pod
    try:
        namespace, claim = source.claim_of(ref.persistent_volume, deadline)
        elsewhere = bool(namespace and ref.namespace) and namespace != ref.namespace
        if elsewhere or claim not in pod.claims.values():  # a volume that is retained may be given to another claim
            namespace, claim = source.claim_of(ref.persistent_volume, deadline, anew=True)
    except PodUnknown as error:
        log.warning("which of the pod's volumes is this one is not known, so how it is mounted was not checked",
                    extra={"pod": str(ref), "volume": ref.persistent_volume, "why": str(error)})  # fmt: skip
        return pod
    if namespace and ref.namespace and namespace != ref.namespace:
        return pod
    own = frozenset(name for name, one in pod.claims.items() if one == claim)
    if not own:  # the pod mounts it all the same: what is known of its claim is not so any more
        log.warning("the volume is of no claim of the pod's, as far as is known",
                    extra={"pod": str(ref), "volume": ref.persistent_volume, "claim": claim})  # fmt: skip
    return replace(pod, own=own or None)


class _Fields(msgspec.Struct, rename="camel"):
    """An object of the API, as far as it matters; what has another form than the API gives it is refused."""


class _Claimed(_Fields):
    claim_name: str = ""
    read_only: bool | None = None


class _Flex(_Fields):
    driver: str = ""
    options: dict[str, str] | None = None
    read_only: bool | None = None


class _Volume(_Fields):
    name: str
    persistent_volume_claim: _Claimed | None = None
    flex_volume: _Flex | None = None
    ephemeral: dict[str, Any] | None = None

    @property
    def read_only(self) -> bool:
        source = self.persistent_volume_claim or self.flex_volume
        return source is not None and bool(source.read_only)


class _Mount(_Fields):
    name: str
    mount_path: str | None = None
    read_only: bool | None = None
    sub_path: str | None = None
    sub_path_expr: str | None = None
    mount_propagation: str | None = None


class _Container(_Fields):
    name: str = ""
    restart_policy: str | None = None
    volume_mounts: list[_Mount] | None = None


class _Spec(_Fields):
    containers: list[_Container]
    init_containers: list[_Container] | None = None
    volumes: list[_Volume] | None = None
    runtime_class_name: str | None = None
    node_name: str | None = None
    host_users: bool | None = None


class _Metadata(_Fields):
    uid: str
    name: str = ""
    annotations: dict[str, str] | None = None


class _Pod(_Fields):
    metadata: _Metadata
    spec: _Spec


def facts_from(pod: Mapping[str, Any]) -> PodFacts:
    """From a Pod as the API writes it in JSON. PodUnknown for what is none: an answer that lacks the uid or the
    containers, such as a proxy's that only has the metadata, says nothing of a runtime."""
    try:
        known = msgspec.convert(pod, _Pod)
    except (ValueError, RecursionError) as error:  # of another form, or of characters that no text has
        raise PodUnknown(f"the API server's answer is no whole pod: {error}") from error
    meta, spec = known.metadata, known.spec
    if not meta.uid:
        raise PodUnknown("the API server's answer is no whole pod: its uid is empty")
    volumes, before = spec.volumes or [], spec.init_containers or []
    claims = {
        volume.name: volume.persistent_volume_claim.claim_name
        for volume in volumes
        if volume.persistent_volume_claim is not None
    } | {
        # The name that Kubernetes gives the claim that it makes.
        volume.name: f"{meta.name}-{volume.name}"
        for volume in volumes
        if volume.ephemeral is not None
    }
    return PodFacts(
        uid=meta.uid,
        node=spec.node_name or "",
        host_users=spec.host_users is not False,
        runtime_class=spec.runtime_class_name or "",
        annotations={
            name: value[:_LONGEST_VALUE] for name, value in (meta.annotations or {}).items() if _decides(name)
        },
        mounts=tuple(_mounts(before, spec.containers, {volume.name for volume in volumes if volume.read_only})),
        claims=claims,
        disks={name: f"claim {claim!r}" for name, claim in claims.items()} | _disks_without_claims(volumes),
    )


def _decides(annotation: str) -> bool:
    """A pod may have 256 KiB of annotations, and the node many pods."""
    return annotation == UNTRUSTED or annotation.startswith(_KATA)


def _mounts(before: list[_Container], containers: list[_Container], read_only: set[str]) -> Iterator[MountFacts]:
    for place, container in enumerate([*before, *containers]):
        for mount in container.volume_mounts or []:
            yield MountFacts(
                container=container.name,
                volume=mount.name,
                path=mount.mount_path or "",
                read_only=bool(mount.read_only),
                sub_path=mount.sub_path or mount.sub_path_expr or "",
                propagation=mount.mount_propagation or "",
                ends=place < len(before) and container.restart_policy != "Always",
                writes=not mount.read_only and mount.name not in read_only,
            )


# FlexVolume options that name a disk (another driver's words for `volume` among them), and those of what is none.
_DISKS, _NO_DISKS = ("volume", "volumeId", "volumeID", "device"), ("directory", "server")


def _disks_without_claims(volumes: Sequence[_Volume]) -> dict[str, str]:
    found = {}
    for volume in volumes:
        if volume.flex_volume is not None:
            disk = _disk_of(volume.flex_volume, volume.name)
            if disk:
                found[volume.name] = f"FlexVolume {disk!r}"
    return found


def _disk_of(volume: _Flex, name: str) -> str:
    """What names the disk of a FlexVolume; empty for one that is none of ours, or no disk.

    Ours may be installed under any name; of other drivers nothing is known, and no guest gets their disks.
    """
    options, driver = volume.options or {}, volume.driver.rpartition("/")[2]
    named = next((options[key] for key in _DISKS if options.get(key)), "")
    if named and (driver == "disk" or named.startswith((*DISKS, "/"))):
        return _one_name(named)
    return name if driver == "runvol" and not any(options.get(key) for key in _NO_DISKS) else ""


def _one_name(named: str) -> str:
    """The same for all names of one disk, of which udev makes several. Elsewhere a look at a path might hang."""
    path = os.path.normpath(named) if named.startswith("/") else named
    return os.path.realpath(path) if path.startswith("/dev/") else path
