"""A NAS for sandboxed pods: nfs-ganesha, the driver, the NRI plugin and a guest, on one network of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestmount import ttrpc
from runvol_proto import nri_pb2 as pb
from tests import ganesha
from tests.driver import POD, Driver, mount_capability
from tests.namespaces import GUEST, HOST, TAP, network
from tests.nri_runtime import PLUGIN_SERVICE, RuntimeSide
from tests.sandbox.shim import Sandbox, Settings, volume_mount, write_bundle
from tests.sandbox.vm import VM

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")


@dataclass(frozen=True)
class Static:
    """A volume that an administrator has written into a PersistentVolume."""

    volume_id: str
    volume_context: dict[str, str]


@dataclass
class Nas:
    """A context manager. `export`: the directory that the server exports."""

    directory: Path
    protocols: str = "4"
    processors: int = 2
    _stack: ExitStack = field(default_factory=ExitStack)
    containers: int = 0

    def __enter__(self) -> Nas:
        with ExitStack() as stack:
            self._enter(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _enter(self, stack: ExitStack) -> None:
        self.export = self.directory / "export"
        shared = self.directory / "shared"
        for place in (self.export, shared, self.directory / "ganesha"):
            place.mkdir(parents=True)
        joined = stack.enter_context(network())
        self.server = stack.enter_context(
            ganesha.Ganesha(self.directory / "ganesha", self.export, tree=ganesha.tree(), prefix=joined.prefix,
                            protocols=self.protocols))  # fmt: skip
        self.vm = stack.enter_context(
            VM(
                prefix=joined.prefix,
                network=(TAP, f"{GUEST}/24"),
                processors=self.processors,
                virtiofs=shared,
                shares={"export": self.export, "cached": self.export},
            )
        )
        socket = self.directory / "nri.sock"
        self.driver = stack.enter_context(Driver(environment={"RUNVOL_NRI_SOCKET": str(socket)}, prefix=joined.prefix))
        self.runtime = RuntimeSide(socket)
        stack.callback(self.runtime.close)
        self._start_plugin(stack)
        settings = Settings(direct_volumes=self.driver.direct_volumes, shared=shared)
        self.sandbox = Sandbox(vm=self.vm, settings=settings).start()
        stack.callback(self.sandbox.destroy)

    def _start_plugin(self, stack: ExitStack) -> None:
        with open(self.directory / "nri.log", "wb") as log:
            plugin = subprocess.Popen([sys.executable, "-m", "runvol", "nri"], stdout=log, stderr=log,
                                      env={**os.environ, **self.driver.environment})  # fmt: skip
        stack.callback(plugin.wait)
        stack.callback(plugin.send_signal, signal.SIGTERM)
        self.plugin: ttrpc.Client = self.runtime.accept()
        assert self.runtime.registered.wait(10)
        self.plugin.call(
            PLUGIN_SERVICE, "Configure", pb.ConfigureRequest(runtime_name="containerd"), pb.ConfigureResponse, 5.0
        )
        self.plugin.call(PLUGIN_SERVICE, "Synchronize", pb.SynchronizeRequest(), pb.SynchronizeResponse, 5.0)

    def volume(self, version: str = "4.2", path: str = ganesha.PSEUDO, **context: str) -> Static:
        facts = {"backend": "nfs", "server": HOST, "path": path, "vers": version, **context}
        return Static(f"nas-{version}", facts)

    def published(self, volume: Static, number: int = 1, **more: Any) -> str:
        """The target on the host, for a pod of Kata."""
        self.driver.stage(volume, RWX)
        return self.driver.publish(volume, POD.format(number), runtime="kata", capability=RWX, **more)

    def taken_back(self, volume: Static, number: int = 1) -> None:
        self.driver.unpublish(volume, POD.format(number))
        self.driver.unstage(volume)

    def container(self, *mounts: dict[str, Any]) -> str:
        """Created as a runtime does it: the NRI plugin first, then the shim. Its name."""
        self.containers += 1
        name = f"nas-{self.containers}"
        pod = pb.PodSandbox(uid=POD.format(1), name="pod", namespace="default", runtime_handler="kata", ips=[GUEST])
        changed = self.runtime.created(self.plugin, pod, list(mounts))
        self.sandbox.create_container(write_bundle(self.directory / name, changed), name)
        return name

    def with_volume(self, target: str, **more: Any) -> str:
        return self.container(volume_mount(target, **more))
