"""The cluster of the tests is a Kubernetes: it runs pods, outlasts the loss of its parts, and leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import cgroups, programs
from tests.cluster.cluster import Cluster, pod
from tests.cluster.machines import Broken
from tests.cluster.node import Node, Settings

pytestmark = pytest.mark.kernel

VOLUME = """
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: runvol}
provisioner: csi.runvol.io
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: claim}
spec:
  storageClassName: runvol
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 64Mi}}
"""


def container(found: dict[str, Any]) -> tuple[str, int]:
    """Which container runs in a pod, and how often it was started anew."""
    status = found["status"]["containerStatuses"][0]
    return status["containerID"], status["restartCount"]


@pytest.fixture
def running(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """A pod that is Ready."""
    cluster.apply(pod("lasting"))
    yield cluster.wait_ready("lasting")
    cluster.delete("pod", "lasting")


def test_a_pod_runs_and_its_output_is_read(cluster: Cluster, running: dict[str, Any]) -> None:
    assert running["spec"]["nodeName"] == "node1"
    assert cluster.kubectl("logs", "lasting") == "started\n"
    assert cluster.kubectl("exec", "lasting", "--", "hostname") == "lasting\n"


def test_a_pod_reaches_the_api_server_and_the_tests_reach_the_pod(cluster: Cluster) -> None:
    cluster.apply(pod("talks", "mkdir w; echo hello > w/index.html; httpd -h w; sleep 1000 & wait"))
    address = cluster.wait_ready("talks")["status"]["podIP"]
    cluster.kubectl("exec", "talks", "--", "sh", "-c", "nc -w 5 $KUBERNETES_SERVICE_HOST 443 < /dev/null")
    got = subprocess.run(["busybox", "wget", "-q", "-O", "-", f"http://{address}"], capture_output=True, text=True)
    assert got.stdout == "hello\n", got.stderr
    cluster.delete("pod", "talks")


def test_a_pod_outlasts_the_api_server(cluster: Cluster, running: dict[str, Any]) -> None:
    cluster.kill("kube-apiserver")
    with pytest.raises(Broken, match="connection refused|was refused"):
        cluster.kubectl("get", "pods")
    cluster.start("kube-apiserver")
    assert container(cluster.wait_ready("lasting")) == container(running)
    cluster.apply(pod("later"))
    cluster.wait_ready("later")
    cluster.delete("pod", "later")


@pytest.mark.parametrize("program", ["kubelet", "containerd"])
def test_a_pod_outlasts_what_runs_it(cluster: Cluster, running: dict[str, Any], program: str) -> None:
    cluster.kill(f"node1/{program}")
    time.sleep(1)
    cluster.start(f"node1/{program}")
    cluster.nodes[0].wait_ready()
    assert container(cluster.wait_ready("lasting")) == container(running)
    cluster.wait("it can be entered", lambda: cluster.kubectl("exec", "lasting", "--", "echo", "there") == "there\n")


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Node]:
    """node2, with another directory of kubelet's and a second runtime."""
    shim = programs.program("containerd-shim-runc-v2")
    node = cluster.add_node(Settings(root=Path("/var/lib/another"), shims={"second": shim}, labels={"kind": "second"}))
    cluster.apply(
        {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "second"}, "handler": "second"}
    )
    yield node
    cluster.remove_node(node)
    cluster.delete("runtimeclass", "second")
    assert node.machine.processes() == []


def test_a_second_node_has_its_own_pods_mounts_and_end(cluster: Cluster, second: Node) -> None:
    cluster.apply(
        pod("here", nodeName="node1"), pod("there", nodeSelector={"kind": "second"}, runtimeClassName="second")
    )
    here, there = cluster.wait_ready("here"), cluster.wait_ready("there")
    seen = [each.run(["cat", "/proc/mounts"]) for each in cluster.nodes]
    for found, own, other in ((here, *seen), (there, *reversed(seen))):
        assert found["metadata"]["uid"] in own
        assert found["metadata"]["uid"] not in other
        assert found["metadata"]["uid"] not in Path("/proc/mounts").read_text()
    assert f"/var/lib/another/pods/{there['metadata']['uid']}" in seen[1]
    cluster.delete("pod", "here")


def test_a_node_that_is_cut_off_is_not_heard(cluster: Cluster, second: Node) -> None:
    cluster.apply(pod("here", nodeName="node1"), pod("there", nodeName="node2"))
    cluster.wait_ready("here")
    address = cluster.wait_ready("there")["status"]["podIP"]
    ping = ("exec", "here", "--", "ping", "-c1", "-W1", address)
    assert "1 packets received" in cluster.kubectl(*ping)
    second.cut()
    with pytest.raises(Broken, match="0 packets received"):
        cluster.kubectl(*ping)
    second.mend()
    cluster.wait("it is heard again", lambda: "1 packets received" in cluster.kubectl(*ping))
    cluster.delete("pod", "here")


def test_a_node_that_loses_its_power_runs_its_pods_anew(cluster: Cluster, second: Node) -> None:
    cluster.apply(pod("there", nodeName="node2"))
    before = cluster.wait_ready("there")
    second.off()
    assert second.machine.processes() == []
    second.on()

    def anew() -> bool:
        after = cluster.wait_ready("there")
        return after["metadata"]["uid"] == before["metadata"]["uid"] and container(after)[0] != container(before)[0]

    cluster.wait("another container runs in the same pod", anew, about=("pod", "there", "default"))


def test_a_driver_introduces_itself_and_a_pod_has_a_volume_of_it(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    socket = "/run/runvol/csi.sock"
    node.run(["mkdir", "/run/runvol"])
    environment = {
        "RUNVOL_DETECT_KUBECONFIG": str(cluster.kubeconfig),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    driver = node.launched(
        "runvol", [sys.executable, "-m", "runvol", "csi", "--endpoint", f"unix://{socket}"], env=environment
    )
    provisioner = node.launched(
        "csi-provisioner",
        [programs.program("csi-provisioner"), f"--csi-address={socket}", f"--kubeconfig={cluster.kubeconfig}",
         "--node-deployment", "--strict-topology", "--immediate-topology=false", "--enable-capacity",
         "--capacity-ownerref-level=-1"],
        keep=True, env={"NODE_NAME": node.name, "NAMESPACE": "default"},
    )  # fmt: skip
    cluster.apply(Path(__file__).parents[2] / "deploy/kubernetes/csidrivers.yaml", VOLUME)
    driver.start()
    provisioner.start()
    claimed = [{"name": "v", "persistentVolumeClaim": {"claimName": "claim"}}]
    mounted = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    cluster.apply(
        pod("writes", "echo kept > /v/f; grep ' /v ' /proc/mounts; sleep 1000 & wait", main=mounted, volumes=claimed)
    )
    cluster.wait_ready("writes", seconds=90)
    cluster.wait(
        "it has a disk", lambda: "/dev/loop" in cluster.kubectl("logs", "writes"), about=("pod", "writes", "default")
    )
    assert [one["name"] for one in (cluster.find("csinode", "node1") or {})["spec"]["drivers"]] == ["csi.runvol.io"]
    assert "globalmount" in node.run(["cat", "/proc/mounts"])
    assert node.path("/var/lib/kubelet/plugins_registry/csi.runvol.io-reg.sock").is_socket()
    assert "globalmount" not in Path("/proc/mounts").read_text()
    cluster.delete("pod", "writes")
    cluster.delete("pvc", "claim")
    cluster.wait("the volume is gone", lambda: not cluster.list("pv"))
    provisioner.stop()
    driver.stop()


def test_a_failed_wait_says_why(cluster: Cluster) -> None:
    cluster.apply(pod("imageless", main={"image": "localhost/nothing:1"}))
    with pytest.raises(Broken) as failed:
        cluster.wait_ready("imageless", seconds=5)
    cluster.delete("pod", "imageless")
    for words in (
        "the pod imageless is Ready; not after 5 s",
        "ErrImageNeverPull",
        "node1/kubelet runs",
        "kubelet.log:",
    ):
        assert words in str(failed.value)


def test_a_kept_program_comes_back_until_it_is_stopped(cluster: Cluster) -> None:
    program = cluster.known("kept", ["sleep", "1000"], keep=True)
    program.start()
    first = program.pid
    program.kill()
    cluster.wait("it runs again", lambda: program.pid != first)
    second = program.pid
    program.stop()
    time.sleep(1.5)
    assert not program.running
    assert not Path(f"/proc/{second}").exists()
    del cluster.programs["kept"]


def test_a_cluster_is_taken_up_again_and_leaves_nothing(built: None, tmp_path: Path) -> None:
    panic = Path("/proc/sys/kernel/panic").read_text()
    with Cluster(tmp_path) as first:
        assert first.nodes[0].run(["cat", "/proc/sys/kernel/panic"]).strip() == "10"
        backing = first.directory / "node1/runvol/backing"
        backing.write_bytes(bytes(4096))
        first.nodes[0].run(["losetup", "--find", "/var/lib/runvol/backing"])
        first.apply(pod("stays"))
        first.wait_ready("stays")
        assert any("loop device" in one for one in first.left())
    assert first.left() == []
    assert Path("/proc/sys/kernel/panic").read_text() == panic
    with Cluster(tmp_path) as second:
        assert second.wait_ready("stays")["metadata"]["name"] == "stays"
    assert second.left() == []


def test_a_cluster_whose_tests_are_killed_ends_with_them(built: None, tmp_path: Path) -> None:
    script = """
import sys, pathlib, time
from tests.cluster.cluster import Cluster
with Cluster(pathlib.Path(sys.argv[1])) as cluster:
    print(*cluster.machine.namespaces, *cluster.nodes[0].machine.namespaces, cluster.network.link, flush=True)
    time.sleep(1000)
"""
    tests = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert tests.stdout
    *namespaces, link = tests.stdout.readline().split()
    tests.send_signal(signal.SIGKILL)
    tests.communicate()

    def inside() -> list[Path]:
        found = []
        for path in Path("/proc").glob("[0-9]*/ns/pid"):
            try:
                found += [path] if str(path.readlink()) in namespaces else []
            except OSError:
                continue
        return found

    end = time.monotonic() + 20
    while (inside() or Path("/sys/class/net", link).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    assert inside() == []
    assert not Path("/sys/class/net", link).exists()
    cgroups.remove_abandoned()
    assert cgroups.left(f"runvol-cluster-{tests.pid}-1") == []
