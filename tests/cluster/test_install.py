"""The chart on a real cluster: installed, used and taken away again, with nothing left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import installed
from tests.cluster.cluster import Cluster, claim, pod

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def runvol(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of its own with the chart."""
    with Cluster(tmp_path_factory.mktemp("c")) as cluster:
        installed.snapshot_crds(cluster)
        installed.import_images(cluster, cluster.nodes[0])
        installed.install(cluster, installed.values(cluster.nodes[0]))
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
    def drivers() -> set[str]:
        found = runvol.find("csinode", "node1")
        return {one["name"] for one in (found or {"spec": {}})["spec"].get("drivers") or ()}

    runvol.wait("both drivers are known", lambda: drivers() == {"csi.runvol.io", "nfs.csi.runvol.io"})
    lines = {row["subject"]: row for row in installed.doctor(runvol)}
    for name in drivers():
        assert lines[f"driver {name}"]["state"] == lines[f"registration {name}"]["state"] == "ok", lines
    assert lines["containerd"]["state"] == lines["running containerd"]["state"] == "ok", lines


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


def test_everything_in_the_chart_is_taken_by_the_server(runvol: Cluster, tmp_path: Path) -> None:
    for more in ("nri.enabled=true", "runtimeClasses[0].name=kata"):
        file = runvol.directory / "values.json"
        # By another name, so that nothing is merged with what runs.
        text = installed.helm(runvol, "template", "another", installed.CHART, "--values", file, "--set", more,
                              "--api-versions", "snapshot.storage.k8s.io/v1", "--namespace", installed.NAMESPACE)  # fmt: skip
        runvol.kubectl("apply", "--dry-run=server", "--namespace", installed.NAMESPACE, "-f", "-", stdin=text)
