"""The real driver as a process of its own, and a client on its socket, for tests, the demo and the benchmarks."""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from blockdev import loops, mountinfo
from runvol import schemas
from runvol_proto import csi_pb2

MODE = csi_pb2.VolumeCapability.AccessMode.Mode
POD = "6dad7281-57ff-49e4-b844-c588ceabec1{}"


class Client:
    """CSI calls by name: `client.CreateVolume(name=…)`."""

    def __init__(self, path: str) -> None:
        self.channel = grpc.insecure_channel(f"unix:{path}", options=[("grpc.default_authority", "localhost")])
        self._calls: dict[str, Any] = {}
        for service in csi_pb2.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                self._calls[method.name] = (
                    self.channel.unary_unary(
                        f"/{service.full_name}/{method.name}",
                        request_serializer=lambda message: (
                            message if isinstance(message, bytes) else message.SerializeToString()
                        ),
                        response_deserializer=GetMessageClass(method.output_type).FromString,
                    ),
                    GetMessageClass(method.input_type),
                )

    def call(self, method: str, request: Message | bytes, timeout: float = 60.0) -> Any:
        return self._calls[method][0](request, timeout=timeout, wait_for_ready=False)

    def request(self, method: str, **fields: Any) -> Any:
        return self._calls[method][1](**fields)

    def __getattr__(self, method: str) -> Any:
        if method not in self._calls:
            raise AttributeError(method)
        return lambda timeout=60.0, **fields: self.call(method, self.request(method, **fields), timeout)

    def close(self) -> None:
        self.channel.close()


def mount_capability(
    mode: str = "SINGLE_NODE_MULTI_WRITER", fstype: str = "", group: str = "", flags: tuple[str, ...] = ()
) -> Any:
    mount = csi_pb2.VolumeCapability.MountVolume(fs_type=fstype, volume_mount_group=group, mount_flags=flags)
    return csi_pb2.VolumeCapability(mount=mount, access_mode={"mode": MODE.Value(mode)})


def block_capability(mode: str = "SINGLE_NODE_WRITER") -> Any:
    return csi_pb2.VolumeCapability(block={}, access_mode={"mode": MODE.Value(mode)})


def _is_listened_to(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


class Driver:
    """`runvol csi` with directories of its own; a context manager that leaves nothing behind."""

    def __init__(
        self, directory: Path | None = None, environment: dict[str, str] | None = None, *, prefix: tuple[str, ...] = ()
    ) -> None:
        # What its programs are started by, for those in a network namespace.
        self.prefix = prefix
        # Short, since Kata finds a volume only by a path of at most 189 bytes.
        self.directory = directory or Path(
            tempfile.mkdtemp(prefix="rv-", dir=os.environ.get("RUNVOL_TEST_DIR", "/var/tmp"))
        )
        self.kubelet = self.directory / "kubelet"
        self.kubelet.mkdir(parents=True, exist_ok=True)
        # On a node these two are under /run, a tmpfs, where fsync costs nothing.
        self.volatile = Path(tempfile.mkdtemp(prefix="rv-", dir="/dev/shm"))
        self.direct_volumes = self.volatile / "direct-volumes"
        self.state, self.run = self.directory / "state", self.volatile / "run"
        self.socket = self.directory / "csi.sock"
        # Of the driver nfs.csi.runvol.io.
        self.nfs_socket = self.directory / "nfs.sock"
        self.log = self.directory / "driver.log"
        self.environment = {
            "RUNVOL_NODE_ROOTS": str(self.kubelet),
            "RUNVOL_PATHS_STATE_DIR": str(self.state),
            "RUNVOL_PATHS_RUN_DIR": str(self.run),
            "RUNVOL_PATHS_DIRECT_VOLUMES": str(self.direct_volumes),
            "RUNVOL_PATHS_CONTAINERD_CONFIG": str(self.directory / "containerd.toml"),
            "RUNVOL_PATHS_KATA_ROOT": str(self.directory / "kata"),
            "RUNVOL_NODE_ID": "node-1",
            **(environment or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.client: Any = None

    @property
    def records(self) -> Path:
        """What the driver knows of this boot."""
        return self.state / "boots" / Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def __enter__(self) -> Driver:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.remove()

    def start(self, *, repaired: bool = True, names: tuple[str, ...] = ("nodes", "nfs")) -> None:
        """Until it answers, and unless told otherwise has put right what was left. `names`: which drivers it serves;
        the first is the one that `client` speaks to."""
        endpoints = {"nodes": f"unix://{self.socket}", "nfs": f"unix://{self.nfs_socket}"}
        served = [endpoints.get(name, "") if name in names else "" for name in ("nodes", "nfs")]
        before = self._repairs()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "runvol", "csi", "--endpoint", served[0],
                 "--nfs-endpoint", served[1]],
                env={**os.environ, **self.environment}, stdout=log, stderr=log, cwd=Path(__file__).resolve().parents[1],
            )  # fmt: skip
        until = time.monotonic() + 20
        while True:
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the driver did not start: {self.log.read_text()[-3000:]}")
            path = endpoints[names[0]].removeprefix("unix://")
            if not _is_listened_to(path):  # gRPC asking on its own takes half of a user-mode kernel's processor
                time.sleep(0.05)
                continue
            client = Client(path)
            try:
                client.Probe(timeout=1.0)
                self.client = client
                break
            except grpc.RpcError:
                client.close()
                time.sleep(0.03)
        # It serves at once; what its last process left is put right behind.
        told = self.environment.get("RUNVOL_LOG_LEVEL", "info") in ("info", "debug")
        while repaired and told and self._repairs() <= before and time.monotonic() < until + 20:
            time.sleep(0.05)

    def _repairs(self) -> int:
        return self.log.read_text(errors="replace").count("repairs done") if self.log.exists() else 0

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As the kernel's OOM killer would."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(20)
        self.process = None

    def remove(self) -> None:
        """Whatever a failed test left: mounts, then loop devices, then files."""
        below = (f"{self.directory}/", f"{self.volatile}/")
        for mount in reversed([mount.target for mount in mountinfo.table() if mount.target.startswith(below)]):
            subprocess.run(["umount", "-l", mount], check=False)
        for device in self.loop_devices():
            subprocess.run(["losetup", "-d", device], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.volatile, ignore_errors=True)

    @contextlib.contextmanager
    def as_nfs(self) -> Iterator[Driver]:
        """The same process under its other name: all calls go there."""
        before, self.client = self.client, Client(str(self.nfs_socket))
        try:
            yield self
        finally:
            self.client.close()
            self.client = before

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`runvol …` with this driver's directories, as an operator on the node would type it."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "runvol", *arguments], env={**os.environ, **self.environment}, check=check,
            capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        if "--json" in arguments and done.stdout:
            schemas.read(json.loads(done.stdout))  # whatever it is for, it is as docs/json.md says
        return done

    # -- what is left on the node

    def mounts(self) -> list[str]:
        return [mount.target for mount in mountinfo.table() if mount.target.startswith(f"{self.directory}/")]

    def loop_devices(self) -> list[str]:
        inodes = {path.stat().st_ino for path in (self.state / "volumes").glob("*")} if self.state.exists() else set()
        found = []
        for device in loops.bound():
            try:
                name = Path(f"/sys/block/{Path(device).name}/loop/backing_file").read_text().strip()
                under = loops.backing(device)
            except OSError:
                continue  # somebody else's, who has let go of it meanwhile
            if name.startswith(str(self.directory)) or (under and under.inode in inodes):
                found.append(device)
        return found

    def left_over(self) -> dict[str, list[str]]:
        """Everything of this driver on the node: empty lists when all is taken back."""
        handed = sorted(os.listdir(self.direct_volumes)) if self.direct_volumes.exists() else []
        places = [self.records / "claims", self.records / "tmp", self.run / "locks", self.run / "turns"]
        claims = [name for place in places if place.exists() for name in os.listdir(place)]
        files = os.listdir(self.state / "volumes")
        rows = [volume.volume.volume_id for volume in self.client.ListVolumes().entries] if self.client else []
        return {
            "mounts": self.mounts(),
            "loop devices": self.loop_devices(),
            "hand-off files": handed,
            "claims and locks": claims,
            "files": files,
            "rows": rows,
        }

    # -- a volume's paths, as kubelet makes them

    def staging(self, name: str) -> str:
        path = self.kubelet / "staging" / name / "globalmount"
        # What is mounted there may have a dead server.
        if not any(mount.target == str(path) for mount in mountinfo.table()):
            path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def target(self, name: str, pod: str) -> str:
        parent = self.kubelet / "pods" / pod / "volumes" / "kubernetes.io~csi" / name
        parent.mkdir(parents=True, exist_ok=True)
        return str(parent / "mount")

    def create(self, name: str, size: int = 64 << 20, capability: Any = None, **parameters: str) -> Any:
        return self.client.CreateVolume(
            name=name,
            capacity_range={"required_bytes": size},
            volume_capabilities=[capability or mount_capability()],
            parameters={key.replace("__", "/"): value for key, value in parameters.items()},
        ).volume

    def stage(self, volume: Any, capability: Any = None, timeout: float = 60.0) -> None:
        self.client.NodeStageVolume(
            timeout=timeout,
            volume_id=volume.volume_id,
            staging_target_path=self.staging(volume.volume_id),
            volume_capability=capability or mount_capability(),
            volume_context=volume.volume_context,
        )

    def publish(
        self, volume: Any, pod: str, *, runtime: str = "", capability: Any = None, read_only: bool = False, name: str = "pod",
        timeout: float = 60.0,
    ) -> str:  # fmt: skip
        target = self.target(volume.volume_id, pod)
        context = dict(volume.volume_context)
        if runtime:
            context["runtime"] = runtime
        context |= {
            "csi.storage.k8s.io/pod.name": name,
            "csi.storage.k8s.io/pod.namespace": "default",
            "csi.storage.k8s.io/pod.uid": pod,
        }
        self.client.NodePublishVolume(
            timeout=timeout,
            volume_id=volume.volume_id,
            staging_target_path=self.staging(volume.volume_id),
            target_path=target,
            volume_capability=capability or mount_capability(),
            readonly=read_only,
            volume_context=context,
        )
        return target

    def unpublish(self, volume: Any, pod: str, timeout: float = 60.0) -> None:
        self.client.NodeUnpublishVolume(
            timeout=timeout, volume_id=volume.volume_id, target_path=self.target(volume.volume_id, pod)
        )

    def unstage(self, volume: Any, timeout: float = 60.0) -> None:
        self.client.NodeUnstageVolume(
            timeout=timeout, volume_id=volume.volume_id, staging_target_path=self.staging(volume.volume_id)
        )

    def delete(self, volume: Any, timeout: float = 60.0) -> None:
        """As a provisioner does it, who asks again while it goes on behind."""
        until = time.monotonic() + timeout
        while True:
            try:
                self.client.DeleteVolume(timeout=max(0.1, until - time.monotonic()), volume_id=volume.volume_id)
                return
            except grpc.RpcError as error:
                behind = ("deleting volume", "removing the files")
                if not (error.details() or "").startswith(behind) or time.monotonic() > until:
                    raise
                time.sleep(0.2)
