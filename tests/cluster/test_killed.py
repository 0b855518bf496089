"""Whatever is killed while volumes are made, mounted and deleted: in the end everything runs, or is gone."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import installed
from tests.cluster.cluster import Cluster, claim
from tests.cluster.writers import writer, written

pytestmark = pytest.mark.kernel

# Kept by their StatefulSet, all the while.
STAY = ["stays-0", "stays-1"]


@pytest.fixture(scope="module")
def cluster(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the chart, and pods that write."""
    with Cluster(tmp_path_factory.mktemp("k")) as running:
        installed.import_images(running, running.nodes[0])
        installed.install(running, installed.values(running.nodes[0]))
        spec = writer("stays")["spec"] | {"volumes": []}
        running.apply({
            "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "stays"},
            "spec": {"replicas": len(STAY), "podManagementPolicy": "Parallel", "selector": {"matchLabels": {"app": "stays"}},
                     "template": {"metadata": {"labels": {"app": "stays"}}, "spec": spec},
                     "volumeClaimTemplates": [claim("data", storageClassName="runvol")]},
        })  # fmt: skip
        for name in STAY:
            running.wait_ready(name, seconds=120)
        yield running
        running.delete("statefulset", "stays", seconds=120)
        running.kubectl("delete", "pvc", "--all", "--wait=false")
        running.wait("no volume is left", lambda: not running.list("pv"), 120)
        installed.uninstall(running)
    assert running.left() == []


def killed_driver(cluster: Cluster) -> None:
    cluster.nodes[0].run(["pkill", "-KILL", "-f", "/usr/bin/runvol csi"])


def killed_program(name: str) -> Callable[[Cluster], None]:
    def kill(cluster: Cluster) -> None:
        cluster.kill(name)
        time.sleep(random.uniform(0.0, 2.0))
        cluster.start(name)

    return kill


KILLS = {"the driver": killed_driver} | {
    name: killed_program(name) for name in ("kube-apiserver", "etcd", "node1/kubelet", "node1/containerd")
}


@pytest.mark.parametrize("what", KILLS)
@pytest.mark.parametrize("_round", range(int(os.environ.get("RUNVOL_ROUNDS", "1"))))
def test_it_is_killed_in_the_middle(cluster: Cluster, _round: int, what: str) -> None:
    cluster.apply(claim("goes", storageClassName="runvol"), writer("goes"))
    cluster.wait_ready("goes", seconds=120)
    before = {name: written(cluster, name) for name in STAY}
    seed = random.randrange(1 << 32)
    random.seed(seed)
    print(f"seed {seed}")
    cluster.apply(claim("comes", storageClassName="runvol"), writer("comes"))
    cluster.kubectl("delete", "pod,pvc", "goes", "--wait=false")
    time.sleep(random.uniform(0.0, 3.0))
    KILLS[what](cluster)
    cluster.wait_ready("comes", seconds=180)
    cluster.wait("what was deleted is gone", lambda: not cluster.find("pod", "goes") and not cluster.find("pvc", "goes"), 180,
                 about=("pod", "goes", "default"))  # fmt: skip
    cluster.wait("those that stay write on", lambda: all(written(cluster, name) > before[name] for name in STAY), 60)
    cluster.delete("pod", "comes", seconds=120)
    cluster.delete("pvc", "comes", seconds=120)
    cluster.wait("its volume is gone", lambda: len(cluster.list("pv")) == len(STAY), 120)


def test_the_node_comes_back_with_the_plugin_as_a_pod(cluster: Cluster) -> None:
    """Pods of kubelet's are older than the plugin's pod then, and wait for it."""
    node, before = cluster.nodes[0], {name: written(cluster, name) for name in STAY}
    uids = {one["metadata"]["uid"] for one in cluster.list("pods")}
    node.off()
    began = time.monotonic()
    node.on(120)
    for name in STAY:
        cluster.wait(f"{name} writes again", lambda name=name: written(cluster, name) > before[name], 180,
                     about=("pod", name, "default"))  # fmt: skip
    print(f"{time.monotonic() - began:.0f} s after the power came back the pods write")
    assert {one["metadata"]["uid"] for one in cluster.list("pods")} == uids
    cluster.wait("the driver is registered", lambda: "csi.runvol.io" in installed.drivers(cluster))
