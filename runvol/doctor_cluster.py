"""`runvol doctor` for the cluster: does the API answer, may it be asked, does it say of the drivers what they need?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from blockdev import Deadline, WaitExpired, selinux
from guestmount import KubernetesApi, drivers
from guestmount.pods import NotThere, PodUnknown
from guestmount.running_containerd import Answer
from runvol import assembly
from runvol.config import Config
from runvol.diagnosis import BROKEN, WARNING, Diagnosis, broken, good, unknown, warning

_SUBJECT = "Kubernetes API"
# Seconds for each question.
_ASKING = 3.0
_CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
# What is read, and what for.
_READ = (
    ("pods", "/api/v1/pods", "which runtime a pod has"),
    ("RuntimeClasses", "/apis/node.k8s.io/v1/runtimeclasses", "which handler a RuntimeClass has"),
    ("PersistentVolumes", "/api/v1/persistentvolumes", "which claim a volume is of"),
    ("StorageClasses", _CLASSES, "which NFS exports there are"),
)
# What a node's own credentials do not list; the driver of NFS has to, the other one reads volumes by their names.
_FOR_NFS = ("PersistentVolumes", "StorageClasses")
# Kubernetes 1.x whose kubelet asks again how many volumes a node may have, and the field that says when.
_ASKS_AGAIN, _PERIOD = 34, "nodeAllocatableUpdatePeriodSeconds"
# What a CSIDriver has to say, and what happens otherwise.
_FIELDS: Mapping[str, tuple[Any, str]] = {
    "attachRequired": (False, "pods wait for an attacher that does not exist"),
    "podInfoOnMount": (True, "a publish does not name its pod, so nobody knows its runtime"),
    "fsGroupPolicy": ("None", "kubelet changes the owners of files that a guest has"),
}


def examine(config: Config, api: KubernetesApi | None, containerd: Answer | None) -> Iterator[Diagnosis]:
    """One line where no API is configured. `containerd`: kubelet's, as far as it is known; None where this is no node,
    and nobody asks which runtime a pod has."""
    if api is None:
        how = ("exports are known by the setting nfs.exports alone" if containerd is None else
               "which runtime a pod has is said by its StorageClass, or by detect.default_runtime")  # fmt: skip
        yield warning("kubernetes.not-configured", _SUBJECT, f"none is configured (detect.kubeconfig): {how}")
        return
    if containerd is not None:
        yield from _kubelet(config, api)
    # The node's pods are all that is followed, and all that its own credentials list.
    asked = {"pods": f"fieldSelector={quote(f'spec.nodeName={config.node_id}', safe='')}&"}
    others = () if config.text("csi.nfs_endpoint") else _FOR_NFS
    unreadable = [
        _readable(api, what, f"{path}?{asked.get(what, '')}limit=1", why, WARNING if what in others else BROKEN)
        for what, path, why in _READ
        if containerd is not None or what in _FOR_NFS
    ]
    yield from (one for one in unreadable if one is not None)
    if not any(unreadable):
        yield good("kubernetes.api", _SUBJECT, "answers, and lets be read what is needed")
    elif all(unreadable):
        return
    yield from _drivers(config, api)
    yield from _classes(config, api)
    if containerd is not None:
        yield from _handlers(config, api, containerd)


def _readable(api: KubernetesApi, what: str, path: str, why: str, state: str) -> Diagnosis | None:
    try:
        api.one(what, path, Deadline.after(_ASKING))
    except (PodUnknown, WaitExpired) as error:
        cost = f"so nobody knows {why}" if state == BROKEN else "which only volumes on NFS need"
        known, fix = _refused(str(error), what)
        return Diagnosis(state=state, id=known, subject=what, finding=f"cannot be read, {cost}: {error}", fix=fix)
    return None


def _refused(said: str, what: str) -> tuple[str, str]:
    """Id and fix, by the status in what `KubernetesApi` says."""
    if re.search(r"\b401\b|certificate", said):
        return "kubernetes.unauthorized", ""
    if re.search(r"\b403\b", said):
        return "kubernetes.forbidden", (f"allow the plugin's account `get`, `list` and `watch` of {what}, as the rules "
                                        "in deploy/manifests/runvol.yaml do")  # fmt: skip
    return "kubernetes.unreachable", ""


def _kubelet(config: Config, api: KubernetesApi) -> Iterator[Diagnosis]:
    kubelet, subject = assembly.kubelet_pods(config, api), "kubelet's pods"
    if kubelet is None:
        return
    try:
        count = len(kubelet.pods(Deadline.after(_ASKING)))
    except PodUnknown as error:
        finding = f"cannot be asked, so it tells of no pod while the API is away: {error}"
        yield warning("kubelet.pods-unreadable", subject, finding)
        return
    yield good("kubelet.pods", subject, f"{count} are told by {config.text('detect.kubelet')}")


def _drivers(config: Config, api: KubernetesApi) -> Iterator[Diagnosis]:
    for name, key in ((drivers.NODES, "csi.endpoint"), (drivers.NFS, "csi.nfs_endpoint")):
        if not config.text(key):
            continue
        subject = f"CSIDriver {name}"
        try:
            found = api.one(subject, f"/apis/storage.k8s.io/v1/csidrivers/{name}", Deadline.after(_ASKING))
        except NotThere:
            yield broken("kubernetes.csidriver-missing", subject, "is not there: pods hang without any event")
            continue
        except (PodUnknown, WaitExpired) as error:
            yield unknown("kubernetes.csidriver-unreadable", subject, f"cannot be read: {error}")
            continue
        spec = found.get("spec")
        spec = spec if isinstance(spec, dict) else {}
        wrong = [f"{field} is {spec.get(field)!r} instead of {wanted!r}: {cost}"
                 for field, (wanted, cost) in _FIELDS.items() if spec.get(field) != wanted]  # fmt: skip
        if wrong:
            yield broken("kubernetes.csidriver-wrong", subject, "; ".join(wrong), f"`kubectl delete csidriver {name}`, "
                         "then `kubectl apply -f deploy/kubernetes/csidrivers.yaml`")  # fmt: skip
        else:
            yield good("kubernetes.csidriver", subject, "says what the driver needs")
        yield from _labels(config, name, spec)
        if name == drivers.NODES:
            yield from _limit(config, api, spec)


def _labels(config: Config, name: str, spec: Mapping[str, Any]) -> Iterator[Diagnosis]:
    """Whether kubelet has volumes mounted with a label that they cannot have; it does where SELinux is on."""
    if spec.get("seLinuxMount") is not True or not selinux.is_on():
        return
    if name == drivers.NFS:
        cost, more = "pods with different labels share a volume on NFS, and its mount has one: the second waits", ""
    elif "directory" in config.words("volumes.backends"):
        cost = ("a volume of the backend directory has no mount of its own that could have the pod's label, and nobody "
                "relabels its files: its pods may not read them")  # fmt: skip
        more = (" (of the chart: `drivers.seLinuxMount=false`); or take `directory` out of `volumes.backends`, once it "
                "has no volumes")  # fmt: skip
    else:
        return
    yield warning("kubernetes.selinux-mount", f"CSIDriver {name}", f"seLinuxMount is true: {cost}",
                  _patch(name, seLinuxMount=False) + more)  # fmt: skip


def _limit(config: Config, api: KubernetesApi, spec: Mapping[str, Any]) -> Iterator[Diagnosis]:
    """Whether a limit of this node's volumes that changes reaches the scheduler."""
    if not config.number("csi.max_volumes") or spec.get(_PERIOD) or _minor(api) < _ASKS_AGAIN:
        return
    yield warning("kubernetes.limit-not-asked-again", f"CSIDriver {drivers.NODES}", f"csi.max_volumes is set, and "
                  f"{_PERIOD} is not: kubelet asks when the plugin registers, and what FlexVolume's volumes take since "
                  "then is not heard of", f"{_patch(drivers.NODES, **{_PERIOD: 60})} (Kubernetes before 1.36 takes it "
                  "with the feature gate MutableCSINodeAllocatableCount only)")  # fmt: skip


def _patch(name: str, **fields: bool | int) -> str:
    """The command that changes a CSIDriver, as typed."""
    changed = msgspec.json.encode({"spec": fields}).decode()
    return f"`kubectl patch csidriver {name} --type=merge -p '{changed}'`"


def _minor(api: KubernetesApi) -> int:
    """Of the API server's version, 1.x; 0 where it does not say."""
    try:
        said = api.one("its version", "/version", Deadline.after(_ASKING)).get("minor")
    except (PodUnknown, WaitExpired):
        return 0
    found = re.match(r"\d+", said) if isinstance(said, str) else None  # some have a `+` after it
    return int(found[0][:4]) if found else 0


def _classes(config: Config, api: KubernetesApi) -> Iterator[Diagnosis]:
    """Those that have volumes of a node made before it is known where their pods can run."""
    if not config.text("csi.endpoint"):
        return
    try:
        found = [
            one for one in api.listed("StorageClasses", _CLASSES, Deadline.after(_ASKING))
            if one.get("provisioner") == drivers.NODES and one.get("volumeBindingMode") != "WaitForFirstConsumer"
        ]  # fmt: skip
    except (PodUnknown, WaitExpired):
        return  # which is a line already
    for one in found:
        metadata = one.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        yield warning("kubernetes.class-binds-at-once", f"StorageClass {name}", "volumeBindingMode is 'Immediate' "
                      "instead of 'WaitForFirstConsumer': a claim's volume is made on any node, and its pods can run "
                      "on that one only")  # fmt: skip


def _handlers(config: Config, api: KubernetesApi, asked: Answer) -> Iterator[Diagnosis]:
    """Whether the runtime that kubelet has is the containerd that is looked at here, and was started with its file."""
    containerd, subject = asked.believed, "runtime handlers"
    if containerd is None:
        return
    try:
        node = api.one("this node", f"/api/v1/nodes/{config.node_id}", Deadline.after(_ASKING))
    except (PodUnknown, WaitExpired) as error:
        yield unknown("kubernetes.node-unreadable", subject, f"the node cannot be read: {error}")
        return
    status = node.get("status")
    said = status.get("runtimeHandlers") if isinstance(status, dict) else None
    if not isinstance(said, list) or not said:
        return  # a kubelet before 1.31
    running = {str(one.get("name", "")) for one in said if isinstance(one, dict)} - {""}
    missing, more = sorted(containerd.handlers.keys() - running), sorted(running - containerd.handlers.keys())
    if not containerd.running:
        more = [name for name in more if name != "runc"]  # which containerd has without a word
    wrong, source = [], containerd.source
    if missing:
        wrong.append(f"{', '.join(missing)}: in {source}, not in kubelet's container runtime")
    if more:
        wrong.append(f"{', '.join(more)}: in kubelet's container runtime, not in {source}")
    if wrong:
        another = (
            "set `cri.endpoint` to the socket of kubelet's containerd"
            if containerd.running
            else ("restart containerd; if it reads another file, set `paths.containerd_config` to that")
        )
        yield warning("kubernetes.handlers-differ", subject, "; ".join(wrong), another)
    else:
        yield good("kubernetes.handlers", subject, f"{', '.join(sorted(running))}: as {source} has them")
