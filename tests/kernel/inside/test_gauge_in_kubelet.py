"""kubelet itself, without a cluster: the pool is its imagefs, and passes its threshold before new containers are refused."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.inside.server import MIB, Server
from tests.kernel.inside.test_gauge_in_cri import _DEFAULT_OF_2, Cri
from tests.kernel.inside.test_service import Client

KUBELET = Path(os.environ.get("RUNVOL_PROGRAMS", "/")).parent / "kubernetes-v1.36.3" / "kubelet"
# What kubelet sets for the whole machine.
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
           "kernel/keys/root_maxbytes")  # fmt: skip
PASSED = "eviction thresholds have been met"


@contextlib.contextmanager
def _as_it_was(directory: Path) -> Iterator[None]:
    """The machine is one that kubelet starts on, and the same as before afterwards."""
    sysctls = {path: path.read_text() for name in SYSCTLS if (path := Path("/proc/sys", name)).exists()}
    said = Path("/proc/cpuinfo").read_text()
    covered = "cpu MHz" not in said  # which a user-mode kernel does not tell
    if covered:
        (directory / "cpuinfo").write_text(said.rstrip() + "\ncpu MHz\t\t: 1000.000\n")
        subprocess.run(["mount", "--bind", directory / "cpuinfo", "/proc/cpuinfo"], check=True)
    try:
        yield
    finally:
        if covered:
            subprocess.run(["umount", "/proc/cpuinfo"], check=True)
        for path, value in sysctls.items():
            path.write_text(value)


class Kubelet:
    """On its own; a context manager. Its thresholds are those that it has by itself."""

    def __init__(self, directory: Path, socket: str) -> None:
        self.directory = directory
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "address": "127.0.0.1",
            "readOnlyPort": 10255, "authentication": {"webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"}, "cgroupDriver": "cgroupfs", "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [], "failCgroupV1": False, "failSwapOn": False, "makeIPTablesUtilChains": False,
            "containerRuntimeEndpoint": f"unix://{socket}", "volumePluginDir": str(directory / "flex"),
        }  # fmt: skip
        (directory / "kubelet.json").write_text(json.dumps(config))

    def __enter__(self) -> Kubelet:
        with open(self.directory / "kubelet.log", "wb") as log:
            self.process = subprocess.Popen(
                [KUBELET, f"--config={self.directory}/kubelet.json", f"--root-dir={self.directory}/kubelet",
                 f"--cert-dir={self.directory}/pki", "--hostname-override=node", "--v=3"], stdout=log, stderr=log,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return (self.directory / "kubelet.log").read_text()

    @staticmethod
    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:10255/{path}", timeout=10) as answer:
            said: bytes = answer.read()
        return said

    def runtime(self) -> dict[str, Any]:
        """Its filesystems of images and containers, in /stats/summary."""
        until = time.monotonic() + 60
        while True:
            try:
                found: dict[str, Any] = json.loads(self.get("stats/summary"))["node"]["runtime"]
                return found
            except (OSError, KeyError):
                assert self.process.poll() is None, self.log()[-3000:]
                assert time.monotonic() < until, self.log()[-3000:]
                time.sleep(0.5)


def test_the_pool_is_kubelets_imagefs_and_passes_its_threshold_before_it_is_full(tmp_path: Path) -> None:
    if not KUBELET.exists():
        pytest.skip("kubelet is not prepared: run tests/prepare/cluster.sh")
    gauge, total = tmp_path / "gauge", 1 << 30
    with (
        Server(tmp_path, size=128 * MIB, data=total, RUNVOL_SNAPSHOTTER_GAUGE=str(gauge)) as server,
        Cri(tmp_path, server, _DEFAULT_OF_2) as cri,
        _as_it_was(tmp_path),
    ):
        cri.until(lambda: os.path.ismount(gauge))
        with Kubelet(tmp_path, cri.socket) as kubelet:
            before = kubelet.runtime()
            for name in ("imageFs", "containerFs"):
                assert abs(before[name]["capacityBytes"] - total) < total // 50
                assert before[name]["availableBytes"] > 0.8 * total
                assert before[name]["inodesFree"] > 0.9 * before[name]["inodes"]
            device = f'device="/dev/loop{os.minor(os.stat(gauge).st_dev)}"'
            shown = [line for line in kubelet.get("metrics/cadvisor").decode().splitlines() if device in line]
            assert [line for line in shown if line.startswith("container_fs_limit_bytes") and 'id="/"' in line], shown
            client = Client(server)
            for number in range(8):
                if number == 6:
                    assert PASSED not in kubelet.log()
                mount = client.prepare(f"a{number}").mounts[0]
                subprocess.run(["dd", "if=/dev/urandom", f"of={mount.source}", "bs=1M", "count=105", "oflag=direct"],
                               capture_output=True, check=True)  # fmt: skip
            cri.until(lambda: PASSED in kubelet.log())
            assert 0 < kubelet.runtime()["imageFs"]["availableBytes"] < 0.15 * total
            assert 'signal="imagefs.available"' in kubelet.log()
            client.prepare("one more")
        server.stop()
        server.runvol("pool", "gauge", "--remove")
        assert not gauge.exists()
