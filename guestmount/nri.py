"""The NRI plugin: an NFS volume of a Kata pod is mounted by its guest's kernel.

CRI always asks for a bind of the target, where our placeholder stands. A container that is about to be created gets an
`nfs`/`nfs4` mount in that bind's place, which Kata hands to its agent as it is. What the mount needs stands in the
claim; nothing is asked of a server, a store or an API here, since the runtime holds a lock over all pods meanwhile, and
starts the container unchanged if it has to wait.

A source is only a path, which any pod may name (hostPath). The export is given to the pod that the claim's target was
made for, by its uid and namespace, under a handler whose guests mount. A container of another pod that binds what a
guest has, a block volume too, is refused: Kata's shims would plug the disk into its guest as well. What host pods have
is no concern here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from blockdev import log_context, nfs, selinux
from guestmount import notices, placeholder, registration, ttrpc, ways
from guestmount.claims import SANDBOX, Claim, Claims, Target
from guestmount.detect import Runtime
from guestmount.errors import Refused, RuntimeUnknown
from guestmount.events import Events
from guestmount.handoff import KataDialect
from guestmount.nri_metrics import BY_GUEST, PLACEHOLDER, REFUSED, UNCHANGED, Book
from guestmount.nri_mux import PLUGIN, RUNTIME, Mux
from guestmount.pods import UNTRUSTED
from guestmount.survey import user_of
from guestmount.ways import guest_mount
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
    """The calls of the runtime. `claims` is read anew each time: publish is another process.

    `runtime_of` tells what a handler is that a claim does not name, the empty one for the runtime's default; it raises
    RuntimeUnknown. Without it only the claim's own handler is served.
    """

    def __init__(
        self, claims: Claims, runtime_of: Callable[[str], Runtime] | None = None, book: Book | None = None,
        events: Events | None = None,
    ) -> None:  # fmt: skip
        self._claims, self._runtime_of, self._book, self._events = claims, runtime_of, book or Book(), events

    def Configure(self, request: pb.ConfigureRequest) -> pb.ConfigureResponse:
        log.info("configured by", extra={"runtime": request.runtime_name, "version": request.runtime_version})
        return pb.ConfigureResponse(events=1 << (_CREATE_CONTAINER - 1))

    def Synchronize(self, request: pb.SynchronizeRequest) -> pb.SynchronizeResponse:
        """Containers that were created while the plugin was away have the read-only placeholder: told, not mended."""
        targets, _damaged = self._targets()
        pods = {pod.id: pod for pod in request.pods}
        for container in request.containers:
            pod = pods.get(container.pod_sandbox_id)
            for mount in container.mounts:
                claim, target = targets.get(mount.source, (None, None))
                if claim is None or target is None or not guest_mount.is_of_kata(claim, target):
                    continue
                theirs = pod is not None and bool(self._foreign(pod, mount.source, target))
                if not theirs and (pod is None or not self._handler_of_another(pod, target)):
                    self._missing(container, mount.source, target, pod)
        return pb.SynchronizeResponse(more=request.more)

    def _missing(self, container: pb.Container, path: str, target: Target, pod: pb.PodSandbox | None) -> None:
        """A container has the placeholder at `path`: it is counted, and its pod is told."""
        self._book.note(PLACEHOLDER)
        if self._events is not None:
            user = user_of(path, target, None)
            if not user.pod and pod is not None:  # a record that does not name it
                user = dataclasses.replace(user, namespace=pod.namespace, pod=pod.name)
            notices.volume_missing(self._events, user, container.name)
        log.error(
            "a container has the placeholder instead of its NFS volume; restart its pod",
            extra={"container": container.name, "id": container.id, "target": path},
        )

    def Shutdown(self, _request: pb.Empty) -> pb.Empty:
        return pb.Empty()

    def StateChange(self, _request: pb.StateChangeEvent) -> pb.Empty:
        return pb.Empty()

    def CreateContainer(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        """RpcError, with which the runtime refuses the container, for one that binds what another pod's guest has."""
        pod, container = request.pod, request.container.name
        with log_context.about(
            request_id=log_context.request_id(), rpc="CreateContainer", pod=f"{pod.namespace}/{pod.name}",
            pod_uid=pod.uid, container=container,
        ):  # fmt: skip
            return self._created(request)

    def _created(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        started, outcome = time.monotonic(), REFUSED
        response = pb.CreateContainerResponse()
        try:
            binds = [one for one in request.container.mounts if one.type == "bind" and one.source.startswith("/")]
            targets, damaged = self._targets() if binds else ({}, ())
            for mount in binds:
                self._bind(mount, request, response, targets, damaged)
            outcome = BY_GUEST if response.adjust.mounts else UNCHANGED
        finally:
            self._book.answered(outcome, time.monotonic() - started)
        if time.monotonic() - started > _SLOW:
            log.warning("creating a container was held up", extra={"seconds": round(time.monotonic() - started, 2)})
        return response

    def _bind(
        self, mount: pb.Mount, request: pb.CreateContainerRequest, response: pb.CreateContainerResponse,
        targets: Mapping[str, tuple[Claim, Target]], damaged: Sequence[Refused],
    ) -> None:  # fmt: skip
        path = next((one for one in _upwards(mount.source) if one in targets), "")
        if not path:
            self._check_known(mount.source, request.pod, damaged)
            return
        claim, target = targets[path]
        said = {"pod": f"{request.pod.namespace}/{request.pod.name}", "container": request.container.name,
                "volume": claim.volume, "handler": request.pod.runtime_handler}  # fmt: skip
        foreign = self._foreign(request.pod, path, target)
        if foreign:
            log.warning("a container is refused: it binds a target that was made for another pod",
                        extra={**said, "target": path, "made_for": target.pod, "why": foreign})  # fmt: skip
            raise ttrpc.RpcError(
                ttrpc.FAILED_PRECONDITION,
                f"{mount.source} is volume {claim.volume} of pod {target.pod}, which only that pod's guest may have, "
                f"and this container is not that pod's: {foreign}",
            )
        if path != mount.source or not guest_mount.is_of_kata(claim, target):
            return
        other = self._handler_of_another(request.pod, target)
        if other:
            log.warning("a container keeps the placeholder: its pod's runtime is another than its volume was made for",
                        extra={**said, "target": path, "made_for": target.pod, "why": other})  # fmt: skip
            return
        response.adjust.mounts.append(replacement(mount, claim, target, ips=list(request.pod.ips)))
        log.info("mounted by the guest", extra=said)

    def _check_known(self, source: str, pod: pb.PodSandbox, damaged: Sequence[Refused]) -> None:
        """A guest that starts on a placeholder whose claim cannot be read would never get its volume."""
        if not damaged or f"/pods/{pod.uid}/" not in source or not placeholder.is_listed(source):
            return
        if self._not_by_guest(_handler(pod)):
            return
        raise ttrpc.RpcError(ttrpc.UNAVAILABLE, f"which volume {source} is cannot be read ({damaged[0]})")

    def _targets(self) -> tuple[dict[str, tuple[Claim, Target]], Sequence[Refused]]:
        """What guests have, by target, and claims that cannot be read."""
        claims, damaged = self._claims.known()
        for error in damaged:
            log.error("a claim cannot be read: a container of its pods has the placeholder", extra={"why": str(error)})
        return {path: (claim, claim.targets[path]) for claim in claims for path in ways.in_guests(claim)}, damaged

    def _foreign(self, pod: pb.PodSandbox, path: str, target: Target) -> str:
        """Why a container of `pod` must not have what the target at `path` was made for; empty if it may."""
        # Where nobody named the pod, the target's own path stands for it.
        known = target.pod_uid and not target.pod_uid.startswith("/")
        if not pod.uid or (pod.uid != target.pod_uid if known else f"/pods/{pod.uid}/" not in path):
            return f"it is of the pod with the uid {pod.uid!r}"
        if target.pod_namespace and pod.namespace != target.pod_namespace:
            return f"it is of a pod in the namespace {pod.namespace!r}"
        return ""

    def _handler_of_another(self, pod: pb.PodSandbox, target: Target) -> str:
        """Why the pod's own guest does not mount it; empty if it does."""
        handler = _handler(pod)
        return "" if handler and handler == target.handler else self._not_by_guest(handler)

    def _not_by_guest(self, handler: str) -> str:
        """Why the pods of a handler mount nothing themselves; empty if their guests do.

        It may be another one than the claim's where that was an operator's word (`runtime: sandbox`).
        """
        if self._runtime_of is None:
            return f"its runtime handler is {handler!r}"
        try:
            runtime = self._runtime_of(handler)
        except RuntimeUnknown as error:
            return str(error)
        if (runtime.kind, runtime.dialect) != (SANDBOX, KataDialect.name):
            return f"its runtime handler {runtime.handler!r} starts no Kata guest"
        return ""


def _handler(pod: pb.PodSandbox) -> str:
    return pod.runtime_handler or ("untrusted" if pod.annotations.get(UNTRUSTED) == "true" else "")


def _upwards(path: str) -> Iterator[str]:
    """The path, and the directories above it."""
    while path not in ("/", ""):
        yield path
        path = os.path.dirname(path)


def replacement(mount: pb.Mount, claim: Claim, target: Target, *, ips: list[str]) -> pb.Mount:
    """The mount that takes the place of the placeholder's bind, at the same destination."""
    if claim.nfs is None:
        raise ttrpc.RpcError(ttrpc.INTERNAL, f"volume {claim.volume} is no NFS export")
    export, address = claim.nfs.export, claim.nfs.address
    export = dataclasses.replace(export, options=selinux.without(export.options))
    flags = [flag for flag in selinux.without(claim.use.mount_flags) if flag not in ("ro", "rw", "defaults")]
    # Of the pod's addresses the one of the server's family, for callbacks of version 4.0.
    client = next((ip for ip in ips if (":" in ip) == (":" in address)), _any(address))
    options = nfs.kernel_options(export, address, client)
    if export.version == "3" and claim.nfs.mount_port:
        options += [f"mountport={claim.nfs.mount_port}", "mountvers=3"]
    kept = [option for option in mount.options if option not in _OF_BINDS and option not in ("ro", "rro", "rw")]
    # `rro` is a bind's (recursiveReadOnly); below this mount there is no other.
    read_only = target.read_only or bool({"ro", "rro"} & {*mount.options})
    return pb.Mount(
        destination=mount.destination,
        type=export.fstype,
        source=export.source,
        options=[*options, *flags, *kept, "ro" if read_only else "rw"],
    )


def _any(address: str) -> str:
    return "::" if ":" in address else "0.0.0.0"


def serve(plugin: Plugin, run_dir: str, path: str, stop: threading.Event) -> None:
    """Stay connected with the runtime until `stop`; each end of the connection is followed by another try, for ever."""
    pause = 0.1
    while not stop.is_set():
        started = time.monotonic()
        try:
            with registration.opened(run_dir) as alive:
                try:
                    _connected(plugin, path, run_dir, alive, stop)
                finally:
                    registration.ended(alive)
            log.warning("the runtime closed the connection")
        except (OSError, ttrpc.RpcError, ttrpc.Closed) as error:
            log.warning("not connected with the runtime", extra={"socket": path, "why": str(error)})
        except Exception:
            # Whatever it is: without this thread no guest gets its volumes any more.
            log.exception("the connection with the runtime ended", extra={"socket": path})
        pause = 0.1 if time.monotonic() - started > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
        stop.wait(pause)


def _connected(plugin: Plugin, path: str, run_dir: str, alive: int, stop: threading.Event) -> None:
    """One connection's life."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(connection):
        connection.settimeout(_REGISTRATION)
        connection.connect(path)
        connection.settimeout(None)
        with contextlib.closing(Mux(connection)) as mux:
            _registered(mux, plugin, path, run_dir, alive, stop)


def _registered(mux: Mux, plugin: Plugin, path: str, run_dir: str, alive: int, stop: threading.Event) -> None:
    """Serve first, since the runtime may ask before it has answered the registration; return at the end of either."""
    service = ttrpc.Service(pb.DESCRIPTOR.services_by_name["Plugin"], plugin)
    server = ttrpc.Server(mux.stream(PLUGIN), [service])
    serving = threading.Thread(target=server.serve, name="nri", daemon=True)
    serving.start()
    client = ttrpc.Client(mux.stream(RUNTIME))
    request = pb.RegisterPluginRequest(plugin_name=NAME, plugin_idx=INDEX)
    client.call("nri.pkg.api.v1alpha1.Runtime", "RegisterPlugin", request, pb.Empty, _REGISTRATION)
    registration.begun(alive)
    log.info("registered with the runtime", extra={"socket": path})
    while serving.is_alive() and not stop.is_set() and registration.stands(alive, run_dir):
        serving.join(0.2)
