"""Where the parts of a pod are on this node, for log collectors and people: what the host reads, and what a guest has.

containerd keeps an OCI bundle for each container (`<state>/io.containerd.runtime.v2.task/k8s.io/<id>/config.json`, with
the annotations of its CRI plugin), kubelet has its output in `<namespace>_<name>_<uid>/<container>/<n>.log`, and of
runvol's volumes the claims tell who has them. Nobody is asked, nothing is entered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from blockdev import durable, mountinfo
from guestmount import ways
from guestmount.claims import HOST, SANDBOX, Claim, Target
from guestmount.runtimes import in_root
from volumes import VolumeKind

ROOT, OUTPUT, VOLUME = "root filesystem", "standard output", "volume"
# Of a container's own files, which are many: only these lie below kubelet's directory of the pod.
_OF_POD = "/pods/{uid}/volume"
_BUNDLES = "io.containerd.runtime.v2.task/k8s.io"
_CRI = "io.kubernetes.cri."
# Bytes of a bundle's configuration, and bundles that are looked at.
_LARGEST, _MOST = 4 << 20, 5000
_LOG = re.compile(r"([0-9]+)\.log\Z")
_PIECE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True, kw_only=True)
class Pod:
    """As far as it is known; `uid` always is."""

    uid: str
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else self.uid


@dataclass(frozen=True, kw_only=True)
class Place:
    """One thing of a pod. `path`: on the node; `readable`: whether its content is there; `why`: if it is not, in words.
    `seen_at`: where the container has it; `kernel`: which one has a volume of runvol's mounted, host or sandbox.
    `device`: what carries it, where that is known."""

    kind: str
    pod: Pod
    container: str = ""
    volume: str = ""
    path: str = ""
    readable: bool
    why: str = ""
    device: str = ""
    handler: str = ""
    kernel: str = ""
    read_only: bool = False
    seen_at: str = ""


class _Mount(msgspec.Struct):
    destination: str = ""
    source: str = ""
    type: str = ""


class _Root(msgspec.Struct, frozen=True):
    path: str = "rootfs"
    readonly: bool = False


class _Spec(msgspec.Struct):
    annotations: dict[str, str] = {}
    mounts: list[_Mount] = []
    root: _Root = _Root()


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """One container of a pod. `root`: where its root filesystem is mounted, if the host mounts it."""

    pod: Pod
    container: str
    root: str
    read_only: bool
    mounts: Sequence[tuple[str, str]]


def bundles(states: Iterable[str], root: str) -> Iterator[Bundle]:
    """The containers of pods, in the state directories of containerds (the node's names; `root` is the node's)."""
    for state in dict.fromkeys(states):
        directory = os.path.join(state, _BUNDLES)
        seen = in_root(directory, root)
        try:
            names = sorted(os.listdir(seen))[:_MOST]
        except OSError:
            continue
        for name in names:
            spec = _spec(os.path.join(seen, name, "config.json"))
            if spec is None or spec.annotations.get(f"{_CRI}container-type") != "container":
                continue
            yield Bundle(
                pod=_pod_of(spec),
                container=spec.annotations.get(f"{_CRI}container-name", name),
                root=os.path.normpath(os.path.join(directory, name, spec.root.path)),
                read_only=spec.root.readonly,
                mounts=[(one.source, one.destination) for one in spec.mounts if one.source.startswith("/")],
            )


def _spec(path: str) -> _Spec | None:
    """None for what is no bundle, or goes away at this moment."""
    try:
        return msgspec.json.decode(durable.read(path, _LARGEST), type=_Spec)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _pod_of(spec: _Spec) -> Pod:
    """containerd before 1.6.9 writes no uid; the pod's own files are mounted from a directory of that name."""
    said = {key: spec.annotations.get(f"{_CRI}sandbox-{key}", "") for key in ("namespace", "name", "uid")}
    uid = said["uid"] or next(
        (found[1] for one in spec.mounts if (found := re.search(r"/pods/([^/]+)/", one.source))), ""
    )
    return Pod(uid=uid, namespace=said["namespace"], name=said["name"])


def logged(directory: str, root: str) -> list[tuple[Pod, str]]:
    """The pods that kubelet has output of, with the directory of each (the node's name)."""
    found = []
    try:
        names = sorted(os.listdir(in_root(directory, root)))
    except OSError:
        return []
    for name in names:
        pieces = name.split("_")
        if len(pieces) == 3 and all(map(_PIECE.match, pieces)):
            namespace, pod, uid = pieces
            found.append((Pod(uid=uid, namespace=namespace, name=pod), os.path.join(directory, name)))
    return found


def places(
    wanted: str, *, claims: Sequence[Claim], containers: Sequence[Bundle], outputs: Sequence[tuple[Pod, str]], root: str
) -> list[Place]:
    """All that is known of the pods called so: a name, `NAMESPACE/NAME`, or a UID."""
    of_claims = [_pod(target) for claim in claims for target in claim.targets.values()]
    known: dict[str, Pod] = {}
    for pod in (*(one.pod for one in containers), *(one for one, _path in outputs), *of_claims):
        if pod.uid and (pod.uid not in known or not known[pod.uid].name):
            known[pod.uid] = pod
    pods = {uid: pod for uid, pod in known.items() if wanted in _names(pod)}
    mounted = {mount.target: mount for mount in mountinfo.table()}
    handlers = {uid: handler for claim in claims for uid, handler in _handlers(claim)}
    found: list[Place] = []
    for uid, pod in sorted(pods.items()):
        own = [one for one in containers if one.pod.uid == uid]
        found += [_root(one, pod, mounted, handlers.get(uid, "")) for one in own]
        found += [place for one, path in outputs if one.uid == uid for place in _outputs(pod, path, root)]
        found += _volumes(pod, claims, own)
    return found


def _names(pod: Pod) -> tuple[str, ...]:
    return (pod.uid, pod.name, f"{pod.namespace}/{pod.name}") if pod.name else (pod.uid,)


def _pod(target: Target) -> Pod:
    uid = "" if target.pod_uid.startswith("/") else target.pod_uid  # FlexVolume's caller may name a path alone
    return Pod(uid=uid, namespace=target.pod_namespace, name=target.pod_name)


def _handlers(claim: Claim) -> Iterator[tuple[str, str]]:
    for target in claim.targets.values():
        handler = target.handler or (claim.owner.handler if claim.owner is not None else "")
        if handler:
            yield target.pod_uid, handler


def _root(one: Bundle, pod: Pod, mounted: Mapping[str, mountinfo.Mount], handler: str) -> Place:
    mount = next((mounted[path] for path in (one.root, in_root(one.root, "/")) if path in mounted), None)
    why = "" if mount is not None else (
        "nothing is mounted there on this node: the guest has it, and only a process in the container reads it"
    )  # fmt: skip
    device = mount.source if mount is not None and mount.source.startswith("/") else ""
    return Place(
        kind=ROOT, pod=pod, container=one.container, path=one.root, readable=mount is not None, why=why, device=device,
        handler=handler, read_only=one.read_only, seen_at="/",
    )  # fmt: skip


def _outputs(pod: Pod, directory: str, root: str) -> Iterator[Place]:
    """The newest file of each container: its number is how often it was started again."""
    seen = in_root(directory, root)
    try:
        containers = sorted(os.listdir(seen))
    except OSError:
        return
    for container in containers:
        try:
            numbers = [
                int(found[1]) for name in os.listdir(os.path.join(seen, container)) if (found := _LOG.match(name))
            ]
        except OSError:
            continue
        if numbers:
            path = os.path.join(directory, container, f"{max(numbers)}.log")
            yield Place(kind=OUTPUT, pod=pod, container=container, path=path, readable=True, read_only=True)


def _volumes(pod: Pod, claims: Sequence[Claim], own: Sequence[Bundle]) -> Iterator[Place]:
    ours = set()
    for claim in claims:
        for path, target in sorted(claim.targets.items()):
            if target.pod_uid != pod.uid:
                continue
            ours.add(path)
            why = _unreadable(claim, path)
            at = [(one.container, to) for one in own for source, to in one.mounts if source == path]
            handler = target.handler or (claim.owner.handler if claim.owner is not None else "")
            for container, to in at or [("", "")]:
                yield Place(
                    kind=VOLUME, pod=pod, container=container, volume=claim.volume, path=path, readable=not why,
                    why=why, device=claim.device or claim.source, read_only=target.read_only, seen_at=to,
                    handler=handler, kernel=_kernel(claim, path),
                )  # fmt: skip
    start = _OF_POD.format(uid=pod.uid)
    for one in own:
        for source, to in one.mounts:
            if start in source and source not in ours:
                yield Place(kind=VOLUME, pod=pod, container=one.container, path=source, readable=True, seen_at=to)


def _kernel(claim: Claim, path: str) -> str:
    if claim.owner is not None:
        return claim.owner.kind
    return SANDBOX if path in ways.in_guests(claim) else HOST


def _unreadable(claim: Claim, path: str) -> str:
    """Why the host cannot read a volume of ours at its target; empty if it can."""
    if claim.kind is VolumeKind.BLOCK and claim.use.raw:
        return "it is a raw device: what is on it is the pod's to know"
    if path not in ways.in_guests(claim):
        return ""
    if claim.kind is VolumeKind.BLOCK:
        return "its guest has it mounted, and the host must not; a snapshot of it can be read elsewhere"
    return "its guest mounts the export itself; mount the export elsewhere to read it"
