"""Each rule of the chart's service accounts is needed: it is taken away, work fails, and goes on once it is given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import installed, programs, removals, rights
from tests.cluster.cluster import Cluster
from tests.cluster.node import Settings

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def governed(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, and the chart with all that brings roles along."""
    directory = tmp_path_factory.mktemp("c")
    # Of a node whose pods may run in a sandbox the plugin has to know which ones do.
    settings = Settings(shims={"sandbox": programs.program("containerd-shim-runc-v2")})
    with Cluster(directory, [settings], flags={"kube-apiserver": rights.audit(directory)}) as cluster:
        cluster.add_node()
        installed.snapshot_crds(cluster)
        for node in cluster.nodes:
            installed.import_images(cluster, node)
        first = cluster.nodes[0]
        kubelet = {"address": f"https://{first.address}:10250", "ca": f"/host{first.directory}/pki/kubelet.crt"}
        values = installed.values(
            first,
            kubelet=kubelet,
            config={
                "detect": {"sandbox_handlers": ["sandbox"]},
                "csi": {"events_seconds": 5},
                "metrics": {"interval_seconds": 2},
            },
        )
        values["node"] = {"startupTaint": removals.TAINT}
        installed.install(cluster, values)
        removals.prepare(cluster)
        yield cluster
        removals.clear(cluster)
        installed.uninstall(cluster)
    assert cluster.left() == []


@pytest.mark.parametrize(("number", "one"), [*enumerate(removals.rounds())], ids=map(str, removals.rounds()))
def test_without_it_work_fails(governed: Cluster, number: int, one: removals.Round) -> None:
    print(removals.run(governed, one, number))  # noqa: T201
