"""NFS for a sandboxed pod, through a real containerd with its NRI on, called over CRI as kubelet calls it.

The handler is named kata and started by runc, which does with a mount of type nfs4 what Kata's agent does in a guest:
mount(2), with the options as they stand and no helper.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockdev import Deadline
from guestmount.cri import Sandboxes
from guestmount import registration
from tests.driver import POD, Driver, mount_capability
from tests.units import confined
from tests.kernel.inside.nfs import ROOT, Drivers, KernelNfs
from tests.kernel.inside.server import program
from tests.kernel.inside.test_containerd import IMAGE, layers, oci_archive

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
_NUMBERS = itertools.count(1)
PROTO = Path(__file__).resolve().parents[1] / "cri.proto"


class Cri:
    """containerd with CRI and NRI, and kubelet's side of it."""

    def __init__(self, directory: Path) -> None:
        from grpc_tools import protoc

        self.directory = directory
        self.socket, self.nri = f"/run/cri-{os.getpid()}.sock", f"/run/nri-{os.getpid()}.sock"
        (directory / "stubs").mkdir(parents=True)
        assert protoc.main(["protoc", f"-I{PROTO.parent}", f"--python_out={directory}/stubs", PROTO.name]) == 0
        sys.path.insert(0, str(directory / "stubs"))
        import cri_pb2

        self.pb: Any = cri_pb2
        for place in ("plugins", "nri.d", "certs"):
            (directory / place).mkdir()
        runtime = 'runtime_type = "io.containerd.runc.v2"'
        (directory / "config.toml").write_text(f"""
version = 3
root = "{directory}/root"
state = "/run/cri-state-{os.getpid()}"
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "{self.nri}"
  plugin_path = "{directory}/plugins"
  plugin_config_path = "{directory}/nri.d"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "native"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    conf_dir = "{directory}/cni"
    bin_dirs = ["{directory}/cni-bin"]
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      {runtime}
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
      {runtime}
""")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        path = f"{os.environ['RUNVOL_PROGRAMS']}:/usr/sbin:/usr/bin:/sbin:/bin"
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen([program("containerd"), "-c", str(self.directory / "config.toml")], stdout=log,
                                            stderr=log, env={"PATH": path, "HOME": "/root"})  # fmt: skip
        self.channel = grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.default_authority", "localhost")])
        until = time.monotonic() + 90
        while True:
            try:
                self.call("Status", self.pb.Nothing(), self.pb.Nothing)
                return
            except grpc.RpcError:
                assert time.monotonic() < until, self.said()
                time.sleep(0.3)

    def said(self) -> str:
        return (self.directory / "log").read_text()[-4000:]

    def call(self, method: str, request: Any, response: Any) -> Any:
        return self.channel.unary_unary(f"/runtime.v1.RuntimeService/{method}", request_serializer=lambda m: m.SerializeToString(),
                                        response_deserializer=response.FromString)(request, timeout=60)  # fmt: skip

    def load(self, archive: Path) -> None:
        subprocess.run([program("ctr"), "-a", self.socket, "-n", "k8s.io", "images", "import", "--local", "--snapshotter", "native",
                        str(archive)], check=True, capture_output=True)  # fmt: skip

    def pod(self, uid: str, handler: str) -> tuple[str, Any]:
        config = self.pb.PodSandboxConfig(
            metadata=self.pb.PodSandboxMetadata(name=f"pod{next(_NUMBERS)}", uid=uid, namespace="default"),
            log_directory=str(self.directory),
        )
        config.linux.security_context.namespace_options.network = 2  # of the node
        made = self.call("RunPodSandbox", self.pb.RunPodSandboxRequest(config=config, runtime_handler=handler),
                         self.pb.RunPodSandboxResponse)  # fmt: skip
        return made.pod_sandbox_id, config

    def container(self, pod: tuple[str, Any], name: str, script: str, mounts: dict[str, str]) -> str:
        config = self.pb.ContainerConfig(
            metadata=self.pb.ContainerMetadata(name=name), image=self.pb.ImageSpec(image=IMAGE),
            command=["/bin/sh", "-c", script], log_path=f"{name}.log",
            mounts=[self.pb.Mount(container_path=inside, host_path=outside) for inside, outside in mounts.items()],
        )  # fmt: skip
        request = self.pb.CreateContainerRequest(pod_sandbox_id=pod[0], config=config, sandbox_config=pod[1])
        made = self.call("CreateContainer", request, self.pb.CreateContainerResponse).container_id
        self.call("StartContainer", self.pb.ContainerRequest(container_id=made), self.pb.Nothing)
        return str(made)

    def output(self, name: str, words: str, within: float = 20) -> str:
        path, until = self.directory / f"{name}.log", time.monotonic() + within
        while words not in (text := path.read_text() if path.exists() else ""):
            assert time.monotonic() < until, f"{text}\n{self.said()}"
            time.sleep(0.2)
        return text

    def gone(self, pod: tuple[str, Any]) -> None:
        for call in ("StopPodSandbox", "RemovePodSandbox"):
            self.call(call, self.pb.PodSandboxRequest(pod_sandbox_id=pod[0]), self.pb.Nothing)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Plugin:
    """`runvol nri`, as a service runs it."""

    def __init__(self, driver: Driver, socket: str) -> None:
        self.driver, self.log = driver, driver.directory / "nri.log"
        self.log.unlink(missing_ok=True)
        # As its unit starts it.
        self.prefix = confined("runvol-nri.service")
        self.environment = {**os.environ, **driver.environment, "RUNVOL_NRI_SOCKET": socket}
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "runvol", "nri"],
                env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip
        self.registered()

    def registered(self) -> None:
        until = time.monotonic() + 60
        while not registration.is_alive(str(self.driver.run)):
            assert time.monotonic() < until, self.log.read_text()[-2000:]
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(20) == 0


@pytest.fixture(scope="module")
def nfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelNfs]:
    server = KernelNfs(tmp_path_factory.mktemp("nfs") / "exported")
    server.start()
    (ROOT / "share").mkdir()
    yield server
    server.close()


@pytest.fixture(scope="module")
def cri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cri]:
    one = Cri(tmp_path_factory.mktemp("cri"))
    one.start()
    oci_archive(one.directory / "image.tar", layers(), command=("/bin/sleep", "100000"))
    one.load(one.directory / "image.tar")
    yield one
    one.kill()
    shutil.rmtree(one.directory, ignore_errors=True)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    made = Drivers(tmp_path_factory.mktemp("d"))
    yield made
    made.end()


@pytest.fixture
def driver(nfs: KernelNfs, drivers: Drivers) -> Iterator[Driver]:
    yield from drivers.lent()


@pytest.fixture
def plugin(driver: Driver, cri: Cri) -> Iterator[Plugin]:
    one = Plugin(driver, cri.nri)
    yield one
    one.stop()


def published(driver: Driver, name: str, pod: str, **more: Any) -> tuple[Any, str]:
    volume = driver.create(
        name, capability=RWX, backend="nfs", server="127.0.0.1", path=f"{ROOT}/share", **more.pop("parameters", {})
    )
    driver.stage(volume, RWX)
    return volume, driver.publish(volume, pod, runtime="kata", capability=RWX, **more)


def taken_back(driver: Driver, volume: Any, pod: str) -> None:
    driver.unpublish(volume, pod)
    driver.unstage(volume)
    driver.delete(volume)
    assert not {what: found for what, found in driver.left_over().items() if found}


@pytest.mark.parametrize("version", ["3", pytest.param("4.0", marks=pytest.mark.long), "4.1", "4.2"])
def test_the_container_mounts_the_export_itself(driver, plugin, cri, version, tmp_path):
    volume, target = published(driver, f"v{version}", POD.format(1), parameters={"vers": version})
    assert os.listdir(target) == ["RUNVOL-PLACEHOLDER"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("as it is")
    pod = cri.pod(POD.format(1), "kata")
    name = f"c-{version}"
    cri.container(pod, name, "echo hi > /data/f; cat /data/f /other/kept; grep -c ' /data nfs' /proc/mounts; grep ' "
                             "/data ' /proc/mounts; echo done; sleep 1000", {"/data": target, "/other": str(other)})  # fmt: skip
    text = cri.output(name, "done")
    assert "as it is" in text, "another mount was changed"
    assert f"vers={version}" in text
    assert (ROOT / f"share/v{version}/f").read_text() == "hi\n"
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert not [line for line in mounts if line[2] in ("nfs", "nfs4")], "the host has mounted it as well"
    cri.gone(pod)
    taken_back(driver, volume, POD.format(1))


def test_read_only_and_a_second_container_of_the_pod(driver, plugin, cri):
    volume, target = published(driver, "ro", POD.format(1), read_only=True)
    (ROOT / "share/ro/f").write_text("there")
    pod = cri.pod(POD.format(1), "kata")
    for number in (1, 2):
        cri.container(pod, f"ro-{number}", "cat /data/f; echo x > /data/g; echo done; sleep 1000", {"/data": target})
        text = cri.output(f"ro-{number}", "done")
        assert "there" in text
        assert "Read-only file system" in text
    cri.gone(pod)
    taken_back(driver, volume, POD.format(1))


@pytest.mark.parametrize(("handler", "below"), [
    ("kata", ""), ("runc", "/RUNVOL-PLACEHOLDER"), ("", ""), pytest.param("kata", "/RUNVOL-PLACEHOLDER", marks=pytest.mark.long),
    pytest.param("runc", "", marks=pytest.mark.long), pytest.param("", "/RUNVOL-PLACEHOLDER", marks=pytest.mark.long),
])  # fmt: skip
def test_a_container_of_another_pod_is_refused_by_containerd(driver, plugin, cri, handler, below):
    name = f"foreign-{handler or 'default'}{'-below' if below else ''}"
    volume, target = published(driver, name, POD.format(1))
    pod = cri.pod(POD.format(2), handler)
    with pytest.raises(grpc.RpcError, match="which only that pod's guest may have") as caught:
        cri.container(pod, name, "sleep 1000", {"/data": target + below})
    assert volume.volume_id in caught.value.details() and POD.format(2) in caught.value.details()
    cri.gone(pod)
    # The plugin is still connected, and the pod's own container gets its volume.
    pod = cri.pod(POD.format(1), "kata")
    cri.container(pod, f"{name}-own", "echo hi > /data/f; echo done; sleep 1000", {"/data": target})
    cri.output(f"{name}-own", "done")
    assert (ROOT / "share" / name / "f").read_text() == "hi\n"
    cri.gone(pod)
    taken_back(driver, volume, POD.format(1))


@pytest.mark.parametrize("handler", ["runc", ""])
def test_a_container_of_its_own_pod_under_another_runtime_has_the_placeholder(driver, plugin, cri, handler):
    name = f"own-{handler or 'default'}"
    volume, target = published(driver, name, POD.format(1))
    (ROOT / "share" / name / "salaries").touch()
    pod = cri.pod(POD.format(1), handler)
    cri.container(pod, name, "exec 2>&1; ls /data; echo x > /data/f; echo done; sleep 1000", {"/data": target})
    text = cri.output(name, "done")
    assert "RUNVOL-PLACEHOLDER" in text
    assert "Read-only file system" in text
    assert "salaries" not in text
    assert os.listdir(ROOT / "share" / name) == ["salaries"]
    assert "its pod's runtime is another" in plugin.log.read_text()
    cri.gone(pod)
    taken_back(driver, volume, POD.format(1))


def test_without_the_plugin_publish_is_refused_and_a_container_fails_to_write(driver, plugin, cri):
    volume, target = published(driver, "away", POD.format(1))
    plugin.kill()
    pod = cri.pod(POD.format(1), "kata")
    cri.container(pod, "away", "echo x > /data/f; echo done; sleep 1000", {"/data": target})
    assert "Read-only file system" in cri.output("away", "done"), "the data went to the host"
    with pytest.raises(grpc.RpcError, match="run `runvol nri` on this node") as caught:
        driver.publish(volume, POD.format(2), runtime="kata", capability=RWX)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    # It comes back, and says which container was created meanwhile.
    plugin.start()
    until = time.monotonic() + 20
    while "placeholder instead of its NFS volume" not in plugin.log.read_text():
        assert time.monotonic() < until, plugin.log.read_text()
        time.sleep(0.2)
    cri.gone(pod)
    pod = cri.pod(POD.format(1), "kata")
    cri.container(pod, "back", "echo x > /data/f; echo done; sleep 1000", {"/data": target})
    cri.output("back", "done")
    assert (ROOT / "share/away/f").read_text() == "x\n"
    cri.gone(pod)
    taken_back(driver, volume, POD.format(1))


def test_the_plugin_outlives_a_restart_of_containerd(driver, plugin, cri):
    cri.kill()
    until = time.monotonic() + 20
    while registration.is_alive(str(driver.run)):
        assert time.monotonic() < until
        time.sleep(0.1)
    cri.start()
    plugin.registered()
    volume, target = published(driver, "restart", POD.format(1))
    pod = cri.pod(POD.format(1), "kata")
    cri.container(pod, "restarted", "echo x > /data/f; echo done; sleep 1000", {"/data": target})
    cri.output("restarted", "done")
    assert (ROOT / "share/restart/f").read_text() == "x\n"
    cri.gone(pod)
    taken_back(driver, volume, POD.format(1))


def test_the_runtime_tells_which_pods_have_a_sandbox(cri, tmp_path):
    """Asked of a real containerd, as an expansion asks it."""
    sandboxes = Sandboxes(endpoint=f"unix://{cri.socket}", roots=[str(tmp_path)])
    first, second = POD.format(6), POD.format(7)
    other = cri.pod(second, "kata")
    assert "lists no pod that kubelet has" in sandboxes.doubt([first], Deadline.after(10))
    (tmp_path / "pods" / second).mkdir(parents=True)
    assert sandboxes.doubt([first], Deadline.after(10)) == ""
    pod = cri.pod(first, "kata")
    assert f"sandbox {pod[0][:13]}" in sandboxes.doubt([first], Deadline.after(10))
    stop = cri.pb.PodSandboxRequest(pod_sandbox_id=pod[0])
    cri.call("StopPodSandbox", stop, cri.pb.Nothing)
    assert sandboxes.doubt([first], Deadline.after(10)) == "", "it takes no container any more"
    assert "the pod runs" in sandboxes.doubt([second], Deadline.after(10))
    for one in (pod, other):
        cri.gone(one)


def test_a_runtime_that_is_told_to_creates_no_container_without_the_plugin(driver, cri):
    """As docs/runtimes.md has it."""
    config = cri.directory / "config.toml"
    before = config.read_text()
    cri.kill()
    config.write_text(f"""{before}
[plugins."io.containerd.nri.v1.nri".default_validator]
  enable = true
  required_plugins = ["runvol"]
""")
    cri.start()
    try:
        pod = cri.pod(POD.format(8), "runc")
        with pytest.raises(grpc.RpcError) as caught:
            cri.container(pod, "alone", "sleep 1000", {})
        assert "runvol" in caught.value.details()
        plugin = Plugin(driver, cri.nri)
        try:
            # The runtime counts a plugin once it has told it of all that there is, a moment after it has registered.
            until = Deadline.after(20)
            while True:
                try:
                    cri.container(pod, "with", "echo done; sleep 1000", {})
                    break
                except grpc.RpcError as error:
                    assert "not present" in error.details()
                    until.check("the runtime counts the plugin")
                    time.sleep(0.2)
            cri.output("with", "done")
        finally:
            plugin.stop()
        # The call in which the runtime finds out may still pass; those after it do not.
        for number in range(5):
            try:
                cri.container(pod, f"alone-again-{number}", "sleep 1000", {})
            except grpc.RpcError as error:
                assert number < 3
                assert "runvol" in error.details()
                break
        else:
            raise AssertionError("containers are created without the plugin")
        cri.gone(pod)
    finally:
        cri.kill()
        config.write_text(before)
        cri.start()
