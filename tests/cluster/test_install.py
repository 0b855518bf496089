"""The chart on a real cluster: installed, used and taken away again, with nothing left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import installed, programs, removals, rights
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.node import Settings

pytestmark = pytest.mark.kernel

TAINT = removals.TAINT


@pytest.fixture(scope="module")
def runvol(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of its own with the chart."""
    directory = tmp_path_factory.mktemp("c")
    # As new nodes come where pods shall wait for the driver.
    new = Settings(kubelet={"registerWithTaints": [{"key": TAINT, "effect": "NoSchedule"}]})
    with Cluster(directory, [new], flags={"kube-apiserver": rights.audit(directory)}) as cluster:
        installed.snapshot_crds(cluster)
        installed.import_images(cluster, cluster.nodes[0])
        flexvolume = {"enabled": True, "pluginDir": str(cluster.flexvolume)}
        values = installed.values(cluster.nodes[0], flexvolume=flexvolume)
        values["node"] = {"startupTaint": TAINT}
        installed.install(cluster, values)
        yield cluster
        installed.uninstall(cluster)
        node = cluster.nodes[0]
        assert node.run(["sh", "-c", "ls -A /var/lib/runvol/volumes"]).split() == []
        assert [line for line in node.run(["mount"]).splitlines() if "csi.runvol.io" in line] == []
        # What the documentation says stays: kubelet keeps the names for the next installation.
        assert node.run(["ls", f"{node.root}/plugins_registry"]).split() == [
            "csi.runvol.io-reg.sock", "nfs.csi.runvol.io-reg.sock"
        ]  # fmt: skip
    assert cluster.left() == []


def user(name: str, of: str, script: str = "sleep 1000000 & wait") -> dict[str, Any]:
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": of}}]
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    return pod(name, script, volumes=volumes, main=mounts)


def snapshot(name: str, of: str) -> dict[str, Any]:
    return {"apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot", "metadata": {"name": name},
            "spec": {"volumeSnapshotClassName": "runvol", "source": {"persistentVolumeClaimName": of}}}  # fmt: skip


def test_both_drivers_are_registered_and_doctor_is_content(runvol: Cluster) -> None:
    runvol.wait("both drivers are known", lambda: installed.drivers(runvol) == {"csi.runvol.io", "nfs.csi.runvol.io"})
    lines = {row["subject"]: row for row in installed.doctor(runvol)}
    for name in installed.drivers(runvol):
        assert lines[f"driver {name}"]["state"] == lines[f"registration {name}"]["state"] == "ok", lines
    assert lines["containerd"]["state"] == lines["running containerd"]["state"] == "ok", lines


def test_doctor_judges_the_arguments_of_the_sidecars(runvol: Cluster) -> None:
    def said() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for row in installed.doctor(runvol):
            if row["subject"].startswith("csi-"):
                found.setdefault(row["subject"], set()).add(f"{row['state']}: {row['finding']}")
        return found

    provisioner, snapshotter = (f"csi-{name} of csi.runvol.io" for name in ("provisioner", "snapshotter"))
    good = {"ok: has the arguments that the driver needs"}
    assert said() == {provisioner: good, snapshotter: good}
    node = runvol.nodes[0]
    another = node.launched(
        "csi-provisioner",
        [programs.program("csi-provisioner"), f"--kubeconfig={runvol.kubeconfig}", "--csi-address=/run/runvol/csi.sock",
         "--node-deployment"], keep=True, env={"NODE_NAME": node.name},
    )  # fmt: skip
    another.start()
    wrong = "broken: runs without --strict-topology: a claim may be made on another node than its pod's"
    try:
        runvol.wait("doctor names the other one", lambda: said()[provisioner] == {*good, wrong}, 30)
    finally:
        another.stop()
    assert said() == {provisioner: good, snapshotter: good}


def test_doctor_warns_of_a_class_that_binds_at_once(runvol: Cluster) -> None:
    runvol.apply({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "at-once"},
                  "provisioner": "csi.runvol.io", "volumeBindingMode": "Immediate"})  # fmt: skip
    lines = {row["subject"]: row for row in installed.doctor(runvol)}
    runvol.delete("storageclass", "at-once")
    assert [name for name in lines if name.startswith("StorageClass ")] == ["StorageClass at-once"]
    assert lines["StorageClass at-once"]["state"] == "warning"


def test_the_node_takes_pods_since_its_driver_is_registered(runvol: Cluster) -> None:
    found = runvol.find("node", "node1")
    assert found and TAINT not in [one["key"] for one in found["spec"].get("taints") or ()]


def test_helm_test_passes(runvol: Cluster) -> None:
    said = installed.helm(runvol, "test", installed.NAME, "--namespace", installed.NAMESPACE, "--timeout", "120s")
    assert "Succeeded" in said


def test_a_volume_lives_as_its_claim_and_snapshots_say(runvol: Cluster) -> None:
    began = time.monotonic()
    runvol.apply(claim("first", "320Mi"), user("writes", "first", "echo kept > /data/f; sync; sleep 1000000 & wait"))
    runvol.wait_ready("writes")
    seconds = time.monotonic() - began
    assert runvol.kubectl("exec", "writes", "--", "cat", "/data/f") == "kept\n"
    runvol.kubectl("patch", "pvc", "first", "--type=merge", "-p",
                   '{"spec":{"resources":{"requests":{"storage":"384Mi"}}}}')  # fmt: skip

    def size() -> str:
        found = runvol.find("pvc", "first")
        return str(found["status"]["capacity"]["storage"]) if found else ""

    runvol.wait("the claim has grown", lambda: size() == "384Mi", 90, about=("pvc", "first", "default"))
    runvol.delete("pod", "writes")
    runvol.apply(snapshot("kept", "first"))

    def ready() -> bool:
        found = runvol.find("volumesnapshot", "kept")
        return bool(found and found.get("status", {}).get("readyToUse"))

    runvol.wait("the snapshot is ready", ready, 60, about=("volumesnapshot", "kept", "default"))
    source = {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "kept"}
    runvol.apply(claim("restored", "384Mi", dataSource=source), user("reads", "restored"))
    runvol.wait_ready("reads")
    assert runvol.kubectl("exec", "reads", "--", "cat", "/data/f") == "kept\n"
    cloned = {"kind": "PersistentVolumeClaim", "name": "first"}
    runvol.apply(claim("cloned", "384Mi", dataSource=cloned), user("clone", "cloned"))
    runvol.wait_ready("clone")
    assert runvol.kubectl("exec", "clone", "--", "cat", "/data/f") == "kept\n"
    for name in ("reads", "clone"):
        runvol.delete("pod", name)
    runvol.delete("volumesnapshot", "kept")
    for name in ("restored", "cloned", "first"):
        runvol.delete("pvc", name)
    runvol.wait("no volume is left", lambda: not runvol.list("pv"))
    assert seconds < 60, "the first pod took longer than a minute"


def in_plugin(cluster: Cluster, *words: str) -> str:
    return cluster.kubectl("exec", f"daemonset/{installed.NAME}-node", f"--namespace={installed.NAMESPACE}", "-c", "runvol",
                           "--", "runvol", *words)  # fmt: skip


def test_a_pod_with_a_flexvolume(runvol: Cluster) -> None:
    volume = json.loads(in_plugin(runvol, "volumes", "create", "flexed", "--size", "67108864", "--json"))["items"][0][
        "volume"
    ]
    source = {"driver": "runvol/runvol", "fsType": "ext4", "options": {"volume": volume}}
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    for name, script in (
        ("flex-one", "echo kept > /data/f; sync; sleep 1000000 & wait"),
        ("flex-two", "sleep 1000000 & wait"),
    ):
        runvol.apply(pod(name, script, volumes=[{"name": "data", "flexVolume": source}], main=mounts))
        runvol.wait_ready(name)
        assert runvol.kubectl("exec", name, "--", "cat", "/data/f") == "kept\n"
        runvol.delete("pod", name)
    in_plugin(runvol, "volumes", "delete", "--yes", volume)


def test_a_claim_on_a_server_that_is_away_says_so_and_goes(runvol: Cluster) -> None:
    runvol.apply({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "nfs"},
                  "provisioner": "nfs.csi.runvol.io", "parameters": {"server": "127.0.0.1", "path": "/"}},
                 claim("on-nfs", storageClassName="nfs"))  # fmt: skip

    def said() -> list[str]:
        return [
            one for one in runvol.events("on-nfs") if "the NFS server 127.0.0.1 does not answer on port 2049" in one
        ]

    runvol.wait("the claim's event names the server", said, 60, about=("pvc", "on-nfs", "default"))
    runvol.delete("pvc", "on-nfs")


def test_capacity_of_a_class_that_goes_goes_with_it(runvol: Cluster) -> None:
    def known() -> bool:
        capacities = runvol.list("csistoragecapacities", f"--namespace={installed.NAMESPACE}")
        return any(one["storageClassName"] == "short" for one in capacities)

    runvol.apply({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "short"},
                  "provisioner": "csi.runvol.io", "volumeBindingMode": "WaitForFirstConsumer"})  # fmt: skip
    runvol.wait("its capacity is told", known)
    runvol.delete("storageclass", "short")
    runvol.wait("nothing is told of it", lambda: not known())


def test_what_each_account_may_do_is_what_it_does(runvol: Cluster) -> None:
    """Last, since the tests before did all that the chart is for: nothing was refused, and no right is for nothing."""
    used: dict[str, set[rights.Right]] = {}
    for account, _program, right, answer in rights.requests(runvol.directory):
        assert answer != 403, f"{account} may not {right}"
        used.setdefault(account, set()).add(right)
    idle = {}
    for role, accounts, may in rights.granted(runvol):
        did = set[rights.Right]().union(*(used.get(account, set()) for account in accounts))
        if never := {right for right in may if not rights.is_used(right, did)} - rights.ELSEWHERE.get(role, set()):
            idle[role] = sorted(never)
    assert not idle, "\n".join(f"{role}: {right}" for role, rights_ in idle.items() for right in rights_)


@pytest.mark.parametrize("which", ["get csidrivers", "create persistentvolumes", "update volumesnapshots/status"])
def test_without_a_right_work_fails(runvol: Cluster, which: str) -> None:
    """Some of those that test_rights has, each of other work."""
    (one,) = (one for one in removals.rounds() if str(one) == which)
    removals.prepare(runvol)
    removals.run(runvol, one, 0)
    removals.clear(runvol)


def test_everything_in_the_chart_is_taken_by_the_server(runvol: Cluster, tmp_path: Path) -> None:
    for more in ("nri.enabled=true", "runtimeClasses[0].name=kata"):
        file = runvol.directory / "values.json"
        # By another name, so that nothing is merged with what runs.
        text = installed.helm(runvol, "template", "another", installed.CHART, "--values", file, "--set", more,
                              "--api-versions", "snapshot.storage.k8s.io/v1", "--namespace", installed.NAMESPACE)  # fmt: skip
        runvol.kubectl("apply", "--dry-run=server", "--namespace", installed.NAMESPACE, "-f", "-", stdin=text)
