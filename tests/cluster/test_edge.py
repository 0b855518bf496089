"""An edge node: kubelet and runvol speak to a caching proxy beside them, the cloud goes, the node reboots."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import programs
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.installed import ROOT
from tests.cluster.node import Node, Settings

pytestmark = pytest.mark.kernel

PORT = 10261
CLASSES = [
    {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}, "provisioner": "csi.runvol.io",
     "parameters": parameters, "volumeBindingMode": "WaitForFirstConsumer"}
    for name, parameters in (("block", {"backend": "loop"}), ("files", {"backend": "directory", "quota": "none"}))
]  # fmt: skip
# Pods and claims of one name, and the classes.
NAMES = {"one": "block", "two": "block", "three": "files"}


@pytest.fixture(scope="module", params=["by the proxy", "by itself"])
def edge(built: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose node1 knows the API server by the proxy only; runvol asks that too, or the server itself, which it
    has to do without then. A handler that may be a sandbox makes it ask about every pod."""
    directory = tmp_path_factory.mktemp("e")
    kubeconfig = directory / "edge.kubeconfig"
    kubeconfig.write_text(
        f"""{{"apiVersion": "v1", "kind": "Config", "current-context": "e", "users": [{{"name": "e", "user": {{}}}}],
"clusters": [{{"name": "e", "cluster": {{"server": "http://127.0.0.1:{PORT}"}}}}],
"contexts": [{{"name": "e", "context": {{"cluster": "e", "user": "e"}}}}]}}"""
    )
    settings = Settings(kubelet={"contentType": "application/json"}, kubelet_flags=[f"--kubeconfig={kubeconfig}"],
                        shims={"kata": programs.program("containerd-shim-runc-v2")})  # fmt: skip
    with Cluster(directory, []) as cluster:
        node = Node(cluster, 1, settings)
        cluster.nodes.append(node)
        launched(node, "" if request.param == "by itself" else f"http://127.0.0.1:{PORT}")
        node.on(units=["proxy", "runvol"])
        cluster.apply((ROOT / "deploy/kubernetes/csidrivers.yaml").read_text())
        cluster.apply(*CLASSES)
        provisioner = installed_provisioner(node)
        cluster.start(provisioner)
        yield cluster
    assert cluster.left() == []


def launched(node: Node, api_server: str) -> None:
    """The proxy, which has the node's own certificate, and runvol, as units of the node."""
    own = node.cluster.certificates.kubeconfig("node1", "/O=system:nodes/CN=system:node:node1", node.cluster.server)
    proxy = [sys.executable, "-m", "tests.cluster.edge_proxy", str(PORT), str(own), "/var/lib/edge-cache"]
    plugin = ["env", f"RUNVOL_NODE_ID={node.name}", f"RUNVOL_DETECT_API_SERVER={api_server}",
              f"RUNVOL_DETECT_KUBECONFIG={'' if api_server else node.cluster.kubeconfig}", sys.executable, "-m", "runvol", "csi"]  # fmt: skip
    for name, words in (("proxy", proxy), ("runvol", plugin)):
        node.launched(name, ["sh", "-c", f"cd {ROOT}; exec {shlex.join(words)}"], keep=True)


def installed_provisioner(node: Node) -> str:
    """In the cloud's time only: nothing is provisioned without it."""
    environment = {"NODE_NAME": node.name, "NAMESPACE": "default", "POD_NAME": "none"}
    node.launched(
        "csi-provisioner",
        [programs.program("csi-provisioner"), f"--kubeconfig={node.cluster.kubeconfig}",
         "--csi-address=/run/runvol/csi.sock", "--node-deployment", "--strict-topology", "--immediate-topology=false",
         "--enable-capacity", "--capacity-ownerref-level=-1"], keep=True, env=environment,
    )  # fmt: skip
    return f"{node.name}/csi-provisioner"


def writer(name: str, **spec: Any) -> dict[str, Any]:
    """A pod that needs nothing of the API but itself: tokens come from the cloud alone."""
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": name}}]
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    script = "echo $(date +%s) >> /data/starts; while :; do date +%s > /data/now; sleep 1; done"
    return pod(name, script, volumes=volumes, automountServiceAccountToken=False, main=mounts, **spec)


def starts(cluster: Cluster, name: str) -> int:
    """How often the pod's container began, by what its volume has kept."""
    found = [*cluster.nodes[0].run(["sh", "-c", f"cat /var/lib/kubelet/pods/*/volumes/kubernetes.io~csi/*/mount/starts "
                                    f"2>/dev/null | wc -l; : {name}"]).split()]  # fmt: skip
    return int(found[0])


def test_pods_come_back_after_a_reboot_while_the_cloud_is_away(edge: Cluster) -> None:
    node = edge.nodes[0]
    for name, of in NAMES.items():
        edge.apply(claim(name, storageClassName=of), writer(name))
    for name in NAMES:
        edge.wait_ready(name)
    edge.wait("every pod has written", lambda: starts(edge, "all") == len(NAMES))
    before = {one["metadata"]["uid"] for one in edge.list("pods")}
    node.off()
    began = time.monotonic()
    node.on(units=["proxy", "runvol"], away=True)
    edge.wait("every pod writes again", lambda: starts(edge, "all") == 2 * len(NAMES), 180)
    print(f"{len(NAMES)} volumes, {time.monotonic() - began:.0f} s after the power came back")
    node.mend()
    for name in NAMES:
        edge.wait_ready(name)
    assert {one["metadata"]["uid"] for one in edge.list("pods")} == before
    for name in NAMES:
        edge.delete("pod", name)
    for name in NAMES:
        edge.delete("pvc", name)
    edge.wait("no volume is left", lambda: not edge.list("pv"))
