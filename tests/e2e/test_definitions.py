"""The driver files say what the product does, each test that is left out has its reason, and the page has the counts."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from csi.node import _CAPABILITIES as NODE
from runvol_proto import csi_pb2
from tests.e2e import definitions, report
from tests.e2e.suite import read
from volumes.model import VolumeKind
from volumes.registry import NAMES, REGISTRY

BACKENDS = definitions.backends()


def storage_class(backend: str) -> dict:
    found: dict = yaml.safe_load(
        (definitions.ROOT / definitions.driver(backend)["StorageClass"]["FromFile"]).read_text()
    )
    return found


def backend_of(name: str) -> str:
    described = storage_class(name)
    return described["parameters"].get("backend", "nfs" if described["provisioner"].startswith("nfs.") else "loop")


def test_every_backend_of_a_class_has_a_driver_file():
    assert {backend_of(one) for one in BACKENDS} == set(NAMES)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_driver_file_says_what_its_backend_can(name):
    described = definitions.driver(name)
    has = described["DriverInfo"]["Capabilities"]
    backend = next(one.backend for one in REGISTRY if one.name == backend_of(name))
    assert described["DriverInfo"]["Name"] == storage_class(name)["provisioner"]
    assert has["block"] == (backend.kind is VolumeKind.BLOCK)
    assert has["snapshotDataSource"] == has["pvcDataSource"] == hasattr(backend, "snapshots")
    assert has["snapshotDataSource"] == ("SnapshotClass" in described)
    assert has["RWX"] == has["capReadOnlyMany"] == backend.multi_node
    assert has.get("singleNodeVolume", False) == has.get("topology", False) != backend.multi_node
    assert has["volumeMountGroup"] == (csi_pb2.NodeServiceCapability.RPC.VOLUME_MOUNT_GROUP in NODE)


def test_what_is_left_out_has_a_reason_and_a_backend_that_is_there():
    for one in definitions.left_out():
        assert one.kind in definitions.KINDS
        assert one.reason.strip() and set(one.backends) <= set(BACKENDS), one
        re.compile(one.tests)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_that_is_left_out_is_recorded_as_passing(name):
    out = [one for one in definitions.left_out(name) if any(one.holds(test) for test in definitions.recorded(name))]
    assert out == []


def test_the_page_has_the_counts_and_those_are_of_what_is_recorded():
    found = json.loads(report.MEASURED.read_text())
    page = report.PAGE.read_text()
    assert report.BEGIN + report.tables(found) + report.END in page
    assert {name: row["passed"] for name, row in found["backends"].items()} == {
        name: len(definitions.recorded(name)) for name in BACKENDS if definitions.recorded(name)
    }
    assert [name for name, row in found["backends"].items() if row["failed"]] == []


def spec(name: str, state: str, message: str = "", kind: str = "It") -> dict:
    failure = {"Failure": {"Message": message}} if message else {}
    return {"ContainerHierarchyTexts": ["External Storage", "[Driver: d]"], "LeafNodeText": name, "LeafNodeType": kind,
            "State": state, **failure}  # fmt: skip


def test_a_report_is_read_as_what_became_of_each_test(tmp_path):
    specs = [
        spec("runs", "passed"), spec("breaks", "failed", "not equal"), spec("hangs", "timedout", "too late"),
        spec("passes over", "skipped", 'Driver "d" does not support ntfs'), spec("[Disruptive] goes", "skipped"),
        spec("elsewhere", "skipped"), spec("", "failed", "no API server", "SynchronizedBeforeSuite"),
        {"ContainerHierarchyTexts": ["[sig-node]"], "LeafNodeText": "other", "LeafNodeType": "It", "State": "passed"},
    ]  # fmt: skip
    (tmp_path / "loop.json").write_text(
        json.dumps([{"RunTime": 61e9, "SpecReports": specs, "SpecialSuiteFailureReasons": ["Interrupted"]}])
    )
    found = read("loop", tmp_path)
    begin = "External Storage [Driver: d] "
    assert found.passed == {f"{begin}runs"}
    assert set(found.failed) == {f"{begin}breaks", f"{begin}hangs", f"SynchronizedBeforeSuite {begin}".strip(),
                                 "the suite: Interrupted"}  # fmt: skip
    assert found.unfit == {f"{begin}passes over": "Driver does not support ntfs"}
    assert {name: one.kind for name, one in found.left_out.items()} == {f"{begin}[Disruptive] goes": "environment"}
    assert found.not_asked == {f"{begin}elsewhere"}
    counts = {kind: sum(reasons.values()) for kind, reasons in found.row()["left_out"].items()}
    assert counts == {"environment": 1, "design": 0}
