"""What a real containerd and a real kubelet say of themselves and of their pods, while nobody asks the API server."""

from __future__ import annotations

import json
import sys

import pytest

from tests.cluster.cluster import Cluster, pod
from tests.cluster.installed import ROOT

pytestmark = pytest.mark.kernel

# Of a pod by its uid, with an API server that is away: from kubelet alone.
ASKED = """
import dataclasses, json, sys
from blockdev import Deadline
from guestmount import KubernetesApi, PodRef
from guestmount.kubelet_pods import KubeletPods
from guestmount.known_pods import KnownPods

kubeconfig, address, authority, node, uid = sys.argv[1:]
api = KubernetesApi(kubeconfig=kubeconfig, server="https://127.0.0.1:1")
api.warm()
kubelet = KubeletPods(address, api, node=node, authority=[authority])
ref = PodRef(namespace="default", name="known", uid=uid)
facts = KnownPods(api, node=node, kept="/run/answers", follows=False, kubelet=kubelet).pod(ref, Deadline.after(40))
print(json.dumps([facts.uid, facts.node, [mount.path for mount in facts.mounts]]))
"""


def test_kubelet_tells_of_its_pods(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    cluster.apply(pod("known"))
    uid = cluster.wait_ready("known")["metadata"]["uid"]
    words = [cluster.kubeconfig, f"https://{node.address}:10250", node.directory / "pki/kubelet.crt", node.name, uid]
    said = node.run(["sh", "-c", f'cd {ROOT}; exec {sys.executable} "$@"', "-", "-c", ASKED, *words])
    assert json.loads(said.splitlines()[-1]) == [uid, node.name, ["/var/run/secrets/kubernetes.io/serviceaccount"]]
    cluster.delete("pod", "known")


def test_containerd_tells_its_runtimes_and_doctor_compares(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    environment = f"RUNVOL_NODE_ID={node.name} RUNVOL_DETECT_KUBECONFIG={cluster.kubeconfig}"
    doctor = f"cd {ROOT}; {environment} {sys.executable} -m runvol doctor --json || true"

    def lines() -> dict[str, dict[str, str]]:
        return {row["subject"]: row for row in json.loads(node.run(["sh", "-c", doctor]))["items"]}

    found = lines()
    assert {found[one]["state"] for one in ("containerd", "running containerd", "runtime handlers")} == {"ok"}, found
    kata = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\nruntime_type = 'io.containerd.kata.v2'\n"
    node.run(
        ["sh", "-ec", 'mkdir -p /etc/containerd/conf.d; printf %s "$1" > /etc/containerd/conf.d/kata.toml', "-", kata]
    )
    assert "the file has the handler 'kata', what runs has not" in lines()["running containerd"]["finding"]
    node.containerd.restart()
    node.wait_containerd()
    assert lines()["running containerd"]["state"] == "ok"
    node.run(["rm", "/etc/containerd/conf.d/kata.toml"])
    node.containerd.restart()
    node.wait_containerd()
