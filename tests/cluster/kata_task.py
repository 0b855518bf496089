"""containerd's Task service for one pod of the tests' Kata shim: each call is one of the sandbox double's."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import tomllib
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2  # noqa: F401
from google.protobuf.empty_pb2 import Empty
from grpc_tools import protoc

from guestmount import ttrpc
from runvol_proto import kata_agent_pb2, kata_oci_pb2
from tests.cluster.kata_shim import SHARED, clean
from tests.sandbox.guest import Guest
from tests.sandbox.shim import ContainerFailed, Sandbox, Settings
from tests.sandbox.vm import VM

DIRECT_VOLUMES = Path("/run/kata-containers/shared/direct-volumes")
_PLACES = {
    "go": ("/etc/kata-containers", "/usr/share/defaults/kata-containers"),
    "rust": ("/etc/kata-containers/runtime-rs", "/usr/share/defaults/kata-containers/runtime-rs"),
}
NOT_FOUND, UNIMPLEMENTED, INTERNAL = 5, 12, 13
# Seconds; longer than any test.
_EVER = 1e6
# The exit status of what ended with its guest, as Kata's.
_LOST = 255


def serve(kind: str, listener: socket.socket, sandbox_id: str) -> None:
    """Ends with the process."""
    shim = Shim(kind, sandbox_id)
    service = ttrpc.Service(shim.pb.Task, shim)

    def accept() -> None:
        while True:
            stream = ttrpc.FileStream(listener.accept()[0].detach())
            threading.Thread(target=ttrpc.Server(stream, [service]).serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    shim.run_guest()


def protocol() -> SimpleNamespace:
    """The messages by their name, and the service as `Task`."""
    source = Path(__file__).with_name("kata_task.proto")
    known = Path(protoc.__file__).parent / "_proto"
    with tempfile.NamedTemporaryFile() as out:
        protoc.main(["protoc", f"-I{source.parent}", f"-I{known}", f"--descriptor_set_out={out.name}", source.name])
        described = descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes()).file[0]
    pool = descriptor_pool.Default()
    pool.Add(described)
    file = pool.FindFileByName(source.name)
    found = {name: message_factory.GetMessageClass(kind) for name, kind in file.message_types_by_name.items()}
    return SimpleNamespace(**found, Task=file.services_by_name["Task"])


def configuration(kind: str, path: str) -> dict[str, Any]:
    """The table of the hypervisor that [runtime] names, or of the first one. What lies in `config.d` is not read."""
    files = [path] if path else [f"{place}/configuration.toml" for place in _PLACES[kind]]
    found = next((Path(one) for one in files if Path(one).is_file()), None)
    if found is None:
        raise ttrpc.RpcError(INTERNAL, f"no configuration in {', '.join(files)}")
    document = tomllib.loads(found.read_text())
    runtime, hypervisors = document.get("runtime", {}), document.get("hypervisor", {})
    name = runtime.get("hypervisor_name") if kind == "rust" else None
    table: dict[str, Any] = hypervisors.get(name or next(iter(hypervisors)), {})
    if table.get("shared_fs", "virtio-fs") not in ("virtio-fs", "none"):
        raise ttrpc.RpcError(INTERNAL, f"shared_fs {table['shared_fs']!r} is not of this shim")
    return table


def settings(kind: str, table: dict[str, Any], shared: Path) -> Settings:
    return Settings(
        shim=kind,
        block_device_driver=table.get("block_device_driver", "virtio-scsi"),
        disable_block_device_use=table.get("disable_block_device_use", False),
        aio=table.get("block_device_aio", "io_uring"),
        cache_set=table.get("block_device_cache_set", False),
        cache_direct=table.get("block_device_cache_direct", False),
        indep_iothreads=table.get("indep_iothreads", 0) > 0,
        direct_volumes=DIRECT_VOLUMES,
        shared=None if table.get("shared_fs") == "none" else shared,
    )


class Process:
    """A container's first process or a further one; `exec_id` is empty for the first."""

    def __init__(self, container_id: str, exec_id: str, bundle: str, request: Any) -> None:
        self.container_id, self.exec_id, self.bundle, self.request = container_id, exec_id, bundle, request
        self.key = container_id, exec_id
        self.started, self.ended = False, threading.Event()
        self.code, self.at = 0, 0.0

    def end(self, code: int) -> None:
        if not self.ended.is_set():
            self.code, self.at = code, time.time()
            self.ended.set()


class Shim:
    """The Task service of one pod."""

    def __init__(self, kind: str, sandbox_id: str) -> None:
        self.kind, self.sandbox_id, self.pb = kind, sandbox_id, protocol()
        self.shared = SHARED / sandbox_id / "shared"
        self._processes: dict[tuple[str, str], Process] = {}
        # The guest's table of the configuration, then the guest.
        self._wanted: Future[dict[str, Any]] = Future()
        self._guest: Future[Sandbox] = Future()
        self._vm: VM | None = None
        # One container is created or removed at a time: there is one monitor of QEMU's.
        self._lock = threading.Lock()

    # -- the guest

    def run_guest(self) -> None:
        """In the main thread: what it starts is killed when it ends."""
        table = self._wanted.result()
        try:
            self._boot(table)
        except BaseException as error:
            self._guest.set_exception(error)
            threading.Event().wait()
        assert self._vm and self._vm.process
        self._vm.process.wait()
        for process in list(self._processes.values()):
            process.end(_LOST)
        threading.Event().wait()

    def _boot(self, table: dict[str, Any]) -> None:
        self.shared.mkdir(parents=True)
        self._vm = VM(
            memory=f"{table.get('default_memory', 512)}M",
            processors=table.get("default_vcpus", 1),
            virtiofs=self.shared,
            outward=table.get("outward", False),
            guest=Guest(kernel=Path(table["kernel"]), initramfs=Path(table["initrd"])),
            prefix=("setpriv", "--pdeathsig", "KILL"),
        ).__enter__()
        made = Sandbox(vm=self._vm, settings=settings(self.kind, table, self.shared), sandbox_id=self.sandbox_id)
        self._guest.set_result(made.start())

    @property
    def _sandbox(self) -> Sandbox:
        return self._guest.result()

    @property
    def _pid(self) -> int:
        return self._vm.pid if self._vm and self._vm.process else os.getpid()

    def _stop_guest(self) -> None:
        if self._vm is None or self._vm.process is None:
            return
        with contextlib.suppress(Exception):
            self._sandbox.call("DestroySandbox", kata_agent_pb2.DestroySandboxRequest(), Empty, 5.0)
            self._vm.process.wait(2)
        self._vm.process.kill()

    # -- containerd's calls

    def Create(self, request: Any) -> Any:
        if request.terminal or request.stdin or request.checkpoint:
            raise ttrpc.RpcError(UNIMPLEMENTED, "no terminal, no standard input and no checkpoint")
        process = Process(request.id, "", request.bundle, request)
        if request.id == self.sandbox_id:
            options = self.pb.Options.FromString(request.options.value)
            try:
                self._wanted.set_result(configuration(self.kind, options.config_path))
                self._guest.result()
            except Exception as error:
                raise ttrpc.RpcError(INTERNAL, f"failed to create the sandbox: {error}") from error
        else:
            self._create_container(request)
        self._processes[request.id, ""] = process
        return self.pb.PidResponse(pid=self._pid)

    def _create_container(self, request: Any) -> None:
        root = Path(request.bundle, "rootfs")
        root.mkdir(exist_ok=True)
        for one in request.rootfs:
            subprocess.run(
                ["mount", "-t", one.type, "-o", ",".join(one.options), one.source, root],
                check=True,
                capture_output=True,
            )
        try:
            with self._lock:
                self._sandbox.create_container(Path(request.bundle), request.id, image=root, start=False)
        except ContainerFailed as error:
            subprocess.run(["umount", "-l", root], check=False)
            raise ttrpc.RpcError(INTERNAL, f"failed to create the container: {error}") from error

    def Exec(self, request: Any) -> Any:
        if request.terminal or request.stdin:
            raise ttrpc.RpcError(UNIMPLEMENTED, "neither a terminal nor a standard input")
        self._find(request.id)
        self._processes[request.id, request.exec_id] = Process(request.id, request.exec_id, "", request)
        return Empty()

    def Start(self, request: Any) -> Any:
        process = self._of(request)
        if process.container_id != self.sandbox_id:
            try:
                self._begin(process)
            except Exception as error:
                process.end(127)
                raise ttrpc.RpcError(INTERNAL, str(error)) from error
            for which in ("stdout", "stderr"):
                threading.Thread(target=self._copy, args=(process, which), daemon=True).start()
            threading.Thread(target=self._await, args=(process,), daemon=True).start()
        process.started = True
        return self.pb.PidResponse(pid=self._pid)

    def _begin(self, process: Process) -> None:
        if not process.exec_id:
            self._sandbox.start_container(process.container_id)
            return
        spec = json.loads(process.request.spec.value)
        wanted = kata_oci_pb2.Process(Args=spec["args"], Env=spec.get("env", []), Cwd=spec.get("cwd", "/"))
        self._sandbox.call(
            "ExecProcess",
            kata_agent_pb2.ExecProcessRequest(
                container_id=process.container_id, exec_id=process.exec_id, process=wanted
            ),
            Empty,
        )

    def _copy(self, process: Process, which: str) -> None:
        """Into containerd's pipe, which is open for both so that it stays while containerd does not."""
        name = process.exec_id or process.container_id
        read = kata_agent_pb2.ReadStreamRequest(container_id=process.container_id, exec_id=name, len=1 << 16)
        path = getattr(process.request, which)
        with (
            contextlib.suppress(Exception),
            open(path, "r+b", buffering=0) if path else tempfile.TemporaryFile() as out,
        ):
            method = f"Read{which.capitalize()}"
            while data := self._sandbox.call(method, read, kata_agent_pb2.ReadStreamResponse, _EVER).data:
                out.write(data)

    def _await(self, process: Process) -> None:
        name = process.exec_id or process.container_id
        wait = kata_agent_pb2.WaitProcessRequest(container_id=process.container_id, exec_id=name)
        try:
            code = self._sandbox.call("WaitProcess", wait, kata_agent_pb2.WaitProcessResponse, _EVER).status
        except Exception:
            code = _LOST
        process.end(code)

    def Kill(self, request: Any) -> Any:
        process = self._find(request.id, request.exec_id)
        if process.ended.is_set():
            raise ttrpc.RpcError(NOT_FOUND, "process already finished")
        if request.id == self.sandbox_id:
            self._stop_guest()
            return Empty()
        if not process.started:
            process.end(128 + request.signal)
            return Empty()
        name = process.exec_id or process.container_id
        self._sandbox.call(
            "SignalProcess",
            kata_agent_pb2.SignalProcessRequest(container_id=request.id, exec_id=name, signal=request.signal),
            Empty,
        )
        return Empty()

    def Wait(self, request: Any) -> Any:
        process = self._of(request)
        process.ended.wait()
        return self._dated(self.pb.WaitResponse(exit_status=process.code), process)

    def Delete(self, request: Any) -> Any:
        process = self._of(request)
        if not process.exec_id:
            if process.container_id == self.sandbox_id:
                self._stop_guest()
                with contextlib.suppress(Exception):
                    self._sandbox.destroy()
                clean(Path(process.bundle), self.sandbox_id)
            else:
                with contextlib.suppress(Exception), self._lock:
                    self._sandbox.remove_container(process.container_id)
                subprocess.run(["umount", "-l", Path(process.bundle, "rootfs")], check=False)
        for key in [process.key] if process.exec_id else [one for one in self._processes if one[0] == process.key[0]]:
            del self._processes[key]
        return self._dated(self.pb.DeleteResponse(pid=self._pid, exit_status=process.code), process)

    def State(self, request: Any) -> Any:
        process = self._of(request)
        status = 3 if process.ended.is_set() else 2 if process.started else 1
        asked = process.request
        return self._dated(
            self.pb.StateResponse(
                id=process.container_id, bundle=process.bundle, pid=self._pid, status=status, stdout=asked.stdout,
                stderr=asked.stderr, exit_status=process.code, exec_id=process.exec_id,
            ), process,
        )  # fmt: skip

    def Pids(self, request: Any) -> Any:
        self._find(request.id)
        return self.pb.PidsResponse(processes=[self.pb.PidResponse(pid=self._pid)])

    def Connect(self, request: Any) -> Any:
        return self.pb.ConnectResponse(shim_pid=os.getpid(), task_pid=self._pid)

    def Stats(self, request: Any) -> Any:
        """Nothing, in the form that CRI takes."""
        self._find(request.id)
        answer = self.pb.StatsResponse()
        answer.stats.type_url = "io.containerd.cgroups.v2.Metrics"
        return answer

    def Update(self, request: Any) -> Any:
        return Empty()

    CloseIO = Update

    def Shutdown(self, request: Any) -> Any:
        """Asked after each container; with the last one this process ends."""
        if not self._processes:
            self._stop_guest()
            threading.Timer(0.2, os._exit, [0]).start()
        return self.Update(request)

    def Pause(self, request: Any) -> Any:
        raise ttrpc.RpcError(UNIMPLEMENTED, "the guest is not paused, and no terminal resized")

    Resume = Checkpoint = ResizePty = Pause

    def _of(self, request: Any) -> Process:
        return self._find(request.id, request.second.decode())

    def _find(self, container_id: str, exec_id: str = "") -> Process:
        found = self._processes.get((container_id, exec_id))
        if found is None:
            raise ttrpc.RpcError(NOT_FOUND, f"no process {container_id} {exec_id}".strip())
        return found

    @staticmethod
    def _dated(answer: Any, process: Process) -> Any:
        if process.ended.is_set():
            answer.exited_at.FromNanoseconds(int(process.at * 1e9))
        return answer
