"""The NRI plugin: an NFS volume of a Kata pod is mounted by its guest's kernel.

CRI always asks for a bind of the target, where our placeholder stands. A container that is about to be created gets an
`nfs`/`nfs4` mount in that bind's place, which Kata hands to its agent as it is. What the mount needs stands in the
claim; nothing is asked of a server, a store or an API here, since the runtime holds a lock over all pods meanwhile, and
starts the container unchanged if it has to wait.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator

from blockdev import nfs
from guestmount import registration, ttrpc
from guestmount.claims import Claim, Claims, Target
from guestmount.handoff import KataDialect
from guestmount.nri_mux import PLUGIN, RUNTIME, Mux
from runvol_proto import nri_pb2 as pb

log = logging.getLogger("runvol.nri")

NAME, INDEX = "runvol", "10"
_CREATE_CONTAINER = 4
# The runtime waits two seconds, and then starts the container unchanged.
_SLOW = 0.5
_REGISTRATION, _LONGEST_PAUSE = 5.0, 10.0
# What only a bind mount has.
_OF_BINDS = frozenset({"bind", "rbind", "private", "rprivate", "shared", "rshared", "slave", "rslave"})


class Plugin:
    """The calls of the runtime. `claims` is read anew each time: publish is another process."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def Configure(self, request: pb.ConfigureRequest) -> pb.ConfigureResponse:
        log.info("configured by", extra={"runtime": request.runtime_name, "version": request.runtime_version})
        return pb.ConfigureResponse(events=1 << (_CREATE_CONTAINER - 1))

    def Synchronize(self, request: pb.SynchronizeRequest) -> pb.SynchronizeResponse:
        """Containers that were created while the plugin was away have the read-only placeholder: told, not mended."""
        exports = dict(self._exports())
        for container in request.containers:
            for mount in container.mounts:
                if mount.source in exports:
                    log.error(
                        "a container has the placeholder instead of its NFS volume; restart its pod",
                        extra={"container": container.name, "id": container.id, "target": mount.source},
                    )
        return pb.SynchronizeResponse(more=request.more)

    def Shutdown(self, _request: pb.Empty) -> pb.Empty:
        return pb.Empty()

    def StateChange(self, _request: pb.StateChangeEvent) -> pb.Empty:
        return pb.Empty()

    def CreateContainer(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        started = time.monotonic()
        response = pb.CreateContainerResponse()
        exports: dict[str, tuple[Claim, Target]] | None = None
        for mount in request.container.mounts:
            if mount.type != "bind" or not mount.source.startswith("/"):
                continue
            exports = dict(self._exports()) if exports is None else exports
            found = exports.get(mount.source)
            if found is not None:
                response.adjust.mounts.append(replacement(mount, *found, ips=list(request.pod.ips)))
                log.info("mounted by the guest", extra={"pod": f"{request.pod.namespace}/{request.pod.name}",
                                                        "container": request.container.name, "volume": found[0].volume,
                                                        "handler": request.pod.runtime_handler})  # fmt: skip
        if time.monotonic() - started > _SLOW:
            log.warning("creating a container was held up", extra={"seconds": round(time.monotonic() - started, 2)})
        return response

    def _exports(self) -> Iterator[tuple[str, tuple[Claim, Target]]]:
        """Targets whose NFS volume a Kata guest mounts."""
        claims, damaged = self._claims.readable()
        for error in damaged:
            log.error("a claim cannot be read: a container of its pods has the placeholder", extra={"why": str(error)})
        for claim in claims:
            for path, target in claim.targets.items():
                if claim.nfs is not None and target.dialect == KataDialect.name:
                    yield path, (claim, target)


def replacement(mount: pb.Mount, claim: Claim, target: Target, *, ips: list[str]) -> pb.Mount:
    """The mount that takes the place of the placeholder's bind, at the same destination."""
    if claim.nfs is None:
        raise ttrpc.RpcError(ttrpc.INTERNAL, f"volume {claim.volume} is no NFS export")
    export, address = claim.nfs.export, claim.nfs.address
    flags = [flag for flag in claim.use.mount_flags if flag not in ("ro", "rw", "defaults")]
    # Of the pod's addresses the one of the server's family, for callbacks of version 4.0.
    client = next((ip for ip in ips if (":" in ip) == (":" in address)), _any(address))
    options = nfs.kernel_options(export, address, client)
    if export.version == "3" and claim.nfs.mount_port:
        options += [f"mountport={claim.nfs.mount_port}", "mountvers=3"]
    kept = [option for option in mount.options if option not in _OF_BINDS and option not in ("ro", "rw")]
    read_only = target.read_only or "ro" in mount.options
    return pb.Mount(
        destination=mount.destination,
        type=export.fstype,
        source=export.source,
        options=[*options, *flags, *kept, "ro" if read_only else "rw"],
    )


def _any(address: str) -> str:
    return "::" if ":" in address else "0.0.0.0"


def serve(claims: Claims, run_dir: str, path: str, stop: threading.Event) -> None:
    """Stay connected with the runtime until `stop`; each end of the connection is followed by another try, for ever."""
    pause = 0.1
    with registration.opened(run_dir) as alive:
        while not stop.is_set():
            started = time.monotonic()
            try:
                _connected(Plugin(claims), path, alive, stop)
                log.warning("the runtime closed the connection")
            except (OSError, ttrpc.RpcError, ttrpc.Closed) as error:
                log.warning("not connected with the runtime", extra={"socket": path, "why": str(error)})
            finally:
                registration.ended(alive)
            pause = 0.1 if time.monotonic() - started > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
            stop.wait(pause)


def _connected(plugin: Plugin, path: str, alive: int, stop: threading.Event) -> None:
    """One connection's life: serve first, since the runtime may ask before it has answered the registration."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_REGISTRATION)
    connection.connect(path)
    connection.settimeout(None)
    mux = Mux(connection)
    service = ttrpc.Service(pb.DESCRIPTOR.services_by_name["Plugin"], plugin)
    server = ttrpc.Server(mux.stream(PLUGIN), [service])
    serving = threading.Thread(target=server.serve, name="nri", daemon=True)
    serving.start()
    with contextlib.closing(mux):
        client = ttrpc.Client(mux.stream(RUNTIME))
        request = pb.RegisterPluginRequest(plugin_name=NAME, plugin_idx=INDEX)
        client.call("nri.pkg.api.v1alpha1.Runtime", "RegisterPlugin", request, pb.Empty, _REGISTRATION)
        registration.begun(alive)
        log.info("registered with the runtime", extra={"socket": path})
        while serving.is_alive() and not stop.is_set():
            serving.join(0.2)
