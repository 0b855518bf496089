"""One process under two names: the volumes of nodes, and those on NFS, which one controller serves for all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from runvol_proto import csi_pb2
from tests.driver import Driver, block_capability, mount_capability
from volumes import export_ids
from blockdev import nfs

SERVICE = csi_pb2.PluginCapability.Service
RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
NFS = {"server": "127.0.0.1", "path": "/nothing/there"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with Driver(tmp_path_factory.mktemp("d")) as running:
        yield running


def refused(call, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code, caught.value.details()
    return caught.value.details()


def test_each_name_says_who_it_is(driver):
    def services() -> set[int]:
        return {one.service.type for one in driver.client.GetPluginCapabilities().capabilities}

    assert driver.client.GetPluginInfo().name == "csi.runvol.io"
    assert SERVICE.VOLUME_ACCESSIBILITY_CONSTRAINTS in services()
    assert driver.client.NodeGetInfo().accessible_topology.segments
    with driver.as_nfs():
        assert driver.client.GetPluginInfo().name == "nfs.csi.runvol.io"
        assert services() & {*SERVICE.Type.values()} == {SERVICE.CONTROLLER_SERVICE, 0}
        assert driver.client.NodeGetInfo().node_id == "node-1"
        assert not driver.client.NodeGetInfo().HasField("accessible_topology")
        assert driver.client.Probe().ready.value


def test_a_volume_of_a_node_is_none_of_the_controllers(driver):
    """A provisioner of the other name that was told of it would take OK for gone."""
    volume = driver.create("here", capability=block_capability())
    snapshot = driver.client.CreateSnapshot(name="s", source_volume_id=volume.volume_id).snapshot
    with driver.as_nfs():
        calls = driver.client
        for one_id in (volume.volume_id, volume.volume_id[:-1] + ("0" if volume.volume_id[-1] != "0" else "1")):
            told = refused(
                lambda one_id=one_id: calls.DeleteVolume(volume_id=one_id), grpc.StatusCode.FAILED_PRECONDITION
            )
            assert "csi.runvol.io" in told
        for call in (
            lambda: calls.DeleteSnapshot(snapshot_id=snapshot.snapshot_id),
            lambda: calls.ControllerGetVolume(volume_id=volume.volume_id),
            lambda: calls.ControllerExpandVolume(
                volume_id=volume.volume_id, capacity_range={"required_bytes": 1 << 30}
            ),
        ):
            refused(call, grpc.StatusCode.FAILED_PRECONDITION)
        refused(lambda: driver.stage(volume, RWX), grpc.StatusCode.NOT_FOUND)
        # What nobody of ours can have made is gone; and what this driver lists is its own.
        calls.DeleteVolume(volume_id="no-form-of-ours")
        calls.DeleteSnapshot(snapshot_id="no-form-of-ours")
        assert not calls.ListVolumes().entries
        assert not calls.ListSnapshots().entries
    driver.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
    driver.delete(volume)


def test_a_class_of_the_nfs_driver_needs_no_backend(driver):
    with driver.as_nfs():
        said = refused(lambda: driver.create("one", capability=RWX, backend="loop"), grpc.StatusCode.INVALID_ARGUMENT)
        assert "csi.runvol.io" in said
        source = {"volume": {"volume_id": "loop-0123456789abcdef01234567"}}
        said = refused(
            lambda: driver.client.CreateVolume(name="one", volume_capabilities=[RWX], parameters=NFS,
                                               volume_content_source=source),
            grpc.StatusCode.INVALID_ARGUMENT,
        )  # fmt: skip
        assert "csi.runvol.io" in said
        # The share is asked, which is not there.
        with pytest.raises(grpc.RpcError) as caught:
            driver.client.CreateVolume(name="one", volume_capabilities=[RWX], parameters=NFS)
        assert "127.0.0.1" in caught.value.details()
        handle = export_ids.id_of(nfs.Export(server="127.0.0.1", path="/nothing/there", version="4.2"), "one", "nfs-")
        with pytest.raises(grpc.RpcError) as caught:
            driver.client.DeleteVolume(volume_id=handle)
        assert "127.0.0.1" in caught.value.details()


def test_a_static_volume_of_the_nfs_driver_needs_no_backend(driver):
    with driver.as_nfs():
        volume = csi_pb2.Volume(volume_id="any/thing", volume_context=NFS)
        driver.client.NodeStageVolume(volume_id=volume.volume_id, staging_target_path=driver.staging("any"),
                                      volume_capability=RWX, volume_context=NFS)  # fmt: skip
        driver.client.NodeUnstageVolume(volume_id=volume.volume_id, staging_target_path=driver.staging("any"))
        said = refused(
            lambda: driver.client.NodeStageVolume(volume_id="x", staging_target_path=driver.staging("x"),
                                                  volume_capability=RWX, volume_context={"backend": "directory"}),
            grpc.StatusCode.INVALID_ARGUMENT,
        )  # fmt: skip
        assert "csi.runvol.io" in said


def test_a_central_controller_serves_the_one_name_alone(tmp_path: Path):
    driver = Driver(tmp_path / "d", {"RUNVOL_CSI_SERVICES": "identity,controller"})
    try:
        driver.start(names=("nfs",))
        assert not driver.socket.exists()
        assert driver.client.GetPluginInfo().name == "nfs.csi.runvol.io"
    finally:
        driver.stop()
        driver.remove()


@pytest.mark.parametrize("endpoint", ["", "unix:///run/x.sock"])
def test_two_equal_endpoints_are_refused(tmp_path: Path, endpoint: str):
    done = subprocess.run(
        [sys.executable, "-m", "runvol", "csi", "--endpoint", endpoint, "--nfs-endpoint", endpoint], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "RUNVOL_PATHS_STATE_DIR": str(tmp_path), "RUNVOL_PATHS_RUN_DIR": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    assert (f"are both {endpoint!r}" if endpoint else "are both empty") in done.stderr


def test_a_controller_without_a_node_grants_growth_and_touches_nothing(tmp_path: Path):
    """The resizer that was elected asks its own controller, wherever the volume lives."""
    with Driver() as node:
        volume = node.create("one")
        snapshot = node.client.CreateSnapshot(name="s", source_volume_id=volume.volume_id).snapshot
        central = Driver(tmp_path / "d", {"RUNVOL_CSI_SERVICES": "identity,controller"})
        central.start()
        try:
            call = central.client
            bigger = call.ControllerExpandVolume(
                volume_id=volume.volume_id,
                capacity_range={"required_bytes": 128 << 20},
                volume_capability=mount_capability(),
            )
            assert (bigger.capacity_bytes, bigger.node_expansion_required) == (128 << 20, True)
            with pytest.raises(grpc.RpcError) as wrong:
                call.ControllerExpandVolume(volume_id=volume.volume_id, capacity_range={"required_bytes": -1})
            assert wrong.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
            with pytest.raises(grpc.RpcError, match="required_bytes"):
                call.ControllerExpandVolume(volume_id=volume.volume_id, capacity_range={"limit_bytes": 128 << 20})
            for refused in (lambda: call.DeleteVolume(volume_id=volume.volume_id),
                            lambda: call.DeleteSnapshot(snapshot_id=snapshot.snapshot_id),
                            lambda: call.CreateSnapshot(name="t", source_volume_id=volume.volume_id)):  # fmt: skip
                with pytest.raises(grpc.RpcError) as away:
                    refused()
                assert away.value.code() is grpc.StatusCode.FAILED_PRECONDITION, away.value.details()
                assert "this one serves no node" in away.value.details()
            with pytest.raises(grpc.RpcError) as made:
                central.create("two", backend="loop")
            assert made.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "--node-deployment" in made.value.details()
            assert not [*call.ListVolumes().entries]
        finally:
            central.stop()
            central.remove()
        node.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
        node.delete(volume)
