"""A node's volumes go from processes to the chart's pods and back, from the first release too, while pods write."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from tests.cluster import installed, released, units
from tests.cluster.cluster import Cluster, claim
from tests.cluster.machines import Broken
from tests.cluster.node import Node
from tests.cluster.writers import writer, written

pytestmark = pytest.mark.kernel

CLASSES = [
    units.storage_class("block", **{"backend": "loop", "csi.storage.k8s.io/fstype": "xfs"}),
    units.storage_class("files", backend="directory", quota="none"),
]


@pytest.fixture(scope="module")
def cluster(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without a driver."""
    with Cluster(tmp_path_factory.mktemp("t")) as running:
        installed.import_images(running, running.nodes[0])
        running.apply((installed.ROOT / "deploy/kubernetes/csidrivers.yaml").read_text())
        running.apply(*CLASSES)
        yield running
    assert running.left() == []


class Processes:
    """The plugin as a unit of the node, with what a unit has beside it. `release`: of before, which needs a registrar."""

    def __init__(self, node: Node, release: str = "") -> None:
        self._node, self._names = node, [f"runvol{release}", f"provisioner{release}"]
        tree = released.tree(release) if release else installed.ROOT
        plugin = ["env", f"RUNVOL_NODE_ID={node.name}", f"RUNVOL_DETECT_KUBECONFIG={node.cluster.kubeconfig}",
                  f"RUNVOL_NODE_ROOTS={node.root}", sys.executable, "-m", "runvol", "csi"]  # fmt: skip
        node.launched(self._names[0], units.in_tree(plugin, tree), keep=True)
        units.know_provisioner(node, self._names[1])
        if release:
            registrar = [sys.executable, "-m", "tests.cluster.registrar", "csi.runvol.io", "/run/runvol/csi.sock",
                         f"{node.root}/plugins_registry"]  # fmt: skip
            self._names.append("registrar")
            node.launched("registrar", units.in_tree(registrar), keep=True)

    def start(self) -> None:
        for name in self._names:
            self._node.cluster.start(f"{self._node.name}/{name}")
        self._node.cluster.wait("the driver is registered and stays so", self._registered)

    def _registered(self) -> bool:
        """One that took another's socket over is gone for a moment when kubelet sees the old one go."""
        for pause in (2.0, 0.0):
            if "csi.runvol.io" not in installed.drivers(self._node.cluster):
                return False
            time.sleep(pause)
        return True

    def stop(self) -> None:
        for name in reversed(self._names):
            self._node.cluster.stop(f"{self._node.name}/{name}")


def go_on(cluster: Cluster, names: list[str]) -> None:
    """The same containers as ever write."""
    before = {name: written(cluster, name) for name in names}
    cluster.wait("all pods write", lambda: all(written(cluster, name) > before[name] for name in names), 20)
    for name in names:
        found = cluster.find("pod", name)
        assert found and found["status"]["containerStatuses"][0]["restartCount"] == 0


def made(cluster: Cluster, name: str, of: str) -> None:
    cluster.apply(claim(name, "320Mi" if of == "block" else "16Mi", storageClassName=of), writer(name))
    cluster.wait_ready(name, seconds=120)


def again(cluster: Cluster, name: str) -> None:
    """The pod goes, and another one has the volume."""
    before = written(cluster, name)
    cluster.delete("pod", name)
    cluster.apply(writer(name))
    cluster.wait_ready(name, seconds=120)
    assert written(cluster, name) >= before


def gone(cluster: Cluster, names: list[str]) -> None:
    for name in names:
        cluster.delete("pod", name)
        cluster.delete("pvc", name)
    cluster.wait("no volume is left", lambda: not cluster.list("pv"))


def installed_chart(cluster: Cluster) -> None:
    """By Helm, which takes what was applied by hand over."""
    node = cluster.nodes[0]
    installed.install(cluster, installed.values(node, storageClasses=[]), "--take-ownership")
    cluster.wait("the driver is registered", lambda: "csi.runvol.io" in installed.drivers(cluster))


def removed_chart(cluster: Cluster) -> None:
    installed.uninstall(cluster)
    cluster.apply((installed.ROOT / "deploy/kubernetes/csidrivers.yaml").read_text())


@pytest.mark.parametrize("release", [released.FIRST, ""], ids=["from the first release", "from a unit"])
def test_processes_and_chart_take_over_from_each_other(cluster: Cluster, release: str) -> None:
    if release and not released.has(release):
        pytest.skip("the history of this clone does not go back to the first release")
    node, names = cluster.nodes[0], ["a", "b"]
    processes = Processes(node, release)
    processes.start()
    made(cluster, "a", "block")
    made(cluster, "b", "files") if not release else made(cluster, "b", "block")
    processes.stop()
    go_on(cluster, names)
    installed_chart(cluster)
    node.kubelet.restart()  # it repeats its calls for pods that run
    node.wait_ready()
    go_on(cluster, names)
    again(cluster, "a")
    made(cluster, "c", "block")
    removed_chart(cluster)
    go_on(cluster, ["b", "c"])
    processes.start()
    again(cluster, "b")
    again(cluster, "c")
    if release:  # it leaves the loop devices of claims that it cannot read, and deletes nothing that has one
        processes.stop()
        processes = Processes(node)
        processes.start()
    gone(cluster, ["a", "b", "c"])
    processes.stop()
    assert node.run(["sh", "-c", "ls -A /var/lib/runvol/volumes"]).split() == []


def test_both_at_once_are_refused(cluster: Cluster) -> None:
    """The pods of the chart say so, and the unit serves on; once it has stopped they do."""
    node = cluster.nodes[0]
    processes = Processes(node)
    processes.start()
    made(cluster, "d", "block")
    with pytest.raises(Broken, match="serves it already; stop that one first"):
        installed.install(cluster, installed.values(node, storageClasses=[]), "--take-ownership", seconds=40)
    again(cluster, "d")
    processes.stop()
    installed.wait_ready(cluster, 240)
    again(cluster, "d")
    gone(cluster, ["d"])
    removed_chart(cluster)
