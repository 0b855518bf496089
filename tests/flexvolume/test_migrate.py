"""FlexVolume's PersistentVolumes become CSI ones with the same data; what cannot is told, and nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flexvolume.migrate import migrate
from tests.driver import Driver
from volumes import parameters


def volume(name: str = "pv1", driver: str = "runvol/runvol", **more):
    flex = {"driver": driver, "fsType": "ext4", "options": {"volume": "loop-1"}} | more.pop("flex", {})
    return {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name, "labels": {"a": "b"}},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "flexVolume": flex,
            "claimRef": {"namespace": "default", "name": "data", "uid": "old"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": []}}, "persistentVolumeReclaimPolicy": "Delete", **more,
        },
    }  # fmt: skip


def test_the_same_data_under_a_csi_volume_and_a_claim_that_names_it():
    (one,) = migrate([volume()])
    new, claim = one.manifests
    assert new["spec"]["csi"] == {"driver": "csi.runvol.io", "volumeHandle": "loop-1", "fsType": "ext4"}
    assert new["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert new["spec"]["nodeAffinity"] == {"required": {"nodeSelectorTerms": []}}
    assert new["spec"]["claimRef"] == {"namespace": "default", "name": "data-csi"}
    assert claim["spec"]["volumeName"] == new["metadata"]["name"] == "pv1-csi"
    assert claim["spec"]["resources"]["requests"]["storage"] == "1Gi"


def test_options_become_what_csi_calls_them():
    flex = {"options": {"volume": "loop-1", "runtime": "kata", "mountOptions": "noatime,nodev"}, "readOnly": True}
    (one,) = migrate([volume(flex=flex, mountOptions=["sync"])])
    spec = one.manifests[0]["spec"]
    assert spec["csi"]["volumeAttributes"] == {"runtime": "kata"}
    assert parameters.check_context(spec["csi"]["volumeAttributes"])
    assert spec["csi"]["readOnly"] is True
    assert spec["mountOptions"] == ["sync", "noatime", "nodev"]


def test_the_disk_driver_of_alicloud():
    (one,) = migrate([volume(driver="alicloud/disk", flex={"options": {"volumeId": "loop-9"}})])
    assert one.manifests[0]["spec"]["csi"]["volumeHandle"] == "loop-9"


@pytest.mark.parametrize(("driver", "vers"), [("alicloud/nas", "3"), ("runvol/runvol", "")])
def test_an_export_becomes_a_static_volume(driver, vers):
    options = {"server": "nas.example.com", "path": "/k8s", "options": "noresvport", "mode": "755"}
    one, again = migrate([volume(driver=driver, flex={"options": options}) for _ in range(2)])
    source = one.manifests[0]["spec"]["csi"]
    attributes = {"backend": "nfs", **options, **({"vers": vers, "makePath": "true"} if vers else {})}
    assert source["volumeAttributes"] == attributes
    assert source["volumeHandle"].startswith("nfs-")
    assert source["volumeHandle"] == again.manifests[0]["spec"]["csi"]["volumeHandle"]


@pytest.mark.parametrize(
    ("made", "words"),
    [(volume(driver="other/x"), "'other/x' is not runvol's"), (volume(flex={"secretRef": {"name": "s"}}), "secret"),
     (volume(flex={"options": {"volume": "v", "color": "red"}}), "'color'"), (volume(flex={"options": {}}), "must name a volume"),
     (volume(flex={"options": {"directory": "/data/x"}}), "runvol volumes adopt"),
     (volume(driver="alicloud/nas", flex={"options": {"server": "nas", "path": "/k8s", "vers": "5"}}), "vers"),
     (volume(driver="alicloud/nas", flex={"options": {"server": "nas"}}), "path")],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused_with_the_reason(made, words):
    (one,) = migrate([made])
    assert not one.manifests
    assert words in one.refused


def test_other_things_are_passed_over():
    assert migrate([{"kind": "PersistentVolume", "spec": {"csi": {}}}, {"kind": "Pod", "spec": {}}, {}]) == []


def test_as_an_operator_types_it(tmp_path: Path):
    with Driver() as driver:
        made = json.loads(driver.cli("volumes", "create", "x", "--size", "16777216", "--json").stdout)["items"][0][
            "volume"
        ]
        file = tmp_path / "pvs.yaml"
        items = [volume(flex={"options": {"volume": made}}), volume("pv2", flex={"options": {"volume": "loop-gone"}})]
        file.write_text(yaml.safe_dump({"kind": "List", "items": items}))
        done = driver.cli("migrate", "flexvolume", str(file), check=False)
        assert done.returncode == 1
        assert made in done.stdout.replace("\n", "").replace(" ", "")
        assert not (tmp_path / "out").exists()
        done = driver.cli("migrate", "flexvolume", str(file), "--write", str(tmp_path / "out"), check=False)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["pv1.yaml"]
        assert len(list(yaml.safe_load_all((tmp_path / "out/pv1.yaml").read_text()))) == 2
        assert "one of the two" in driver.cli("migrate", "flexvolume", check=False).stderr
        driver.cli("volumes", "delete", "--yes", made)
