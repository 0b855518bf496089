"""The plain manifests are the chart's, and a server takes them; the examples do what the table says."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.cluster import examples, manifests, programs
from tests.cluster.cluster import Cluster
from tests.cluster.installed import ROOT

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("name", manifests.FILES)
def test_the_manifests_are_those_of_the_chart(built: None, name: str) -> None:
    assert (manifests.PLACE / name).read_text() == manifests.rendered(name), "run `python -m tests.cluster.manifests`"


def test_a_server_takes_everything_that_is_deployed(cluster: Cluster) -> None:
    cluster.kubectl("apply", "--dry-run=server", "-f", ROOT / "deploy/crds/volumesnapshots.yaml")
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
    """Type, format and what is required, by each field's place."""
    found = {
        at: (
            schema.get("type"),
            schema.get("format"),
            tuple(schema.get("enum", ())),
            tuple(sorted(schema.get("required", ()))),
        )
    }
    for name, inner in schema.get("properties", {}).items():
        found |= _fields(inner, f"{at}.{name}")
    return found


def test_the_snapshots_api_has_the_fields_that_the_sidecars_know(built: None) -> None:
    ours = {
        one["metadata"]["name"]: one
        for one in yaml.safe_load_all((ROOT / "deploy/crds/volumesnapshots.yaml").read_text())
    }
    for path in sorted(programs.program("crds").glob("snapshot.*.yaml")):
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
