"""NFS volumes through the real driver, against the kernel's own server and client: every version, and a server that dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent import futures
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from blockdev import Deadline, idmapped, selinux
from volumes import export_ids
from tests.driver import POD, Driver, mount_capability
from tests.kernel.inside.nfs import ROOT, VERSIONS, Drivers, KernelNfs

SERVER = "127.0.0.1"
RWX = mount_capability("MULTI_NODE_MULTI_WRITER")


@pytest.fixture(scope="module")
def nfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelNfs]:
    server = KernelNfs(tmp_path_factory.mktemp("nfs") / "exported")
    server.start()
    (ROOT / "share").mkdir()
    os.chmod(ROOT / "share", 0o777)
    yield server
    server.close()


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    made = Drivers(tmp_path_factory.mktemp("d"))
    yield made
    made.end()


@pytest.fixture
def driver(nfs: KernelNfs, drivers: Drivers) -> Iterator[Driver]:
    nfs.start()
    for running in drivers.lent():
        yield running
        nfs.start()


def create(driver: Driver, name: str = "one", capability=RWX, **parameters: str):
    asked = {"backend": "nfs", "server": SERVER, "path": str(ROOT / "share")} | parameters
    return driver.create(name, capability=capability, **asked)


def gone(driver: Driver, volume, *pods: str, capability=RWX) -> None:
    for pod in pods:
        driver.unpublish(volume, pod)
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize("version", VERSIONS)
def test_runc_pods_share_a_volume(driver, version):
    volume = create(driver, f"v{version}", vers=version)
    assert not volume.accessible_topology
    assert volume.volume_context["path"] == f"{ROOT}/share/v{version}"
    driver.stage(volume, RWX)
    first = driver.publish(volume, POD.format(1), runtime="runc", capability=RWX)
    second = driver.publish(volume, POD.format(2), runtime="runc", capability=RWX, read_only=True)
    (Path(first) / "f").write_text("x")
    assert (Path(second) / "f").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (Path(second) / "g").write_text("x")
    mounted = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"/v{version} " in line]
    assert len([line for line in mounted if "globalmount" in line]) == 1, "mounted once for the volume"
    assert f"vers={version}" in mounted[0]
    assert (ROOT / f"share/v{version}/f").read_text() == "x"
    gone(driver, volume, POD.format(1), POD.format(2))


@pytest.mark.parametrize("version", VERSIONS)
def test_something_else_at_the_target_is_told_and_left(driver, version):
    volumes = [create(driver, f"{name}-{version}", vers=version) for name in ("one", "two")]
    for volume in volumes:
        driver.stage(volume, RWX)
    one, two = (driver.publish(volume, POD.format(1), runtime="runc", capability=RWX) for volume in volumes)
    (Path(two) / "of-two").touch()
    assert driver.publish(volumes[0], POD.format(1), runtime="runc", capability=RWX) == one
    subprocess.run(["umount", one], check=True)
    subprocess.run(["mount", "--bind", two, one], check=True)
    with pytest.raises(grpc.RpcError, match="something else than .* is mounted at") as caught:
        driver.publish(volumes[0], POD.format(1), runtime="runc", capability=RWX)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert os.listdir(one) == ["of-two"]
    for volume in volumes:
        gone(driver, volume, POD.format(1))


def test_mount_options_are_carried(driver):
    capability = mount_capability("MULTI_NODE_MULTI_WRITER", flags=("noatime", "rsize=65536"))
    volume = create(driver, options="nconnect=2,soft", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, POD.format(1), runtime="runc", capability=capability)
    (line,) = [one for one in Path("/proc/self/mounts").read_text().splitlines() if f" {target} " in one]
    for word in ("noatime", "rsize=65536", "nconnect=2", "soft"):
        assert word in line
    gone(driver, volume, POD.format(1))


def test_a_label_is_left_out_by_a_kernel_without_selinux(driver):
    """As mount(8) does it: the NFS client would know no such option."""
    assert not selinux.is_on()
    label = 'context="system_u:object_r:container_file_t:s0:c10,c20"'
    capability = mount_capability("MULTI_NODE_MULTI_WRITER", flags=("noatime", label))
    volume = create(driver, "labelled", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, POD.format(1), runtime="runc", capability=capability)
    (line,) = [one for one in Path("/proc/self/mounts").read_text().splitlines() if f" {target} " in one]
    assert "noatime" in line and "context" not in line
    gone(driver, volume, POD.format(1))


@pytest.mark.parametrize("version", ["3", "4.2"])
def test_nothing_maps_the_owners_of_its_files_for_a_pod_with_users_of_its_own(driver, version):
    """Which is why such a pod is refused before anything is mounted."""
    volume = create(driver, f"users-{version}", vers=version)
    driver.stage(volume, RWX)
    directory = os.open(driver.publish(volume, POD.format(1), runtime="runc", capability=RWX), os.O_PATH)
    try:
        assert not idmapped.is_possible(directory, Deadline.after(30))
    finally:
        os.close(directory)
    gone(driver, volume, POD.format(1))


def test_a_deleted_volume_is_archived_or_removed_as_the_class_says(driver):
    kept, removed = create(driver, "kept"), create(driver, "removed", archiveOnDelete="false")
    for name in ("kept", "removed"):
        (ROOT / "share" / name / "f").write_text("x")
        (ROOT / "share" / name / "link").symlink_to("/etc")
    driver.delete(kept)
    driver.delete(removed)
    driver.delete(removed)
    names = os.listdir(ROOT / "share")
    assert not [name for name in names if "removed" in name or name == "kept"]
    (archived,) = [name for name in names if name.startswith("archived-kept")]
    assert (ROOT / "share" / archived / "f").read_text() == "x"
    assert Path("/etc/passwd").exists()


def test_another_controller_goes_on_where_one_was_killed(driver, tmp_path):
    volume = create(driver, "shared")
    driver.kill()
    for file in driver.state.glob("exports.json"):
        file.unlink()
    driver.start()
    older = export_ids.short(volume.volume_id)  # as a release gave it whose ids say nothing of their export
    for call in (lambda: driver.client.DeleteVolume(volume_id=older),
                 lambda: driver.client.CreateSnapshot(name="s", source_volume_id=older)):  # fmt: skip
        with pytest.raises(grpc.RpcError, match="no export known for this id") as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (ROOT / "share/shared").is_dir()
    assert create(driver, "shared").volume_id == volume.volume_id
    with pytest.raises(grpc.RpcError, match="exists already"):
        create(driver, "shared", mode="0700")
    driver.kill()
    for file in driver.state.glob("exports.json"):
        file.unlink()
    driver.start()
    size = {"required_bytes": 1 << 30}
    call = {"volume_id": volume.volume_id, "capacity_range": size}
    assert driver.client.ControllerExpandVolume(**call).capacity_bytes == 1 << 30
    driver.delete(volume)
    assert not (ROOT / "share/shared").exists()


def test_names_that_csi_driver_nfs_users_write_are_understood(driver):
    volume = driver.create(
        "theirs", capability=RWX, backend="nfs", server=SERVER, share=f"{ROOT}/share", mountPermissions="0750"
    )
    assert (ROOT / "share/theirs").stat().st_mode & 0o777 == 0o750
    driver.delete(volume)
    with pytest.raises(grpc.RpcError, match="'onDelete'"):
        driver.create("x", capability=RWX, backend="nfs", server=SERVER, share=f"{ROOT}/share", onDelete="retain")
    with pytest.raises(grpc.RpcError, match="contradicts path"):
        driver.create("x", capability=RWX, backend="nfs", server=SERVER, share="/a", path="/b")


def test_a_sub_directory_is_named_and_may_be_shared(driver):
    one, two = (create(driver, name, subDir="teams/a") for name in ("one", "two"))
    assert one.volume_context["path"] == f"{ROOT}/share/teams/a"
    place = ROOT / "share/teams/a"
    (place / "f").write_text("x")
    driver.delete(one)
    assert (place / "f").read_text() == "x", "another volume has it too"
    below = create(driver, "below", subDir="teams/a/b")
    driver.delete(two)
    assert (place / "b").is_dir(), "another volume lies in it"
    driver.delete(below)
    assert not place.exists(), "it goes with the last volume that lies in it"
    (kept,) = (ROOT / "share").glob("archived-teams-a-*/f")
    assert kept.read_text() == "x"
    place.mkdir()
    (place / "f").write_text("x")
    three = create(driver, "three", subDir="teams/a", archiveOnDelete="false")
    driver.delete(three)
    assert (place / "f").read_text() == "x", "it was there before this volume, and no record says whose it is"


def test_a_link_on_the_way_leads_nowhere(driver):
    (ROOT / "share/way").symlink_to("/etc")
    with pytest.raises(grpc.RpcError, match="leads through a link"):
        create(driver, "one", subDir="way/a")
    (ROOT / "share/way").unlink()
    assert not Path("/etc/a").exists()
    driver.delete(create(driver, "one", subDir="way/a"))


@pytest.mark.parametrize("word", ["nfsvers=4.0", "vers=3", "nolock,tcp,nfsvers=4.2"])
def test_the_version_may_stand_among_the_mount_options(driver, word):
    capability = mount_capability("MULTI_NODE_MULTI_WRITER", flags=(word,))
    volume = create(driver, "one", capability=capability)
    driver.stage(volume, capability)
    target = driver.publish(volume, POD.format(1), runtime="runc", capability=capability)
    (line,) = [one for one in Path("/proc/self/mounts").read_text().splitlines() if f" {target} " in one]
    assert f"vers={word.rpartition('=')[2]}," in line
    driver.stage(volume, capability)
    gone(driver, volume, POD.format(1))
    with pytest.raises(grpc.RpcError, match="contradicts"):
        create(driver, "two", capability=capability, vers="4.1")


def test_a_static_volumes_mode_is_set_when_it_is_staged(driver):
    place = ROOT / "moded"
    (place / "d").mkdir(parents=True)
    (place / "d/f").write_text("x")
    (place / "link").symlink_to("/etc/shadow")
    before = os.stat("/etc/shadow").st_mode

    class Static:
        volume_id = "nas-moded"
        volume_context = {"backend": "nfs", "server": SERVER, "path": str(place), "mode": "770"}  # noqa: RUF012

    driver.stage(Static, RWX)
    assert [path.stat().st_mode & 0o777 for path in (place, place / "d")] == [0o770, 0o755]
    driver.unstage(Static)
    Static.volume_context |= {"mode": "750", "modeType": "recursive"}
    driver.stage(Static, RWX)
    assert [path.stat().st_mode & 0o777 for path in (place, place / "d", place / "d/f")] == [0o750, 0o750, 0o640]
    assert os.stat("/etc/shadow").st_mode == before
    place.chmod(0o700)
    driver.stage(Static, RWX)
    assert place.stat().st_mode & 0o777 == 0o700, "set once, not again by kubelet's restart"
    driver.unstage(Static)


def test_gc_leaves_the_claims_of_exports_alone(driver):
    class Static:
        volume_id = "nas-of-team-a"
        volume_context = {"backend": "nfs", "server": SERVER, "path": f"{ROOT}/share"}  # noqa: RUF012

    driver.stage(Static, RWX)
    target = driver.publish(Static, POD.format(1), runtime="runc", capability=RWX)
    driver.cli("gc")
    assert driver.left_over()["claims and locks"]
    (Path(target) / "still").write_text("x")
    driver.unpublish(Static, POD.format(1))
    driver.unstage(Static)


def test_a_share_as_a_volume_is_never_removed(driver):
    (ROOT / "whole").mkdir()
    volume = create(driver, "whole", path=f"{ROOT}/whole", volumeAs="sharepath", archiveOnDelete="false")
    assert volume.volume_context["path"] == f"{ROOT}/whole"
    (ROOT / "whole/f").write_text("x")
    driver.delete(volume)
    assert (ROOT / "whole/f").read_text() == "x"


def test_a_static_volume_needs_no_controller(driver):
    class Static:
        volume_id = "nas-of-team-a"
        volume_context = {"backend": "nfs", "server": SERVER, "path": f"{ROOT}/share"}  # noqa: RUF012

    driver.stage(Static, RWX)
    target = driver.publish(Static, POD.format(1), runtime="runc", capability=RWX)
    (Path(target) / "static").write_text("x")
    assert (ROOT / "share/static").read_text() == "x"
    usage = driver.client.NodeGetVolumeStats(volume_id=Static.volume_id, volume_path=target)
    assert usage.usage[0].total > 0
    driver.unpublish(Static, POD.format(1))
    driver.unstage(Static)


def test_a_static_volumes_sub_directory_is_all_that_its_pod_sees(driver):
    (ROOT / "share/app1").mkdir(parents=True)
    (ROOT / "share/app1/mine").write_text("x")

    class Static:
        volume_id = "nas-sub"
        volume_context = {"backend": "nfs", "server": SERVER, "share": f"{ROOT}/share", "subDir": "app1"}  # noqa: RUF012

    driver.stage(Static, RWX)
    assert os.listdir(driver.publish(Static, POD.format(1), runtime="runc", capability=RWX)) == ["mine"]
    driver.unpublish(Static, POD.format(1))
    driver.unstage(Static)


def test_another_export_under_the_same_handle_waits_for_the_pods_of_the_first(driver):
    for name in "ab":
        (ROOT / f"share/of-{name}").mkdir()
        (ROOT / f"share/of-{name}/i-am-{name}").touch()

    class Static:
        volume_id = "nas-again"
        volume_context = {"backend": "nfs", "server": SERVER, "path": f"{ROOT}/share/of-a"}  # noqa: RUF012

    driver.stage(Static, RWX)
    driver.publish(Static, POD.format(1), runtime="runc", capability=RWX)
    Static.volume_context = {**Static.volume_context, "path": f"{ROOT}/share/of-b"}
    for call in (lambda: driver.stage(Static, RWX),
                 lambda: driver.publish(Static, POD.format(2), runtime="runc", capability=RWX),
                 lambda: driver.publish(Static, POD.format(1), runtime="runc", capability=RWX)):  # fmt: skip
        with pytest.raises(grpc.RpcError, match="of-a.*of-b") as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    driver.unpublish(Static, POD.format(1))
    driver.stage(Static, RWX)
    assert os.listdir(driver.publish(Static, POD.format(2), runtime="runc", capability=RWX)) == ["i-am-b"]
    driver.unpublish(Static, POD.format(2))
    driver.unstage(Static)


def test_what_an_earlier_release_delivered_without_its_sub_directory_goes_on_for_its_pods(driver):
    (ROOT / "share/app2").mkdir(parents=True)

    class Static:
        volume_id = "nas-older"
        volume_context = {"backend": "nfs", "server": SERVER, "path": f"{ROOT}/share"}  # noqa: RUF012

    driver.stage(Static, RWX)
    driver.publish(Static, POD.format(1), runtime="runc", capability=RWX)
    Static.volume_context = {**Static.volume_context, "subDir": "app2"}
    driver.stage(Static, RWX)
    driver.publish(Static, POD.format(1), runtime="runc", capability=RWX)
    with pytest.raises(grpc.RpcError, match="of its own") as refused:
        driver.publish(Static, POD.format(2), runtime="runc", capability=RWX)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    driver.unpublish(Static, POD.format(1))
    driver.unstage(Static)


def test_a_directory_that_was_there_is_left_as_it_is(driver):
    (ROOT / "share/legacy/data").mkdir(parents=True)
    (ROOT / "share/legacy").chmod(0o700)
    driver.delete(create(driver, "new", subDir="legacy", archiveOnDelete="false"))
    assert (ROOT / "share/legacy/data").is_dir()
    assert (ROOT / "share/legacy").stat().st_mode & 0o777 == 0o700


def test_a_kata_pod_needs_the_plugin_or_shares_the_hosts_mount(driver):
    refused, shared = create(driver, "refused"), create(driver, "shared", inSandbox="share")
    for volume in (refused, shared):
        driver.stage(volume, RWX)
    with pytest.raises(grpc.RpcError, match="runvol nri") as caught:
        driver.publish(refused, POD.format(1), runtime="kata", capability=RWX)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    target = driver.publish(shared, POD.format(1), runtime="kata", capability=RWX)
    (Path(target) / "f").write_text("x")
    gone(driver, refused)
    gone(driver, shared, POD.format(1))


def test_it_grows_in_the_controller(driver):
    volume = create(driver, "grows")
    grown = driver.client.ControllerExpandVolume(volume_id=volume.volume_id, capacity_range={"required_bytes": 1 << 40})
    assert grown.capacity_bytes == 1 << 40
    assert not grown.node_expansion_required
    driver.delete(volume)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [({"server": "nobody.invalid"}, "nobody.invalid"), ({"server": "192.0.2.1"}, "192.0.2.1 does not answer"),
     ({"path": "/no/such"}, "does the server export this path"), ({"path": "relative"}, "'path'"), ({"path": "/a/../b"}, "'path'"),
     ({"server": "a b"}, "'server'"), ({"options": "addr=1.2.3.4"}, "'options'"), ({"vers": "2"}, "'vers'"),
     ({"mode": "888"}, "'mode'"), ({"path": ""}, "'path'")],
)  # fmt: skip
def test_what_cannot_be_is_told_at_once(driver, parameters, words):
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        create(driver, "no", **parameters)
    assert words in caught.value.details()
    assert time.monotonic() - started < 8


def test_a_dead_server_costs_each_call_its_patience_and_nobody_else_anything(driver, nfs):
    volume, local = create(driver, "dies"), driver.create("local", backend="directory", quota="none")
    driver.stage(volume, RWX)
    driver.stage(local)
    target = driver.publish(volume, POD.format(1), runtime="runc", capability=RWX)
    (Path(target) / "f").write_text("x")
    nfs.stop()
    started = time.monotonic()
    # kubelet comes again for a running pod: it is published, and nobody asks the server.
    driver.publish(volume, POD.format(1), runtime="runc", capability=RWX)
    assert time.monotonic() - started < 3
    with pytest.raises(grpc.RpcError, match="does not answer") as caught:
        driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target, timeout=4)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    started = time.monotonic()
    for number in range(5):
        driver.publish(local, POD.format(2), runtime="runc")
        driver.unpublish(local, POD.format(2))
    assert time.monotonic() - started < 5, f"{number} calls for another volume waited"
    started = time.monotonic()
    driver.unpublish(volume, POD.format(1))
    driver.unstage(volume)
    assert time.monotonic() - started < 5
    driver.stage(volume, RWX)
    with pytest.raises(grpc.RpcError, match=f"{SERVER} does not answer"):
        driver.publish(volume, POD.format(1), runtime="runc", capability=RWX)
    with pytest.raises(grpc.RpcError, match=f"{SERVER} does not answer"):
        driver.delete(volume)
    driver.unstage(volume)
    nfs.start()
    until = time.monotonic() + 60
    while True:
        try:
            driver.delete(volume)
            break
        except grpc.RpcError:
            assert time.monotonic() < until
            time.sleep(1)
    driver.unstage(local)
    driver.delete(local)


def test_many_at_once(driver):
    volume = create(driver, "many")
    driver.stage(volume, RWX)

    def pod(number: int) -> None:
        name = POD.format(number)
        for _ in range(20):
            try:
                driver.publish(volume, name, runtime="runc", capability=RWX)
                break
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.ABORTED
                time.sleep(0.1)

    with futures.ThreadPoolExecutor(5) as callers:
        list(callers.map(pod, range(1, 6)))
    gone(driver, volume, *[POD.format(number) for number in range(1, 6)])


def test_ten_dead_mounts_hold_up_nobody(driver, nfs):
    dead = [create(driver, f"dead-{number}", options="hard") for number in range(10)]
    targets = []
    for number, volume in enumerate(dead):
        driver.stage(volume, RWX)
        targets.append(driver.publish(volume, POD.format(number), runtime="runc", capability=RWX))
    local = driver.create("local", backend="directory", quota="none")
    nfs.stop()

    def asked(number: int) -> str:
        try:
            driver.client.NodeGetVolumeStats(timeout=6, volume_id=dead[number].volume_id, volume_path=targets[number])
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

    slowest = 0.0
    with futures.ThreadPoolExecutor(10) as callers:
        hanging = [callers.submit(asked, number) for number in range(10)]
        time.sleep(0.5)
        for _ in range(3):
            for call in (lambda: driver.stage(local), lambda: driver.publish(local, POD.format(1), runtime="runc"),
                         lambda: driver.unpublish(local, POD.format(1)), lambda: driver.unstage(local)):  # fmt: skip
                started = time.monotonic()
                call()
                slowest = max(slowest, time.monotonic() - started)
        assert {one.result() for one in hanging} <= {"DEADLINE_EXCEEDED", "UNAVAILABLE", "FAILED_PRECONDITION", "OK"}
    assert slowest < 2, slowest
    for number, volume in enumerate(dead):
        driver.unpublish(volume, POD.format(number), timeout=10)
        driver.unstage(volume, timeout=10)
    nfs.start()
    for volume in dead:
        driver.delete(volume)
    driver.delete(local)


def test_two_drivers_of_one_process(driver):
    """Volumes of the one name are mounted, grown and deleted under the other; what lives on nodes is not."""
    older = create(driver, "older")
    with driver.as_nfs():
        newer = driver.create("newer", capability=RWX, server=SERVER, path=f"{ROOT}/share")
        assert not newer.accessible_topology
        assert {one.volume.volume_id for one in driver.client.ListVolumes().entries} == {
            older.volume_id,
            newer.volume_id,
        }
        for number, volume in enumerate((older, newer)):
            driver.stage(volume, RWX)
            target = driver.publish(volume, POD.format(number), runtime="runc", capability=RWX)
            (Path(target) / "f").write_text("x")
        driver.client.ControllerExpandVolume(volume_id=older.volume_id, capacity_range={"required_bytes": 1 << 30})
        snapshot = driver.client.CreateSnapshot(name="s", source_volume_id=newer.volume_id).snapshot
        driver.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
    for number, volume in enumerate((older, newer)):
        driver.unpublish(volume, POD.format(number))
        driver.unstage(volume)
    driver.delete(newer)
    with driver.as_nfs():
        driver.delete(older)
        assert not driver.client.ListVolumes().entries


@pytest.mark.parametrize("version", ["3", "4.1"])
def test_a_described_path_is_made_if_that_is_asked_for(driver, version):
    place = {"backend": "nfs", "server": SERVER, "path": f"{ROOT}/share/app{version}/data", "vers": version}
    static = SimpleNamespace(volume_id=f"made-{version}", volume_context=place)

    driver.stage(static, RWX)
    with pytest.raises(grpc.RpcError, match="no such path|No such file"):
        driver.publish(static, POD.format(1), runtime="runc", capability=RWX)
    driver.unpublish(static, POD.format(1))
    driver.unstage(static)
    static.volume_context["makePath"] = "true"
    for _again in range(2):
        driver.stage(static, RWX)
        target = driver.publish(static, POD.format(1), runtime="runc", capability=RWX)
        (Path(target) / "f").write_text("x")
        driver.unpublish(static, POD.format(1))
        driver.unstage(static)
    made = ROOT / f"share/app{version}"
    assert (made / "data/f").read_text() == "x"
    assert [oct(path.stat().st_mode & 0o7777) for path in (made, made / "data")] == ["0o755", "0o777"]
    # A link on the way leads nowhere.
    (made / "link").symlink_to("/etc")
    static.volume_context["path"] += "/../link/new"
    with pytest.raises(grpc.RpcError) as caught:
        driver.stage(static, RWX)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    static.volume_context["path"] = f"{ROOT}/share/app{version}/link/new"
    with pytest.raises(grpc.RpcError) as caught:
        driver.stage(static, RWX)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
    assert not Path("/etc/new").exists()


def test_a_directory_that_its_server_has_lost(driver):
    """What was mounted is stale: that is said, and a pod that comes alone has it mounted anew."""
    volume = create(driver, "stale")
    driver.stage(volume, RWX)
    target = driver.publish(volume, POD.format(1), runtime="runc", capability=RWX)
    place = ROOT / "share/stale"
    shutil.rmtree(place)
    place.mkdir(mode=0o777)

    def refused(call) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION, caught.value.details()
        return caught.value.details()

    client, other = driver.client, partial(driver.publish, volume, POD.format(2), runtime="runc", capability=RWX)
    said = refused(lambda: client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target))
    assert "end all pods" in said
    assert refused(other) == said
    health = client.NodeGetVolumeHealth(volume_id=volume.volume_id, volume_publish_path=target).volume_health
    assert [one.reason for one in health.health_statuses] == ["Stale"]
    # The pod that has it is told once more that it does, and ends.
    driver.publish(volume, POD.format(1), runtime="runc", capability=RWX)
    driver.unpublish(volume, POD.format(1))
    assert os.path.exists(other())
    (Path(driver.target(volume.volume_id, POD.format(2))) / "f").write_text("x")
    assert (place / "f").read_text() == "x"
    gone(driver, volume, POD.format(2))


def test_statistics_of_a_dead_server_cost_a_few_seconds_a_server(driver, nfs):
    volumes = [create(driver, f"many-{number}") for number in range(12)]
    for volume in volumes:
        driver.stage(volume, RWX)
    targets = [driver.publish(volume, POD.format(1), runtime="runc", capability=RWX) for volume in volumes]
    local = driver.create("local")
    nfs.stop()
    started = time.monotonic()

    def asked(number: int) -> str:
        volume, target = volumes[number % 12], targets[number % 12]
        with pytest.raises(grpc.RpcError) as caught:
            driver.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=target)
        return caught.value.details()

    with futures.ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(asked, number) for number in range(40)]
        time.sleep(0.5)
        before = time.monotonic()
        driver.client.Probe(timeout=5)
        driver.stage(local)
        driver.publish(local, POD.format(2), runtime="runc")
        beside = time.monotonic() - before
        said = {answer.result() for answer in answers}
    assert time.monotonic() - started < 10
    assert beside < 8
    words = ("the NFS server 127.0.0.1 does not answer", "too many calls are under way, some for volumes of nfs-")
    assert all(one.startswith(words) for one in said), said
    assert any(one.startswith(words[0]) for one in said)
    nfs.start()
    until = time.monotonic() + 60
    while True:
        try:
            driver.client.NodeGetVolumeStats(volume_id=volumes[0].volume_id, volume_path=targets[0])
            break
        except grpc.RpcError:
            assert time.monotonic() < until, "the server is not asked again"
            time.sleep(1)
    gone(driver, local, POD.format(2), capability=None)
    for volume in volumes:
        gone(driver, volume, POD.format(1))


def test_an_export_that_a_guest_mounts_is_given_to_its_pods_group(driver):
    """Before the guest has it: runv's pods get a file to read, and the host mounts nothing that is seen."""
    capability = mount_capability("MULTI_NODE_MULTI_WRITER", group="2000")
    volume = create(driver, "grouped", capability=capability)
    place = ROOT / "share/grouped"
    (place / "deep").mkdir()
    (place / "deep/f").write_text("x")
    (place / "link").symlink_to("/etc/passwd")
    driver.stage(volume, capability)
    # Kubelet's own, which RunD's hand-off stands in.
    (Path(driver.target(volume.volume_id, POD.format(1))).parent / "vol_data.json").write_text('{"specVolID":"pv"}')
    target = driver.publish(volume, POD.format(1), runtime="rund", capability=capability)
    assert os.listdir(target) == ["RUNVOL-PLACEHOLDER"]
    assert {path.lstat().st_gid for path in (place, place / "deep", place / "deep/f")} == {2000}
    assert (place / "deep").stat().st_mode & 0o2770 == 0o2770
    assert Path("/etc/passwd").stat().st_gid == 0
    driver.publish(volume, POD.format(1), runtime="rund", capability=capability)
    gone(driver, volume, POD.format(1), capability=capability)
