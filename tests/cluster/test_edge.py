"""An edge node: kubelet and runvol speak to a caching proxy beside them, the cloud goes, the node reboots."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import programs, units
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.node import Settings

pytestmark = pytest.mark.kernel

CLASSES = [
    units.storage_class("block", backend="loop"),
    units.storage_class("files", backend="directory", quota="none"),
]
# Pods and claims of one name, and the classes.
NAMES = {"one": "block", "two": "block", "three": "files"}


@pytest.fixture(scope="module", params=["by the proxy", "by itself"])
def edge(built: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose node1 knows the API server by the proxy only; runvol asks that too, or the server itself, which it
    has to do without then. A handler that may be a sandbox makes it ask about every pod."""
    directory = tmp_path_factory.mktemp("e")
    settings = Settings(**units.by_proxy(directory), shims={"kata": programs.program("containerd-shim-runc-v2")})
    with Cluster(directory, []) as cluster:
        units.started(cluster, settings, "" if request.param == "by itself" else f"http://127.0.0.1:{units.PORT}")
        cluster.apply(*CLASSES)
        yield cluster
    assert cluster.left() == []


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
    edge.start(units.PROVISIONER)
    for name in NAMES:
        edge.wait_ready(name)
    assert {one["metadata"]["uid"] for one in edge.list("pods")} == before
    for name in NAMES:
        edge.delete("pod", name)
    for name in NAMES:
        edge.delete("pvc", name)
    edge.wait("no volume is left", lambda: not edge.list("pv"))
