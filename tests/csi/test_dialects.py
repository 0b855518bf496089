"""NFS and block volumes for runv and RunD pods through the real server: the file, the placeholder, and nothing left."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from blockdev import loops
from tests.driver import POD, Driver, mount_capability

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")


class Static:
    volume_id = "nas-1"
    volume_context = {"backend": "nfs", "server": "nas.example.com", "probe": "none", "path": "/k8s", "vers": "4.0"}  # noqa: RUF012


@pytest.fixture
def driver() -> Iterator[Driver]:
    """Under a path without capital letters, which runv's reader would corrupt."""
    place = Path(tempfile.mkdtemp(prefix="rv", dir="/var/tmp"))
    lower = place.with_name(f"rv{os.getpid()}-{abs(hash(place.name)) % 10**8}")
    place.rename(lower)
    with Driver(lower) as running:
        yield running
        assert not [*running.mounts(), *running.loop_devices()]


def kubelets_file(driver: Driver, volume_id: str) -> Path:
    folder = Path(driver.target(volume_id, POD.format(1))).parent
    (folder / "vol_data.json").write_text('{"specVolID":"pv"}')
    return folder


@pytest.mark.parametrize(
    ("runtime", "rund", "file"),
    [
        ("runv", "rund2", "alibabacloudcsiplugin.json"),
        ("rund", "rund2", "vol_data.json"),
        ("rund", "rund3", "vol_attr.json"),
    ],
)
def test_an_export_is_handed_over_and_taken_back_whatever_is_configured_then(driver, runtime, rund, file):
    driver.stop()
    driver.environment["RUNVOL_DETECT_RUND"] = rund
    driver.start()
    folder = kubelets_file(driver, Static.volume_id)
    driver.stage(Static, RWX)
    target = driver.publish(Static, POD.format(1), runtime=runtime, capability=RWX)
    assert os.listdir(target) == ["RUNVOL-PLACEHOLDER"]
    assert "nas.example.com" in (folder / file).read_text()
    (one,) = json.loads(driver.cli("handoffs", "--json").stdout)["items"]
    assert one["volume"] == "nas-1"
    # A restart under another configuration: kubelet publishes again, and then the pod goes.
    driver.kill()
    driver.environment["RUNVOL_DETECT_RUND"] = "rund3" if rund == "rund2" else "rund2"
    driver.start()
    driver.publish(Static, POD.format(1), runtime=runtime, capability=RWX)
    assert len(json.loads(driver.cli("handoffs", "--json").stdout)["items"]) == 1
    driver.unpublish(Static, POD.format(1))
    driver.unstage(Static)
    assert json.loads((folder / "vol_data.json").read_text()) == {"specVolID": "pv"}
    assert sorted(os.listdir(folder)) == ["vol_data.json"]
    assert json.loads(driver.cli("handoffs", "--json").stdout)["items"] == []


def test_a_block_volume_for_runv_is_a_loop_device_that_goes_with_it(driver):
    volume = driver.create("one")
    driver.stage(volume)
    target = driver.publish(volume, POD.format(1), runtime="runv")
    told = json.loads((Path(target).parent / "alibabacloudcsiplugin.json").read_text())
    assert told["device"].startswith("/dev/loop")
    assert loops.stands_on(told["device"], str(driver.state / "volumes" / f"{volume.volume_id}.img"))
    with pytest.raises(grpc.RpcError, match="belongs to the guest"):
        driver.publish(volume, POD.format(2), runtime="runc")
    driver.unpublish(volume, POD.format(1))
    assert driver.loop_devices() == []
    driver.publish(volume, POD.format(2), runtime="runc")
    driver.unpublish(volume, POD.format(2))
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize(("runtime", "words"), [("rund", "two kernels"), ("kata", "inSandbox")])
def test_what_a_dialect_cannot_carry_is_refused_by_name(driver, runtime, words):
    volume = driver.create("one") if runtime == "rund" else Static
    capability = mount_capability() if runtime == "rund" else RWX
    driver.stage(volume, capability)
    with pytest.raises(grpc.RpcError, match=words):
        driver.publish(volume, POD.format(1), runtime=runtime, capability=capability)
    driver.unstage(volume)
    assert json.loads(driver.cli("handoffs", "--json").stdout)["items"] == []
    if runtime == "rund":
        driver.delete(volume)


def test_a_group_that_this_node_cannot_give_is_said(driver):
    """No guest gives files to a group, and this node does not reach the server."""
    capability = mount_capability("MULTI_NODE_MULTI_WRITER", group="2000")
    kubelets_file(driver, Static.volume_id)
    driver.stage(Static, capability)
    with pytest.raises(grpc.RpcError, match="cannot be given to the pod's group 2000") as caught:
        driver.publish(Static, POD.format(1), runtime="rund", capability=capability)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    # Who only reads needs none.
    driver.publish(Static, POD.format(1), runtime="rund", capability=capability, read_only=True)
    driver.unpublish(Static, POD.format(1))
    driver.unstage(Static)
