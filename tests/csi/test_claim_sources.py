"""A claim whose source is another node's goes there, since the scheduler does not know it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api_double import ApiDouble
from tests.csi.helpers import refused
from tests.csi.test_store_away import leave
from tests.driver import Driver, mount_capability

pytestmark = pytest.mark.kernel
SELECTED, NODE = "volume.kubernetes.io/selected-node", "topology.csi.runvol.io/node"
OF_CLAIM = {"csi.storage.k8s.io/pvc/name": "r", "csi.storage.k8s.io/pvc/namespace": "default"}
KINDS = {"snapshot": "VolumeSnapshot", "volume": "PersistentVolumeClaim"}


@pytest.fixture(scope="module")
def left():
    """An API, and a driver of node-1 that no more has the store of a volume and its snapshot; their ids."""
    double = ApiDouble()
    with Driver(environment={"RUNVOL_DETECT_API_SERVER": double.url}) as driver:
        volume = driver.create("pvc").volume_id
        snapshot = driver.client.CreateSnapshot(source_volume_id=volume, name="s").snapshot.snapshot_id
        leave(driver)
        yield double, driver, {"volume": {"volume_id": volume}, "snapshot": {"snapshot_id": snapshot}}
    double.stop()


@pytest.fixture
def api(left):
    """What it says: both are node-9's now."""
    double, _driver, sources = left
    double.says, double.forbids = None, False
    double.requests.clear()
    affinity = [{"matchExpressions": [{"key": NODE, "operator": "In", "values": ["node-9"]}]}]
    spec = {"csi": {"driver": "csi.runvol.io", "volumeHandle": sources["volume"]["volume_id"]},
            "nodeAffinity": {"required": {"nodeSelectorTerms": affinity}}}  # fmt: skip
    double.put("nodes", "node-9", {})
    double.put("persistentvolumes", "pv-1", {"spec": spec})
    double.put("persistentvolumeclaims", "source", {"spec": {"volumeName": "pv-1"}})
    double.put("volumesnapshots", "source", {"status": {"boundVolumeSnapshotContentName": "c-1"}})
    described(double, "node-9", sources["snapshot"]["snapshot_id"])
    return double


@pytest.fixture
def away(left):
    _double, driver, sources = left
    return driver, sources


def described(api: ApiDouble, node: str, handle: str) -> None:
    """The snapshot's content."""
    labels = {"snapshot.storage.kubernetes.io/managed-by": node}
    content = {"metadata": {"labels": labels}, "status": {"snapshotHandle": handle}}
    api.put("volumesnapshotcontents", "c-1", content)


def claimed(api: ApiDouble, kind: str, selected: str = "node-1", **spec: Any) -> None:
    source = {"kind": KINDS[kind], "name": "source"}
    api.put("persistentvolumeclaims", "r", {"metadata": {"annotations": {SELECTED: selected, "other": "x"}},
                                            "spec": {"dataSource": source, "kept": {"as": "it is"}, **spec}})  # fmt: skip


def asked(driver: Driver, source: dict[str, Any], code: str, *words: str) -> None:
    with refused(code, *words):
        driver.client.CreateVolume(name="pvc-r", volume_capabilities=[mount_capability()], parameters=OF_CLAIM,
                                   volume_content_source=source)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_goes_to_the_node_of_its_source(api, away, kind):
    driver, sources = away
    claimed(api, kind)
    asked(driver, {kind: sources[kind]}, "RESOURCE_EXHAUSTED", "is on node-9, not on node-1", "is asked for it now")
    changed = api.objects["persistentvolumeclaims"]["r"]
    assert changed["metadata"]["annotations"] == {SELECTED: "node-9", "other": "x"}
    assert changed["spec"]["kept"] == {"as": "it is"}


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_claim_for_which_this_node_was_chosen_is_changed(api, away, kind):
    driver, sources = away
    for selected, more in (("node-2", {}), ("node-1", {"volumeName": "pv-2"})):
        claimed(api, kind, selected, **more)
        asked(driver, {kind: sources[kind]}, "RESOURCE_EXHAUSTED", "is on node-9, not on node-1")
        assert api.objects["persistentvolumeclaims"]["r"]["metadata"]["annotations"][SELECTED] == selected
    assert not any(path.startswith("PUT") for path, _agent in api.requests)


def test_a_claim_is_not_sent_to_a_node_that_is_gone(api, away):
    driver, sources = away
    claimed(api, "snapshot")
    api.drop("nodes", "node-9")
    asked(driver, {"snapshot": sources["snapshot"]}, "RESOURCE_EXHAUSTED", "and the cluster has no node node-9")
    assert api.objects["persistentvolumeclaims"]["r"]["metadata"]["annotations"][SELECTED] == "node-1"


def test_what_the_cluster_says_of_another_source_is_not_believed(api, away):
    driver, sources = away
    claimed(api, "snapshot")
    described(api, "node-9", "snap-other")
    asked(driver, {"snapshot": sources["snapshot"]}, "RESOURCE_EXHAUSTED", "is not on this node")
    assert api.objects["persistentvolumeclaims"]["r"]["metadata"]["annotations"][SELECTED] == "node-1"


def test_a_source_of_this_node_whose_store_is_away_sends_nobody_elsewhere(api, away):
    driver, sources = away
    claimed(api, "snapshot")
    described(api, "node-1", sources["snapshot"]["snapshot_id"])
    asked(driver, {"snapshot": sources["snapshot"]}, "FAILED_PRECONDITION", "its filesystem may not be mounted")


@pytest.mark.parametrize("says", [(403, {"kind": "Status"}), (500, {}), (200, []), (200, {"spec": [], "metadata": 1})])
def test_a_cluster_that_does_not_answer_changes_nothing(api, away, says):
    driver, sources = away
    claimed(api, "volume")
    api.says = says
    asked(driver, {"volume": sources["volume"]}, "RESOURCE_EXHAUSTED", "is not on this node")


def test_a_claim_that_may_not_be_changed_is_left_with_the_words(api, away):
    driver, sources = away
    claimed(api, "volume")
    api.forbids = True
    asked(driver, {"volume": sources["volume"]}, "RESOURCE_EXHAUSTED", "is on node-9, not on node-1")
    assert api.objects["persistentvolumeclaims"]["r"]["metadata"]["annotations"][SELECTED] == "node-1"
