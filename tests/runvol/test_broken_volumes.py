"""Broken installations: volumes, what is left over, kubelet, what runvol stands on. See `test_broken`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi.kubelet import Registration
from guestmount import drivers
from runvol import doctor_kernel, version
from runvol_proto import csi_pb2
from tests.driver import Driver, mount_capability
from tests.installation import ROOT, Installation
from tests.plugin_watcher import PluginWatcher
from tests.runvol.test_broken import Broken, found_and_put_right

MIB = 1 << 20
A = "6dad7281-57ff-49e4-b844-c588ceabec1a"


def made(it: Installation, name: str = "one", size: int = 16 * MIB) -> tuple[str, Path]:
    """A volume's id and file."""
    said = json.loads(it.execute(f"runvol volumes create {name} --size {size} --json"))
    rows = said if isinstance(said, list) else next(iter(one for one in said.values() if isinstance(one, list)))
    volume_id = str(rows[0]["volume"])
    return volume_id, it.state / "volumes" / f"{volume_id}.img"


def _disk_too_small(it: Installation) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", it.state], check=True)
    it.volume_id, _ = made(it, size=64 * MIB)  # type: ignore[attr-defined]
    (it.state / "somebody-elses").write_bytes(b"x" * 60 * MIB)


def _bounded(it: Installation) -> None:
    made(it)
    it.set(loop__capacity_bytes=8 * MIB)


def _lost(it: Installation) -> None:
    it.volume_id, it.image = made(it)  # type: ignore[attr-defined]
    it.image.rename(it.directory / "backup")  # type: ignore[attr-defined]


def _short(it: Installation) -> None:
    it.volume_id, it.image = made(it)  # type: ignore[attr-defined]
    shutil.copy(it.image, it.directory / "backup")  # type: ignore[attr-defined]
    os.truncate(it.image, MIB)  # type: ignore[attr-defined]


def _damaged(it: Installation) -> None:
    _, image = made(it)
    subprocess.run(["mkfs.ext4", "-qF", image], check=True)
    subprocess.run(["debugfs", "-w", "-R", "set_super_value state 2", image], check=True, capture_output=True)


def _bound(it: Installation) -> None:
    _, image = made(it)
    subprocess.run(["losetup", "-f", image], check=True)


def _no_store(it: Installation) -> None:
    made(it)
    shutil.copy(it.state / "volumes.db", it.directory / "backup")
    (it.state / "volumes.db").write_bytes(b"no database" * 1000)
    for more in ("-wal", "-shm"):
        (it.state / f"volumes.db{more}").unlink(missing_ok=True)


def _future(it: Installation) -> None:
    made(it)
    os.utime(it.state / "volumes.db", (time.time() + 7200,) * 2)


def _deep(it: Installation) -> None:
    deep = it.directory / ("kubelet" * 12)
    deep.mkdir()
    it.set(node__roots=[str(deep)])


def _stray(it: Installation) -> None:
    made(it)
    (it.state / "volumes/stray.img").write_bytes(b"\0" * 4096)


HERE = (
    Broken(id="volumes.over-promised", breaks=_disk_too_small, given={"only": "runvol volumes delete", "ID": "{it.volume_id} --yes"}),
    Broken(id="volumes.over-promised", breaks=_bounded, given={"only": "loop.", "loop.capacity_bytes": "0"}),
    Broken(id="volumes.file-missing", breaks=_lost, words="from a backup",
           by_hand=lambda it: (it.directory / "backup").rename(it.image)),  # type: ignore[attr-defined]
    Broken(id="volumes.file-missing", breaks=_short, words="from a backup",
           by_hand=lambda it: (it.directory / "backup").rename(it.image)),  # type: ignore[attr-defined]
    Broken(id="volumes.filesystem-damaged", breaks=_damaged),
    Broken(id="volumes.store-unreadable", breaks=_no_store, words="its message",
           by_hand=lambda it: (it.directory / "backup").rename(it.state / "volumes.db")),
    Broken(id="left.loop-device", breaks=_bound),
    Broken(id="left.file", breaks=_stray, given={"only": "rm"}),
    Broken(id="left.file", breaks=_stray, given={"only": "runvol volumes adopt", "NAME": "stray"}),
    Broken(id="clock.future", breaks=_future),
    Broken(id="kubelet.root-missing", breaks=lambda it: it.set(node__roots=["/nowhere/kubelet"]),
           given={"node.roots": '["{it.kubelet}"]'}),
    Broken(id="kubelet.root-too-long", breaks=_deep, given={"node.roots": '["{it.kubelet}"]'}),
)  # fmt: skip


@pytest.mark.parametrize("one", HERE, ids=[f"{one.id}-{number}" for number, one in enumerate(HERE)])
def test_node(one: Broken) -> None:
    with Installation() as it:
        it.state.mkdir()
        found_and_put_right(it, one)


# -- with the plugin at work


@pytest.fixture
def served() -> Iterator[tuple[Installation, Driver]]:
    with Installation() as it, Driver() as driver:
        it.set(
            node__roots=[str(driver.kubelet)], paths__state_dir=str(driver.state), paths__run_dir=str(driver.run),
            paths__direct_volumes=str(driver.direct_volumes), csi__endpoint=f"unix://{driver.socket}",
        )  # fmt: skip
        yield it, driver


def test_plugin_that_does_not_run(served: tuple[Installation, Driver]) -> None:
    it, driver = served
    found_and_put_right(it, Broken(id="kubelet.driver-silent", breaks=lambda _: driver.stop(), words="start `runvol csi`",
                                   by_hand=lambda _: driver.start()))  # fmt: skip


def _without_its_claim(driver: Driver) -> None:
    """At a target that is no pod's of kubelet's: what a pod's directory still holds is kubelet's to unpublish."""
    volume = driver.create("pvc-1")
    driver.stage(volume)
    target = driver.kubelet / "elsewhere" / "mount"
    target.parent.mkdir()
    driver.client.NodePublishVolume(
        volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id), target_path=str(target),
        volume_capability=mount_capability(), volume_context={"runtime": "kata"},
    )  # fmt: skip
    for name in os.listdir(driver.records / "claims"):
        os.unlink(driver.records / "claims" / name)


@pytest.mark.parametrize("known", ["left.hand-off", "left.placeholder"])
def test_what_nobody_took_back(served: tuple[Installation, Driver], known: str) -> None:
    it, driver = served
    found_and_put_right(it, Broken(id=known, breaks=lambda _: _without_its_claim(driver)))


def test_hand_off_that_somebody_removed(served: tuple[Installation, Driver]) -> None:
    it, driver = served
    volume = driver.create("pvc-1")
    driver.stage(volume)

    def breaks(_: Installation) -> None:
        driver.publish(volume, A, runtime="kata")
        shutil.rmtree(driver.direct_volumes)

    found_and_put_right(it, Broken(id="volumes.hand-off-damaged", breaks=breaks, words="delete the pod",
                                   by_hand=lambda _: driver.unpublish(volume, A)))  # fmt: skip


def test_mount_that_somebody_took_away(served: tuple[Installation, Driver]) -> None:
    it, driver = served
    volume = driver.create("pvc-1")
    driver.stage(volume)

    def breaks(_: Installation) -> None:
        subprocess.run(["umount", driver.publish(volume, A, runtime="runc")], check=True)

    found_and_put_right(it, Broken(id="volumes.mount-missing", breaks=breaks, words="delete the pod",
                                   by_hand=lambda _: driver.unpublish(volume, A)))  # fmt: skip


def until(check: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_kubelet_that_does_not_know_it(served: tuple[Installation, Driver]) -> None:
    it, driver = served
    it.set(csi__plugins_registry="auto")
    registry, driver.environment["RUNVOL_CSI_ENDPOINT"] = driver.kubelet / "plugins_registry", ""
    one = Broken(id="kubelet.registry-missing", breaks=lambda _: registry.rename(driver.kubelet / "gone"),
                 words="`node.roots`", by_hand=lambda _: (driver.kubelet / "gone").rename(registry))  # fmt: skip
    registry.mkdir()
    watcher = PluginWatcher(registry).start()
    try:
        until(lambda: not it.ill("kubelet.registration-missing"))
        found_and_put_right(it, one)
        until(lambda: not it.ill("kubelet.registration-missing"))
        second: list[Registration] = []

        def another(_: Installation) -> None:
            (registry / "more").mkdir()
            second.append(Registration(drivers.NODES, endpoint="/run/other.sock", registry=str(registry / "more"),
                                       alive=lambda: True))  # fmt: skip
            second[0]._others.found = lambda *_: ""  # type: ignore[method-assign]
            second[0].start()
            until(lambda: second[0]._inode != 0)

        def leave_one(_: Installation) -> None:
            second[0].stop()
            shutil.rmtree(registry / "more")

        found_and_put_right(it, Broken(id="kubelet.registration-twice", breaks=another, words="leave one",
                                       by_hand=leave_one))  # fmt: skip
        found_and_put_right(it, Broken(
            id="kubelet.registration-missing", breaks=lambda _: driver.stop(), words="start `runvol csi`",
            by_hand=lambda it: (driver.start(), until(lambda: not it.ill("kubelet.registration-missing"))),
        ))  # fmt: skip
    finally:
        watcher.stop()


class _Older:
    """A plugin of another release, as far as it says who it is."""

    def __init__(self, path: str) -> None:
        self.version = version()
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        says = grpc.unary_unary_rpc_method_handler(
            lambda _request, _context: csi_pb2.GetPluginInfoResponse(name=drivers.NODES, vendor_version=self.version),
            request_deserializer=csi_pb2.GetPluginInfoRequest.FromString,
            response_serializer=csi_pb2.GetPluginInfoResponse.SerializeToString,
        )
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("csi.v1.Identity", {"GetPluginInfo": says}),)
        )
        self.server.add_insecure_port(f"unix:{path}")


def test_plugin_of_another_release() -> None:
    with Installation() as it:
        it.run.mkdir()
        older = _Older(str(it.run / "csi.sock"))
        older.server.start()
        found_and_put_right(it, Broken(
            id="versions.skew", breaks=lambda _: setattr(older, "version", "0.0.9"), words="restart those that are older",
            by_hand=lambda _: setattr(older, "version", version()),
        ))  # fmt: skip
        older.server.stop(None)


# -- what it stands on


@pytest.mark.parametrize("propagation", ["private", "slave"])
def test_mounts_that_do_not_reach_kubelet(propagation: str) -> None:
    """In a mount namespace of its own, as a container without mountPropagation has it."""
    with Installation() as it:
        subprocess.run(["mount", "--bind", it.kubelet, it.kubelet], check=True)
        subprocess.run(["mount", "--make-shared", it.kubelet], check=True)
        with subprocess.Popen(["sleep", "60"]) as kubelet:
            try:
                it.set(node__kubelet_process=str(kubelet.pid))
                known = [_inside(it, one) for one in (propagation, "unchanged")]
            finally:
                kubelet.kill()
    assert known[0]["kubelet.mounts-not-propagated"]["state"] == "broken"
    assert "`mountPropagation: Bidirectional`" in known[0]["kubelet.mounts-not-propagated"]["fix"]
    assert "kubelet.mounts" in known[1]


def _inside(it: Installation, propagation: str) -> dict[str, Any]:
    words = ["unshare", "-m", "--propagation", propagation, sys.executable, "-m", "runvol", "--config", it.file, "doctor",
             "--json"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode in (0, 1, 3), done.stderr
    said = json.loads(done.stdout)
    return {one["id"]: one for one in said["items"]}


def test_kernel_without_loop_devices_and_filesystems(tmp_path: Path) -> None:
    release = os.uname().release
    for place in ("dev", "proc", f"lib/modules/{release}"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "proc/filesystems").write_text("nodev\ttmpfs\n")
    (tmp_path / "modprobe").write_text(
        f'#!/bin/sh\n[ $1 = loop ] && touch {tmp_path}/dev/loop-control\necho "	$1" >> {tmp_path}/proc/filesystems\n'
    )
    (tmp_path / "modprobe").chmod(0o755)
    with Installation() as it:
        shutil.copy(tmp_path / "modprobe", it.bin / "modprobe")

        it.set(paths__host_root=str(tmp_path))

        def ill() -> dict[str, str]:
            found = doctor_kernel.examine(it.loaded, on_node=True, root=str(tmp_path))
            return {
                one.subject: one.fix for one in found if one.id in ("kernel.loop-missing", "kernel.filesystem-missing")
            }

        found = ill()
        assert set(found) == {"loop devices", "filesystem ext4", "filesystem xfs"}
        for fix in found.values():
            it.apply(fix, {})
        assert not ill()
        # In a container without the node's modules nobody knows.
        (tmp_path / "proc/filesystems").write_text("nodev\ttmpfs\n")
        shutil.rmtree(tmp_path / "lib")
        it.set(paths__host_root=str(tmp_path))
        found = doctor_kernel.examine(it.loaded, on_node=True, root=str(tmp_path))
        assert {one.state for one in found if one.id == "kernel.filesystem-missing"} == {"unknown"}


def test_a_module_that_can_be_loaded_is_as_good(tmp_path: Path) -> None:
    base = tmp_path / "lib/modules" / os.uname().release
    base.mkdir(parents=True)
    (base / "modules.dep").write_text("kernel/fs/xfs/xfs.ko.xz: kernel/lib/libcrc32c.ko.xz kernel/fs/ext4.ko\n")
    assert doctor_kernel.loadable("xfs", str(tmp_path)) and not doctor_kernel.loadable("ext4", str(tmp_path))


@pytest.mark.parametrize(
    ("package", "programs"),
    [("e2fsprogs", ("mkfs.ext4", "e2fsck")), ("util-linux", ("blkid",)), ("xfsprogs", ("mkfs.xfs", "xfs_logprint")),
     ("tar", ("tar",)), ("coreutils", ("du",))],
)  # fmt: skip
def test_programs_that_are_not_installed(tmp_path: Path, package: str, programs: tuple[str, ...]) -> None:
    for name in ("mkfs.ext4", "e2fsck", "blkid", "mkfs.xfs", "xfs_logprint", "tar", "du"):
        if name not in programs:
            (tmp_path / name).symlink_to("/bin/true")
    found = [one for one in doctor_kernel.programs(str(tmp_path)) if one.fix]
    assert {(one.id, one.subject) for one in found} == {(f"programs.{package}-missing", name) for name in programs}
    assert {one.fix for one in found} == {f"install the package {package}"}
    for name in programs:
        (tmp_path / name).symlink_to("/bin/true")
    assert not [one for one in doctor_kernel.programs(str(tmp_path)) if one.fix]
