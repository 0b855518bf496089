"""Volumes of the backend `directory` through the real server, for runc and for sandboxes."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from tests.driver import POD, Driver, block_capability, mount_capability

KATA = """
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
  runtime_type = "io.containerd.kata.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata.options]
    ConfigPath = "/kata.toml"
"""


@pytest.fixture
def volume(driver: Driver):
    made = driver.create("files", backend="directory", quota="none")
    driver.stage(made)
    yield made
    for pod in (POD.format(1), POD.format(2)):
        driver.unpublish(made, pod)
    driver.unstage(made)
    driver.delete(made)
    assert not any(driver.left_over().values()), driver.left_over()


def kata(driver: Driver, shared_fs: str) -> None:
    (driver.directory / "containerd.toml").write_text(KATA)
    (driver.directory / "kata").mkdir(exist_ok=True)
    (driver.directory / "kata/kata.toml").write_text(f'[hypervisor.qemu]\nshared_fs = "{shared_fs}"\n')


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_pods_of_any_runtime_get_the_directory(driver, volume, runtime):
    first = driver.publish(volume, POD.format(1), runtime=runtime)
    second = driver.publish(volume, POD.format(2), runtime=runtime, read_only=True)
    (Path(first) / "f").write_text("x")
    assert (Path(second) / "f").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (Path(second) / "g").write_text("x")
    assert driver.publish(volume, POD.format(1), runtime=runtime) == first
    assert not os.listdir(driver.direct_volumes) if driver.direct_volumes.exists() else True


def test_runc_and_a_sandbox_have_it_at_once(driver, volume):
    kata(driver, "virtio-fs")
    runc = driver.publish(volume, POD.format(1), runtime="runc")
    sandbox = driver.publish(volume, POD.format(2), runtime="kata")
    (Path(runc) / "f").write_text("x")
    assert (Path(sandbox) / "f").read_text() == "x"


@pytest.mark.parametrize(("shared_fs", "words"), [("virtio-9p", "through virtio-9p"), ("none", "does not share")])
def test_a_sandbox_that_would_not_use_virtio_fs_is_refused_with_the_setting(driver, volume, shared_fs, words):
    kata(driver, shared_fs)
    with pytest.raises(grpc.RpcError) as caught:
        driver.publish(volume, POD.format(1), runtime="kata")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert words in caught.value.details()
    assert "kata.toml" in caught.value.details()
    assert not Path(driver.target(volume.volume_id, POD.format(1))).exists()


def test_a_pods_group_owns_the_files(driver, volume):
    capability = mount_capability(group="4321")
    target = driver.publish(volume, POD.format(1), runtime="runc", capability=capability)
    assert os.stat(target).st_gid == 4321
    assert os.stat(target).st_mode & 0o2070 == 0o2070


def test_read_write_once_pod_has_one_pod(driver):
    capability = mount_capability("SINGLE_NODE_SINGLE_WRITER")
    volume = driver.create("once", capability=capability, backend="directory", quota="none")
    driver.stage(volume, capability)
    driver.publish(volume, POD.format(1), runtime="runc", capability=capability)
    with pytest.raises(grpc.RpcError, match="ReadWriteOncePod"):
        driver.publish(volume, POD.format(2), runtime="runc", capability=capability)
    driver.unpublish(volume, POD.format(1))
    driver.publish(volume, POD.format(2), runtime="runc", capability=capability)
    driver.unpublish(volume, POD.format(2))
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize(
    ("capability", "words"),
    [(block_capability(), "no block device"), (mount_capability("MULTI_NODE_MULTI_WRITER"), "lives on one node"),
     (mount_capability(flags=("sync",)), "mount_flags")],
)  # fmt: skip
def test_what_a_directory_cannot_be_is_refused_by_name(driver, capability, words):
    with pytest.raises(grpc.RpcError, match=words) as caught:
        driver.create("no", capability=capability, backend="directory", quota="none")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_parameter_of_another_backend_is_refused(driver):
    for parameters in ({"backend": "directory", "preallocate": "true"}, {"backend": "loop", "quota": "none"}):
        with pytest.raises(grpc.RpcError, match="is not a parameter of the backend"):
            driver.create("no", **parameters)


def test_a_size_that_nothing_enforces_is_refused_unless_the_class_says_so(driver):
    with pytest.raises(grpc.RpcError, match="project quotas") as caught:
        driver.create("no", backend="directory")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not driver.client.ListVolumes().entries


def test_statistics_expansion_and_health(driver, volume):
    target = driver.publish(volume, POD.format(1), runtime="runc")
    usage = driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target)
    assert {one.unit for one in usage.usage} == {1, 2}
    assert not usage.volume_condition.abnormal
    grown = driver.client.NodeExpandVolume(
        volume_id=volume.volume_id, volume_path=target, capacity_range={"required_bytes": 128 << 20}
    )
    assert grown.capacity_bytes == 128 << 20
    with pytest.raises(grpc.RpcError, match="takes no snapshots"):
        driver.client.CreateSnapshot(name="s", source_volume_id=volume.volume_id)
    with pytest.raises(grpc.RpcError, match="still published"):
        driver.client.DeleteVolume(volume_id=volume.volume_id)


def test_a_restart_of_the_driver_is_not_noticed(driver, volume):
    target = driver.publish(volume, POD.format(1), runtime="runc")
    (Path(target) / "f").write_text("x")
    driver.kill()
    driver.start()
    driver.stage(volume)
    driver.publish(volume, POD.format(1), runtime="runc")
    assert (Path(target) / "f").read_text() == "x"
    assert "directory" in driver.cli("volumes", "--json").stdout
    assert driver.cli("gc", "--dry-run", check=False).stdout.count(volume.volume_id) == 0
