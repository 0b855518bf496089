"""What containerd tells kubelet of the pool, by CRI: the same questions that kubelet asks, of three containerds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.kernel.inside.server import MIB, Server, program
from tests.kernel.inside.test_containerd import IMAGE, layers, oci_archive

PROTO = Path(__file__).resolve().parents[1] / "cri.proto"
OLDER = ("v1.6.20", "v1.7.33")
_NO_PODS = """
[proxy_plugins.runvol]
  type = "snapshot"
  address = "{socket}"
  exports.root = "{gauge}"
"""
# As `runvol snapshotter containerd-config --all-runtimes` has them on 1.6, and an operator on later ones.
_DEFAULT_OF_1 = """
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  stats_collect_period = 1
  sandbox_image = "{image}"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "runvol"
"""
_DEFAULT_OF_2 = """
version = 3
[plugins."io.containerd.cri.v1.images"]
  stats_collect_period = 1
  snapshotter = "runvol"
"""
_OWN_RUNTIME = """
version = 3
disabled_plugins = ["io.containerd.nri.v1.nri"]
[plugins."io.containerd.cri.v1.images"]
  stats_collect_period = 1
  snapshotter = "native"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{image}"
  [plugins."io.containerd.cri.v1.images".runtime_platforms.kata]
    snapshotter = "runvol"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
    runtime_type = "io.containerd.runc.v2"
    snapshotter = "runvol"
"""
# containerd makes these directories where they are missing, and /etc of a user-mode kernel is the machine's.
_CNI_OF_1 = """
[plugins."io.containerd.grpc.v1.cri".cni]
  conf_dir = "{directory}/cni"
  bin_dir = "{directory}/cni-bin"
"""
_CNI_OF_2 = """
[plugins."io.containerd.cri.v1.runtime".cni]
  conf_dir = "{directory}/cni"
  bin_dirs = ["{directory}/cni-bin"]
"""


class Cri:
    """A containerd with the snapshotter, as kubelet asks it; a context manager."""

    def __init__(self, directory: Path, server: Server, said: str, version: str = "v2.4.2") -> None:
        self.directory, self.socket = directory, f"/run/gauge-cri-{os.getpid()}.sock"
        self.gauge = server.environment["RUNVOL_SNAPSHOTTER_GAUGE"]
        self._program = str(Path(os.environ["RUNVOL_PROGRAMS"]).parent / f"containerd-{version}" / "containerd")
        if not os.path.exists(self._program):
            pytest.skip(f"containerd {version} is not prepared: run tests/prepare/containerds.sh")
        said += _NO_PODS + (_CNI_OF_1 if "version = 2" in said else _CNI_OF_2)
        said = said.format(socket=server.socket, gauge=self.gauge, image=IMAGE, directory=directory)
        head = f'root = "{directory}/root"\nstate = "/run/gauge-cri-{os.getpid()}"\n'
        (directory / "cri.toml").write_text(f'{head}{said}[grpc]\n  address = "{self.socket}"\n')

    def __enter__(self) -> Cri:
        from grpc_tools import protoc

        stubs = self.directory / "stubs"
        stubs.mkdir()
        assert protoc.main(["protoc", f"-I{PROTO.parent}", f"--python_out={stubs}", PROTO.name]) == 0
        sys.path.insert(0, str(stubs))
        import cri_pb2

        self.pb: Any = cri_pb2
        path = f"{os.environ['RUNVOL_PROGRAMS']}:/usr/sbin:/usr/bin:/sbin:/bin"
        with open(self.directory / "cri.log", "ab") as log:
            self.process = subprocess.Popen([self._program, "-c", str(self.directory / "cri.toml")], stdout=log, stderr=log,
                                            env={"PATH": path, "HOME": "/root"})  # fmt: skip
        self.channel = grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.default_authority", "localhost")])
        self.until(self._answers)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            self.call("Status", self.pb.Nothing(), self.pb.Nothing)
            return True
        except grpc.RpcError:
            return False

    def log(self) -> str:
        return (self.directory / "cri.log").read_text()[-4000:]

    def until(self, true: Callable[[], Any], within: float = 60) -> Any:
        until = time.monotonic() + within
        while not (found := true()):
            assert time.monotonic() < until, self.log()
            time.sleep(0.3)
        return found

    def call(self, method: str, request: Any, response: Any, service: str = "Runtime") -> Any:
        return self.channel.unary_unary(f"/runtime.v1.{service}Service/{method}", request_serializer=lambda m: m.SerializeToString(),
                                        response_deserializer=response.FromString)(request, timeout=60)  # fmt: skip

    def load(self, snapshotter: str) -> None:
        archive = self.directory / "image.tar"
        oci_archive(archive, layers(big=MIB), command=("/bin/sleep", "100000"))
        subprocess.run([program("ctr"), "-a", self.socket, "-n", "k8s.io", "images", "import", "--local", "--snapshotter",
                        snapshotter, str(archive)], check=True, capture_output=True)  # fmt: skip

    def image_filesystems(self) -> list[Any]:
        return list(self.call("ImageFsInfo", self.pb.Nothing(), self.pb.ImageFsInfoResponse, "Image").image_filesystems)


def _shows_the_pool(path: str, server: Server) -> bool:
    facts, total = os.statvfs(path), int(str(server.pool()["dataTotalBytes"]))
    # Another filesystem is not of this size.
    return abs(facts.f_blocks * facts.f_frsize - total) < total // 50 and facts.f_bavail * facts.f_frsize < total


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    running: list[Server] = []

    def start(place: str = "") -> Server:
        server = Server(tmp_path, size=128 * MIB, RUNVOL_SNAPSHOTTER_GAUGE=place or str(tmp_path / "gauge"))
        running.append(server.__enter__())
        return server

    yield start
    for server in running:
        server.stop()
        server.runvol("pool", "gauge", "--remove")
        server.__exit__()


@pytest.mark.parametrize("version", [*(pytest.param(one, marks=pytest.mark.long) for one in OLDER), "v2.4.2"])
def test_the_default_snapshotter_is_what_kubelet_calls_imagefs(
    version: str, serve: Callable[..., Server], tmp_path: Path
) -> None:
    # Before 1.6.33 no entry says where: it is a directory of containerd's, and the gauge is put there.
    own = str(tmp_path / "root/io.containerd.snapshotter.v1.runvol") if version == "v1.6.20" else ""
    server = serve(own)
    with Cri(tmp_path, server, _DEFAULT_OF_1 if version in OLDER else _DEFAULT_OF_2, version) as cri:
        (first,) = cri.image_filesystems()
        assert first.fs_id.mountpoint == cri.gauge
        assert cri.until(lambda: os.path.ismount(cri.gauge))
        assert _shows_the_pool(first.fs_id.mountpoint, server)
        cri.load("runvol")
        assert cri.until(lambda: cri.image_filesystems()[0].used_bytes.value > MIB)


def test_a_runtime_of_its_own_shows_the_pool_by_its_containers_only(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()
    with Cri(tmp_path, server, _OWN_RUNTIME) as cri:
        cri.load("native")
        config = cri.pb.PodSandboxConfig(
            metadata=cri.pb.PodSandboxMetadata(name="pod", uid="u", namespace="default"), log_directory=str(tmp_path)
        )
        config.linux.security_context.namespace_options.network = 2  # of the node
        config.linux.cgroup_parent = "/gauge"
        request = cri.pb.RunPodSandboxRequest(config=config, runtime_handler="kata")
        pod = cri.call("RunPodSandbox", request, cri.pb.RunPodSandboxResponse).pod_sandbox_id
        container = cri.pb.ContainerConfig(
            metadata=cri.pb.ContainerMetadata(name="c"), image=cri.pb.ImageSpec(image=IMAGE), log_path="c.log",
            command=["/bin/sh", "-c", "dd if=/dev/zero of=/written bs=1M count=20; echo done; sleep 1000"],
        )  # fmt: skip
        made = cri.call("CreateContainer", cri.pb.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config),
                        cri.pb.CreateContainerResponse).container_id  # fmt: skip
        cri.call("StartContainer", cri.pb.ContainerRequest(container_id=made), cri.pb.Nothing)
        log = tmp_path / "c.log"
        cri.until(lambda: log.exists() and "done" in log.read_text())
        time.sleep(3)  # several rounds of its collector
        # Kubelet takes the first one for its DiskPressure, and this containerd names no other.
        (only,) = cri.image_filesystems()
        assert only.fs_id.mountpoint.endswith(".native")
        (stats,) = cri.call("ListContainerStats", cri.pb.Nothing(), cri.pb.ListContainerStatsResponse).stats
        assert stats.attributes.id == made
        assert stats.writable_layer.fs_id.mountpoint == cri.gauge
        assert _shows_the_pool(stats.writable_layer.fs_id.mountpoint, server)
        assert stats.writable_layer.used_bytes.value == 0
        (sandbox,) = cri.call("ListPodSandboxStats", cri.pb.Nothing(), cri.pb.ListPodSandboxStatsResponse).stats
        assert [one.writable_layer.fs_id.mountpoint for one in sandbox.linux.containers] == [cri.gauge]
        for call in ("StopPodSandbox", "RemovePodSandbox"):
            cri.call(call, cri.pb.PodSandboxRequest(pod_sandbox_id=pod), cri.pb.Nothing)
