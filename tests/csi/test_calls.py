"""Listing, capacity, topology, statistics, health, groups, and the server itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import grpc
import pytest

from runvol_proto import csi_pb2
from tests.csi.helpers import PODS, image, refused
from tests.driver import Driver, mount_capability
from tests.until import until

pytestmark = pytest.mark.kernel
A = PODS[0]
MIB = 1 << 20


def test_the_plugin_says_who_it_is_and_what_it_can(driver):
    info = driver.client.GetPluginInfo()
    assert info.name == "csi.runvol.io" and info.vendor_version
    services = [
        one.service.type for one in driver.client.GetPluginCapabilities().capabilities if one.HasField("service")
    ]
    assert sorted(services) == [1, 2, 3]
    assert driver.client.Probe().ready.value


def test_only_the_services_that_were_asked_for_are_served():
    with Driver(environment={"RUNVOL_CSI_SERVICES": "identity,node"}) as driver:
        assert driver.client.NodeGetInfo().node_id == "node-1"
        with refused("UNIMPLEMENTED"):
            driver.client.ListVolumes()
        assert len(driver.client.GetPluginCapabilities().capabilities) == 2


def test_pages_are_stable(driver):
    volumes = [driver.create(f"v{n}", 8 * MIB) for n in range(5)]
    first = driver.client.ListVolumes(max_entries=2)
    driver.delete(volumes[0])
    second = driver.client.ListVolumes(max_entries=2, starting_token=first.next_token)
    third = driver.client.ListVolumes(max_entries=2, starting_token=second.next_token)
    seen = [entry.volume.volume_id for page in (first, second, third) for entry in page.entries]
    assert seen == [volume.volume_id for volume in volumes] and not third.next_token
    for token in ("x", "-1", "9" * 40, "1 ", "１"):
        with refused("ABORTED", "starting_token"):
            driver.client.ListVolumes(starting_token=token)
    with refused("INVALID_ARGUMENT", "max_entries"):
        driver.client.ListVolumes(max_entries=-1)


def test_a_volume_lives_on_this_node_only(driver):
    here = {"segments": {"topology.csi.runvol.io/node": "node-1"}}
    there = {"segments": {"topology.csi.runvol.io/node": "node-2"}}
    make = lambda name, **topology: driver.client.CreateVolume(  # noqa: E731
        name=name,
        volume_capabilities=[mount_capability()],
        capacity_range={"required_bytes": 8 * MIB},
        accessibility_requirements=topology,
    )
    assert make("a", requisite=[there, here]).volume.accessible_topology[0].segments == here["segments"]
    make("b", preferred=[here])
    for topology in ({"requisite": [there]}, {"preferred": [there]}, {"requisite": [{"segments": {"zone": "z"}}]}):
        with refused("RESOURCE_EXHAUSTED", "node-1"):
            make("c", **topology)
    assert driver.client.NodeGetInfo().accessible_topology.segments == here["segments"]
    assert driver.client.GetCapacity(accessible_topology=here).available_capacity > 0
    assert driver.client.GetCapacity(accessible_topology=there).available_capacity == 0


@pytest.mark.parametrize("wrong", [{"backnd": "loop"}, {"backend": "tape"}, {"csi.storage.k8s.io/fstype": "btrfs"}])
def test_a_wrong_class_is_refused_when_its_volume_is_made_and_not_by_the_scheduler(driver, wrong):
    """A capacity that is not answered counts as none, and the pod reads that no node has enough free storage."""
    assert driver.client.GetCapacity(parameters=wrong).available_capacity > 0
    with refused("INVALID_ARGUMENT", *wrong.values()):
        driver.create("wrong", **wrong)


def test_capacity_counts_promises():
    with Driver(environment={"RUNVOL_LOOP_CAPACITY_BYTES": str(100 * MIB)}) as driver:
        driver.create("a", 60 * MIB)
        assert driver.client.GetCapacity().available_capacity == 40 * MIB
        assert driver.client.GetCapacity().maximum_volume_size.value == 40 * MIB
        with refused("RESOURCE_EXHAUSTED"):
            driver.create("b", 41 * MIB)
        shared = mount_capability("MULTI_NODE_MULTI_WRITER")
        assert driver.client.GetCapacity(volume_capabilities=[shared]).available_capacity == 0


@pytest.mark.parametrize("mode", ["MULTI_NODE_READER_ONLY", "MULTI_NODE_SINGLE_WRITER", "MULTI_NODE_MULTI_WRITER"])
def test_a_filesystem_for_several_nodes_is_refused_wherever_it_is_asked_for(driver, mode):
    make = mount_capability
    with refused("INVALID_ARGUMENT", mode):
        driver.create("a", capability=make(mode))
    volume = driver.create("b", 8 * MIB)
    answer = driver.client.ValidateVolumeCapabilities(volume_id=volume.volume_id, volume_capabilities=[make(mode)])
    assert not answer.HasField("confirmed") and mode in answer.message
    with refused("FAILED_PRECONDITION", mode):
        driver.stage(volume, make(mode))


@pytest.mark.parametrize(
    "mode", ["SINGLE_NODE_WRITER", "SINGLE_NODE_READER_ONLY", "SINGLE_NODE_SINGLE_WRITER", "SINGLE_NODE_MULTI_WRITER"]
)
def test_modes_of_one_node_are_confirmed(driver, mode):
    volume = driver.create("a", 8 * MIB, mount_capability(mode))
    assert driver.client.ValidateVolumeCapabilities(
        volume_id=volume.volume_id, volume_capabilities=[mount_capability(mode)]
    ).HasField("confirmed")


def test_a_reader_only_mode_is_read_only_at_the_target(driver):
    capability = mount_capability("SINGLE_NODE_READER_ONLY")
    volume = driver.create("a", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="runc", capability=capability)
    with pytest.raises(OSError, match="Read-only"):
        open(f"{target}/x", "w").close()
    driver.unpublish(volume, A)


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_statistics_are_the_filesystems_own(driver, runtime):
    volume = driver.create("a", 64 * MIB)
    driver.stage(volume)
    target = driver.publish(volume, A, runtime=runtime)
    by_unit = {
        one.unit: one for one in driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target).usage
    }
    space, inodes = by_unit[csi_pb2.VolumeUsage.BYTES], by_unit[csi_pb2.VolumeUsage.INODES]
    assert (
        50 * MIB < space.total <= 64 * MIB
        and space.available + space.used <= space.total
        and space.available > 40 * MIB
    )
    assert inodes.total == 16384 and inodes.used == 11
    with refused("NOT_FOUND"):
        driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=str(driver.kubelet))
    driver.unpublish(volume, A)


def test_health_tells_what_is_wrong_in_new_words_and_old_ones(driver):
    volume = driver.create("a", 64 * MIB)
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata")
    state = lambda: (
        driver.client.NodeGetVolumeHealth(volume_id=volume.volume_id, volume_publish_path=target).volume_health
    )  # noqa: E731
    assert state().volume_id == volume.volume_id and not state().health_statuses
    stats = driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target)
    assert not stats.volume_condition.abnormal

    (place,) = driver.direct_volumes.iterdir()
    (place / "mountInfo.json").unlink()
    assert [(one.status, one.reason) for one in state().health_statuses] == [(csi_pb2.INACCESSIBLE, "HandOffDamaged")]
    assert (
        "mountInfo"
        in driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target).volume_condition.message
    )
    driver.unpublish(volume, A)

    with open(image(driver, volume), "r+b") as file:
        file.seek(1024 + 0x3A)
        file.write(b"\x02\x00")
    assert (
        driver.client.ControllerGetVolumeHealth(volume_id=volume.volume_id).volume_health.health_statuses[0].status
        == csi_pb2.DEGRADED
    )
    image(driver, volume).unlink()
    (listed,) = driver.client.ControllerListVolumeHealth().entries
    assert listed.health_statuses[0].status == csi_pb2.DATA_LOSS and "gone" in listed.health_statuses[0].message
    assert driver.client.ControllerGetVolume(volume_id=volume.volume_id).status.volume_condition.abnormal
    driver.unstage(volume)
    assert not driver.client.NodeGetStorageHealth().backend_health


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_each_pod_has_its_own_group(driver, runtime):
    capability = mount_capability(group="2000")
    volume = driver.create("a", 64 * MIB)
    driver.stage(volume, capability)
    driver.publish(volume, A, runtime=runtime, capability=capability)
    driver.unpublish(volume, A)
    target = driver.publish(volume, PODS[1], runtime="runc", capability=mount_capability(group="3000"))
    assert os.stat(target).st_gid == 3000 and os.stat(target).st_mode & 0o2070 == 0o2070
    driver.unpublish(volume, PODS[1])
    target = driver.publish(volume, PODS[2], runtime="runc")
    assert os.stat(target).st_gid == 3000
    driver.unpublish(volume, PODS[2])


def test_mount_options_reach_the_host_and_the_hand_off(driver):
    capability = mount_capability(flags=("noatime", "nodev"))
    volume = driver.create("a", 64 * MIB)
    driver.stage(volume, capability)
    target = driver.publish(volume, A, runtime="runc", capability=capability)
    assert os.statvfs(target).f_flag & (os.ST_NOATIME | os.ST_NODEV) == os.ST_NOATIME | os.ST_NODEV
    driver.unpublish(volume, A)
    driver.publish(volume, A, runtime="kata", capability=capability)
    (handed,) = json.loads(driver.cli("handoffs", "--json").stdout)["items"]
    assert handed["options"] == ["rw", "noatime", "nodev"]
    driver.unpublish(volume, A)


def test_the_filesystem_is_the_callers_the_classs_or_the_disks(driver):
    volume = driver.client.CreateVolume(
        name="class", capacity_range={"required_bytes": 320 * MIB}, volume_capabilities=[mount_capability()],
        parameters={"csi.storage.k8s.io/fstype": "xfs"},
    ).volume  # fmt: skip
    driver.stage(volume)
    assert image(driver, volume).read_bytes()[:4] == b"XFSB"
    driver.unstage(volume)
    volume.volume_context.clear()
    driver.stage(volume)  # nobody says anything: what is on the disk counts
    driver.unstage(volume)
    with refused("FAILED_PRECONDITION", "holds xfs, but ext4"):
        driver.stage(volume, mount_capability(fstype="ext4"))


def test_a_stop_lets_calls_end_and_takes_the_socket_away(driver):
    volume = driver.create("a", 320 * MIB)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(driver.client.NodeStageVolume(
        volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id), volume_capability=mount_capability())))  # fmt: skip
    thread.start()
    time.sleep(0.01)
    driver.process.send_signal(signal.SIGTERM)
    thread.join()
    assert driver.process.wait(20) == 0 and not driver.socket.exists()
    driver.start()
    driver.unstage(volume)


@pytest.mark.parametrize("which", ["run_dir", "state_dir", "socket"])
def test_a_second_plugin_is_refused_before_it_does_anything(driver, tmp_path, which):
    """A pod beside a unit, say, whichever of the directories they share."""
    other = {"RUNVOL_PATHS_RUN_DIR": str(tmp_path / "run"), "RUNVOL_PATHS_STATE_DIR": str(tmp_path / "state")}
    other.pop(f"RUNVOL_PATHS_{which.upper()}", None)
    socket = driver.socket if which == "socket" else tmp_path / "csi.sock"
    before = until((driver.run / "alive").exists) and (driver.run / "alive").stat().st_ino
    second = subprocess.run(
        [os.sys.executable, "-m", "runvol", "csi", "--endpoint", f"unix://{socket}"],
        env={**os.environ, **driver.environment, **other},
        capture_output=True, text=True, timeout=30, check=False, cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    )  # fmt: skip
    words = (
        f"process {driver.process.pid} serves it already" if which != "socket" else "another process serves this socket"
    )
    assert second.returncode == 1 and words in second.stderr, second.stderr
    assert driver.client.Probe().ready.value and (driver.run / "alive").stat().st_ino == before


def test_a_dead_plugins_socket_and_locks_are_replaced(driver):
    driver.kill()
    assert driver.socket.exists()
    driver.start()
    assert oct(driver.socket.stat().st_mode & 0o777) == "0o700"


def test_a_callers_deadline_ends_the_call(driver):
    volume = driver.create("a", 64 * MIB)
    with pytest.raises(grpc.RpcError) as caught:
        driver.stage(volume, timeout=0.001)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for _ in range(100):  # the abandoned call may still hold the volume for a moment
        try:
            driver.stage(volume)
            break
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.ABORTED
            time.sleep(0.05)
    driver.unstage(volume)


def test_a_name_is_one_volumes_whatever_its_backend(driver):
    driver.create("same")
    with refused("ALREADY_EXISTS", "same", "backend loop"):
        driver.create("same", backend="directory", quota="none")


def test_a_path_of_another_volumes_is_left_to_it(driver):
    """An unknown id, or another's, with the staging path or the target of a volume that a pod uses."""
    volume, other = driver.create("v"), driver.create("other")
    for one in (volume, other):
        driver.stage(one)
    target = driver.publish(volume, PODS[0], runtime="runc")
    for wrong in ("loop-x", other.volume_id):
        driver.client.NodeUnstageVolume(volume_id=wrong, staging_target_path=driver.staging(volume.volume_id))
        driver.client.NodeUnpublishVolume(volume_id=wrong, target_path=target)
    assert os.path.ismount(target) and os.path.ismount(driver.staging(volume.volume_id))
    with open(f"{target}/file", "w") as file:
        file.write("still here")
    driver.unpublish(volume, PODS[0])
    for one in (volume, other):
        driver.unstage(one)


def test_a_clone_of_an_xfs_is_handed_over_with_nouuid(driver):
    use = mount_capability(fstype="xfs")
    volume = driver.create("v", 320 << 20, use)
    driver.stage(volume, use)
    driver.publish(volume, PODS[0], runtime="kata", capability=use)
    (info,) = driver.direct_volumes.glob("*/mountInfo.json")
    assert "nouuid" in json.loads(info.read_text())["options"]
    driver.unpublish(volume, PODS[0])
    driver.unstage(volume)


def test_a_context_of_selinux_is_one_option(driver):
    flag = 'context="system_u:object_r:container_file_t:s0:c10,c20"'
    use = mount_capability(flags=("noatime", flag))
    volume = driver.create("v", 64 << 20, use)
    driver.stage(volume, use)
    driver.publish(volume, PODS[0], runtime="kata", capability=use)
    (info,) = driver.direct_volumes.glob("*/mountInfo.json")
    assert json.loads(info.read_text())["options"] == ["rw", "noatime"]  # a guest has a policy of its own
    claim = json.loads((driver.records / "claims" / f"{volume.volume_id}.json").read_text())
    assert claim["use"]["mount_flags"] == ["noatime", flag]
    driver.unpublish(volume, PODS[0])
    driver.unstage(volume)


@pytest.mark.parametrize(
    "handle",
    ["nfs-data-1", "nfs.example.com/share##", "10.0.0.1#srv/nfs#data", "MyVolume_1", "data:prod", "../../etc", "ß"],
)
def test_a_static_volumes_handle_may_be_anything(driver, handle):
    rwx = mount_capability("MULTI_NODE_MULTI_WRITER")
    context = {"backend": "nfs", "server": "127.0.0.1", "share": "/srv/one"}
    staging = driver.staging("v")
    stage = {"volume_id": handle, "staging_target_path": staging, "volume_capability": rwx}
    for _ in range(2):
        driver.client.NodeStageVolume(**stage, volume_context=context)
    other = {**stage, "volume_id": f"{handle}x", "staging_target_path": driver.staging("w")}
    driver.client.NodeStageVolume(**other, volume_context=context | {"share": "/srv/two"})
    assert len(list((driver.records / "claims").iterdir())) == 2
    for one in (stage, other):
        driver.client.NodeUnstageVolume(volume_id=one["volume_id"], staging_target_path=one["staging_target_path"])
    assert not list((driver.records / "claims").iterdir())
    driver.client.DeleteVolume(volume_id=handle)
    if not handle.startswith("nfs-"):
        with refused("NOT_FOUND"):
            driver.client.ControllerGetVolume(volume_id=handle)
    with refused("INVALID_ARGUMENT", "volume_id"):
        driver.client.NodeStageVolume(**{**stage, "volume_id": "x" * 129}, volume_context=context)
