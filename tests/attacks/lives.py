"""A volume's life through each façade and on each backend, as kubelet leads it: what the attackers disturb."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from tests.driver import Driver, block_capability, mount_capability
from tests.flexvolume.test_driver import POD, Flex

SIZE = 64 << 20
# What a backend's volumes need of a class, and how FlexVolume's options describe one; a new backend adds its name.
CSI: dict[str, dict[str, str]] = {"loop": {}, "directory": {"quota": "none"}}
FLEX = ("loop", "directory", "given-directory", "given-device")
# Backends whose parts this machine's kernel lacks, and where they are attacked instead.
ELSEWHERE = {"nfs": "tests/kernel/inside"}


class Failed(Exception):
    """A call's answer that is no success: `code` and `sentence`, as the caller shows them to people."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(f"{code}: {sentence}")
        self.code, self.sentence = code, sentence


class CsiLife:
    """One volume of a backend, by gRPC. `runtime`: of its pods; `raw`: volumeMode Block."""

    def __init__(self, driver: Driver, backend: str, runtime: str, *, raw: bool = False) -> None:
        self.driver, self.backend, self.runtime = driver, backend, runtime
        self.raw, self.group = raw, ""
        self.volume: Any = None

    @property
    def capability(self) -> Any:
        """With the mount group (fsGroup) of the next pod."""
        return block_capability() if self.raw else mount_capability(group=self.group)

    @contextlib.contextmanager
    def _called(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise Failed(error.code().name, str(error.details())) from None

    def make(self, name: str) -> None:
        with self._called():
            parameters = {} if self.backend == "loop" else {"backend": self.backend, **CSI[self.backend]}
            self.volume = self.driver.create(name, SIZE, self.capability, **parameters)

    def mount(self, pod: str) -> Path:
        with self._called():
            self.driver.stage(self.volume, self.capability)
            return Path(self.driver.publish(self.volume, pod, runtime=self.runtime, capability=self.capability))

    def unmount(self, pod: str) -> None:
        with self._called():
            self.driver.unpublish(self.volume, pod)
            self.driver.unstage(self.volume)

    def delete(self) -> None:
        with self._called():
            self.driver.delete(self.volume)

    @property
    def bytes(self) -> Path | None:
        """The file or directory in which its bytes lie."""
        for place in ("volumes", "directories"):
            for found in (self.driver.state / place).glob(f"{self.volume.volume_id}*"):
                return found
        return None


class FlexLife:
    """One volume by FlexVolume's calls, with no node plugin at all."""

    def __init__(self, flex: Flex, backend: str, runtime: str) -> None:
        self.flex, self.backend, self.runtime = flex, backend, runtime
        self.name, self.options, self.group, self.raw = "", {}, "", False

    def make(self, name: str) -> None:
        self.name = name
        if self.backend in CSI:
            words = [f"{key}={value}" for key, value in CSI[self.backend].items()]
            try:
                made = self.flex.create(name, f"backend={self.backend}", *words)
            except subprocess.CalledProcessError as error:
                raise Failed("cli", error.stderr or error.stdout) from None
            self.options = {"volume": made}
            return
        place = self.flex.driver.directory / "given" / name
        place.parent.mkdir(exist_ok=True)
        if self.backend == "given-directory":
            place.mkdir(exist_ok=True)
            self.options = {"directory": str(place)}
        else:
            with place.open("ab") as file:
                file.truncate(SIZE)
            subprocess.run(["mkfs.ext4", "-q", "-F", str(place)], check=True)
            self.options = {"device": str(place)}

    def _call(self, *words: str) -> None:
        _, reply = self.flex.run(*words)
        if reply["status"] != "Success":
            raise Failed(str(reply["status"]), str(reply.get("message", "")))

    def mount(self, pod: str) -> Path:
        target = self._target(pod)
        os.makedirs(target, exist_ok=True)
        options = {"kubernetes.io/pod.uid": pod, "kubernetes.io/readwrite": "rw", "runtime": self.runtime}
        if self.group:
            options["kubernetes.io/mounterArgs.FsGroup"] = self.group
        self._call("mount", target, json.dumps({**options, **self.options}))
        return Path(target)

    def _target(self, pod: str) -> str:
        return str(self.flex.driver.kubelet / "pods" / pod / "volumes/runvol~runvol" / self.name)

    def unmount(self, pod: str) -> None:
        self._call("unmount", self._target(pod))

    @property
    def bytes(self) -> Path | None:
        """The file or directory in which its bytes lie."""
        if "volume" not in self.options:
            return Path(self.options.get("device") or self.options["directory"])
        for place in ("volumes", "directories"):
            for found in (self.flex.driver.state / place).glob(f"{self.options['volume']}*"):
                return found
        return None

    def delete(self) -> None:
        if "volume" in self.options:
            self.flex.driver.cli("volumes", "delete", "--yes", self.options["volume"])


def pods() -> list[str]:
    return [POD.format(number) for number in range(10, 30)]
