"""What breaks when a rule of the chart's service accounts is taken away: each rule, which program needs it, and for what work.

A round takes one right from every role, does the work, finds each program that needs it refused in the API server's
audit log, gives the right back, and sees the work done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.cluster import installed, rights
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.rights import Right

TAINT = "csi.runvol.io/not-ready"
_SELECTED = "volume.kubernetes.io/selected-node"
_SNAPSHOTS, _STORAGE, _LEASES, _NODES = (
    "snapshot.storage.k8s.io",
    "storage.k8s.io",
    "coordination.k8s.io",
    "node.k8s.io",
)
_SNAPSHOT_API = {"apiGroup": _SNAPSHOTS, "kind": "VolumeSnapshot"}
# Seconds: refused, and done again by somebody who waits longer from time to time, five minutes at the most.
_REFUSED, _DONE = 60.0, 330.0
_FOLLOWS = ("list", "watch")


@dataclass(frozen=True)
class Need:
    """`programs` of whoever has the role need `verbs` on a resource for `work`, of WORKS. Who follows objects lists
    and watches them, each where the other one fails: those two are taken away together."""

    role: str
    group: str
    resource: str
    verbs: str
    programs: str
    work: str

    def rights(self) -> set[Right]:
        return {(verb, self.group, self.resource) for verb in self.verbs.split()}


NEEDS = (
    Need("plugin", "", "pods", "get list watch", "runvol", "restart publish"),
    Need("plugin", "", "persistentvolumes", "get list watch", "runvol", "restart publish"),
    Need("plugin", _NODES, "runtimeclasses", "get list watch", "runvol", "restart publish"),
    Need("plugin", _STORAGE, "storageclasses", "list", "runvol", "doctor"),
    Need("plugin", _STORAGE, "csidrivers", "get", "runvol", "doctor"),
    Need("plugin", "", "nodes", "get", "runvol", "doctor"),
    Need("plugin", "", "events", "create patch", "runvol", "fill"),
    Need("kubelet", "", "nodes/pods", "get", "", "kubelet"),  # which kubelet asks for, whom the log leaves out
    Need("taint", "", "nodes", "update", "runvol", "taint"),
    Need("provisioner", "", "persistentvolumes", "list watch", "csi-provisioner", "restart"),
    Need("provisioner", "", "persistentvolumes", "get", "csi-provisioner", "clone"),
    Need("provisioner", "", "persistentvolumes", "create", "csi-provisioner", "provision"),
    Need("provisioner", "", "persistentvolumes", "patch delete", "csi-provisioner", "delete"),
    Need("provisioner", "", "persistentvolumeclaims", "get", "runvol", "elsewhere"),
    Need("provisioner", "", "persistentvolumeclaims", "list watch", "csi-provisioner", "restart"),
    Need("provisioner", "", "persistentvolumeclaims", "update", "csi-provisioner", "clone"),
    Need("provisioner", _STORAGE, "storageclasses", "list watch", "csi-provisioner", "restart"),
    Need("provisioner", "", "events", "create patch", "csi-provisioner", "fail"),
    Need("provisioner", _SNAPSHOTS, "volumesnapshots", "list watch", "csi-provisioner", "restart"),
    Need("provisioner", _SNAPSHOTS, "volumesnapshots", "get update", "csi-provisioner", "restore"),
    Need("provisioner", _SNAPSHOTS, "volumesnapshotcontents", "get", "csi-provisioner", "restore"),
    Need("snapshotter", "", "events", "create", "csi-snapshotter", "fail"),
    Need("snapshotter", "", "events", "patch", "csi-snapshotter", "stuck"),
    Need("snapshotter", _SNAPSHOTS, "volumesnapshotclasses", "list watch", "csi-snapshotter", "restart"),
    Need("snapshotter", _SNAPSHOTS, "volumesnapshotcontents", "list watch", "csi-snapshotter", "restart"),
    Need("snapshotter", _SNAPSHOTS, "volumesnapshotcontents", "get patch", "csi-snapshotter", "snapshot"),
    Need("snapshotter", _SNAPSHOTS, "volumesnapshotcontents/status", "update", "csi-snapshotter", "forget"),
    Need("snapshotter", _SNAPSHOTS, "volumesnapshotcontents/status", "patch", "csi-snapshotter", "fail"),
    Need("resizer", "", "persistentvolumes", "list watch", "csi-resizer", "restart"),
    Need("resizer", "", "persistentvolumes", "patch", "csi-resizer", "expand"),
    Need("resizer", "", "persistentvolumeclaims", "list watch", "csi-resizer", "restart"),
    Need("resizer", "", "pods", "list watch", "csi-resizer", "restart"),
    Need("resizer", "", "persistentvolumeclaims/status", "patch", "csi-resizer", "expand"),
    Need("resizer", "", "events", "create patch", "csi-resizer", "fail"),
    Need("snapshot-controller", "", "persistentvolumes", "list watch", "snapshot-controller", "restart"),
    Need("snapshot-controller", "", "persistentvolumes", "get", "snapshot-controller", "snapshot"),
    Need("snapshot-controller", "", "nodes", "list watch", "snapshot-controller", "restart"),
    Need("snapshot-controller", "", "persistentvolumeclaims", "list watch", "snapshot-controller", "restart"),
    Need("snapshot-controller", "", "persistentvolumeclaims", "get update", "snapshot-controller", "snapshot"),
    Need("snapshot-controller", "", "events", "create", "snapshot-controller", "fail"),
    Need("snapshot-controller", "", "events", "patch", "snapshot-controller", "held"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshotclasses", "list watch", "snapshot-controller", "restart"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshotcontents", "list watch", "snapshot-controller", "restart"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshotcontents", "create patch", "snapshot-controller", "snapshot"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshotcontents", "delete", "snapshot-controller", "forget"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshots", "list watch", "snapshot-controller", "restart"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshots", "get patch", "snapshot-controller", "snapshot"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshots", "update", "snapshot-controller", "forget"),
    Need("snapshot-controller", _SNAPSHOTS, "volumesnapshots/status", "update", "snapshot-controller", "snapshot"),
    Need("leases", _LEASES, "leases", "get create update",
         "csi-provisioner csi-resizer csi-snapshotter snapshot-controller", "elect"),
    Need("capacity", _STORAGE, "csistoragecapacities", "list watch", "csi-provisioner", "restart"),
    Need("capacity", _STORAGE, "csistoragecapacities", "create", "csi-provisioner", "tell"),
    Need("capacity", _STORAGE, "csistoragecapacities", "update", "csi-provisioner", "provision"),
    Need("capacity", _STORAGE, "csistoragecapacities", "delete", "csi-provisioner", "untell"),
    Need("capacity", "", "pods", "get", "csi-provisioner", "restart"),
)  # fmt: skip


# The chart's values with which it has all of its roles.
EVERY_ROLE = (
    "snapshots.enabled=true",
    "snapshots.controller=true",
    f"node.startupTaint={TAINT}",
    "kubelet.address=https://127.0.0.1:10250",
)


def table() -> set[tuple[str, Right]]:
    """Every role with every right that it should have."""
    return {(f"{installed.NAME}-{one.role}", right) for one in NEEDS for right in one.rights()}


# -- work: yields when it is prepared, when it was begun, and when it is done; the rest clears up


def _ours(name: str, size: str = "64Mi", node: str = "node1", **spec: Any) -> dict[str, Any]:
    """A claim that a node was chosen for, without a pod."""
    wanted = claim(name, size, storageClassName="runvol", **spec)
    wanted["metadata"]["annotations"] = {_SELECTED: node}
    return wanted


def _bound(cluster: Cluster, name: str) -> str:
    """The name of the claim's volume, once it is there."""

    def volume() -> str:
        found = cluster.find("pvc", name)
        return str(found["spec"]["volumeName"]) if found and found["status"].get("phase") == "Bound" else ""

    return cluster.wait(f"the claim {name} is bound", volume, _DONE, about=("pvc", name, "default"))


def _snapshot(name: str, of: str) -> dict[str, Any]:
    return {"apiVersion": f"{_SNAPSHOTS}/v1", "kind": "VolumeSnapshot", "metadata": {"name": name},
            "spec": {"volumeSnapshotClassName": "runvol", "source": {"persistentVolumeClaimName": of}}}  # fmt: skip


def _ready(cluster: Cluster, name: str) -> None:
    def ready() -> bool:
        found = cluster.find("volumesnapshot", name)
        return bool(found and found.get("status", {}).get("readyToUse"))

    cluster.wait(f"the snapshot {name} is ready", ready, _DONE, about=("volumesnapshot", name, "default"))


def prepare(cluster: Cluster) -> None:
    """What all work needs: a claim that a pod uses, one that nobody uses, and a snapshot of that."""
    cluster.apply({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "plain"}, "handler": "runc"},
                  _ours("busy"), _ours("source"), _user("uses", "busy"))  # fmt: skip
    _bound(cluster, "source")
    cluster.apply(_snapshot("kept", "source"))
    _ready(cluster, "kept")
    cluster.wait_ready("uses")


def clear(cluster: Cluster) -> None:
    """Takes away all that work has left; some of it waits for other."""
    kinds = ("volumesnapshots", "pods", "pvc")
    for kind in kinds:
        cluster.kubectl("delete", kind, "--all", "--wait=false", "--grace-period=1")
    cluster.kubectl("delete", "runtimeclass", "plain")
    cluster.wait("nothing is left", lambda: not any(cluster.list(kind) for kind in kinds), _DONE)
    for volume in cluster.list("pv"):
        if volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain":
            cluster.kubectl("delete", "pv", volume["metadata"]["name"], "--wait=false")
    cluster.wait("no volume is left", lambda: not cluster.list("pv"), _DONE)


def _user(name: str, of: str) -> dict[str, Any]:
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": of}}]
    return pod(name, volumes=volumes, runtimeClassName="plain",
               main={"volumeMounts": [{"name": "data", "mountPath": "/data"}]})  # fmt: skip


def _made(cluster: Cluster, wanted: dict[str, Any]) -> Iterator[None]:
    """A claim that is to be bound."""
    name = wanted["metadata"]["name"]
    yield
    cluster.apply(wanted)
    yield
    _bound(cluster, name)
    yield
    cluster.delete("pvc", name)


def _provision(cluster: Cluster, name: str) -> Iterator[None]:
    return _made(cluster, _ours(name))


def _clone(cluster: Cluster, name: str) -> Iterator[None]:
    """Of a claim that nobody has cloned yet: it is marked the first time."""
    source = f"{name}-source"
    cluster.apply(_ours(source))
    _bound(cluster, source)
    yield from _made(cluster, _ours(name, dataSource={"kind": "PersistentVolumeClaim", "name": source}))
    cluster.delete("pvc", source)


def _restore(cluster: Cluster, name: str) -> Iterator[None]:
    """Twice, since a snapshot that could not be marked is restored all the same."""
    source = {**_SNAPSHOT_API, "name": "kept"}
    again = _made(cluster, _ours(f"{name}-again", dataSource=source))
    for part, _ in enumerate(_made(cluster, _ours(name, dataSource=source))):
        if part == 2:
            for _step in range(3):
                next(again)
        yield
    next(again, None)


def _elsewhere(cluster: Cluster, name: str) -> Iterator[None]:
    """Of a source on node1, asked of node2; once that has refused it, a scheduler chooses again, and the same."""
    wanted = _ours(name, node="node2", dataSource={"kind": "PersistentVolumeClaim", "name": "source"})
    yield
    cluster.apply(wanted)
    yield

    def chosen_again() -> bool:
        found = cluster.find("pvc", name)
        assert found
        if _SELECTED not in found["metadata"]["annotations"]:
            cluster.kubectl("annotate", "pvc", name, f"{_SELECTED}=node2")
        return found["status"]["phase"] == "Bound"

    cluster.wait(f"the claim {name} is bound", chosen_again, _DONE, about=("pvc", name, "default"))
    yield
    cluster.delete("pvc", name)


def _delete(cluster: Cluster, name: str) -> Iterator[None]:
    cluster.apply(_ours(name))
    volume = _bound(cluster, name)
    yield
    cluster.delete("pvc", name)
    yield
    cluster.wait(
        f"the volume of {name} is gone", lambda: not cluster.find("pv", volume), _DONE, about=("pv", volume, "")
    )
    yield


def _grow(cluster: Cluster, name: str, mebibytes: int) -> None:
    wanted = {"spec": {"resources": {"requests": {"storage": f"{mebibytes}Mi"}}}}
    cluster.kubectl("patch", "pvc", name, "--type=merge", "-p", json.dumps(wanted))


def _expand(cluster: Cluster, name: str) -> Iterator[None]:
    cluster.apply(_ours(name))
    volume = _bound(cluster, name)

    def grown() -> bool:
        found = cluster.find("pv", volume)
        return bool(found and found["spec"]["capacity"]["storage"] == "80Mi")

    yield
    _grow(cluster, name, 80)
    yield
    cluster.wait(f"the volume of {name} has grown", grown, _DONE, about=("pvc", name, "default"))
    yield
    cluster.delete("pvc", name)


def _take(cluster: Cluster, name: str) -> Iterator[None]:
    yield
    cluster.apply(_snapshot(name, "source"))
    yield
    _ready(cluster, name)
    yield
    cluster.delete("volumesnapshot", name)


def _forget(cluster: Cluster, name: str) -> Iterator[None]:
    cluster.apply(_snapshot(name, "source"))
    _ready(cluster, name)
    yield
    cluster.kubectl("delete", "volumesnapshot", name, "--wait=false")
    yield
    cluster.wait(f"the snapshot {name} is gone", lambda: not cluster.find("volumesnapshot", name), _DONE,
                 about=("volumesnapshot", name, "default"))  # fmt: skip
    yield


def _fail(cluster: Cluster, name: str) -> Iterator[None]:
    """What fails, and is told of, most of it each time that it is tried again."""

    def begin(suffix: str) -> None:
        cluster.apply(_snapshot(f"{name}-busy{suffix}", "busy"), _snapshot(f"{name}-absent{suffix}", "nothing"),
                      _ours(f"{name}{suffix}", dataSource={"kind": "PersistentVolumeClaim", "name": "busy"}),
                      *_of_nothing(f"{name}-nothing{suffix}"))  # fmt: skip
        _bound(cluster, f"{name}-nothing{suffix}")
        _grow(cluster, f"{name}-nothing{suffix}", 80)

    yield
    begin("")
    yield
    begin("-again")
    cluster.wait(f"{name} is told of", lambda: cluster.events(f"{name}-again"), _DONE)
    yield
    for suffix in ("", "-again"):
        for which in ("busy", "absent"):
            cluster.delete("volumesnapshot", f"{name}-{which}{suffix}", seconds=_DONE)
        for one in (f"{name}{suffix}", f"{name}-nothing{suffix}"):
            cluster.delete("pvc", one, seconds=_DONE)
        cluster.delete("pv", f"{name}-nothing{suffix}")


def _fill(cluster: Cluster, name: str) -> Iterator[None]:
    """A pod fills its volume: that is said on it, and on its claim, again and again. What was not said is said anew."""

    def said() -> list[dict[str, Any]]:
        return [one for one in cluster.list("events", "--namespace=default", "--field-selector=reason=VolumeAlmostFull")
                if one["involvedObject"]["name"] == name and one["count"] > 1]  # fmt: skip

    wanted = _user(name, name)
    wanted["spec"]["containers"][0]["command"] = ["sh", "-c", "yes > /data/file; sync; sleep 100000"]
    yield
    cluster.apply(_ours(name), wanted)
    yield
    cluster.wait(f"{name} is told that its volume is almost full", said, _DONE)
    yield
    cluster.delete("pod", name)
    cluster.delete("pvc", name)


def _of_nothing(name: str) -> list[dict[str, Any]]:
    """A claim, bound to a volume that no driver has."""
    about = {"accessModes": ["ReadWriteOnce"], "storageClassName": "runvol"}
    volume = {"capacity": {"storage": "64Mi"}, "persistentVolumeReclaimPolicy": "Retain",
              "csi": {"driver": "csi.runvol.io", "volumeHandle": name}, "claimRef": {"namespace": "default", "name": name}}  # fmt: skip
    return [{"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": {**about, **volume}},
            claim(name, storageClassName="runvol", volumeName=name)]  # fmt: skip


def _held(cluster: Cluster, name: str) -> Iterator[None]:
    """A snapshot that is deleted while a claim waits to be made of it, which is told of again and again."""
    cluster.apply(_snapshot(name, "source"))
    _ready(cluster, name)
    cluster.apply(claim(name, storageClassName="runvol", dataSource={**_SNAPSHOT_API, "name": name}))
    yield
    cluster.kubectl("delete", "volumesnapshot", name, "--wait=false")
    yield
    yield
    cluster.delete("pvc", name)
    cluster.wait(f"the snapshot {name} is gone", lambda: not cluster.find("volumesnapshot", name), _DONE)


def _stuck(cluster: Cluster, name: str) -> Iterator[None]:
    """A snapshot that cannot be deleted for want of a secret, which is told of again and again."""
    secret = [f"snapshot.storage.kubernetes.io/deletion-secret-{key}" for key in ("name", "namespace")]
    cluster.apply(_snapshot(name, "source"))
    _ready(cluster, name)
    found = cluster.find("volumesnapshot", name)
    assert found
    content = found["status"]["boundVolumeSnapshotContentName"]
    cluster.kubectl("annotate", "volumesnapshotcontent", content, *(f"{key}=nothing" for key in secret))
    yield
    cluster.kubectl("delete", "volumesnapshot", name, "--wait=false")
    yield
    yield
    cluster.kubectl("annotate", "volumesnapshotcontent", content, *(f"{key}-" for key in secret))
    cluster.wait(f"the content {content} is gone", lambda: not cluster.find("volumesnapshotcontent", content), _DONE)


def _class(name: str) -> dict[str, Any]:
    return {"apiVersion": f"{_STORAGE}/v1", "kind": "StorageClass", "metadata": {"name": name},
            "provisioner": "csi.runvol.io", "volumeBindingMode": "WaitForFirstConsumer"}  # fmt: skip


def _told(cluster: Cluster, name: str) -> bool:
    found = cluster.list("csistoragecapacities", f"--namespace={installed.NAMESPACE}")
    return any(one["storageClassName"] == name for one in found)


def _tell(cluster: Cluster, name: str) -> Iterator[None]:
    yield
    cluster.apply(_class(name))
    yield
    cluster.wait(f"the capacity of {name} is told", lambda: _told(cluster, name), _DONE)
    yield
    cluster.delete("storageclass", name)


def _untell(cluster: Cluster, name: str) -> Iterator[None]:
    cluster.apply(_class(name))
    cluster.wait(f"the capacity of {name} is told", lambda: _told(cluster, name), _DONE)
    yield
    cluster.delete("storageclass", name)
    yield
    cluster.wait(f"nothing is told of {name}", lambda: not _told(cluster, name), _DONE)
    yield


def _begin_anew(cluster: Cluster, *selector: str) -> None:
    """Pods of the release; without the leases of the old ones, which the new ones would wait for."""
    words = (f"--namespace={installed.NAMESPACE}", "--wait=false")
    cluster.kubectl("delete", "pods", *words, "--force", "--grace-period=0", *(selector or ("--all",)))
    cluster.kubectl("delete", "leases", "--all", *words)


def _restart(cluster: Cluster, _name: str) -> Iterator[None]:
    yield
    _begin_anew(cluster)
    yield
    installed.wait_ready(cluster)
    yield


def _elect(cluster: Cluster, _name: str) -> Iterator[None]:
    yield
    _begin_anew(cluster, "--selector=app.kubernetes.io/component=controller")
    yield
    installed.wait_ready(cluster)
    yield


def _publish(cluster: Cluster, name: str) -> Iterator[None]:
    yield
    cluster.apply(_user(name, "source"))
    yield
    cluster.wait_ready(name, seconds=_DONE)
    yield
    cluster.delete("pod", name)


def _doctor(cluster: Cluster, _name: str) -> Iterator[None]:
    yield
    cluster.wait("doctor can be asked", lambda: installed.doctor(cluster))
    yield
    lines = {row["subject"]: row for row in installed.doctor(cluster)}
    assert {lines["Kubernetes API"]["state"], lines["CSIDriver csi.runvol.io"]["state"]} == {"ok"}, lines
    yield


def _kubelet(cluster: Cluster, _name: str) -> Iterator[None]:
    def line() -> dict[str, str]:
        return next(row for row in installed.doctor(cluster) if row["subject"] == "kubelet's pods")

    yield
    cluster.wait("kubelet refuses the plugin", lambda: "403" in line()["finding"], _REFUSED)
    yield
    cluster.wait("kubelet answers the plugin", lambda: line()["state"] == "ok", _DONE)
    yield


def _taint(cluster: Cluster, _name: str) -> Iterator[None]:
    def tainted() -> bool:
        found = cluster.find("node", "node1")
        return bool(found and TAINT in [one["key"] for one in found["spec"].get("taints") or ()])

    yield
    cluster.kubectl("taint", "node", "node1", f"{TAINT}=:NoSchedule")
    _begin_anew(cluster, "--selector=app.kubernetes.io/component=node")
    yield
    cluster.wait("node1 takes pods", lambda: not tainted(), _DONE)
    installed.wait_ready(cluster)
    yield


WORKS: dict[str, Callable[[Cluster, str], Iterator[None]]] = {
    "clone": _clone, "delete": _delete, "doctor": _doctor, "elect": _elect, "elsewhere": _elsewhere, "expand": _expand,
    "fail": _fail, "fill": _fill, "forget": _forget, "held": _held, "kubelet": _kubelet, "provision": _provision, "publish": _publish,
    "restart": _restart, "restore": _restore, "snapshot": _take, "stuck": _stuck, "taint": _taint, "tell": _tell, "untell": _untell,
}  # fmt: skip


# -- rounds


@dataclass(frozen=True)
class Round:
    """One right, or all of those that only break together, with who needs them."""

    rights: tuple[Right, ...]
    needs: tuple[Need, ...]

    def __str__(self) -> str:
        verbs = " ".join(verb for verb, _group, _resource in self.rights)
        return f"{verbs} {self.rights[0][2]}"

    def works(self) -> list[str]:
        """Who begins anew does so before anything else is begun."""
        found = {work for need in self.needs for work in need.work.split()}
        return sorted(found, key=lambda work: (work not in ("restart", "taint", "elect"), work))

    def refused(self) -> set[tuple[str, Right]]:
        """Program and right of each refusal that is waited for."""
        return {(program, right) for need in self.needs for right in need.rights() & {*self.rights}
                for program in need.programs.split()}  # fmt: skip


def rounds(needs: Sequence[Need] = NEEDS) -> list[Round]:
    """Every right of every need is in one. Who follows objects and gets them only where that fails loses all three."""
    found = []
    for group, resource in sorted({(need.group, need.resource) for need in needs}):
        of = [need for need in needs if (need.group, need.resource) == (group, resource)]
        follow = [need for need in of if need.verbs.split()[-1:] == ["watch"] or need.verbs == "list"]
        verbs = {verb for need in follow for verb in need.verbs.split()}
        parts = [(verbs, follow)] if follow else []
        rest = [need for need in of if need not in follow]
        for verb in sorted({verb for need in rest for verb in need.verbs.split()}):
            parts.append(({verb}, [need for need in rest if verb in need.verbs.split()]))
        found += [Round(tuple(sorted((verb, group, resource) for verb in some)), tuple(who)) for some, who in parts]
    return found


def _roles(cluster: Cluster) -> list[dict[str, Any]]:
    """Those of the release, with one resource and one verb in each rule."""
    found = []
    for kind in ("clusterroles", "roles"):
        for role in cluster.list(
            kind, f"--namespace={installed.NAMESPACE}", f"--selector=app.kubernetes.io/instance={installed.NAME}"
        ):
            rules = [{"apiGroups": [group], "resources": [resource], "verbs": [verb]} for rule in role["rules"]
                     for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]]  # fmt: skip
            found.append({**role, "rules": rules})
    return found


def _without(role: dict[str, Any], some: set[Right]) -> list[dict[str, Any]]:
    return [
        rule for rule in role["rules"] if (rule["verbs"][0], rule["apiGroups"][0], rule["resources"][0]) not in some
    ]


def _set(cluster: Cluster, role: dict[str, Any], without: set[Right]) -> None:
    cluster.kubectl("patch", role["kind"].lower(), role["metadata"]["name"], f"--namespace={installed.NAMESPACE}",
                    "--type=merge", "-p", json.dumps({"rules": _without(role, without)}))  # fmt: skip


def _seen(cluster: Cluster, since: int, refused: bool) -> set[tuple[str, Right]]:
    return {
        (one.program, one.right) for one in rights.requests(cluster.directory, since) if (one.answer == 403) is refused
    }


def _lists_first(program: str, right: Right) -> bool:
    """The plugin does; of snapshots so does the snapshot-controller, which ends without, and the provisioner, which
    does without until it begins anew."""
    of_snapshots = right[1] == _SNAPSHOTS and program in ("snapshot-controller", "csi-provisioner")
    return program == "runvol" or of_snapshots


def run(cluster: Cluster, one: Round, number: int) -> str:
    """A line about a round: what was refused to whom, and that it was done afterwards."""
    log, began = cluster.directory / "audit.log", time.monotonic()
    roles = [role for role in _roles(cluster) if _without(role, {*one.rights}) != role["rules"]]
    works = {name: WORKS[name](cluster, f"{name}-{number}") for name in one.works()}
    for work in works.values():
        next(work)
    without, since, wanted = {*one.rights}, log.stat().st_size, one.refused()

    def missing(of: set[tuple[str, Right]]) -> set[tuple[str, Right]]:
        return of - _seen(cluster, since, refused=True)

    def wait_refused(of: set[tuple[str, Right]]) -> None:
        try:
            cluster.wait(f"without `{one}` work fails", lambda: not missing(of), _REFUSED)
        except Exception as late:
            raise AssertionError(f"without `{one}` nothing was refused to {sorted(missing(of))}") from late

    def give_back(*verbs: str) -> None:
        for role in roles:
            _set(cluster, role, {right for right in without if right[0] not in verbs})

    try:
        give_back()
        for work in works.values():
            next(work)
        # Who lists first does not get as far as watching, and a plugin that watches needs not get.
        later = {(program, right) for program, right in wanted if right[0] == "watch" and _lists_first(program, right)}
        got = {(program, right) for program, right in wanted if program == "runvol" and right[0] == "get" and later}
        wait_refused(wanted - later)
        if got:
            from_here = log.stat().st_size
            give_back("get")
            works["again"] = WORKS["publish"](cluster, f"publish-{number}-again")
            next(works["again"])
            next(works["again"])
            cluster.wait(
                f"with `get` of `{one}` the plugin gets", lambda: got <= _seen(cluster, from_here, refused=False), _DONE
            )
            wanted -= got
        if later:
            give_back("get", "list")
            if "csi-provisioner" in {program for program, _right in later}:
                _begin_anew(cluster)
            wait_refused(later)
    finally:
        given = log.stat().st_size
        give_back(*(right[0] for right in without))
    for work in works.values():
        next(work)

    def undone() -> set[tuple[str, Right]]:
        did = _seen(cluster, given, refused=False)
        return {(program, right) for program, right in wanted
                if not rights.is_used(right, {other for who, other in did if who == program})}  # fmt: skip

    try:
        cluster.wait(f"with `{one}` work is done again", lambda: not undone(), _DONE)
    except Exception as late:
        raise AssertionError(f"`{one}` was given back, and nothing was done by {sorted(undone())}") from late
    for work in works.values():
        next(work, None)
    return f"{one}: {', '.join(one.works())}; refused to {', '.join(sorted({who for who, _ in wanted}) or ['kubelet'])}; {time.monotonic() - began:.0f} s"
