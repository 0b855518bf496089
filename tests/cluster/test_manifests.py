"""The plain manifests are the chart's, and a server takes them; the examples do what the table says."""

from __future__ import annotations

import pytest

from tests.cluster import examples, manifests
from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("name", manifests.FILES)
def test_the_manifests_are_those_of_the_chart(built: None, name: str) -> None:
    assert (manifests.PLACE / name).read_text() == manifests.rendered(name), "run `python -m tests.cluster.manifests`"


def test_a_server_takes_everything_that_is_deployed(cluster: Cluster) -> None:
    cluster.kubectl("create", "namespace", "runvol-system")
    for path in [manifests.PLACE / "runvol.yaml", manifests.PLACE / "runvol-with-nri.yaml",
                 *(path for path in examples.EXAMPLES.glob("*.yaml") if path.stem != "snapshot")]:  # fmt: skip
        cluster.kubectl("apply", "--dry-run=server", "-f", path)
    cluster.delete("namespace", "runvol-system")


def test_every_example_is_in_the_table() -> None:
    assert {path.stem for path in examples.EXAMPLES.glob("*.yaml")} == {*examples.ORDER}
    text = examples.TABLE.read_text()
    assert all(f"[{name}.yaml]" in text for name in examples.ORDER)
