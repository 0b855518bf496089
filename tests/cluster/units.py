"""runvol as units of a node, from this tree and without an image; beside it a proxy before the API server, as at the edge."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster import programs
from tests.cluster.cluster import Cluster
from tests.cluster.installed import ROOT
from tests.cluster.node import Node, Settings
from tests.sandbox.guest import build

PORT = 10261
# The name of a program of node1's.
PROVISIONER = "node1/csi-provisioner"


def storage_class(name: str, **parameters: str) -> dict[str, Any]:
    """A StorageClass of runvol's own driver."""
    return {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name},
            "provisioner": "csi.runvol.io", "parameters": parameters, "volumeBindingMode": "WaitForFirstConsumer"}  # fmt: skip


def started(
    cluster: Cluster, settings: Settings, api_server: str, *, nri: bool = False, more: Sequence[str] = ()
) -> Node:
    """node1, on, with the proxy, runvol and its provisioner; with `nri` also runvol's NRI plugin, and its driver of NFS.
    `more` settings of runvol's, as `VARIABLE=VALUE`."""
    node = Node(cluster, 1, settings)
    cluster.nodes.append(node)
    launched(node, api_server, nri=nri, more=more)
    node.on(units=["proxy", "runvol", *(["nri"] if nri else [])])
    cluster.apply((ROOT / "deploy/kubernetes/csidrivers.yaml").read_text())
    know_provisioner(node)
    cluster.start(PROVISIONER)
    return node


def by_proxy(directory: Path) -> dict[str, Any]:
    """Settings of a node whose kubelet knows the API server by the proxy only."""
    kubeconfig = directory / "edge.kubeconfig"
    kubeconfig.write_text(
        f"""{{"apiVersion": "v1", "kind": "Config", "current-context": "e", "users": [{{"name": "e", "user": {{}}}}],
"clusters": [{{"name": "e", "cluster": {{"server": "http://127.0.0.1:{PORT}"}}}}],
"contexts": [{{"name": "e", "context": {{"cluster": "e", "user": "e"}}}}]}}"""
    )
    return {"kubelet": {"contentType": "application/json"}, "kubelet_flags": [f"--kubeconfig={kubeconfig}"]}


def launched(node: Node, api_server: str, *, nri: bool = False, more: Sequence[str] = ()) -> None:
    """The proxy, which has the node's own certificate, and runvol, as units of the node."""
    own = node.cluster.certificates.kubeconfig("node1", "/O=system:nodes/CN=system:node:node1", node.cluster.server)
    proxy = [sys.executable, "-m", "tests.cluster.edge_proxy", str(PORT), str(own), "/var/lib/edge-cache"]
    runvol = ["env", f"RUNVOL_NODE_ID={node.name}", f"RUNVOL_DETECT_API_SERVER={api_server}",
              f"RUNVOL_DETECT_KUBECONFIG={'' if api_server else node.cluster.kubeconfig}",
              f"RUNVOL_CSI_NFS_ENDPOINT={'unix:///run/runvol/nfs.sock' if nri else ''}", *more, sys.executable, "-m", "runvol"]  # fmt: skip
    units = {"proxy": proxy, "runvol": [*runvol, "csi"], **({"nri": [*runvol, "nri"]} if nri else {})}
    for name, words in units.items():
        node.launched(name, in_tree(words), keep=True)


def in_tree(words: Sequence[str], tree: Path = ROOT) -> list[str]:
    """A command that runs in this tree, or in another release's."""
    return ["sh", "-c", f"cd {tree}; exec {shlex.join(words)}"]


def know_provisioner(node: Node, name: str = "csi-provisioner") -> None:
    """In the cloud's time only: nothing is provisioned without it."""
    environment = {"NODE_NAME": node.name, "NAMESPACE": "default", "POD_NAME": "none"}
    node.launched(
        name,
        [programs.program("csi-provisioner"), f"--kubeconfig={node.cluster.kubeconfig}",
         "--csi-address=/run/runvol/csi.sock", "--node-deployment", "--strict-topology", "--immediate-topology=false",
         "--enable-capacity", "--capacity-ownerref-level=-1"], keep=True, env=environment,
    )  # fmt: skip


def command(node: Node, *words: str) -> str:
    """What a command of runvol's prints on the node."""
    return node.run(in_tree([sys.executable, "-m", "runvol", *words]))


def kata_configuration(more: str = "", runtime: str = "") -> str:
    """Kata's configuration for the guest of the tests; `runtime`: sections of the Rust shim's."""
    guest = build()
    return f"""{runtime}
[hypervisor.qemu]
kernel = "{guest.kernel}"
initrd = "{guest.initramfs}"
shared_fs = "virtio-fs"
block_device_driver = "virtio-scsi"
block_device_aio = "threads"
{more}
"""
