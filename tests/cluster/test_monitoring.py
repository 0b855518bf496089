"""A real Prometheus on a real node: what pods have is told with their names and their claims', and what they must know
stands on them as events."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from tests.cluster import units
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.installed import ROOT
from tests.cluster.node import Node, Settings

pytestmark = pytest.mark.kernel

_METRICS, _PROMETHEUS = 9810, 9090
_ASK = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


@pytest.fixture(scope="module")
def cluster(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("m")
    settings = Settings(
        **units.by_proxy(directory), kata={"kata": units.kata_configuration("disable_block_device_use = false")}
    )
    more = [f"RUNVOL_CSI_METRICS=127.0.0.1:{_METRICS}", "RUNVOL_METRICS_INTERVAL_SECONDS=2",
            "RUNVOL_METRICS_DOCTOR_SECONDS=30", "RUNVOL_CSI_EVENTS_SECONDS=5"]  # fmt: skip
    config = directory / "prometheus.json"
    config.write_text(json.dumps({
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "runvol", "honor_labels": True,
                            "static_configs": [{"targets": [f"127.0.0.1:{_METRICS}"]}]}]}))  # fmt: skip
    with Cluster(directory, []) as running:
        running.apply(*_rights("system:node:node1"))
        node = units.started(running, settings, f"http://127.0.0.1:{units.PORT}", more=more)
        node.launched("prometheus", ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory}/tsdb",
                                     f"--web.listen-address=127.0.0.1:{_PROMETHEUS}", "--log.level=warn"])  # fmt: skip
        running.start("node1/prometheus")
        running.apply(
            units.storage_class("block", backend="loop"),
            {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "kata"}, "handler": "kata"},
        )
        yield running
        running.stop("node1/prometheus")
    assert running.left() == []


def _rights(user: str) -> list[dict[str, Any]]:
    """The plugin's role, as the chart has it, for whoever the proxy is to the API server: a node alone may not follow
    PersistentVolumes, which name the claims."""
    given = (ROOT / "deploy/manifests/runvol.yaml").read_text()
    (role,) = (one for one in yaml.safe_load_all(given)
               if one and (one["kind"], one["metadata"]["name"]) == ("ClusterRole", "runvol-plugin"))  # fmt: skip
    group = "rbac.authorization.k8s.io"
    binding = {"apiVersion": f"{group}/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "runvol-plugin"},
               "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "runvol-plugin"},
               "subjects": [{"apiGroup": group, "kind": "User", "name": user}]}  # fmt: skip
    return [role, binding]


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Node:
    return cluster.nodes[0]


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> Iterator[dict[str, str]]:
    """Two pods that have written 20 MiB each, one of them in a guest: the runtime class, by name."""
    names = {"on-runc": "", "on-kata": "kata"}
    for name, runtime in names.items():
        volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": f"of-{name}"}}]
        script = "yes | dd of=/data/file bs=64k count=320 iflag=fullblock; sync; echo written; sleep 1000000 & wait"
        more = {"runtimeClassName": runtime} if runtime else {}
        cluster.apply(
            claim(f"of-{name}", "64Mi", storageClassName="block"),
            pod(name, script, volumes=volumes, main={"volumeMounts": [{"name": "data", "mountPath": "/data"}]}, **more),
        )
    for name in names:
        cluster.wait_ready(name, seconds=180)
    yield names
    for name in names:
        cluster.delete("pod", name)
        cluster.delete("pvc", f"of-{name}")


def query(node: Node, expression: str) -> list[tuple[dict[str, str], float]]:
    address = f"http://127.0.0.1:{_PROMETHEUS}/api/v1/query?query={quote(expression)}"
    found = json.loads(node.run([sys.executable, "-c", _ASK, address]))["data"]["result"]
    return [(one["metric"], float(one["value"][1])) for one in found]


def test_volumes_are_told_with_pod_and_claim(cluster: Cluster, node: Node, pods: dict[str, str]) -> None:
    for name, runtime in pods.items():
        mine = f'{{namespace="default",pod="{name}",persistentvolumeclaim="of-{name}"}}'
        cluster.wait(
            f"what {name} has written is told",
            lambda mine=mine: query(node, f"runvol_volume_used_bytes{mine} > {20 << 20}"), 90,
        )  # fmt: skip
        counted = f"runvol_volume_written_bytes_total{mine}"
        if runtime:
            counted = f'runvol_vmm_written_bytes_total{{namespace="default",pod="{name}"}}'
        cluster.wait(f"what {name} has written is counted", lambda counted=counted: query(node, f"{counted} > 0"), 90)
    owners = {(one["owner"], one["handler"]) for one, _value in query(node, "runvol_volumes > 0")}
    assert {("host", "runc"), ("sandbox", "kata")} <= owners
    assert query(node, 'runvol_handoffs{dialect="kata",state="open"} == 1')
    assert query(node, 'runvol_watch_healthy{watch="pods of this node"} == 1')
    assert query(node, 'sum(runvol_detections_total{decided_by="runtime_class"}) > 0')
    cluster.wait("doctor has been asked", lambda: query(node, "runvol_doctor_timestamp_seconds > 0"), 90)


def test_where_tells_output_and_what_a_guest_has(node: Node, pods: dict[str, str]) -> None:
    for name, runtime in pods.items():
        told = json.loads(units.command(node, "where", name, "--json"))
        # Of the volumes the one of runvol's; kubelet's own, such as the token, are files on the node.
        rows = {one["what"]: one for one in told["items"] if one["what"] != "volume" or one["volume"]}
        assert "written" in node.run(["cat", rows["standard output"]["path"]])
        volume = rows["volume"]
        kernel = "sandbox" if runtime else "host"
        assert (volume["seenAt"], volume["readable"], volume["kernel"]) == ("/data", not runtime, kernel), volume
        assert rows["root filesystem"]["container"] == rows["standard output"]["container"]


def test_a_pod_is_told_that_its_volume_is_almost_full(cluster: Cluster, pods: dict[str, str]) -> None:
    cluster.kubectl("exec", "on-runc", "--", "sh", "-c", "yes > /data/more; sync")

    def said(name: str) -> list[dict[str, Any]]:
        return [one for one in cluster.list("events", "--namespace=default", "--field-selector=reason=VolumeAlmostFull")
                if one["involvedObject"]["name"] == name]  # fmt: skip

    for name in ("on-runc", "of-on-runc"):
        cluster.wait(f"{name} is told", lambda name=name: said(name), 60)
    cluster.wait("it is one event that counts", lambda: said("on-runc")[0]["count"] > 1, 60)
    assert len(said("on-runc")) == 1
    assert "VolumeAlmostFull" in cluster.kubectl("describe", "pvc", "of-on-runc")
