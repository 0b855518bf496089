"""What is broken in a real cluster: doctor in the plugin's pod finds it, and what it says to do puts it right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from guestmount.drivers import DRIVERS
from tests.cluster import installed
from tests.cluster.cluster import Cluster
from tests.cluster.node import Settings

pytestmark = pytest.mark.kernel

# Seconds: until who was refused asks again, and until a pod was replaced.
_REFUSED, _REPLACED = 360, 180


@pytest.fixture(scope="module")
def runvol(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("c"), [Settings()]) as cluster:
        installed.snapshot_crds(cluster)
        installed.import_images(cluster, cluster.nodes[0])
        installed.install(cluster, installed.values(cluster.nodes[0]))
        cluster.wait("the driver is known", lambda: "csi.runvol.io" in installed.drivers(cluster))
        yield cluster
        installed.uninstall(cluster)
    assert cluster.left() == []


def ill(cluster: Cluster, known: str) -> list[dict[str, str]]:
    return [row for row in installed.doctor(cluster) if row["id"] == known and row["state"] != "ok"]


def well(cluster: Cluster, known: str) -> list[dict[str, str]]:
    return [row for row in installed.doctor(cluster) if row["id"] == known and row["state"] == "ok"]


def changed(cluster: Cluster, kind: str, name: str, *, namespace: str = "default") -> dict[str, Any]:
    """The object, without what the API server writes into it."""
    found = cluster.find(kind, name, namespace)
    assert found is not None
    for key in ("resourceVersion", "uid", "creationTimestamp", "managedFields", "generation"):
        found["metadata"].pop(key, None)
    found.pop("status", None)
    return found


def replace(cluster: Cluster, what: dict[str, Any]) -> None:
    cluster.kubectl("replace", "-f", "-", stdin=json.dumps(what))


def test_nothing_is_broken_to_begin_with(runvol: Cluster) -> None:
    assert [row for row in installed.doctor(runvol) if row["state"] == "broken"] == []


def test_csidriver_that_somebody_deleted(runvol: Cluster) -> None:
    runvol.delete("csidriver", "csi.runvol.io")
    (found,) = ill(runvol, "kubernetes.csidriver-missing")
    command = found["fix"].split("`")[1].split()
    assert command[0] == "kubectl"
    runvol.kubectl(*command[1:-1], installed.ROOT / command[-1])
    assert not ill(runvol, "kubernetes.csidriver-missing")


def test_rights_that_somebody_took_away(runvol: Cluster) -> None:
    before = changed(runvol, "clusterrole", "runvol-plugin")
    less = [rule for rule in before["rules"] if "pods" not in rule["resources"]]
    replace(runvol, {**before, "rules": less})
    try:
        runvol.wait("the API refuses the plugin", lambda: ill(runvol, "kubernetes.forbidden"), _REFUSED)
        (found, *_) = ill(runvol, "kubernetes.forbidden")
        assert "deploy/manifests/runvol.yaml" in found["fix"]
    finally:
        replace(runvol, before)
    runvol.wait("the plugin may ask again", lambda: not ill(runvol, "kubernetes.forbidden"), _REFUSED)


def test_registry_of_kubelets_that_is_elsewhere(runvol: Cluster) -> None:
    node = runvol.nodes[0]
    registry = f"{node.root}/plugins_registry"
    node.run(["mv", registry, f"{registry}.away"])
    try:
        found = ill(runvol, "kubelet.registry-missing")
        assert {row["subject"] for row in found} == {f"registration {name}" for name in DRIVERS}
        assert all(registry in row["finding"] for row in found)
    finally:
        # kubelet makes it when it starts; it would not look again into one that comes back under its feet.
        node.kubelet.restart()
        node.run(["rm", "-r", f"{registry}.away"])
    runvol.wait("kubelet knows the drivers", lambda: len(well(runvol, "kubelet.registration")) == len(DRIVERS))


def test_mounts_that_do_not_propagate(runvol: Cluster) -> None:
    """As a DaemonSet that somebody wrote without mountPropagation."""
    before = changed(runvol, "daemonset", "runvol-node", namespace=installed.NAMESPACE)
    after = json.loads(json.dumps(before))
    for container in after["spec"]["template"]["spec"]["containers"]:
        for mount in container.get("volumeMounts", ()):
            if mount["name"] == "kubelet":
                mount["mountPropagation"] = "HostToContainer"
    replace(runvol, after)

    try:
        (found,) = runvol.wait(
            "doctor sees the propagation", lambda: ill(runvol, "kubelet.mounts-not-propagated"), _REPLACED
        )
        assert "`mountPropagation: Bidirectional`" in found["fix"]
    finally:
        replace(runvol, before)
        installed.wait_ready(runvol)
    runvol.wait("mounts propagate", lambda: well(runvol, "kubelet.mounts"), _REPLACED)
