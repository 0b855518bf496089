"""NFS under the real kubelet and containerd: guests mount the export themselves, through containerd's NRI."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster import units
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.file_server import ADDRESS, FileServer
from tests.cluster.node import Node, Settings
from tests.cluster.test_sandbox import WRITE, container, in_runtime, inside, mounted_on_data, on_host, restarted

pytestmark = pytest.mark.kernel

KATA = "kata"
# docs/runtimes.md: no container is created without the plugin.
REQUIRED = """
[plugins.'io.containerd.nri.v1.nri'.default_validator]
enable = true
required_plugins = ['runvol']
"""
EXPORTS = ("nas-static", "nas-on-host")
UNITS = ["proxy", "runvol", "nri"]


@pytest.fixture(scope="module")
def server(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    with FileServer(tmp_path_factory.mktemp("nas")) as running:
        yield running
    assert running.machine.processes() == []


@pytest.fixture(scope="module")
def cluster(server: FileServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With a node that has the server beside it, the NRI plugin, and the export twice: kubelet's pauses after a failure are
    those of a volume, whichever pods want it."""
    directory = tmp_path_factory.mktemp("n")
    settings = Settings(**units.by_proxy(directory), kata={KATA: units.kata_configuration("outward = true")},
                        containerd=REQUIRED, server=server)  # fmt: skip
    with Cluster(directory, []) as running:
        units.started(running, settings, f"http://127.0.0.1:{units.PORT}", nri=True)
        running.apply(
            units.storage_class("block", backend="loop"),
            {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": KATA}, "handler": KATA},
            *(export(name) for name in EXPORTS),
            *(claim(name, storageClassName="", volumeName=name, accessModes=["ReadWriteMany"]) for name in EXPORTS),
        )
        yield running
    assert running.left() == []


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Node:
    return cluster.nodes[0]


def export(name: str) -> dict[str, Any]:
    """A static volume: the server's whole export."""
    attributes = {"backend": "nfs", "server": ADDRESS, "path": "/exp", "vers": "4.2"}
    return {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
        "spec": {"capacity": {"storage": "64Mi"}, "accessModes": ["ReadWriteMany"], "storageClassName": "",
                 "persistentVolumeReclaimPolicy": "Retain",
                 "csi": {"driver": "nfs.csi.runvol.io", "volumeHandle": f"{name}-id", "volumeAttributes": attributes}},
    }  # fmt: skip


def writer(name: str, runtime: str = KATA, claimed: str = "nas-static") -> dict[str, Any]:
    """Its files in the volume are named like the pod."""
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": claimed}}]
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    script = WRITE.replace("/data/", f"/data/{name}.")
    return pod(name, script, volumes=volumes, automountServiceAccountToken=False, main=mounts, **in_runtime(runtime))


def written(server: FileServer, name: str) -> int:
    """How many numbers of a pod's are on the server, which are counted without a gap."""
    log = server.export / f"{name}.log"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    assert lines == [str(number) for number in range(1, len(lines) + 1)]
    return len(lines)


def starts(server: FileServer, name: str) -> int:
    told = server.export / f"{name}.starts"
    return told.read_text().count("start") if told.exists() else 0


def goes_on(cluster: Cluster, server: FileServer, name: str, since: int, seconds: float = 60.0) -> None:
    cluster.wait(f"{name} writes", lambda: written(server, name) > since, seconds, about=("pod", name, "default"))


def is_told(cluster: Cluster, name: str, *words: str) -> Callable[[], bool]:
    return lambda: any(all(word in event for word in words) for event in cluster.events(name))


def test_the_guest_mounts_the_export(cluster: Cluster, node: Node, server: FileServer) -> None:
    cluster.apply(writer("one"), claim("disk", storageClassName="block"), writer("disk", claimed="disk"))
    cluster.wait_ready("one", seconds=120)
    goes_on(cluster, server, "one", 2)
    assert mounted_on_data(cluster, "one") == [f"{ADDRESS}:/exp", "nfs4"]
    assert inside(cluster, "one", "cat /data/one.starts") == "start\n"
    assert on_host(node, ("nas-static", "nas-static-id")) == ["tmpfs"]
    assert ":/exp" not in node.run(["cat", "/proc/mounts"])
    assert starts(server, "one") == 1


def test_a_plugin_that_was_killed_is_back_for_the_second_guest(cluster: Cluster, server: FileServer) -> None:
    before, had = container(cluster, "one"), written(server, "one")
    cluster.kill("node1/nri")
    cluster.apply(writer("two"))
    goes_on(cluster, server, "one", had + 2)
    cluster.wait_ready("two", seconds=120)
    assert mounted_on_data(cluster, "two") == [f"{ADDRESS}:/exp", "nfs4"]
    inside(cluster, "one", "echo by one > /data/from-one")
    inside(cluster, "two", "echo by two > /data/from-two")
    assert inside(cluster, "two", "cat /data/from-one") == "by one\n"
    assert inside(cluster, "one", "cat /data/from-two") == "by two\n"
    goes_on(cluster, server, "two", written(server, "two"))
    assert container(cluster, "one") == before
    cluster.kubectl("delete", "pod", "two", "--wait=false")


def test_a_kernel_without_a_client_is_told_to_who_wants_it_on_the_host(cluster: Cluster, node: Node) -> None:
    if "nfs4" in node.run(["cat", "/proc/filesystems"]):
        pytest.skip("this kernel has an NFS client")
    cluster.apply(writer("on-runc", "", "nas-on-host"))
    cluster.wait("it is told", is_told(cluster, "on-runc", "FailedMount", "no NFS client"),
                 about=("pod", "on-runc", "default"))  # fmt: skip
    cluster.delete("pod", "on-runc")


def test_without_the_plugin_no_container_begins(cluster: Cluster, server: FileServer) -> None:
    """Neither a new pod's nor one that restarts in its guest; both do when it is back."""
    before, had = container(cluster, "one"), starts(server, "one")
    cluster.stop("node1/nri")
    cluster.apply(writer("waits"))
    inside(cluster, "one", "kill 1")
    for name, words in (("waits", ("FailedMount", "none is registered")), ("one", ("Failed", "runvol"))):
        cluster.wait(f"{name} is refused", is_told(cluster, name, *words), about=("pod", name, "default"))
    assert starts(server, "one") == had and not (server.export / "waits.starts").exists()
    cluster.start("node1/nri")
    restarted(cluster, "one", before)
    cluster.wait_ready("waits", seconds=120)
    cluster.wait("both begin", lambda: starts(server, "one") > had and starts(server, "waits") > 0)
    assert starts(server, "one") == had + 1 and starts(server, "waits") == 1
    assert mounted_on_data(cluster, "one") == [f"{ADDRESS}:/exp", "nfs4"]
    goes_on(cluster, server, "one", written(server, "one"))
    cluster.kubectl("delete", "pod", "waits", "--wait=false")


def test_a_node_that_was_off_comes_back_without_the_cloud(cluster: Cluster, node: Node, server: FileServer) -> None:
    # Each number is on the disk before the next.
    cluster.wait("the disk is written", lambda: "\n2\n" in cluster.kubectl("logs", "disk"), 120,
                 about=("pod", "disk", "default"))  # fmt: skip
    before = {name: container(cluster, name) for name in ("one", "disk")}
    had = starts(server, "one")
    node.off()
    numbers, began = written(server, "one"), time.monotonic()
    node.on(units=UNITS, away=True)
    cluster.wait("the export is written", lambda: written(server, "one") > numbers, 180)
    log = "cat /var/log/pods/default_disk_*/main/*.log"
    cluster.wait("the disk is written", lambda: "began 2" in node.run(["sh", "-c", log]), 180)
    print(f"both write {time.monotonic() - began:.0f} s after the power came back, without the cloud")
    assert starts(server, "one") == had + 1
    node.mend()
    cluster.start(units.PROVISIONER)
    for name, was in before.items():
        restarted(cluster, name, was)
    assert mounted_on_data(cluster, "one") == [f"{ADDRESS}:/exp", "nfs4"]
    assert mounted_on_data(cluster, "disk")[1] == "ext4"


def test_nothing_is_left_of_what_was_deleted(cluster: Cluster, node: Node) -> None:
    cluster.kubectl("delete", "pod", "one", "disk", "--wait=false")
    cluster.wait("no pod is left", lambda: not cluster.list("pods"))
    for name in (*EXPORTS, "disk"):
        cluster.delete("pvc", name)
    for name in EXPORTS:
        cluster.delete("pv", name)
    cluster.wait("no volume is left", lambda: not cluster.list("pv"))
    assert node.run(["pgrep", "-a", "qemu|virtiofsd"], check=False) == ""
    assert node.run(["find", "/var/lib/runvol/boots", "-path", "*/claims/*.json"]) == ""
    assert "runvol" not in " ".join(line.split()[0] for line in node.run(["cat", "/proc/mounts"]).splitlines())
    assert [one for one in cluster.left() if one.startswith("loop")] == []
