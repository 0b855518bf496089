"""The runtime's end of NRI: it accepts the plugin, answers its registration, and calls it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

from guestmount import ttrpc
from guestmount.nri_mux import PLUGIN, RUNTIME, Mux
from runvol_proto import nri_pb2 as pb

PLUGIN_SERVICE = "nri.pkg.api.v1alpha1.Plugin"


class RuntimeSide:
    """The runtime's end of the socket: it accepts, answers the registration, and calls the plugin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.registered = threading.Event()
        self.mux: Mux | None = None

    def RegisterPlugin(self, request: pb.RegisterPluginRequest) -> pb.Empty:
        assert (request.plugin_name, request.plugin_idx) == ("runvol", "10")
        self.registered.set()
        return pb.Empty()

    def accept(self) -> ttrpc.Client:
        self.listener.settimeout(15)
        connection, _ = self.listener.accept()
        self.mux = Mux(connection)
        service = ttrpc.Service(pb.DESCRIPTOR.services_by_name["Runtime"], self)
        threading.Thread(target=ttrpc.Server(self.mux.stream(RUNTIME), [service]).serve, daemon=True).start()
        return ttrpc.Client(self.mux.stream(PLUGIN))

    def hang_up(self) -> None:
        assert self.mux is not None
        self.mux.close()
        self.registered.clear()

    def close(self) -> None:
        if self.mux is not None:
            self.mux.close()
        self.listener.close()
        self.path.unlink(missing_ok=True)

    def created(self, client: ttrpc.Client, pod: pb.PodSandbox, mounts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A bundle's mounts after CreateContainer: one at the same destination is replaced, in its place."""
        asked = [
            pb.Mount(destination=m["destination"], type=m["type"], source=m["source"], options=m["options"])
            for m in mounts
        ]
        request = pb.CreateContainerRequest(pod=pod, container=pb.Container(name="c", id="c1", mounts=asked))
        answer = client.call(PLUGIN_SERVICE, "CreateContainer", request, pb.CreateContainerResponse, 2.0)
        changed = {m.destination: {"destination": m.destination, "type": m.type, "source": m.source, "options": list(m.options)}
                   for m in answer.adjust.mounts}  # fmt: skip
        return [changed.pop(m["destination"], m) for m in mounts] + list(changed.values())
