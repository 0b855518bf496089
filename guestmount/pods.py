"""What is known of a pod, and who can be asked."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from blockdev import Deadline
from volumes.registry import DISKS

log = logging.getLogger("runvol.pods")

UNTRUSTED = "io.kubernetes.cri.untrusted-workload"


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


class PodSource(Protocol):
    """Somebody who knows pods: an API server, a kubelet."""

    def pod(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        """Raises PodUnknown."""

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        """The handler of a RuntimeClass. Raises PodUnknown."""

    def claim_of(self, persistent_volume: str, deadline: Deadline) -> tuple[str, str]:
        """Namespace and name of the claim that a PersistentVolume is bound to. Raises PodUnknown."""

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
    except PodUnknown as error:
        log.warning("which of the pod's volumes is this one is not known, so how it is mounted was not checked",
                    extra={"pod": str(ref), "volume": ref.persistent_volume, "why": str(error)})  # fmt: skip
        return pod
    if namespace and ref.namespace and namespace != ref.namespace:
        return pod
    return replace(pod, own=frozenset(name for name, one in pod.claims.items() if one == claim))


def facts_from(pod: Mapping[str, Any]) -> PodFacts:
    """From a Pod as the API writes it in JSON."""
    meta, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    volumes = spec.get("volumes") or ()
    claims = {
        volume.get("name", ""): volume["persistentVolumeClaim"].get("claimName", "")
        for volume in volumes
        if volume.get("persistentVolumeClaim")
    } | {
        # The name that Kubernetes gives the claim that it makes.
        volume.get("name", ""): f"{meta.get('name', '')}-{volume.get('name', '')}"
        for volume in volumes
        if volume.get("ephemeral")
    }
    read_only = {volume.get("name", "") for volume in volumes if _is_read_only(volume)}
    ordinary = [one for one in spec.get("initContainers") or () if one.get("restartPolicy") != "Always"]
    containers = [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]
    return PodFacts(
        uid=meta.get("uid", ""),
        runtime_class=spec.get("runtimeClassName") or "",
        annotations=dict(meta.get("annotations") or {}),
        mounts=tuple(
            MountFacts(
                container=container.get("name", ""),
                volume=mount.get("name", ""),
                path=mount.get("mountPath", ""),
                read_only=bool(mount.get("readOnly")),
                sub_path=mount.get("subPath") or mount.get("subPathExpr") or "",
                propagation=mount.get("mountPropagation") or "",
                ends=any(container is one for one in ordinary),
                writes=not mount.get("readOnly") and mount.get("name", "") not in read_only,
            )
            for container in containers
            for mount in container.get("volumeMounts") or ()
        ),
        claims=claims,
        disks={name: f"claim {claim!r}" for name, claim in claims.items()} | _disks_without_claims(volumes),
    )


def _is_read_only(volume: Mapping[str, Any]) -> bool:
    source = volume.get("persistentVolumeClaim") or volume.get("flexVolume") or {}
    return bool(source.get("readOnly"))


# FlexVolume options that name a disk (another driver's words for `volume` among them), and those of what is none.
_DISKS, _NO_DISKS = ("volume", "volumeId", "volumeID", "device"), ("directory", "server")


def _disks_without_claims(volumes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    found = {}
    for volume in volumes:
        name = volume.get("name", "")
        if volume.get("flexVolume"):
            disk = _disk_of(volume["flexVolume"], name)
            if disk:
                found[name] = f"FlexVolume {disk!r}"
    return found


def _disk_of(volume: Mapping[str, Any], name: str) -> str:
    """What names the disk of a FlexVolume; empty for one that is none of ours, or no disk.

    Ours may be installed under any name; of other drivers nothing is known, and no guest gets their disks.
    """
    options, driver = volume.get("options") or {}, str(volume.get("driver", "")).rpartition("/")[2]
    named = next((str(options[key]) for key in _DISKS if options.get(key)), "")
    if named and (driver == "disk" or named.startswith((*DISKS, "/"))):
        return _one_name(named)
    return name if driver == "runvol" and not any(options.get(key) for key in _NO_DISKS) else ""


def _one_name(named: str) -> str:
    """The same for all names of one disk, of which udev makes several. Elsewhere a look at a path might hang."""
    path = os.path.normpath(named) if named.startswith("/") else named
    return os.path.realpath(path) if path.startswith("/dev/") else path
