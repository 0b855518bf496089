"""What is known of a pod, and who can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from blockdev import Deadline

UNTRUSTED = "io.kubernetes.cri.untrusted-workload"


@dataclass(frozen=True, kw_only=True)
class PodRef:
    """A pod as kubelet names it in a publish (`podInfoOnMount`); every field may be empty."""

    namespace: str = ""
    name: str = ""
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else (self.uid or "a pod that nobody named")


@dataclass(frozen=True, kw_only=True)
class MountFacts:
    """One volumeMount of one container."""

    container: str
    volume: str
    path: str = ""
    read_only: bool = False
    sub_path: str = ""
    propagation: str = ""


@dataclass(frozen=True, kw_only=True)
class PodFacts:
    """The part of a pod that decides about its storage. `claims`: pod volume name to PersistentVolumeClaim."""

    uid: str
    runtime_class: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[MountFacts, ...] = ()
    claims: Mapping[str, str] = field(default_factory=dict)

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


def facts_from(pod: Mapping[str, Any]) -> PodFacts:
    """From a Pod as the API writes it in JSON."""
    meta, spec = pod.get("metadata") or {}, pod.get("spec") or {}
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
            )
            for container in containers
            for mount in container.get("volumeMounts") or ()
        ),
        claims={
            volume.get("name", ""): volume["persistentVolumeClaim"].get("claimName", "")
            for volume in spec.get("volumes") or ()
            if volume.get("persistentVolumeClaim")
        },
    )
