"""Pods with a user namespace of their own (`hostUsers: false`): the real runc maps the owners of what was published."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline
from guestmount import Detector, DetectSettings, PodRef
from guestmount.pods import PodFacts
from tests import runc
from tests.csi.helpers import PODS, refused
from tests.csi.test_rust_shim import CONTAINERD, Api
from tests.driver import Driver, block_capability, mount_capability

A = PODS[1]
GROUP = "2000"
# What the container sees and makes: it is root there, and no one on the node.
SCRIPT = "stat -c %u:%g /data/old; touch /data/new; stat -c %u:%g /data/new; cat /proc/self/uid_map"


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as one:
        yield one
        one.shutdown()


@pytest.fixture
def driver(api: Api) -> Iterator[Driver]:
    one = Driver(environment={"RUNVOL_DETECT_API_SERVER": api.address})
    (one.directory / "containerd.toml").write_text(CONTAINERD)
    config = one.directory / "kata/etc/kata-containers/runtime-rs/configuration.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\ndisable_block_device_use = false\n")
    with one:
        yield one
        assert not one.mounts()


def pod(api: Api, *, sandbox: bool = False, host_users: bool = False) -> None:
    api.runs(containers=("one",))
    api.spec["hostUsers"] = host_users
    if not sandbox:
        del api.spec["runtimeClassName"]


@pytest.mark.parametrize(
    ("size", "fstype", "parameters"),
    [(64 << 20, "ext4", {}), (320 << 20, "xfs", {}), (64 << 20, "", {"backend": "directory", "quota": "none"})],
    ids=["ext4", "xfs", "directory"],
)
def test_a_containers_root_owns_files_that_the_nodes_root_owns_on_the_disk(driver, api, size, fstype, parameters):
    pod(api)
    use = mount_capability(fstype=fstype, group=GROUP)
    volume = driver.create("v", size, use, **parameters)
    driver.stage(volume, use)
    target = Path(driver.publish(volume, A, capability=use))
    (target / "old").write_text("x")
    os.chown(target / "old", 1000, 1001)
    done = runc.run(str(target), SCRIPT, host_users=False)
    assert done.returncode == 0, done.stderr
    old, new, users = done.stdout.splitlines()
    assert users.split() == ["0", str(runc.USERS), str(runc.COUNT)]
    # The pod's group, which is the container's own number of it, owns what is made there.
    assert (old, new) == ("1000:1001", f"0:{GROUP}")
    on_disk = (target / "new").stat()
    assert (on_disk.st_uid, on_disk.st_gid) == (0, int(GROUP))
    driver.unpublish(volume, A)
    driver.unstage(volume)


def test_without_the_mapping_a_container_has_nothing_there(driver, api):
    """What is seen above is the mapping's work: with the host's owners the same container may not write."""
    pod(api)
    volume = driver.create("v")
    driver.stage(volume)
    target = driver.publish(volume, A)
    plain = runc.run(target, "touch /data/new", host_users=False, mapped=False)
    assert plain.returncode != 0 and "Permission denied" in plain.stderr
    driver.unpublish(volume, A)
    driver.unstage(volume)


def test_nfs_is_refused_before_anything_is_mounted(driver, api):
    pod(api)
    context = {"backend": "nfs", "server": "192.0.2.1", "share": "/srv/one"}
    use = mount_capability("MULTI_NODE_MULTI_WRITER")
    static = type("Static", (), {"volume_id": "static-1", "volume_context": context})
    driver.stage(static, use)
    for _ in range(2):
        with refused("FAILED_PRECONDITION", "static-1", "NFS client", "hostUsers: false"):
            driver.publish(static, A, capability=use)
    assert not driver.mounts()
    driver.unstage(static)


def test_a_directory_on_a_filesystem_that_cannot_is_refused_by_its_name(api, tmp_path):
    """Whichever those are on this kernel: the driver tries, and so does runc."""
    pod(api)
    # overlay's own layers may be on what is mapped; the overlay itself cannot be.
    place = tmp_path / "place"
    runc.mounted("tmpfs", tmp_path / "layers", "tmpfs")
    try:
        for name in ("lower", "upper", "work"):
            (tmp_path / "layers" / name).mkdir()
        layers = ",".join(f"{name}dir={tmp_path}/layers/{name}" for name in ("lower", "upper", "work"))
        runc.mounted("overlay", place, "overlay", layers)
        try:
            one = Driver(environment={"RUNVOL_DETECT_API_SERVER": api.address, "RUNVOL_DIRECTORY_PATH": f"{place}/v"})
            (one.directory / "containerd.toml").write_text(CONTAINERD)
            with one:
                volume = one.create("v", backend="directory", quota="none")
                one.stage(volume)
                with refused("FAILED_PRECONDITION", "on overlay", "idmapped mounts"):
                    one.publish(volume, A)
                assert not one.mounts()
                pod(api, host_users=True)
                target = one.publish(volume, A)
                done = runc.run(target, "true", host_users=False)
                assert done.returncode != 0 and "MOUNT_ATTR_IDMAP" in done.stderr, done.stderr
                one.unpublish(volume, A)
                one.unstage(volume)
        finally:
            subprocess.run(["umount", str(place)], check=True)
    finally:
        subprocess.run(["umount", str(tmp_path / "layers")], check=True)


@pytest.mark.parametrize("what", ["filesystem", "raw", "directory", "shared nfs", "nfs"])
def test_a_sandboxed_pod_with_a_user_namespace_is_refused_in_words(driver, api, what):
    """A guest's agent maps nothing; before, such a pod waited for kubelet's own refusal with its volume handed over."""
    pod(api, sandbox=True)
    if "nfs" in what:
        shared = {"inSandbox": "share"} if "shared" in what else {}
        context = {"backend": "nfs", "server": "192.0.2.1", "share": "/srv/one", "probe": "none", **shared}
        volume = type("Static", (), {"volume_id": "static-1", "volume_context": context})
        use = mount_capability("MULTI_NODE_MULTI_WRITER")
    else:
        use = block_capability() if what == "raw" else mount_capability()
        volume = driver.create(
            "v", 64 << 20, use, **({"backend": "directory", "quota": "none"} if what == "directory" else {})
        )
    driver.stage(volume, use)
    with refused("FAILED_PRECONDITION", "hostUsers: false", "'kata'", "Remove hostUsers"):
        driver.publish(volume, A, capability=use)
    assert not driver.mounts() and not driver.left_over()["hand-off files"]
    driver.unstage(volume)


def test_on_a_node_without_sandboxes_the_watched_pod_says_it(api, tmp_path):
    """Nobody is asked for a runtime there; what is known of the pod already is looked at all the same."""

    class Watched:
        def followed(self, uid: str) -> PodFacts | None:
            return PodFacts(uid=uid, host_users=False) if uid == A else None

        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was asked")

    (tmp_path / "containerd.toml").write_text('[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]\n')
    detector = Detector(DetectSettings(containerd_config=str(tmp_path / "containerd.toml")), Watched())
    found = detector.detect(PodRef(uid=A), "", Deadline.after(5))
    assert found.kind == "host" and found.pod is not None and not found.pod.host_users
    other = detector.detect(PodRef(uid=PODS[2]), "", Deadline.after(5))
    assert other.kind == "host" and other.pod is None
