"""A real Prometheus scrapes the driver: what a guest has is told as what the host has is."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runvol import metric_table
from tests.api_double import ApiDouble
from tests.csi.helpers import PODS
from tests.driver import Driver
from tests.monitoring.prometheus import Prometheus, free_port
from tests.sandbox.shim import GO, Sandbox, Settings, volume_mount, write_bundle
from tests.sandbox.vm import VM
from tests.until import until

pytestmark = pytest.mark.kernel
A, B = PODS[:2]
CONTAINERD = """[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
runtime_path = "/opt/kata/bin/containerd-shim-kata-v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata-node]
runtime_type = "io.containerd.kata.v2"
runtime_path = "/opt/kata/bin/containerd-shim-kata-v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata-node.options]
ConfigPath = "/etc/kata-containers/node.toml"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


@pytest.fixture
def api() -> Iterator[ApiDouble]:
    one = ApiDouble()
    yield one
    one.stop()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def driver(api: ApiDouble, port: int) -> Iterator[Driver]:
    one = Driver(environment={
        "RUNVOL_CSI_METRICS": f"127.0.0.1:{port}", "RUNVOL_METRICS_INTERVAL_SECONDS": "1",
        "RUNVOL_METRICS_DOCTOR_SECONDS": "0", "RUNVOL_DETECT_API_SERVER": api.url,
    })  # fmt: skip
    (one.directory / "containerd.toml").write_text(CONTAINERD)
    config = one.directory / "kata/etc/kata-containers/node.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\nblock_device_cache_set = true\nblock_device_cache_direct = true\n")
    with one:
        yield one
        assert not one.mounts()
        assert one.loop_devices() == []


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def put_claim(api: ApiDouble, volume_id: str, claim: str, uid: str = "u") -> None:
    api.put("persistentvolumes", volume_id, {"spec": {
        "csi": {"driver": "csi.runvol.io"}, "claimRef": {"namespace": "default", "name": claim, "uid": uid}}})  # fmt: skip


@pytest.mark.guest
@pytest.mark.parametrize("handler", ["kata", "kata-node"])
def test_what_a_guest_has_is_told_with_pod_claim_and_volume(
    driver: Driver, api: ApiDouble, port: int, handler: str
) -> None:
    """Bytes in use from its superblock; I/O from the loop device that its VMM holds, else from the VMM itself."""
    volume = driver.create("db", 64 << 20)
    put_claim(api, volume.volume_id, "data-db-0")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime=handler, name="db-0")
    mine = f'{{volume="{volume.volume_id}",namespace="default",persistentvolumeclaim="data-db-0",pod="db-0"}}'
    with Prometheus({"runvol": [f"127.0.0.1:{port}"]}) as prometheus, VM() as vm:
        before = until(lambda: prometheus.value(f"runvol_volume_used_bytes{mine}"), 20)
        settings = Settings(shim=GO, direct_volumes=driver.direct_volumes, shared=None, block_device_driver="virtio-blk",
                            cache_set=handler == "kata-node", cache_direct=handler == "kata-node")  # fmt: skip
        sandbox = Sandbox(vm=vm, settings=settings).start()
        sandbox.create_container(write_bundle(driver.directory / "b", [volume_mount(target)]), "c1")
        code, output = sandbox.run(
            "c1", "sh", "-c", "yes | dd of=/mnt/data/file bs=64k count=256 iflag=fullblock && sync",
        )  # fmt: skip
        assert code == 0, output
        assert until(lambda: prometheus.value(f"runvol_volume_used_bytes{mine}") > before + (15 << 20), 40)
        assert prometheus.value(f"runvol_volume_capacity_bytes{mine}") > 50 << 20
        assert prometheus.value(f"runvol_volume_inodes_used{mine}") == 12
        assert prometheus.value(f"time() - runvol_volume_measured_timestamp_seconds{mine}") < 10
        assert prometheus.value(f'runvol_volumes{{backend="loop",owner="sandbox",handler="{handler}"}}') == 1
        assert prometheus.value('runvol_handoffs{dialect="kata",state="open"}') == 1
        if handler == "kata-node":
            assert until(lambda: prometheus.value(f"runvol_volume_written_bytes_total{mine}") >= 16 << 20, 20)
            assert prometheus.value(f"runvol_volume_writes_total{mine}") > 0
            assert prometheus.value(f"runvol_volume_reads_total{mine}") > 0
            assert not prometheus.query("runvol_vmm_written_bytes_total")
        else:
            of_vmm = f'{{namespace="default",pod="db-0",pid="{vm.pid}"}}'
            assert until(lambda: prometheus.value(f"runvol_vmm_written_bytes_total{of_vmm}") >= 16 << 20, 20)
            assert not prometheus.query(f"runvol_volume_written_bytes_total{mine}")
        sandbox.remove_container("c1")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


def test_what_the_host_has_is_told_and_forgotten_with_its_pod(driver: Driver, api: ApiDouble, port: int) -> None:
    volume = driver.create("web", 64 << 20)
    put_claim(api, volume.volume_id, "www")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="runc", name="web-0")
    mine = f'{{volume="{volume.volume_id}",persistentvolumeclaim="www",pod="web-0"}}'
    with Prometheus({"runvol": [f"127.0.0.1:{port}"]}) as prometheus:
        assert until(lambda: prometheus.query(f"runvol_volume_writes_total{mine}"), 20)
        with open(f"{target}/file", "wb") as file:
            file.write(os.urandom(8 << 20))
            os.fsync(file.fileno())
        assert until(lambda: prometheus.value(f"runvol_volume_written_bytes_total{mine}") >= 8 << 20, 20)
        assert until(lambda: prometheus.value(f"runvol_volume_used_bytes{mine}") >= 8 << 20, 20)
        # A second pod: one series still, and both are named.
        driver.publish(volume, B, runtime="runc", name="web-1")
        assert until(lambda: prometheus.value(f'count(runvol_volume_pod{{volume="{volume.volume_id}"}})') == 2, 20)
        assert until(lambda: [labels.get("pod", "") for labels, _value in prometheus.query(
            f'runvol_volume_used_bytes{{volume="{volume.volume_id}"}}')] == [""], 20)  # fmt: skip
        driver.unpublish(volume, A)
        driver.unpublish(volume, B)
        driver.unstage(volume)
        driver.delete(volume)
        assert until(lambda: not prometheus.query(f'runvol_volume_used_bytes{{volume="{volume.volume_id}"}}'), 20)
        (target_of_scrape,) = prometheus.targets()
        assert target_of_scrape["health"] == "up", target_of_scrape


def test_every_metric_stands_in_the_table(driver: Driver, port: int) -> None:
    volume = driver.create("v")
    driver.stage(volume)
    driver.publish(volume, A, runtime="runc")
    text = until(lambda: text if "runvol_volume_pod{" in (text := scrape(port)) else "", 10)
    names = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line.startswith("runvol_")}
    known = metric_table.sample_names()
    assert {one for one in names if not one.endswith("_created")} <= known
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)


def test_calls_are_counted_by_method_and_code(driver: Driver, port: int) -> None:
    with pytest.raises(Exception, match="NOT_FOUND"):
        driver.client.NodeGetVolumeStats(volume_id="loop-none", volume_path=str(driver.kubelet / "pods/x"))
    text = scrape(port)
    assert 'runvol_csi_calls_total{code="NOT_FOUND",method="NodeGetVolumeStats"} 1.0' in text
    assert 'runvol_csi_call_seconds_count{method="NodeGetVolumeStats"} 1.0' in text
    assert 'runvol_detections_total{decided_by="attribute"}' not in text
    assert re.search(r'runvol_watch_healthy\{watch="pods of this node"\} 1.0', until(
        lambda: text if 'watch="pods of this node"} 1.0' in (text := scrape(port)) else "", 10))  # fmt: skip


def test_a_server_that_hangs_holds_up_no_scrape_and_no_other_volume(tmp_path: Path, port: int) -> None:
    """The directory of one backend hangs (a FUSE filesystem that answers nobody is a dead server to the kernel)."""
    with Driver(environment={"RUNVOL_CSI_METRICS": f"127.0.0.1:{port}", "RUNVOL_METRICS_INTERVAL_SECONDS": "1",
                             "RUNVOL_METRICS_DOCTOR_SECONDS": "0"}) as driver:  # fmt: skip
        one, other = driver.create("one"), driver.create("other", backend="directory", quota="none")
        for volume, pod in ((one, A), (other, B)):
            driver.stage(volume)
            driver.publish(volume, pod, runtime="runc")
        used = f'runvol_volume_measured_timestamp_seconds{{namespace="default",persistentvolumeclaim="",pod="pod",volume="{one.volume_id}"}}'
        until(lambda: used in scrape(port), 10)
        with Hanging(driver.target(other.volume_id, B)):
            until(lambda: f'pod="pod",volume="{other.volume_id}"}} 1.0' in _lines(port, "runvol_volume_unmeasured"), 20)
            began = time.monotonic()
            assert "runvol_blocked_system_calls 1.0" in scrape(port)
            assert time.monotonic() - began < 2
            now = time.time()
            until(lambda: float(_lines(port, used).split()[-1]) > now, 15)
        driver.unpublish(one, A)
        driver.unstage(one)
        driver.unpublish(other, B)
        driver.unstage(other)


def _lines(port: int, start: str) -> str:
    return "\n".join(line for line in scrape(port).splitlines() if line.startswith(start))


class Hanging:
    """A mount over `path` of a FUSE filesystem whose program answers nothing but the kernel's greeting."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        subprocess.run(
            ["mount", "-i", "-t", "fuse", "-o", f"fd={self._fd},rootmode=40000,user_id=0,group_id=0", "hanging", self._path],
            check=True, pass_fds=[self._fd],
        )  # fmt: skip
        # FUSE_INIT is answered (version 7.31), all that follows is read and kept.
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        request = os.read(self._fd, 1 << 17)
        unique = request[8:16]
        body = (7).to_bytes(4, "little") + (31).to_bytes(4, "little") + bytes(56)
        os.write(self._fd, (16 + len(body)).to_bytes(4, "little") + bytes(4) + unique + body)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self._path], check=True)
        os.close(self._fd)  # whoever waits is let go


def test_nobody_is_told_where_nothing_is_served(driver: Driver, port: int) -> None:
    """Without the setting no thread looks at volumes: that costs a node nothing."""
    with Driver() as other:
        threads = {Path(f"/proc/{other.process.pid}/task/{task}/comm").read_text().strip()
                   for task in os.listdir(f"/proc/{other.process.pid}/task")}  # fmt: skip
        assert not {"survey", "doctor", "metrics"} & threads
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", free_port())) != 0


def events_of(api: ApiDouble, reason: str) -> list[dict[str, Any]]:
    return [one for one in [*api.objects.get("events", {}).values()] if one["reason"] == reason]


def test_pods_and_claims_are_told(driver: Driver, api: ApiDouble) -> None:
    """A volume that is almost full, on the pod and its claim; and a hand-off that somebody has taken away, on the pod."""
    full, lost = driver.create("full", 32 << 20), driver.create("lost", 32 << 20)
    put_claim(api, full.volume_id, "data", uid="claim-uid")
    driver.stage(full)
    driver.stage(lost)
    target = driver.publish(full, A, runtime="runc", name="web-0")
    with open(f"{target}/file", "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    about = until(lambda: {one["involvedObject"]["kind"]: one["involvedObject"] for one in
                           events_of(api, "VolumeAlmostFull")} if len(events_of(api, "VolumeAlmostFull")) > 1 else {}, 20)  # fmt: skip
    assert (about["Pod"]["name"], about["Pod"]["uid"]) == ("web-0", A)
    assert (about["PersistentVolumeClaim"]["name"], about["PersistentVolumeClaim"]["uid"]) == ("data", "claim-uid")
    driver.publish(lost, B, runtime="kata", name="db-0")
    (handed,) = driver.direct_volumes.iterdir()
    (handed / "mountInfo.json").unlink()
    (event,) = until(lambda: events_of(api, "HandOffLost"), 20)
    assert (event["involvedObject"]["name"], event["involvedObject"]["uid"]) == ("db-0", B)
    assert lost.volume_id in event["message"]
    for volume, pod in ((full, A), (lost, B)):
        driver.unpublish(volume, pod)
        driver.unstage(volume)


@pytest.fixture
def on_xfs(driver: Driver) -> Iterator[Driver]:
    """A volume that is in use can be copied in one step there."""
    driver.stop()
    disk, place = driver.directory / "disk.img", driver.directory / "fast"
    subprocess.run(["truncate", "-s", "1G", disk], check=True)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    driver.environment["RUNVOL_PATHS_STATE_DIR"] = str(place / "state")
    driver.state = place / "state"
    driver.start()
    yield driver
    driver.stop()
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("may_list", [True, False])
def test_a_nodes_own_credentials_are_enough_to_know_whose_a_volume_is(
    on_xfs: Driver, api: ApiDouble, port: int, may_list: bool
) -> None:
    """They get volumes by their names, and may neither list nor follow them: metrics have the claim all the same, and a
    snapshot of what a pod has is told to it."""
    driver = on_xfs
    if not may_list:
        api.refuses = lambda path, _query: path == "/api/v1/persistentvolumes"
        driver.stop()
        driver.start()
    volume = driver.create("db", 64 << 20)
    put_claim(api, volume.volume_id, "data", uid="claim-uid")
    driver.stage(volume)
    driver.publish(volume, A, runtime="runc", name="db-0")
    mine = ('namespace="default"', 'persistentvolumeclaim="data"', 'pod="db-0"', f'volume="{volume.volume_id}"')
    assert until(lambda: f"runvol_volume_used_bytes{{{','.join(mine)}}} " in scrape(port), 20)
    assert ('runvol_watch_healthy{watch="PersistentVolumes"}' in scrape(port)) is may_list
    taken = driver.client.CreateSnapshot(name="s", source_volume_id=volume.volume_id).snapshot
    (event,) = until(lambda: events_of(api, "SnapshotOfVolumeInUse"), 20)
    about = event["involvedObject"]
    assert (about["kind"], about["name"], about["uid"]) == ("PersistentVolumeClaim", "data", "claim-uid")
    assert f"snapshot {taken.snapshot_id} of volume {volume.volume_id}" in event["message"]
    assert "default/db-0 had it" in event["message"]
    driver.client.DeleteSnapshot(snapshot_id=taken.snapshot_id)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    driver.delete(volume)
