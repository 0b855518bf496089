"""kubelet's side of a plugin's registration, as its plugin manager does it: an inotify watch would be quicker, no more.

A socket that is new, or another one at the same path, is asked who it is and told how that ended; one that is gone takes
its driver's name away, whoever else has it too; nothing is asked a second time, and what begins with a dot is not seen.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import grpc

from runvol_proto import plugin_registration_pb2 as wire

SERVICE = "pluginregistration.Registration"


class PluginWatcher:
    """Watches `registry` from `start` to `stop`; `names` are the drivers that are registered, with their sockets."""

    def __init__(self, registry: Path, refuse: Callable[[wire.PluginInfo], str] = lambda _info: "") -> None:
        self.registry, self.refuse = registry, refuse
        self.names: dict[str, str] = {}
        self.asked = 0
        self._seen: dict[str, tuple[tuple[int, int], str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> PluginWatcher:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self._look()

    def _look(self) -> None:
        # The number of an inode that is gone is given to the next one.
        now = {str(path): (facts.st_ino, facts.st_ctime_ns) for path in self.registry.glob("**/*")
               if not path.name.startswith(".") and (facts := _socket(path))}  # fmt: skip
        for path, (which, name) in [*self._seen.items()]:
            if now.get(path) != which:
                self.names.pop(name, None)
                del self._seen[path]
        for path, which in now.items():
            if path not in self._seen:
                self._seen[path] = which, self._registered(path)

    def _registered(self, path: str) -> str:
        self.asked += 1
        with grpc.insecure_channel(f"unix:{path}") as channel:
            try:
                info = _call(channel, "GetInfo", wire.InfoRequest(), wire.PluginInfo)
                wrong = "" if info.type == "CSIPlugin" and info.supported_versions else "no CSI plugin"
                wrong = wrong or self.refuse(info)
                if not wrong:
                    self.names[info.name] = info.endpoint
                status = wire.RegistrationStatus(plugin_registered=not wrong, error=wrong)
                _call(channel, "NotifyRegistrationStatus", status, wire.RegistrationStatusResponse)
            except grpc.RpcError:
                return ""
        return str(info.name)


def _call(channel: grpc.Channel, method: str, request: object, answer: type) -> object:
    ask = channel.unary_unary(f"/{SERVICE}/{method}", request_serializer=lambda one: one.SerializeToString(),
                              response_deserializer=answer.FromString)  # fmt: skip
    return ask(request, timeout=2)


def _socket(path: Path) -> os.stat_result | None:
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return None
    return facts if stat.S_ISSOCK(facts.st_mode) else None
