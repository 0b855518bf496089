"""Pods in QEMU guests under the real kubelet and containerd: their volumes are devices of the guest, through all that
happens to a node."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import units
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.machines import Broken
from tests.cluster.node import Node, Settings

pytestmark = pytest.mark.kernel

RUNC, KATA, RUST = "", "kata", "kata-rust"
NAMES = {RUNC: "on-runc", KATA: "on-kata", RUST: "on-rust"}
SANDBOXES = (KATA, RUST)
# A number a second, which is on the disk before the next.
WRITE = """echo start >> /data/starts; n=$(tail -n1 /data/log 2>/dev/null || echo 0)
echo began $(wc -l < /data/starts)
while :; do n=$((n + 1)); echo $n >> /data/log; sync; echo $n; sleep 1; done & wait"""


@pytest.fixture(scope="module")
def cluster(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With a node whose kubelet has a caching proxy, handlers for both of Kata's shims, and runvol as a unit."""
    directory = tmp_path_factory.mktemp("s")
    kata = {
        KATA: units.kata_configuration("disable_block_device_use = false"),
        RUST: units.kata_configuration(runtime='[runtime]\nname = "virt_container"\nhypervisor_name = "qemu"'),
        "kata-blind": units.kata_configuration("disable_block_device_use = true"),
    }
    edge = units.by_proxy(directory)
    edge["kubelet"]["volumeStatsAggPeriod"] = "3s"
    with Cluster(directory, []) as running:
        units.started(running, Settings(**edge, kata=kata), f"http://127.0.0.1:{units.PORT}")
        running.apply(
            units.storage_class("block", backend="loop"),
            units.storage_class("files", backend="directory", quota="none"),
            *(
                {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name}, "handler": name}
                for name in (*kata, "nowhere")
            ),
        )
        yield running
    assert running.left() == []


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Node:
    return cluster.nodes[0]


def stateful_set(name: str, runtime: str) -> dict[str, Any]:
    """One template for all runtimes."""
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    group = {"runAsUser": 1000, "fsGroup": 2000}
    spec = pod(
        name, WRITE, main=mounts, automountServiceAccountToken=False, securityContext=group, **in_runtime(runtime)
    )["spec"]
    return {
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": name},
        "spec": {
            "serviceName": name, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": spec},
            "volumeClaimTemplates": [claim("data", storageClassName="block")],
        },
    }  # fmt: skip


def in_runtime(runtime: str) -> dict[str, str]:
    return {"runtimeClassName": runtime} if runtime else {}


def with_claim(name: str, claimed: str, runtime: str, script: str = WRITE, **main: Any) -> dict[str, Any]:
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": claimed}}]
    main = main or {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    return pod(name, script, volumes=volumes, automountServiceAccountToken=False, main=main, **in_runtime(runtime))


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> dict[str, str]:
    """The pods of three StatefulSets, by their runtime."""
    cluster.apply(*(stateful_set(name, runtime) for runtime, name in NAMES.items()))
    for name in NAMES.values():
        cluster.wait(f"{name}-0 is made", lambda: cluster.find("pod", f"{name}-0"))  # noqa: B023
        cluster.wait_ready(f"{name}-0", seconds=120)
    return {runtime: f"{name}-0" for runtime, name in NAMES.items()}


def inside(cluster: Cluster, name: str, script: str) -> str:
    """What a command in the pod's container prints."""
    return cluster.kubectl("exec", name, "--", "sh", "-c", script)


def written(cluster: Cluster, name: str) -> list[int]:
    """What the pod has written, which is counted without a gap."""
    found = [int(line) for line in inside(cluster, name, "cat /data/log").split()]
    assert found == list(range(1, len(found) + 1))
    return found


def starts(cluster: Cluster, name: str) -> int:
    """How often the container began and found the volume."""
    return int(inside(cluster, name, "wc -l < /data/starts"))


def goes_on(cluster: Cluster, name: str, since: int, seconds: float = 60.0) -> None:
    cluster.wait(f"{name} writes", lambda: written(cluster, name)[-1] > since, seconds, about=("pod", name, "default"))


def mounted_on_data(cluster: Cluster, name: str) -> list[str]:
    """Device and filesystem."""
    return inside(cluster, name, "grep ' /data ' /proc/mounts").split()[:3:2]


def volume_of(cluster: Cluster, claimed: str) -> tuple[str, str]:
    """The names of a claim's volume, for Kubernetes and for runvol."""
    name = (cluster.find("pvc", claimed) or {})["spec"]["volumeName"]
    return name, (cluster.find("pv", name) or {})["spec"]["csi"]["volumeHandle"]


def on_host(node: Node, volume: tuple[str, str]) -> list[str]:
    """The filesystem types of the node's mounts at a volume's paths or of its loop device."""
    mounts = [line.split() for line in node.run(["cat", "/proc/mounts"]).splitlines()]
    loops = node.run(["losetup", "--list", "--noheadings", "--output=NAME,BACK-FILE"]).splitlines()
    backed = [line.split()[0] for line in loops if volume[1] in line]
    return [words[2] for words in mounts if volume[0] in words[1] or words[0] in backed]


def container(cluster: Cluster, name: str) -> tuple[str, str, int]:
    found = cluster.find("pod", name)
    assert found
    status = found["status"]["containerStatuses"][0]
    return found["metadata"]["uid"], status.get("containerID", ""), status["restartCount"]


def restarted(cluster: Cluster, name: str, before: tuple[str, str, int], seconds: float = 120.0) -> None:
    """Another container runs in the same pod."""

    def anew() -> bool:
        uid, identity, count = container(cluster, name)
        found = cluster.find("pod", name)
        ready = found and found["status"]["containerStatuses"][0]["ready"]
        return bool(ready) and uid == before[0] and identity != before[1] and count > before[2]

    cluster.wait(f"{name} runs another container", anew, seconds, about=("pod", name, "default"))


def guests(node: Node, cluster: Cluster, name: str) -> list[str]:
    """The pids, on the node, of the QEMU of a pod."""
    inspected = node.ctr("containers", "list", f"labels.io.kubernetes.pod.name=={name}", "--quiet").split()
    sandboxes = [one[:16] for one in inspected]
    found = node.run(["pgrep", "-a", "qemu"], check=False).splitlines()
    return [line.split()[0] for line in found if any(f"/run/vc/{one}/" in line for one in sandboxes)]


def test_one_template_with_both_runtimes(cluster: Cluster, node: Node, pods: dict[str, str]) -> None:
    for name in pods.values():
        goes_on(cluster, name, 2)
    sizes = {runtime: inside(cluster, name, "df -k /data | tail -n1").split()[1] for runtime, name in pods.items()}
    assert len(set(sizes.values())) == 1, sizes
    for runtime, name in pods.items():
        device, fstype = mounted_on_data(cluster, name)
        host = on_host(node, volume_of(cluster, f"data-{name}"))
        if runtime in SANDBOXES:
            assert device.startswith("/dev/sd"), device
            assert host == ["tmpfs"]
            assert len(guests(node, cluster, name)) == 1
        else:
            assert device.startswith("/dev/loop"), device
            assert "ext4" in host
        assert fstype == "ext4"
        assert inside(cluster, name, "stat -c '%u %g' /data/log") == "1000 2000\n"
        assert starts(cluster, name) == 1
        assert cluster.kubectl("logs", name).startswith("began 1\n1\n2\n")


def test_what_a_guest_is_for_is_in_it(cluster: Cluster, pods: dict[str, str]) -> None:
    name = pods[KATA]
    assert inside(cluster, name, "uname -r") != inside(cluster, pods[RUNC], "uname -r")
    assert "shm /dev/shm tmpfs" in inside(cluster, name, "cat /proc/mounts")
    assert "kubernetes" in inside(cluster, name, "cat /etc/hosts").lower()


def test_a_second_sandbox_is_refused_by_the_holders_name(cluster: Cluster, pods: dict[str, str]) -> None:
    cluster.apply(with_claim("second", f"data-{pods[KATA]}", KATA))
    cluster.wait("it is refused", lambda: any(pods[KATA] in one for one in cluster.events("second")),
                 about=("pod", "second", "default"))  # fmt: skip
    cluster.delete("pod", "second")


def test_a_flexvolume_goes_from_one_runtime_to_the_other(cluster: Cluster, node: Node) -> None:
    units.command(node, "flexvolume", "install", "--plugin-dir", str(cluster.flexvolume))
    made = units.command(node, "volumes", "create", "flexed", "--size", "67108864", "--json")
    volume = json.loads(made)["items"][0]["volume"]
    source = {"driver": "runvol/runvol", "fsType": "ext4", "options": {"volume": volume}}
    before = 0
    for name, runtime in (("flex-runc", RUNC), ("flex-kata", KATA), ("flex-again", RUNC)):
        mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
        cluster.apply(pod(name, WRITE, volumes=[{"name": "data", "flexVolume": source}], main=mounts,
                          automountServiceAccountToken=False, **in_runtime(runtime)))  # fmt: skip
        cluster.wait_ready(name, seconds=120)
        goes_on(cluster, name, before)
        device, fstype = mounted_on_data(cluster, name)
        assert device.startswith("/dev/sd" if runtime else "/dev/loop") and fstype == "ext4"
        before = written(cluster, name)[-1]
        cluster.delete("pod", name)
    units.command(node, "volumes", "delete", "--yes", volume)


@pytest.mark.parametrize(("runtime", "words"), [("kata-blind", "disable_block_device_use"), ("nowhere", "'nowhere'")])
def test_what_cannot_have_the_device_is_refused(cluster: Cluster, runtime: str, words: str) -> None:
    cluster.apply(claim("refused", storageClassName="block"), with_claim("refused", "refused", runtime))
    cluster.wait("it is refused", lambda: any(words in one and "FailedMount" in one for one in cluster.events("refused")),
                 about=("pod", "refused", "default"))  # fmt: skip
    cluster.delete("pod", "refused")
    cluster.delete("pvc", "refused")


def test_a_handler_that_containerd_does_not_know_is_kubelets_to_tell(cluster: Cluster) -> None:
    cluster.apply(pod("lost", runtimeClassName="nowhere"))
    words = 'no runtime for "nowhere" is configured'
    cluster.wait("kubelet tells", lambda: any(words in one for one in cluster.events("lost")), about=("pod", "lost", "default"))  # fmt: skip
    cluster.delete("pod", "lost")


def test_kubelet_knows_the_volumes_bytes(cluster: Cluster, pods: dict[str, str]) -> None:
    def known() -> dict[str, int]:
        summary = json.loads(cluster.kubectl("get", "--raw", "/api/v1/nodes/node1/proxy/stats/summary"))
        return {
            one["podRef"]["name"]: volume["usedBytes"]
            for one in summary["pods"]
            for volume in one.get("volume", [])
            if volume["name"] == "data" and volume.get("usedBytes") and volume.get("capacityBytes", 0) > 40 << 20
        }

    found = cluster.wait("all are known", lambda: known() if set(known()) >= set(pods.values()) else None)
    assert max(found.values()) - min(found.values()) < 1 << 20, found


def test_a_container_that_restarts_finds_its_data(cluster: Cluster, node: Node, pods: dict[str, str]) -> None:
    before = {runtime: (container(cluster, pods[runtime]), written(cluster, pods[runtime])) for runtime in SANDBOXES}
    qemu = {runtime: guests(node, cluster, pods[runtime]) for runtime in SANDBOXES}
    for runtime in SANDBOXES:
        with contextlib.suppress(Broken):  # what was executed may end with the container
            inside(cluster, pods[runtime], "kill 1")
    for runtime in SANDBOXES:
        restarted(cluster, pods[runtime], before[runtime][0])
        goes_on(cluster, pods[runtime], before[runtime][1][-1])
        assert starts(cluster, pods[runtime]) == 2
        assert mounted_on_data(cluster, pods[runtime])[1] == "ext4"
        assert guests(node, cluster, pods[runtime]) == qemu[runtime]


def test_a_pod_writes_on_while_what_runs_it_is_killed(cluster: Cluster, pods: dict[str, str]) -> None:
    before = {name: container(cluster, name) for name in pods.values()}
    cluster.kill("node1/kubelet")
    cluster.kill("node1/runvol")
    cluster.kill("node1/containerd")
    time.sleep(1)
    cluster.start("node1/containerd")
    cluster.start("node1/kubelet")
    cluster.nodes[0].wait_ready()
    for name in pods.values():
        cluster.wait_ready(name)
        cluster.wait("it can be entered", lambda: inside(cluster, name, "echo there") == "there\n")  # noqa: B023
        goes_on(cluster, name, written(cluster, name)[-1])
        assert container(cluster, name) == before[name]


def test_a_guest_that_is_killed_comes_back_with_its_data(cluster: Cluster, node: Node, pods: dict[str, str]) -> None:
    before = {runtime: (container(cluster, pods[runtime]), written(cluster, pods[runtime])) for runtime in SANDBOXES}
    for runtime in SANDBOXES:
        node.run(["kill", "-9", *guests(node, cluster, pods[runtime])])
    for runtime in SANDBOXES:
        restarted(cluster, pods[runtime], before[runtime][0])
        goes_on(cluster, pods[runtime], before[runtime][1][-1])
        assert starts(cluster, pods[runtime]) == 3
        assert mounted_on_data(cluster, pods[runtime])[1] == "ext4"


def test_nothing_outlives_its_shim(cluster: Cluster, node: Node, pods: dict[str, str]) -> None:
    """Unlike Kata's Rust shim, which leaves its QEMU."""
    name, before = pods[KATA], container(cluster, pods[KATA])
    (qemu,) = guests(node, cluster, name)
    shim = node.run(["ps", "-o", "ppid=", "-p", qemu]).strip()
    node.run(["kill", "-9", shim])
    cluster.wait("QEMU is gone", lambda: qemu not in node.run(["pgrep", "qemu"], check=False).split())
    last = starts(cluster, pods[RUST])
    restarted(cluster, name, before)
    assert starts(cluster, name) == last + 1


def test_who_follows_a_pod_that_was_forced_away_waits_for_its_guest(
    cluster: Cluster, node: Node, pods: dict[str, str]
) -> None:
    """The guest hangs, and would write on if it went on."""
    name, before = pods[KATA], written(cluster, pods[KATA])[-1]
    last, (qemu,) = starts(cluster, name), guests(node, cluster, name)
    node.run(["kill", "-STOP", qemu])
    cluster.kubectl("delete", "pod", name, "--force", "--grace-period=0")
    words = f"belongs to the guest of pod default/{name}"
    cluster.wait("its follower is refused", lambda: any(words in one for one in cluster.events(name)),
                 about=("pod", name, "default"))  # fmt: skip
    assert node.run(["pgrep", "-c", "qemu"]).strip() == "2"
    node.run(["kill", "-9", qemu])
    cluster.wait_ready(name, seconds=120)
    goes_on(cluster, name, before)
    assert starts(cluster, name) == last + 1


@pytest.mark.parametrize("away", [False, True], ids=["", "away"])
def test_a_node_that_was_off_runs_its_guests_again(
    cluster: Cluster, node: Node, pods: dict[str, str], away: bool
) -> None:
    before = {name: (container(cluster, name), written(cluster, name), starts(cluster, name)) for name in pods.values()}
    node.off()
    began = time.monotonic()
    node.on(units=["proxy", "runvol"], away=away)
    if away:
        for name, (*_, count) in before.items():
            log = f"cat /var/log/pods/default_{name}_*/main/*.log"
            cluster.wait(f"{name} has begun again", lambda: f"began {count + 1}" in node.run(["sh", "-c", log]), 180)  # noqa: B023
        print(f"{time.monotonic() - began:.0f} s after the power came back, without the cloud")
        node.mend()
    for name, (was, numbers, count) in before.items():
        restarted(cluster, name, was, 180)
        goes_on(cluster, name, numbers[-1])
        assert starts(cluster, name) == count + 1
    print(f"all are known to write {time.monotonic() - began:.0f} s after the power came back")
    cluster.start(units.PROVISIONER)


def test_a_volume_goes_from_runtime_to_runtime(cluster: Cluster, node: Node) -> None:
    cluster.apply(claim("moved", storageClassName="block"))
    last = 0
    for count, runtime in enumerate((RUNC, KATA, RUNC), 1):
        cluster.apply(with_claim("moves", "moved", runtime))
        cluster.wait_ready("moves", seconds=120)
        goes_on(cluster, "moves", last)
        last = written(cluster, "moves")[-1]
        assert starts(cluster, "moves") == count
        assert (mounted_on_data(cluster, "moves")[0].startswith("/dev/sd")) == (runtime == KATA)
        cluster.delete("pod", "moves")
    cluster.delete("pvc", "moved")


def test_a_raw_device_and_a_directory(cluster: Cluster, node: Node) -> None:
    """The one a disk of the guest's, the other shared by virtio-fs."""
    volumes = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in ("raw", "shared")]
    main = {
        "volumeDevices": [{"name": "raw", "devicePath": "/dev/raw"}],
        "volumeMounts": [{"name": "shared", "mountPath": "/data"}],
    }
    script = "dd if=/dev/zero of=/dev/raw bs=4096 count=1; echo written | dd of=/dev/raw conv=fsync; " + WRITE
    cluster.apply(
        claim("raw", storageClassName="block", volumeMode="Block"), claim("shared", storageClassName="files"),
        pod("both", script, volumes=volumes, main=main, automountServiceAccountToken=False, **in_runtime(KATA)),
    )  # fmt: skip
    cluster.wait_ready("both", seconds=120)
    goes_on(cluster, "both", 1)
    assert mounted_on_data(cluster, "both")[1] == "virtiofs"
    shared = node.run(["cat", f"/var/lib/runvol/directories/{volume_of(cluster, 'shared')[1]}/log"])
    assert shared.startswith("1\n")
    assert inside(cluster, "both", "head -c 8 /dev/raw") == "written\n"
    assert int(inside(cluster, "both", "blockdev --getsize64 /dev/raw")) == 64 << 20
    before = container(cluster, "both")
    inside(cluster, "both", "kill 1")
    restarted(cluster, "both", before)
    assert starts(cluster, "both") == 2
    cluster.delete("pod", "both")
    for name in ("raw", "shared"):
        cluster.delete("pvc", name)


def test_nothing_is_left_of_what_was_deleted(cluster: Cluster, node: Node, pods: dict[str, str]) -> None:
    for name in NAMES.values():
        cluster.delete("statefulset", name)
    for name in pods.values():
        cluster.wait(f"{name} is gone", lambda: cluster.find("pod", name) is None)  # noqa: B023
        cluster.delete("pvc", f"data-{name}")
    cluster.wait("no volume is left", lambda: not cluster.list("pv"))
    assert node.run(["pgrep", "-a", "qemu|virtiofsd"], check=False) == ""
    left = node.run(
        ["sh", "-c", "ls /run/kata-containers/shared/direct-volumes /run/kata-containers/shared/sandboxes /run/vc"]
    )
    assert [line for line in left.splitlines() if line and not line.endswith(":")] == []
    assert node.run(["find", "/var/lib/runvol/boots", "-path", "*/claims/*.json"]) == ""
    assert [one for one in cluster.left() if one.startswith("loop")] == []
