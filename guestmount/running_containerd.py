"""What the running containerd says of its runtime handlers, which its file may have been newer, or older, than.

CRI's `Status` with `verbose` has the CRI plugin's configuration in JSON as `info["config"]`: containerd's
internal/cri/server/status.go and internal/cri/config/config.go (2.x), pkg/cri of the same form (1.6 and 1.7, which have
`untrustedWorkloadRuntime` too). What is asked is remembered as long as that containerd lives: it makes its socket anew
whenever it starts, and reads no configuration after that.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from blockdev import Deadline, durable
from guestmount import containerd_readings
from guestmount.containerd_places import Places, Taken
from guestmount.containerd_readings import Readings
from guestmount.cri import Sandboxes
from guestmount.runtimes import ContainerdConfig, Handler

log = logging.getLogger("runvol.containerd")

_METHOD = "/runtime.v1.RuntimeService/Status"
# Bytes of an answer; one of containerd 2 has 4,000.
_LARGEST = 4 << 20
_MOST_HANDLERS = 1000
# Seconds of one question, and until one that was not answered is asked again.
_LONGEST, _PAUSE = 1.0, 5.0

_Text = Annotated[str, msgspec.Meta(max_length=4096)]
# Device, inode and time of change of a socket.
_Stamp = tuple[int, int, int]


class Silent(Exception):
    """Why the running containerd does not tell."""


class _Options(msgspec.Struct, rename="pascal"):
    config_path: _Text = ""
    binary_name: _Text = ""


class _Runtime(msgspec.Struct, rename="camel"):
    runtime_type: _Text = ""
    runtime_path: _Text = ""
    pod_annotations: list[_Text] | None = msgspec.field(default=None, name="PodAnnotations")
    options: _Options | None = None
    snapshotter: _Text = ""

    def handler(self, name: str) -> Handler:
        options = self.options or _Options()
        return Handler(
            name=name,
            runtime_type=self.runtime_type,
            runtime_path=self.runtime_path,
            config_path=options.config_path,
            binary=options.binary_name,
            pod_annotations=tuple(self.pod_annotations or ()),
            snapshotter=self.snapshotter,
        )


class _Runtimes(msgspec.Struct, rename="camel"):
    runtimes: Annotated[dict[_Text, _Runtime], msgspec.Meta(min_length=1, max_length=_MOST_HANDLERS)]
    default_runtime_name: _Text
    untrusted_workload_runtime: _Runtime | None = None


class _Config(msgspec.Struct):
    containerd: _Runtimes


class _Kept(msgspec.Struct, frozen=True):
    """An answer on the disk, for processes that kubelet starts for one call each."""

    socket: str
    stamp: _Stamp
    handlers: tuple[Handler, ...]
    default: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is known of kubelet's containerd; `doubt`: why the running one did not tell, `unread`: what is wrong with
    its file, in words that go on after its name. `differently`: its file as another version of it reads that, where
    that makes a difference. `others`: of those that it may be too, None for what cannot be read."""

    taken: Taken
    running: ContainerdConfig | None
    on_file: ContainerdConfig | None
    differently: tuple[ContainerdConfig, ...] = ()
    others: tuple[ContainerdConfig | None, ...] = ()
    doubt: str = ""
    unread: str = ""

    @property
    def believed(self) -> ContainerdConfig | None:
        """What runs, else what would."""
        return self.running or self.on_file

    def having(self, handler: str) -> ContainerdConfig | None:
        """What is believed of a handler: without it a pod that names it cannot start."""
        if self.running is not None or not handler:
            return self.believed
        return next((one for one in self.all if handler in one.handlers), self.believed)

    @property
    def handlers(self) -> dict[str, Handler]:
        """Those of the running one, else all that there may be."""
        found = [self.running] if self.running is not None else [one for one in self.possible if one is not None]
        return {name: handler for one in reversed(found) for name, handler in one.handlers.items()}

    @property
    def possible(self) -> tuple[ContainerdConfig | None, ...]:
        """What may count while the running one does not tell."""
        return self.on_file, *self.differently, *self.others

    @property
    def all(self) -> Iterator[ContainerdConfig]:
        """What is believed, what will be after containerd's next start, and what may be what counts."""
        yield from (one for one in (self.running, *self.possible) if one is not None)


class KubeletsContainerd:
    """`kept`: the file that an answer is kept in, of a directory that is gone with a reboot; empty for none. `roots`:
    kubelet's directories, which tell whether a containerd that is known by its socket alone is kubelet's."""

    def __init__(self, places: Places, kept: str = "", roots: Sequence[str] = ()) -> None:
        self._places, self._kept, self._roots = places, kept, roots
        self._lock = threading.Lock()
        # By the socket's path, of which there are few.
        self._known: dict[str, tuple[_Stamp, ContainerdConfig]] = {}
        self._silent: dict[str, tuple[_Stamp, float, str]] = {}

    def read(self, deadline: Deadline) -> Answer:
        """Both words, and no exception: who says nothing is None."""
        taken, doubts = self._places.taken(), []
        running, found = None, taken
        for one in (taken, *taken.others):
            try:
                running, found = self._says(one, deadline), one
                break
            except Silent as error:
                doubts.append(str(error))
        # Those of one socket are one containerd, of which is not known which file it reads.
        others = (one for one in (taken, *taken.others)
                  if one is not found and (running is None or one.endpoint == found.endpoint))  # fmt: skip
        said = self._on_file(found)
        return Answer(
            taken=found, running=running, on_file=next(iter(said.found), None), unread=said.why,
            doubt="" if running is not None else "; ".join(dict.fromkeys(doubts)),
            differently=said.found[1:],
            others=tuple(each for one in others for each in self._on_file(one).found or (None,)),
        )  # fmt: skip

    def _on_file(self, taken: Taken) -> Readings:
        if not taken.serves:
            return Readings(why="has its CRI plugin disabled (disabled_plugins), so kubelet's runtime is another one; "
                                "set paths.containerd_config and cri.endpoint")  # fmt: skip
        return containerd_readings.read(taken.config, self._places.root)

    def _says(self, taken: Taken, deadline: Deadline) -> ContainerdConfig:
        if not taken.endpoint:
            raise Silent("it is never asked (cri.endpoint is empty)")
        if not taken.certain:
            raise Silent(f"which socket the containerd of {taken.config} has is not known; set cri.endpoint")
        path = taken.endpoint.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise Silent(f"cri.endpoint {taken.endpoint!r} is no socket's path")
        stamp = _stamp(path)
        known = self._known.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        if not self._lock.acquire(timeout=min(_LONGEST, deadline.remaining())):
            raise Silent("it is being asked")
        try:
            known = self._known.get(path)
            if known is None or known[0] != stamp:
                known = stamp, self._from_disk(path, stamp) or self._asked(taken, path, stamp, deadline)
                self._known[path] = known
            return known[1]
        finally:
            self._lock.release()

    def _asked(self, taken: Taken, path: str, stamp: _Stamp, deadline: Deadline) -> ContainerdConfig:
        last, until, why = self._silent.get(path, ((0, 0, 0), 0.0, ""))
        if last == stamp and time.monotonic() < until:
            raise Silent(why)
        try:
            found = parsed(_status(path, min(_LONGEST, deadline.remaining())), f"the running containerd ({path})")
            if not taken.proved:
                asked = Sandboxes(endpoint=taken.endpoint, roots=self._roots, patience=_LONGEST)
                if doubt := asked.stranger(deadline):
                    raise Silent(doubt)
            if _stamp(path) != stamp:
                raise Silent(f"the containerd at {path} was started anew just now")
        except Silent as error:
            if why != str(error):  # one that never tells is told of once
                log.warning("what the running containerd says is passed over", extra={"why": str(error)[:500]})
            self._silent[path] = stamp, time.monotonic() + _PAUSE, str(error)
            raise
        self._to_disk(_Kept(socket=path, stamp=stamp, handlers=tuple(found.handlers.values()),
                            default=found.default_handler))  # fmt: skip
        return found

    def _from_disk(self, path: str, stamp: _Stamp) -> ContainerdConfig | None:
        if not self._kept:
            return None
        try:
            kept = msgspec.json.decode(durable.read(self._kept), type=_Kept)
        except (OSError, ValueError, RecursionError):
            return None  # asked anew, which replaces it
        if (kept.socket, kept.stamp) != (path, stamp):
            return None
        return _config({one.name: one for one in kept.handlers}, kept.default, f"the running containerd ({path})")

    def _to_disk(self, kept: _Kept) -> None:
        if not self._kept:
            return
        try:
            os.makedirs(os.path.dirname(self._kept), mode=0o700, exist_ok=True)
            durable.replace(self._kept, msgspec.json.encode(kept), beside=f"{self._kept}.")
        except OSError as error:
            log.warning("what the running containerd says is not kept", extra={"why": str(error)})


def parsed(content: str, source: str) -> ContainerdConfig:
    """From the JSON of `info["config"]`. Silent for what has another form than containerd gives it."""
    try:
        found = msgspec.json.decode(content, type=_Config).containerd
    except (ValueError, RecursionError) as error:
        raise Silent(f"its answer is no containerd's configuration: {error}") from error
    named = dict(found.runtimes)
    untrusted = found.untrusted_workload_runtime
    if untrusted is not None and untrusted.runtime_type:
        named.setdefault("untrusted", untrusted)
    return _config({name: one.handler(name) for name, one in named.items()}, found.default_runtime_name, source)


def _config(handlers: dict[str, Handler], default: str, source: str) -> ContainerdConfig:
    return ContainerdConfig(handlers=handlers, default_handler=default, source=source, running=True)


def _status(path: str, seconds: float) -> str:
    import grpc

    from runvol_proto import cri_pb2

    options = (("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", _LARGEST))
    try:
        with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
            ask = channel.unary_unary(
                _METHOD,
                request_serializer=cri_pb2.StatusRequest.SerializeToString,
                response_deserializer=cri_pb2.StatusResponse.FromString,
            )
            answer = ask(cri_pb2.StatusRequest(verbose=True), timeout=seconds)
    except grpc.RpcError as error:
        raise Silent(f"the containerd at {path} does not tell its runtime handlers ({error.code().name})") from error
    return str(answer.info.get("config", ""))


def _stamp(path: str) -> _Stamp:
    """Of a socket behind which somebody lives. A full backlog is somebody too, and want of a descriptor is no word of
    anybody's death."""
    try:
        found = os.stat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise Silent(f"{path} is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as tried:
            refused = tried.connect_ex(path)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
            raise Silent(f"{path}: {error.strerror or error}") from error
        refused = 0
    if refused not in (0, errno.EAGAIN):
        raise Silent(f"no containerd answers at {path}: {os.strerror(refused)}")
    return found.st_dev, found.st_ino, found.st_ctime_ns
