"""The plain manifests are the chart's, and a server takes them; the examples do what the table says."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml

from tests.cluster import examples, manifests, programs, removals, rights
from tests.cluster.cluster import Cluster
from tests.cluster.installed import ROOT

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("name", manifests.FILES)
def test_the_manifests_are_those_of_the_chart(built: None, name: str) -> None:
    assert (manifests.PLACE / name).read_text() == manifests.rendered(name), "run `python -m tests.cluster.manifests`"


@pytest.mark.parametrize(
    ("values", "classes"),
    [((), {"StorageClass runvol", "VolumeSnapshotClass runvol"}), (("drivers.nfs=false",), {"StorageClass runvol", "VolumeSnapshotClass runvol"}),
     (("drivers.nodes=false",), set()),
     (("drivers.nodes=false", "storageClasses[0].name=a", "storageClasses[1].name=b", "storageClasses[1].provisioner=nfs.csi.runvol.io"),
      {"StorageClass b"})],
    ids=["both drivers", "without NFS", "without volumes of nodes", "its own class of NFS"],
)  # fmt: skip
def test_a_class_is_there_only_with_the_driver_that_serves_it(
    built: None, values: tuple[str, ...], classes: set[str]
) -> None:
    made = manifests.templated("--set", "snapshots.enabled=true", *(word for one in values for word in ("--set", one)))
    objects = [one for one in yaml.safe_load_all(made) if one]
    assert {f"{one['kind']} {one['metadata']['name']}" for one in objects if one["kind"].endswith("Class")} == classes
    # And `helm test` takes the first of them.
    claims = [one["spec"]["storageClassName"] for one in objects if one["kind"] == "PersistentVolumeClaim"]
    assert claims == [one.split()[1] for one in classes if one.startswith("StorageClass")]


def test_every_rule_of_the_roles_has_its_work_and_every_work_its_rule(built: None) -> None:
    made = manifests.templated(*(word for one in removals.EVERY_ROLE for word in ("--set", one)))
    roles = [one for one in yaml.safe_load_all(made) if one and one["kind"] in ("Role", "ClusterRole")]
    assert {(one["metadata"]["name"], right) for one in roles for right in rights.of(one)} == removals.table()
    assert {right for one in removals.rounds() for right in one.rights} == {right for _role, right in removals.table()}
    assert {work for one in removals.NEEDS for work in one.work.split()} == {*removals.WORKS}


def test_the_chart_makes_what_a_prometheus_operator_takes(built: None) -> None:
    """Off by default; and a loopback is refused in words, since no Prometheus of the cluster reaches it."""
    assert "monitoring.coreos.com" not in manifests.templated()
    asked = [
        word
        for one in ("podMonitor=true", "prometheusRule=true", "labels.release=p")
        for word in ("--set", f"monitoring.{one}")
    ]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        manifests.templated(*asked)
    assert "set node.metricsAddress: pod" in refused.value.stderr
    made = manifests.templated(*asked, "--set", "node.metricsAddress=pod", "--set", "nri.enabled=true")
    objects = {one["kind"]: one for one in yaml.safe_load_all(made) if one}
    assert objects["PrometheusRule"]["spec"] == yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text())
    assert objects["PrometheusRule"]["metadata"]["labels"]["release"] == "p"
    ports = {one["port"] for one in objects["PodMonitor"]["spec"]["podMetricsEndpoints"]}
    containers = objects["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert ports == {port["name"] for one in containers for port in one.get("ports", ())}
    (plugin,) = [one for one in containers if one["name"] == "runvol"]
    assert {"name": "RUNVOL_CSI_METRICS", "value": "[$(POD_IP)]:9810"} in plugin["env"]


def test_a_server_takes_everything_that_is_deployed(cluster: Cluster) -> None:
    for path in sorted((ROOT / "deploy/crds").glob("*.yaml")):
        cluster.kubectl("apply", "--dry-run=server", "-f", path)
    cluster.kubectl("create", "namespace", "runvol-system")
    cluster.kubectl("delete", "storageclass", "--all")  # other tests' classes have these names and other parameters
    for path in [manifests.PLACE / "runvol.yaml", manifests.PLACE / "runvol-with-nri.yaml",
                 *(path for path in examples.EXAMPLES.glob("*.yaml") if path.stem != "snapshot")]:  # fmt: skip
        cluster.kubectl("apply", "--dry-run=server", "-f", path)
    cluster.delete("namespace", "runvol-system")


def test_every_example_is_in_the_table() -> None:
    assert {path.stem for path in examples.EXAMPLES.glob("*.yaml")} == {*examples.ORDER}
    text = examples.TABLE.read_text()
    assert all(f"[{name}.yaml]" in text for name in examples.ORDER)


def _fields(schema: dict[str, Any], at: str = "") -> dict[str, tuple[Any, ...]]:
    """Type, format and what is required, by each field's place; items of lists and values of maps have one, too."""
    found = {
        at: (
            schema.get("type"),
            schema.get("format"),
            tuple(schema.get("enum", ())),
            tuple(sorted(schema.get("required", ()))),
            len(schema.get("x-kubernetes-validations", ())),
            schema.get("x-kubernetes-map-type"),
        )
    }
    for name, inner in schema.get("properties", {}).items():
        found |= _fields(inner, f"{at}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(inner := schema.get(name), dict):
            found |= _fields(inner, f"{at}[{name}]")
    return found


@pytest.mark.parametrize("name", ["volumesnapshots", "volumegroupsnapshots"])
def test_the_snapshots_api_has_the_fields_that_the_sidecars_know(built: None, name: str) -> None:
    ours = {one["metadata"]["name"]: one for one in yaml.safe_load_all((ROOT / f"deploy/crds/{name}.yaml").read_text())}
    group = {one["spec"]["group"] for one in ours.values()}
    for path in sorted(programs.program("crds").glob(f"{group.pop()}_*.yaml")):
        theirs = yaml.safe_load(path.read_text())
        own = ours.pop(theirs["metadata"]["name"])
        assert {key: own["spec"]["names"][key] for key in theirs["spec"]["names"]} == theirs["spec"]["names"]
        (version,) = own["spec"]["versions"]
        known = next(one for one in theirs["spec"]["versions"] if one["name"] == "v1")
        assert version.get("subresources", {}) == known.get("subresources", {})
        fields, expected = (_fields(one["schema"]["openAPIV3Schema"]) for one in (version, known))
        expected = {at: what for at, what in expected.items() if not at.endswith(".restoreSize")}
        assert {at: what for at, what in fields.items() if at in expected} == expected
    assert not ours
