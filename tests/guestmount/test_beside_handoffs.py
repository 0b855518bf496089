"""The hand-off files of runv, RunD 2 and RunD 3: golden bytes, what is refused by name, and what is taken back."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from guestmount import Rund2Dialect, Rund3Dialect, RunvDialect
from guestmount.errors import BadRequest, Refused, Unsupported
from guestmount.handoff import Delivery, NfsDelivery

POD = "6dad7281-57ff-49e4-b844-c588ceabec16"
KUBELETS = {"specVolID": "pv1", "volumeHandle": "h", "driverName": "csi.runvol.io", "nodeName": "n"}


@pytest.fixture
def kubelet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubelet's directory under a path without capitals, as a real one is."""
    root = tmp_path_factory.mktemp("kubelet")
    (root / f"pods/{POD}/volumes/kubernetes.io~csi/pv1/mount").mkdir(parents=True)
    return root


@pytest.fixture
def folder(kubelet: Path) -> Path:
    return kubelet / f"pods/{POD}/volumes/kubernetes.io~csi/pv1"


def export(folder: Path, **more) -> NfsDelivery:
    facts = {"server": "x.nas.aliyuncs.com", "path": "/k8s", "version": "3", "options": ("nolock", "tcp")} | more
    return NfsDelivery(volume_id="nfs-1", target=str(folder / "mount"), **facts)


def block(folder: Path, **more) -> Delivery:
    facts = {"device": "/dev/vdc", "fstype": "ext4"} | more
    return Delivery(volume_id="loop-1", target=str(folder / "mount"), **facts)


DIALECTS = {"runv": RunvDialect, "rund2": Rund2Dialect, "rund3": Rund3Dialect}
FILES = {"runv": "alibabacloudcsiplugin.json", "rund2": "vol_data.json", "rund3": "vol_attr.json"}


@pytest.fixture(params=DIALECTS)
def dialect(request, kubelet, folder):
    if request.param == "rund2":
        (folder / "vol_data.json").write_text(json.dumps(KUBELETS))
    return DIALECTS[request.param]([str(kubelet)])


def test_runv_block(kubelet, folder):
    RunvDialect([str(kubelet)]).deliver(block(folder))
    file = folder / "alibabacloudcsiplugin.json"
    assert (
        file.read_bytes()
        == (
            f'{{"device":"/dev/vdc","volumeType":"block","identity":"{folder}/mount","mountfile":"{file}","runtime":"runv"}}'
        ).encode()
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_runv_nfs(kubelet, folder):
    RunvDialect([str(kubelet)]).deliver_nfs(export(folder, read_only=True))
    file = folder / "alibabacloudcsiplugin.json"
    assert (
        file.read_bytes()
        == (
            '{"server":"x.nas.aliyuncs.com","path":"/k8s","vers":"3","mode":"","modeType":"","options":"nolock,tcp,ro",'
            f'"runtime":"runv","mountfile":"{file}","volumeType":"nfs"}}'
        ).encode()
    )


def test_rund2_nfs_keeps_what_kubelet_wrote(kubelet, folder):
    (folder / "vol_data.json").write_text(json.dumps(KUBELETS))
    os.chmod(folder / "vol_data.json", 0o640)
    dialect = Rund2Dialect([str(kubelet)])
    dialect.deliver_nfs(export(folder, version="4.0"))
    assert (folder / "vol_data.json").read_bytes() == (
        b'{"specVolID":"pv1","volumeHandle":"h","driverName":"csi.runvol.io","nodeName":"n",'
        b'"csi.alibabacloud.com/version":"4.0","csi.alibabacloud.com/options":"nolock,tcp",'
        b'"csi.alibabacloud.com/server":"x.nas.aliyuncs.com","csi.alibabacloud.com/path":"/k8s"}'
    )
    assert stat.S_IMODE((folder / "vol_data.json").stat().st_mode) == 0o640
    dialect.withdraw(str(folder / "mount"))
    assert json.loads((folder / "vol_data.json").read_text()) == KUBELETS


def test_rund3_nfs_does_not_lose_the_version(kubelet, folder):
    Rund3Dialect([str(kubelet)]).deliver_nfs(export(folder, version="4.1", options=("noresvport",), read_only=True))
    assert (folder / "vol_attr.json").read_bytes() == (
        b'{"Source":"x.nas.aliyuncs.com:/k8s","DeviceType":"nfs","MountOpts":["vers=4.1","noresvport","ro"],"Extra":{},"FSType":""}'
    )
    assert stat.S_IMODE((folder / "vol_attr.json").stat().st_mode) == 0o600


def test_a_hand_off_is_delivered_listed_repeated_and_withdrawn(dialect, folder):
    target = str(folder / "mount")
    before = sorted(os.listdir(folder))
    for _ in range(2):
        dialect.deliver_nfs(export(folder))
    (one,) = dialect.delivered()
    assert (one.dialect, one.target, one.device, one.fstype) == (dialect.name, target, "x.nas.aliyuncs.com:/k8s", "nfs")
    dialect.deliver_nfs(export(folder, path="/other"))
    assert [one.device for one in dialect.delivered()] == ["x.nas.aliyuncs.com:/other"]
    for _ in range(2):
        dialect.withdraw(target)
    assert dialect.delivered() == []
    assert sorted(os.listdir(folder)) == before


def test_what_was_being_written_is_swept(dialect, folder):
    (folder / f"{FILES[dialect.name]}.runvol-1").write_text("half")
    dialect.sweep()
    assert not (folder / f"{FILES[dialect.name]}.runvol-1").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"runtime": 5}', b'{"DeviceType": "pci"}', b"\xff", b"[" * 70_000]
)
def test_somebody_elses_file_is_left_alone(dialect, folder, content):
    path = folder / FILES[dialect.name]
    path.write_bytes(content)
    dialect.withdraw(str(folder / "mount"))
    assert path.read_bytes() == content
    assert dialect.delivered() == []


def test_a_flexvolume_target_shares_its_parent_and_is_refused(dialect, folder):
    flex = folder.parent.parent / "runvol~runvol/data"
    with pytest.raises(Unsupported, match="several volumes of a pod"):
        dialect.check_nfs(NfsDelivery(volume_id="v", target=str(flex), server="s", path="/p", version="3"))


@pytest.mark.parametrize(("field", "value"), [("server", "a,b"), ("path", "/a\nb"), ("path", "/a,ro")])
def test_what_would_mean_something_else_is_refused(dialect, folder, field, value):
    with pytest.raises(BadRequest, match=field):
        dialect.check_nfs(export(folder, **{field: value}))


def test_runv_refuses_what_its_reader_would_corrupt(kubelet, folder):
    dialect = RunvDialect([str(kubelet)])
    with pytest.raises(Unsupported, match="path = '/K8s'"):
        dialect.check_nfs(export(folder, path="/K8s"))
    upper = folder.parent / "PV/mount"
    with pytest.raises(Unsupported, match="capital letters: the target"):
        dialect.check(Delivery(volume_id="v", target=str(upper), device="/dev/vdc", fstype="ext4"))


@pytest.mark.parametrize(
    ("more", "words"), [({"read_only": True}, "ro"), ({"options": ("noatime",)}, "noatime"), ({"fstype": "xfs"}, "xfs")]
)
def test_what_runv_does_not_carry_of_a_block_volume_is_refused_by_name(kubelet, folder, more, words):
    with pytest.raises(Unsupported, match=words):
        RunvDialect([str(kubelet)]).deliver(block(folder, **more))
    assert os.listdir(folder) == ["mount"]


@pytest.mark.parametrize(("kind", "words"), [(Rund2Dialect, "two kernels"), (Rund3Dialect, "PCI functions")])
def test_rund_refuses_block_volumes_by_name(kubelet, folder, kind, words):
    with pytest.raises(Unsupported, match=words):
        kind([str(kubelet)]).deliver(block(folder))


@pytest.mark.parametrize("content", [None, "{", '{"a": 1}', "[]"])
def test_rund2_needs_kubelets_file(kubelet, folder, content):
    if content is not None:
        (folder / "vol_data.json").write_text(content)
    with pytest.raises(Refused, match="kubelet's .*vol_data.json"):
        Rund2Dialect([str(kubelet)]).deliver_nfs(export(folder))
    assert not (folder / "vol_data.json").exists() or (folder / "vol_data.json").read_text() == content


def test_rund3_trusts_no_file_that_a_workload_could_have_planted(kubelet, folder):
    planted = folder / "vol_attr.json"
    planted.write_text('{"DeviceType": "nfs", "Source": "evil:/"}')
    os.chown(planted, 1000, 1000)
    assert Rund3Dialect([str(kubelet)]).delivered() == []
