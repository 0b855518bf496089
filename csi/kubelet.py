"""The plugin introduces itself to kubelet: a socket in kubelet's `plugins_registry`, for one driver name.

kubelet looks into that directory at its start and hears of what appears there: it asks a new socket who it is, calls
NodeGetInfo, and says how that ended. It forgets the name with the socket, and asks no second time after a failure; so
the socket is made anew after one, and whenever it is not there any more. Two sockets for one name are worse than one:
the end of either takes the name away.

Format: proto/plugin_registration.proto.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc

from blockdev import daemon, durable
from runvol_proto import plugin_registration_pb2 as wire

log = logging.getLogger("runvol.registration")

_SERVICE = "pluginregistration.Registration"
_KIND, _VERSIONS = "CSIPlugin", ("1.0.0",)
# Seconds between two looks: until kubelet knows the name, and afterwards.
_SOON, _LATER = 1.0, 5.0
# Seconds that kubelet has for its answer before it is asked anew, the first time and at most.
_FIRST_WAIT, _LONGEST_WAIT = 10.0, 300.0
# Looks in a row that find the plugin without an answer before its name is taken back: a slow moment is none.
_SILENT = 3
# Sockets of others that are asked, and seconds that all of them together have for an answer.
_MOST, _ASKING = 64, 1.0
# Seconds before one that gave none is asked again, the first time and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0
# Seconds for the end of a registration.
_END = 5.0


def registry(setting: str, roots: Sequence[str]) -> str:
    """kubelet's directory for sockets, by the setting csi.plugins_registry; empty for none."""
    return os.path.join(roots[0], "plugins_registry") if setting == "auto" else setting


def sockets_of(name: str, registry: str) -> list[tuple[str, str]]:
    """The sockets that answer and register this name, and for which endpoint each does."""
    paths = [path for path, _inode, _changed in _sockets(registry) if daemon.answers(path)]
    found = zip(paths, _introductions(paths), strict=True)
    return [(path, str(info.endpoint)) for path, info in found if info is not None and _is(info, name)]


def told_at(run_dir: str, name: str) -> str:
    """The file that says how a driver's registration is: JSON with `driver` and `state`."""
    return os.path.join(run_dir, f"registration-{name}.json")


class Registration:
    """Keeps one driver name known to kubelet from `start` to `stop`, however often either of the two goes and comes."""

    def __init__(self, name: str, *, endpoint: str, registry: str, alive: Callable[[], bool], told: str = "") -> None:
        """`endpoint`: the path of the driver's socket, as kubelet sees it; `alive`: whether it answers; `registry`:
        kubelet's directory; `told`: a file that says how it is, for `runvol doctor`."""
        self._name, self._endpoint, self._registry = name, endpoint, registry
        self._alive, self._told = alive, told
        self._path = os.path.join(registry, f"{name}-reg.sock")
        # kubelet passes over what begins with a dot, so it sees a socket that listens already.
        self._hidden = os.path.join(registry, f".{name}-reg.sock")
        self._stop, self._kick = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"registration of {name}", daemon=True)
        self._server: grpc.Server | None = None
        self._inode = 0
        self._wait, self._until = _FIRST_WAIT, 0.0
        self._others = _Others(name)
        self._seen_other = ""
        self._silent = 0
        self._registered, self._state, self._trouble = False, "", ""
        self._times = 0

    @property
    def registered(self) -> int:
        """How often kubelet has said so, which does so whenever it starts; 0 while the socket that is there is not."""
        return self._times if self._registered else 0

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Tell it to end, without a wait for that."""
        self._stop.set()
        self._kick.set()

    def stop(self) -> None:
        """Nobody answers any more. The socket's file stays: with it kubelet would forget the name, and write so to the
        API, and a node that goes down in order and comes up while the API is away could not take that back. What hangs
        meanwhile ends with the process."""
        self.end()
        self._thread.join(_END)
        if self._thread.is_alive():
            log.warning("registration with kubelet is left as it is", extra={"driver": self._name})

    def _run(self) -> None:
        while True:
            self._kick.clear()
            if self._stop.is_set():
                break
            self._done(self._step)
            self._kick.wait(_LATER if self._registered else _SOON)
        self._done(self._stop_server)
        self._say("the plugin has ended; kubelet keeps its name for the next one")

    def _done(self, step: Callable[[], None]) -> None:
        """Whatever comes of it; the same trouble is told once."""
        now = ""
        try:
            step()
        except Exception as error:
            now = str(error) or type(error).__name__
            if now != self._trouble:
                foreseen, facts = isinstance(error, OSError), {"driver": self._name, "why": now}
                log.warning("registration with kubelet fails; it is tried again", extra=facts, exc_info=not foreseen)
            if not self._registered:
                self._say(f"not registered: {now}")
        self._trouble = now

    def _step(self) -> None:
        if len(os.fsencode(self._hidden)) > daemon.LONGEST_PATH:
            self._say(f"not registered: {self._hidden} would have more than the {daemon.LONGEST_PATH} bytes of a unix "
                      "socket's path; give kubelet a shorter --root-dir (here: node.roots)")  # fmt: skip
        elif not self._lives():
            self._withdraw()
            self._say(f"not registered: {self._endpoint} does not answer")
        elif not os.path.isdir(self._registry):
            self._withdraw()
            self._say(f"not registered: {self._registry} is not there; kubelet makes it, or node.roots names another "
                      "directory than kubelet's")  # fmt: skip
        else:
            self._beside(self._others.found(self._registry, self._inode))

    def _lives(self) -> bool:
        self._silent = 0 if self._alive() else self._silent + 1
        return self._silent == 0 or (self._inode != 0 and self._silent < _SILENT)

    def _beside(self, other: str) -> None:
        """`other`: a socket of somebody else's for the same name; empty for none."""
        gone, self._seen_other = bool(self._seen_other and not other), other
        if other:
            self._say(f"{other} registers {self._name} as well: remove it (a node-driver-registrar beside runvol?); "
                      "kubelet forgets the name with whichever of the two ends first"
                      if self._inode else f"not registered: {other} registers {self._name} already")  # fmt: skip
        elif not self._stop.is_set() and (
            gone or not self._stands() or (not self._registered and time.monotonic() > self._until)
        ):
            self._offer()

    def _stands(self) -> bool:
        try:
            return self._inode != 0 and os.lstat(self._path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def _offer(self) -> None:
        """A new socket in kubelet's directory, in place of the last one."""
        self._stop_server()
        server = grpc.server(futures.ThreadPoolExecutor(1, thread_name_prefix="registration"))
        server.add_generic_rpc_handlers((self._handler(),))
        self._server, self._inode, self._registered = server, 0, False  # to be stopped, should a step fail
        daemon.listen(server, self._hidden)
        server.start()
        inode = os.lstat(self._hidden).st_ino
        os.rename(self._hidden, self._path)
        self._inode = inode
        self._until, self._wait = time.monotonic() + self._wait, min(self._wait * 2, _LONGEST_WAIT)
        self._say(f"waiting for kubelet to look at {self._path}")

    def _withdraw(self) -> None:
        if self._stands():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._stop_server()
        self._inode, self._registered, self._wait = 0, False, _FIRST_WAIT

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait(1)
            self._server = None

    def _handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        return grpc.method_handlers_generic_handler(
            _SERVICE,
            {
                "GetInfo": grpc.unary_unary_rpc_method_handler(
                    self._info, wire.InfoRequest.FromString, wire.PluginInfo.SerializeToString
                ),
                "NotifyRegistrationStatus": grpc.unary_unary_rpc_method_handler(
                    self._status, wire.RegistrationStatus.FromString, wire.RegistrationStatusResponse.SerializeToString
                ),
            },
        )

    def _info(self, _request: wire.InfoRequest, _context: object) -> wire.PluginInfo:
        return wire.PluginInfo(type=_KIND, name=self._name, endpoint=self._endpoint, supported_versions=_VERSIONS)

    def _status(self, status: wire.RegistrationStatus, _context: object) -> wire.RegistrationStatusResponse:
        if status.plugin_registered:
            self._registered, self._wait, self._times = True, _FIRST_WAIT, self._times + 1
            self._say("registered")
        else:
            self._registered = False
            self._say(f"not registered: kubelet says: {status.error[:1000]}")
        self._kick.set()
        return wire.RegistrationStatusResponse()

    def _say(self, state: str) -> None:
        if state == self._state:
            return
        self._state = state
        level = logging.INFO if state in ("registered",) or state.startswith("waiting") else logging.WARNING
        log.log(level, "registration with kubelet", extra={"driver": self._name, "state": state})
        if self._told:
            with contextlib.suppress(OSError):
                content = json.dumps({"driver": self._name, "state": state}).encode()
                durable.replace(self._told, content, beside=f"{self._told}.", synced=False)


@dataclass
class _Other:
    """`is_same`: whether it registers our name; None until it has said. When it is asked again, and the pause before
    the time after."""

    is_same: bool | None = None
    again: float = 0.0
    pause: float = _FIRST_PAUSE


class _Others:
    """The sockets in kubelet's directory that are not ours, each asked until it has said once who it is.

    What serves them may hang: it is asked ever more rarely, and all that are asked have their second at the same time.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[tuple[str, int, int], _Other] = {}

    def found(self, registry: str, own: int) -> str:
        """The path of one that somebody has, and that registers our name; empty where there is none. `own`: our
        socket's inode."""
        self._known = {key: self._known.get(key) or _Other() for key in _sockets(registry) if key[1] != own}
        self._ask()
        same = (path for (path, *_), one in self._known.items() if one.is_same and daemon.answers(path))
        return next(same, "")

    def _ask(self) -> None:
        now = time.monotonic()
        due = [(path, one) for (path, *_), one in self._known.items()
               if one.is_same is None and now >= one.again and daemon.answers(path)]  # fmt: skip
        for (_path, one), info in zip(due, _introductions([path for path, _ in due]), strict=True):
            if info is not None:
                one.is_same = _is(info, self._name)
            one.again, one.pause = now + one.pause, min(2 * one.pause, _LONGEST_PAUSE)


def _sockets(registry: str) -> Iterator[tuple[str, int, int]]:
    """As kubelet finds them: at any depth, none that begins with a dot."""
    left = _MOST
    for directory, inner, names in os.walk(registry):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):
                facts = os.lstat(os.path.join(directory, name))
                if stat.S_ISSOCK(facts.st_mode):
                    yield os.path.join(directory, name), facts.st_ino, facts.st_ctime_ns
                    left -= 1
                    if not left:
                        return


def _introductions(paths: Sequence[str]) -> list[wire.PluginInfo | None]:
    """How each of these sockets introduces itself, asked at the same time; None where it does not."""
    with contextlib.ExitStack() as channels:
        asked = [
            channels.enter_context(grpc.insecure_channel(f"unix:{path}"))
            .unary_unary(
                f"/{_SERVICE}/GetInfo",
                request_serializer=wire.InfoRequest.SerializeToString,
                response_deserializer=wire.PluginInfo.FromString,
            )
            .future(wire.InfoRequest(), timeout=_ASKING)
            for path in paths
        ]
        return [_introduction(one) for one in asked]


def _introduction(asked: Any) -> wire.PluginInfo | None:
    try:
        info: wire.PluginInfo = asked.result()
    except grpc.RpcError:
        return None
    return info


def _is(info: wire.PluginInfo, name: str) -> bool:
    return bool(info.type == _KIND and info.name == name)
