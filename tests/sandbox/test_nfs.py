"""NFS in the guest: from NodePublishVolume over the NRI plugin and the shim to a mount by the guest's own kernel."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.driver import POD
from tests.flexvolume.test_driver import Flex
from tests.namespaces import GUEST, HOST
from tests.nas import RWX, Nas
from tests.sandbox.shim import ContainerFailed, volume_mount

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def nas() -> Iterator[Nas]:
    directory = Path(tempfile.mkdtemp(prefix="rv-nas-", dir="/var/tmp"))
    try:
        with Nas(directory, protocols="3,4") as made:
            yield made
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def mounted(nas: Nas, container: str, at: str = "/mnt/data") -> tuple[str, str, list[str]]:
    """Type, source and options, as the guest's kernel tells them."""
    code, text = nas.sandbox.run(container, "grep", f" {at} ", "/proc/self/mounts")
    assert code == 0, text
    source, _, fstype, options = text.split()[:4]
    return fstype, source, options.split(",")


@pytest.mark.parametrize("version", ["3", "4.0", "4.1", "4.2"])
def test_the_guests_kernel_mounts_the_export(nas: Nas, version: str) -> None:
    path = str(nas.export) if version == "3" else "/exp"
    volume = nas.volume(version, path, options="noatime")
    target = nas.published(volume)
    with pytest.raises(OSError, match="Read-only"):
        (Path(target) / "f").touch()
    container = nas.with_volume(target)
    fstype, source, options = mounted(nas, container)
    assert (fstype, source) == ("nfs" if version == "3" else "nfs4", f"{HOST}:{path}")
    assert {f"vers={version}", f"addr={HOST}", "rw", "noatime"} <= set(options)
    assert version == "3" or f"clientaddr={GUEST}" in options
    code, said = nas.sandbox.run(container, "sh", "-c", f"echo {version} > /mnt/data/from-{version} && sync")
    assert code == 0, said
    assert (nas.export / f"from-{version}").read_text() == f"{version}\n"
    (nas.export / f"host-{version}").write_text(version)
    assert nas.sandbox.run(container, "cat", f"/mnt/data/host-{version}") == (0, version)
    nas.sandbox.remove_container(container)
    nas.taken_back(volume)
    assert not os.path.exists(target)


def test_two_containers_and_a_reader(nas: Nas) -> None:
    volume = nas.volume()
    target = nas.published(volume)
    writer, reader = nas.with_volume(target), nas.with_volume(target, read_only=True)
    assert nas.sandbox.run(writer, "sh", "-c", "echo one > /mnt/data/shared")[0] == 0
    assert nas.sandbox.run(reader, "cat", "/mnt/data/shared") == (0, "one\n")
    code, said = nas.sandbox.run(reader, "sh", "-c", "echo two > /mnt/data/shared")
    assert code, said
    assert "Read-only" in said
    for one in (writer, reader):
        nas.sandbox.remove_container(one)
    nas.taken_back(volume)


def test_another_mount_of_the_container_is_what_it_was(nas: Nas) -> None:
    volume, beside = nas.volume(), nas.directory / "beside"
    beside.mkdir()
    (beside / "f").write_text("by virtio-fs")
    target = nas.published(volume)
    container = nas.container(volume_mount(target), volume_mount(str(beside), "/mnt/beside"))
    assert mounted(nas, container)[0] == "nfs4"
    assert nas.sandbox.run(container, "cat", "/mnt/beside/f") == (0, "by virtio-fs")
    nas.sandbox.remove_container(container)
    nas.taken_back(volume)


def test_an_export_that_is_not_there_fails_the_container_and_leaves_nothing(nas: Nas) -> None:
    volume = nas.volume("4.1", "/exp/nothing-here")
    target = nas.published(volume)
    with pytest.raises(ContainerFailed, match="No such file"):
        nas.with_volume(target)
    nas.taken_back(volume)
    assert not nas.driver.left_over()["claims and locks"]


def test_a_server_that_is_away_is_named_before_the_guest_waits_for_it(nas: Nas) -> None:
    volume = nas.volume("4.1")
    nas.driver.stage(volume, RWX)
    nas.server.signal(signal.SIGKILL)
    try:
        with pytest.raises(grpc.RpcError) as refused:
            nas.driver.publish(volume, POD.format(1), runtime="kata", capability=RWX, timeout=15)
        assert HOST in refused.value.details()
    finally:
        nas.server.end()
        nas.server.start()
    target = nas.published(volume)
    container = nas.with_volume(target)
    assert nas.sandbox.run(container, "ls", "/mnt/data")[0] == 0
    nas.sandbox.remove_container(container)
    nas.taken_back(volume)


def test_a_running_guest_goes_on_when_its_server_comes_back(nas: Nas) -> None:
    volume = nas.volume("4.2")
    target = nas.published(volume)
    container = nas.with_volume(target)
    assert nas.sandbox.run(container, "sh", "-c", "echo before > /mnt/data/life")[0] == 0
    nas.server.end()
    writing = nas.sandbox.spawn(container, "sh", "-c", "echo after >> /mnt/data/life; sync; echo done > /tmp/done")
    assert writing
    nas.driver.unpublish(volume, POD.format(1), timeout=10)
    nas.server.start()
    code, said = nas.sandbox.run(
        container, "sh", "-c", "while [ ! -e /tmp/done ]; do sleep 0.2; done; cat /mnt/data/life"
    )
    assert (code, said) == (0, "before\nafter\n")
    nas.sandbox.remove_container(container)
    nas.driver.unstage(volume)


def test_a_flexvolume_that_describes_an_export_is_mounted_by_the_guest_too(nas: Nas) -> None:
    flex = Flex(nas.driver)
    target = flex.target("team-a")
    options = {"server": HOST, "path": "/exp", "vers": "4.2", "runtime": "kata", "kubernetes.io/readwrite": "rw",
               "kubernetes.io/pod.uid": POD.format(1)}  # fmt: skip
    flex.ok("mount", target, json.dumps(options))
    flex.ok("mount", target, json.dumps(options))
    container = nas.with_volume(target)
    assert mounted(nas, container)[:2] == ("nfs4", f"{HOST}:/exp")
    assert nas.sandbox.run(container, "sh", "-c", "echo flex > /mnt/data/flex")[0] == 0
    assert (nas.export / "flex").read_text() == "flex\n"
    nas.sandbox.remove_container(container)
    flex.ok("unmount", target)
    assert not nas.driver.left_over()["claims and locks"]
