"""runvol on two nodes, by its chart: a volume lives on its node, its pods come there, and what is another node's is left
alone. The nodes share one kernel: each sees the loop devices of both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import grpc
import pytest

from tests.cluster import installed
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.node import Node
from tests.cluster.test_install import snapshot, user
from tests.driver import Client, mount_capability

pytestmark = pytest.mark.kernel
KEY, NODE_LABEL = "topology.csi.runvol.io/node", "kubernetes.io/hostname"
ELSEWHERE = "didn't match PersistentVolume's node affinity"
WRITES = "while :; do date +%s >> /data/log && sync || echo failed; sleep 0.2; done & wait"
SOURCES = {"VolumeSnapshot": {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "kept"},
           "PersistentVolumeClaim": {"kind": "PersistentVolumeClaim", "name": "source"}}  # fmt: skip


@pytest.fixture(scope="module")
def pair(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with node1 and node2, and the chart."""
    with Cluster(tmp_path_factory.mktemp("c")) as cluster:
        cluster.add_node()
        installed.snapshot_crds(cluster)
        for node in cluster.nodes:
            installed.import_images(cluster, node)
        installed.install(cluster, installed.values(cluster.nodes[0]))
        yield cluster
        installed.uninstall(cluster)
        for node in cluster.nodes:
            assert node.run(["sh", "-c", "ls -A /var/lib/runvol/volumes"]).split() == []
            assert [line for line in node.run(["mount"]).splitlines() if "csi.runvol.io" in line] == []
    assert cluster.left() == []


@pytest.fixture
def used(pair: Cluster) -> Iterator[Cluster]:
    """The cluster; afterwards no pods, claims and snapshots of the test's are left, nor volumes."""
    yield pair
    for node in pair.nodes:
        pair.kubectl("uncordon", node.name)
    for kind in ("statefulsets", "pods", "volumesnapshots", "pvc"):
        pair.kubectl("delete", kind, "--all", "--wait=true", "--grace-period=1", timeout=120)
    pair.wait("no volume is left", lambda: not pair.list("pv"))


def on(node: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """A pod that may run on one node only."""
    wanted["spec"]["nodeSelector"] = {NODE_LABEL: node}
    return wanted


def ballast(node: str) -> dict[str, Any]:
    """A pod that has the scheduler prefer the other node."""
    requests = {"resources": {"requests": {"cpu": "1", "memory": "2Gi"}}}
    return on(node, pod(f"ballast-{node}", main=requests))


def stateful(name: str) -> dict[str, Any]:
    """One pod with one claim, `data-NAME-0`."""
    spec = user(name, "")["spec"]
    del spec["volumes"]
    template = {"metadata": {"labels": {"app": name}}, "spec": spec}
    wanted = claim("data", "320Mi")
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": name},
            "spec": {"serviceName": name, "replicas": 1, "selector": {"matchLabels": {"app": name}},
                     "template": template, "volumeClaimTemplates": [wanted]}}  # fmt: skip


def volume_of(cluster: Cluster, name: str) -> dict[str, Any]:
    """The PersistentVolume of a claim."""
    found = cluster.find("pvc", name)
    assert found
    volume = cluster.find("pv", found["spec"]["volumeName"])
    assert volume
    return volume


def node_of(volume: dict[str, Any]) -> str:
    (term,) = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    (one,) = term["matchExpressions"]
    assert one["key"] == KEY and one["operator"] == "In"
    (node,) = one["values"]
    return str(node)


def plugin(cluster: Cluster, node: str) -> str:
    """The name of the node's pod of runvol."""
    words = (f"--namespace={installed.NAMESPACE}", "--selector=app.kubernetes.io/component=node",
             f"--field-selector=spec.nodeName={node}")  # fmt: skip
    (one,) = cluster.list("pods", *words)
    return str(one["metadata"]["name"])


def command(cluster: Cluster, node: str, *words: str) -> str:
    """What a command prints that is run beside a node's plugin."""
    where = (plugin(cluster, node), f"--namespace={installed.NAMESPACE}", "-c", "runvol", "--")
    return cluster.kubectl("exec", *where, *words)


def snapshots_on(node: Node) -> list[str]:
    """The ids of the snapshots that a node's plugin has."""
    client = Client(str(node.path("/run/runvol/csi.sock")))
    found = [one.snapshot.snapshot_id for one in client.ListSnapshots().entries]
    client.close()
    return found


def take(cluster: Cluster, name: str, of: str) -> None:
    """A snapshot, which is ready."""
    cluster.apply(snapshot(name, of))

    def ready() -> bool:
        found = cluster.find("volumesnapshot", name)
        return bool(found and found.get("status", {}).get("readyToUse"))

    cluster.wait(f"the snapshot {name} is ready", ready, about=("volumesnapshot", name, "default"))


def said(cluster: Cluster, name: str, *words: str, seconds: float = 60.0) -> None:
    """An event of the object holds all the words."""
    cluster.wait(f"an event of {name} has {words}", lambda: any(all(word in one for word in words)
                 for one in cluster.events(name)), seconds, about=("events", "", "default"))  # fmt: skip


def test_a_claim_lies_where_its_first_pod_runs_and_its_pods_come_back_there(used: Cluster) -> None:
    used.apply(stateful("set"))
    first = used.wait_ready("set-0")["spec"]["nodeName"]
    assert node_of(volume_of(used, "data-set-0")) == first
    used.kubectl("exec", "set-0", "--", "sh", "-c", "echo kept > /data/f; sync")
    # The other node is the better one now.
    used.apply(ballast(first))
    used.wait_ready(f"ballast-{first}")
    used.kubectl("delete", "pod", "set-0", "--wait=true")
    assert used.wait_ready("set-0")["spec"]["nodeName"] == first
    assert used.kubectl("exec", "set-0", "--", "cat", "/data/f") == "kept\n"
    other = next(node.name for node in used.nodes if node.name != first)
    used.apply(on(other, user("pinned", "data-set-0")))
    said(used, "pinned", "FailedScheduling", ELSEWHERE)


def test_what_is_made_of_a_source_comes_to_the_sources_node(used: Cluster) -> None:
    writing = user("writes", "source", "echo kept > /data/f; sync; sleep 1000000 & wait")
    used.apply(claim("source", "320Mi"), on("node1", writing))
    used.wait_ready("writes")
    used.delete("pod", "writes")
    take(used, "kept", "source")
    (content,) = used.list("volumesnapshotcontents")
    assert content["metadata"]["labels"]["snapshot.storage.kubernetes.io/managed-by"] == "node1"
    assert [len(snapshots_on(node)) for node in used.nodes] == [1, 0]
    # The scheduler takes node2 whenever it may.
    used.apply(ballast("node1"))
    used.wait_ready("ballast-node1")
    for kind, source in SOURCES.items():
        name = f"of-{kind.lower()}"
        began = time.monotonic()
        used.apply(claim(name, "320Mi", dataSource=source), user(name, name))
        assert used.wait_ready(name)["spec"]["nodeName"] == "node1"
        assert time.monotonic() - began < 60
        assert used.kubectl("exec", name, "--", "cat", "/data/f") == "kept\n"
        said(used, name, "ProvisioningFailed", "is on node1, not on node2")
        pinned = f"pinned-{kind.lower()}"
        used.apply(claim(pinned, "320Mi", dataSource=source), on("node2", user(pinned, pinned)))
        said(used, pinned, "ProvisioningFailed", "is on node1, not on node2")
        said(used, pinned, "FailedScheduling", ELSEWHERE)
        used.delete("pod", pinned)
        used.delete("pod", name)
    used.delete("volumesnapshot", "kept")
    used.wait("its content is gone", lambda: not used.list("volumesnapshotcontents"))
    assert snapshots_on(used.nodes[0]) == []


def test_a_claim_grows_wherever_the_resizer_runs(used: Cluster) -> None:
    names = {node.name: f"on-{node.name}" for node in used.nodes}
    for node, name in names.items():
        used.apply(claim(name, "320Mi"), on(node, user(name, name)))
    for name in names.values():
        used.wait_ready(name)
        used.kubectl("patch", "pvc", name, "--type=merge", "-p",
                     '{"spec":{"resources":{"requests":{"storage":"384Mi"}}}}')  # fmt: skip

    def size(name: str) -> str:
        # kubelet looks at a pod's volumes once a minute, or when the pod changes.
        used.kubectl("annotate", "pod", name, "--overwrite", f"looked-at={time.monotonic()}")
        return str((used.find("pvc", name) or {})["status"]["capacity"]["storage"])

    for node, name in names.items():
        used.wait(f"the claim on {node} has grown", lambda name=name: size(name) == "384Mi", 90,
                  about=("pvc", name, "default"))  # fmt: skip


def test_a_claim_that_no_node_has_room_for_waits_with_words(used: Cluster) -> None:
    capacities = used.list("csistoragecapacities", f"--namespace={installed.NAMESPACE}")
    assert {one["nodeTopology"]["matchLabels"][KEY] for one in capacities} == {"node1", "node2"}
    used.apply(claim("large", "900Ti"), user("large", "large"))
    said(used, "large", "FailedScheduling", "2 node(s) did not have enough free storage")


class Asked:
    """The calls that node2's plugin is asked about node1's volume, and what it has to answer."""

    def __init__(self, node: Node, volume: dict[str, Any], pod_uid: str, snapshot_id: str) -> None:
        self._node = node
        handle, name = volume["spec"]["csi"]["volumeHandle"], volume["metadata"]["name"]
        of = {"volume_id": handle}
        staging = (
            f"{node.root}/plugins/kubernetes.io/csi/csi.runvol.io/{sha256(handle.encode()).hexdigest()}/globalmount"
        )
        target = f"{node.root}/pods/{pod_uid}/volumes/kubernetes.io~csi/{name}/mount"
        how = mount_capability(fstype="xfs")
        here = {"requisite": [{"segments": {KEY: "node1"}}]}
        size = {"required_bytes": 900 << 20}
        self.refused = {
            "DeleteVolume": of,
            "ControllerGetVolume": of,
            "ControllerExpandVolume": {**of, "capacity_range": size},
            "ValidateVolumeCapabilities": {**of, "volume_capabilities": [how]},
            "CreateSnapshot": {"source_volume_id": handle, "name": "s"},
            "CreateVolumeGroupSnapshot": {"source_volume_ids": [handle], "name": "g"},
            "DeleteSnapshot": {"snapshot_id": snapshot_id},
            "GetSnapshot": {"snapshot_id": snapshot_id},
            "NodeStageVolume": {**of, "staging_target_path": staging, "volume_capability": how},
            "NodePublishVolume": {**of, "staging_target_path": staging, "target_path": target, "volume_capability": how},
            "NodeExpandVolume": {**of, "volume_path": target, "capacity_range": size},
            "NodeGetVolumeStats": {**of, "volume_path": target},
        }  # fmt: skip
        # A node that has nothing of a volume has let go of it.
        self.granted = {
            "NodeUnpublishVolume": {**of, "target_path": target},
            "NodeUnstageVolume": {**of, "staging_target_path": staging},
        }
        self.elsewhere = {"name": "pvc-x", "volume_capabilities": [how], "accessibility_requirements": here}

    def answers(self) -> dict[str, tuple[str, str]]:
        """Code and sentence of each refusal."""
        found = {}
        client = Client(str(self._node.path("/run/runvol/csi.sock")))
        for name, fields in {**self.refused, **self.granted, "CreateVolume": self.elsewhere}.items():
            try:
                getattr(client, name)(**fields)
                found[name] = ("OK", "")
            except grpc.RpcError as error:
                found[name] = (error.code().name, error.details())
        client.close()
        return found


def standing(node: Node) -> tuple[list[str], list[str], list[str]]:
    """A node's loop devices, mounts and files of volumes."""
    devices = [line.split()[1] for line in node.run(["cat", "/proc/mounts"]).splitlines() if "csi.runvol.io" in line]
    loops = node.run(["losetup", "--list", "--noheadings", "--output=NAME,BACK-INO,BACK-FILE"]).splitlines()
    files = node.run(["ls", "/var/lib/runvol/volumes"]).split()
    return devices, sorted(line for line in loops if any(name in line for name in files)), files


def written(cluster: Cluster, name: str) -> int:
    """How many lines a writing pod has written, none of which failed."""
    assert "failed" not in cluster.kubectl("logs", name)
    return int(cluster.kubectl("exec", name, "--", "sh", "-c", "wc -l < /data/log"))


def test_what_is_the_other_nodes_is_left_alone(used: Cluster) -> None:
    one, two = used.nodes
    used.apply(claim("source", "320Mi"), on("node1", user("source", "source")))
    used.wait_ready("source")
    used.delete("pod", "source")
    take(used, "kept", "source")
    for node in (one, two):
        name = f"writes-{node.name}"
        used.apply(claim(name, "320Mi"), on(node.name, user(name, name, WRITES)))
    pods = {name: used.wait_ready(name) for name in ("writes-node1", "writes-node2")}
    before, lines = standing(one), written(used, "writes-node1")
    assert len(before[1]) == 1 and before[0]
    (content,) = used.list("volumesnapshotcontents")
    asked = Asked(two, volume_of(used, "writes-node1"), pods["writes-node1"]["metadata"]["uid"],
                  content["status"]["snapshotHandle"])  # fmt: skip
    for name, (code, sentence) in asked.answers().items():
        if name in asked.granted:
            assert code == "OK", (name, sentence)
        elif name == "CreateVolume":
            assert code == "RESOURCE_EXHAUSTED" and "another node" in sentence, sentence
        else:
            assert code == "FAILED_PRECONDITION" and "another node's" in sentence, (name, code, sentence)
    assert "nothing is left over" in command(used, "node2", "runvol", "gc")
    ids = [volume_of(used, name)["spec"]["csi"]["volumeHandle"] for name in ("source", "writes-node1")]
    assert not any(each in command(used, "node2", "sh", "-c", "runvol doctor; true") for each in ids)
    assert not any(each in command(used, "node2", "runvol", "volumes", "--json") for each in ids)
    # Killed, and with nothing under /run that it knew.
    restarts = plugin_restarts(used, "node2")
    two.run(["find", "/run/runvol", "-mindepth", "1", "-delete"])
    for pid in two.run(["pgrep", "--full", "runvol csi"]).split():
        two.run(["kill", "-KILL", pid])
    used.wait("node2's plugin runs again", lambda: plugin_restarts(used, "node2") > restarts)
    installed.wait_ready(used)
    assert "nothing is left over" in command(used, "node2", "runvol", "gc")
    assert standing(one) == before
    for name in ("writes-node1", "writes-node2"):
        now = written(used, name)
        used.wait(f"{name} goes on", lambda name=name, now=now: written(used, name) > now)
    assert written(used, "writes-node1") > lines


def plugin_restarts(cluster: Cluster, node: str) -> int:
    found = cluster.find("pod", plugin(cluster, node), installed.NAMESPACE)
    (one,) = [one for one in (found or {})["status"]["containerStatuses"] if one["name"] == "runvol"]
    return int(one["restartCount"]) if one["ready"] else -1


def test_a_drained_nodes_pods_wait_for_it(used: Cluster) -> None:
    used.apply(on("node1", user("first", "data-set-0", "echo kept > /data/f; sync; sleep 1000000 & wait")),
               claim("data-set-0", "320Mi"))  # fmt: skip
    used.wait_ready("first")
    used.delete("pod", "first")
    used.apply(stateful("set"))
    used.wait_ready("set-0")
    used.kubectl("drain", "node1", "--ignore-daemonsets", "--delete-emptydir-data", "--force", timeout=90)
    said(used, "set-0", "FailedScheduling", "1 node(s) were unschedulable", ELSEWHERE)
    used.kubectl("uncordon", "node1")
    assert used.wait_ready("set-0")["spec"]["nodeName"] == "node1"
    assert used.kubectl("exec", "set-0", "--", "cat", "/data/f") == "kept\n"
    installed.wait_ready(used)


def test_a_volume_is_deleted_when_its_node_is_back_and_by_nobody_else(used: Cluster) -> None:
    two = used.nodes[1]
    used.apply(claim("late", "320Mi"), on("node2", user("late", "late")))
    used.wait_ready("late")
    volume = volume_of(used, "late")
    image = two.directory / "runvol/volumes" / f"{volume['spec']['csi']['volumeHandle']}.img"
    assert image.exists()
    used.delete("pod", "late")
    two.off()
    used.delete("pvc", "late")
    time.sleep(8)
    found = used.find("pv", volume["metadata"]["name"])
    assert found and found["status"]["phase"] == "Released" and image.exists()
    two.on()
    used.wait("the volume is gone", lambda: used.find("pv", volume["metadata"]["name"]) is None, 120)
    assert not image.exists()
    installed.wait_ready(used)


def test_what_is_left_of_a_node_that_is_gone_is_taken_away_by_hand(used: Cluster) -> None:
    """As docs/install.md says; a claim whose source was there says where that is."""
    two = used.nodes[1]
    used.apply(claim("source", "320Mi"), on("node2", user("lost", "source")))
    used.wait_ready("lost")
    used.delete("pod", "lost")
    take(used, "kept", "source")
    used.apply(user("lost", "source"))
    used.wait_ready("lost")
    volume, (content,) = volume_of(used, "source"), used.list("volumesnapshotcontents")
    used.remove_node(two)
    installed.wait_ready(used)
    used.apply(user("lost", "source"))
    said(used, "lost", "FailedScheduling", ELSEWHERE)
    used.apply(claim("restored", "320Mi", dataSource=SOURCES["VolumeSnapshot"]), user("restored", "restored"))
    said(used, "restored", "is on node2, not on node1", "the cluster has no node node2")
    for name in ("lost", "restored"):
        used.delete("pod", name)
    used.kubectl("delete", "volumesnapshot", "kept", "--wait=false")
    for name in ("restored", "source"):
        used.delete("pvc", name)
    time.sleep(5)
    assert used.find("pv", volume["metadata"]["name"]) and used.list("volumesnapshotcontents")
    left = [("pv", volume["metadata"]["name"]), ("volumesnapshotcontent", content["metadata"]["name"])]
    for kind, name in [*left, ("volumesnapshot", "kept")]:
        used.kubectl("delete", kind, name, "--wait=false", "--ignore-not-found")
        if used.find(kind, name):
            used.kubectl("patch", kind, name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
        used.wait(f"{kind} {name} is gone", lambda kind=kind, name=name: used.find(kind, name) is None)
    managed = "csi.storage.k8s.io/managed-by=external-provisioner-node2"
    used.kubectl("delete", "csistoragecapacities", f"--namespace={installed.NAMESPACE}", f"--selector={managed}")
