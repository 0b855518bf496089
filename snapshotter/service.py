"""containerd's snapshots service.

What the store alone can answer has a lane of its own (`workers`) and never waits behind what makes devices, nor that
behind what measures them. Every call ends within its limit, although containerd sets no deadline: what waits for
another call, for a device or for the pool gives up by itself and says why. A thread that the kernel keeps in
device-mapper cannot; after its limit the caller is released all the same (CANCELLED), the log names the call, and
another thread takes its place. Other calls do not notice. A List goes on for as long as it is read.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from blockdev import Deadline, sentences
from runvol_proto import containerd_snapshots_pb2 as pb
from runvol_proto import grpc_health_pb2 as health_pb
from snapshotter import wire
from snapshotter.background import Background
from snapshotter.errors import SnapshotterError, TookTooLong, Unavailable
from snapshotter.model import Kind, Snapshot
from snapshotter.node import Node
from snapshotter.workers import Worker, Workers, aside, current

log = logging.getLogger("runvol.snapshotter")
NAME = "containerd.services.snapshots.v1.Snapshots"
LENDING = "runvol.snapshotter.v1.Lending"
# Of one message of a List: how many snapshots at the most, and bytes unless one alone has more.
_PAGE, _PAGE_BYTES = 100, 1 << 20
# A call that takes longer is worth a line, in seconds.
_SLOW = 5.0
# How long after its limit a call may still end by itself, in seconds.
_GRACE = 1.0
# How long a List may stand still, and how long it may take in all, in seconds; how many there may be at once, and for
# how long one stands still at least before a new one takes its place then.
_STILL, _LONGEST, _LISTS, _SURELY = 7.0, 300.0, 32, 1.0
_QUICK = ("Mounts", "Remove", "Stat", "Update", "Cleanup")
Observer = Callable[[str, str, float], None]


@dataclass
class _Running:
    name: str
    key: str
    until: float
    context: grpc.ServicerContext
    worker: Worker | None
    released: bool = False
    # A List whose page is not taken yet.
    sending: bool = False


class Service:
    """The RPCs over a node's snapshotter. `limit` is the longest that a call may take, in seconds.

    `quick` are the threads for what the store alone can answer, `reading` those for List, `measuring` those for Usage;
    without them `workers` does all.
    """

    def __init__(
        self, node: Node, workers: Workers, *, limit: float, observe: Observer | None = None,
        background: Background | None = None, quick: Workers | None = None, reading: Workers | None = None,
        measuring: Workers | None = None,
    ) -> None:  # fmt: skip
        self._background = background or Background()
        self._node, self._limit, self._observe = node, limit, observe
        self._workers, self._quick = workers, quick or workers
        self._lanes = {"List": reading or workers, "Usage": measuring or workers} | dict.fromkeys(_QUICK, self._quick)
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._ending = threading.Lock()
        self._stop = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()
        self._background.started(self._watchdog)

    def close(self) -> None:
        self._stop.set()

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What a server registers."""
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._unary(name, getattr(self, name)), request_deserializer=request.FromString,
                response_serializer=response.SerializeToString,
            )
            for name, request, response in (
                ("Prepare", pb.PrepareSnapshotRequest, pb.PrepareSnapshotResponse),
                ("View", pb.ViewSnapshotRequest, pb.ViewSnapshotResponse),
                ("Mounts", pb.MountsRequest, pb.MountsResponse),
                ("Commit", pb.CommitSnapshotRequest, Empty),
                ("Remove", pb.RemoveSnapshotRequest, Empty),
                ("Stat", pb.StatSnapshotRequest, pb.StatSnapshotResponse),
                ("Update", pb.UpdateSnapshotRequest, pb.UpdateSnapshotResponse),
                ("Usage", pb.UsageRequest, pb.UsageResponse),
                ("Cleanup", pb.CleanupRequest, Empty),
            )
        }  # fmt: skip
        methods["List"] = grpc.unary_stream_rpc_method_handler(
            _on(self._lane("List"), self._reading), request_deserializer=pb.ListSnapshotsRequest.FromString,
            response_serializer=pb.ListSnapshotsResponse.SerializeToString,
        )  # fmt: skip
        return grpc.method_handlers_generic_handler(NAME, methods)

    def lending(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What `runvol images make` asks for, in containerd's messages; see `lending`."""
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._unary(name, getattr(self, name)), request_deserializer=request.FromString,
                response_serializer=response.SerializeToString,
            )
            for name, request, response in (
                ("Lend", pb.MountsRequest, pb.MountsResponse),
                ("GiveBack", pb.RemoveSnapshotRequest, Empty),
            )
        }  # fmt: skip
        return grpc.method_handlers_generic_handler(LENDING, methods)

    def health(self) -> grpc.GenericRpcHandler[Any, Any]:
        """gRPC's health service: SERVING while calls are answered, whatever the pool's state is, and while what runs
        behind them goes on: without it nothing is deleted or extended."""

        def check(_request: Any, _context: grpc.ServicerContext) -> Message:
            troubles = self._background.troubles()
            answers = health_pb.HealthCheckResponse
            return answers(status=answers.NOT_SERVING if troubles else answers.SERVING)

        handler = grpc.unary_unary_rpc_method_handler(
            _on(self._quick, check), request_deserializer=health_pb.HealthCheckRequest.FromString,
            response_serializer=health_pb.HealthCheckResponse.SerializeToString,
        )  # fmt: skip
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})

    def _lane(self, name: str) -> Workers:
        return self._lanes.get(name, self._workers)

    def _unary(
        self, name: str, method: Callable[[Any, Deadline], Message]
    ) -> Callable[[Any, grpc.ServicerContext], Message]:
        def call(request: Any, context: grpc.ServicerContext) -> Message:
            # One look at the clock before and one after: in a virtual machine a look may be a system call.
            started, number, running = self._begin(name, getattr(request, "key", ""), context)
            self._node.activity.begin()
            try:
                try:
                    _refuse_if_all_hang(running)
                    response = method(request, Deadline(running.until, self._limit))
                finally:
                    ended = time.monotonic()
                    self._node.activity.end(ended)
                    self._ended(number, running)
            except Exception as error:
                self._refuse(name, running.key, number, ended - started, error, context)
            self._done(name, running.key, ended - started)
            return response

        return _on(self._lane(name), call)

    def _begin(self, name: str, key: str, context: grpc.ServicerContext) -> tuple[float, int, _Running]:
        """When the call came, its number, and what the watchdog knows of it."""
        worker, number = current(), next(self._numbers)
        started = worker.arrived if worker is not None else time.monotonic()
        running = self._running[number] = _Running(name, key, started + self._limit, context, worker)
        return started, number, running

    def _watch(self) -> None:
        """Release callers whose call hangs in the kernel, and let others go before what takes long."""
        lanes = {self._workers, *self._lanes.values()}
        while not self._stop.wait(1.0):
            with self._background.survived("releasing calls that hang"):
                self._release_hanging(time.monotonic())
            with self._background.survived("letting calls go before those that take long"):
                for lane in lanes:
                    lane.look()

    def _release_hanging(self, now: float) -> None:
        for number, one in list(self._running.items()):
            if now <= one.until + _GRACE or one.released:
                continue
            if one.sending:
                self._end_list(one)
                continue
            one.released = True
            log.error("call hangs in the kernel; its caller is released", extra=_facts(one.name, one.key))
            try:
                with self._ending:  # there is room for others before the caller knows
                    if number in self._running and one.worker is not None:
                        one.worker.lane.give_up(one.worker)
            finally:
                one.context.cancel()  # type: ignore[no-untyped-call]

    def _end_list(self, one: _Running) -> None:
        one.released = True
        log.warning("a List that is not read on is ended", extra={"rpc": one.name})
        one.context.cancel()  # type: ignore[no-untyped-call]

    def _ended(self, number: int, running: _Running) -> None:
        with self._ending:
            del self._running[number]
        if running.released and not running.sending:
            log.warning("a call that hung in the kernel has ended", extra=_facts(running.name, running.key))

    def _done(self, name: str, key: str, seconds: float) -> None:
        if self._observe is not None:
            self._observe(name, "OK", seconds)
        level = logging.WARNING if seconds > _SLOW else logging.DEBUG
        if log.isEnabledFor(level):
            log.log(level, "call done", extra=_facts(name, key, seconds))

    def _refuse(
        self, name: str, key: str, number: int, seconds: float, error: Exception, context: grpc.ServicerContext
    ) -> NoReturn:
        code = wire.code_of(error)
        if self._observe is not None:
            self._observe(name, code.name, seconds)
        facts = {**_facts(name, key, seconds), "code": code.name}
        message = sentences.short(str(error))
        if code is grpc.StatusCode.INTERNAL:
            log.error("call failed", extra={**facts, "call": number}, exc_info=error)
            if not isinstance(error, SnapshotterError):
                # The same words each time, as kubelet counts equal events: the call's number is for the log.
                message = sentences.short(f"{type(error).__name__}: {error}", "; see the snapshotter's log")
        elif code is not grpc.StatusCode.NOT_FOUND:
            log.warning("call refused", extra={**facts, "reason": message})
        context.abort(code, message)
        raise AssertionError("abort returned")

    def Prepare(self, request: Any, deadline: Deadline) -> Message:
        self._node.wait_for_pool(deadline)
        found = self._node.snapshots.prepare(request.key, request.parent, request.labels, deadline)
        return pb.PrepareSnapshotResponse(mounts=wire.mounts(found))

    def View(self, request: Any, deadline: Deadline) -> Message:
        self._node.wait_for_pool(deadline)
        found = self._node.snapshots.prepare(request.key, request.parent, request.labels, deadline, kind=Kind.VIEW)
        return pb.ViewSnapshotResponse(mounts=wire.mounts(found))

    def Mounts(self, request: Any, deadline: Deadline) -> Message:
        if not self._node.ready:
            with aside():
                self._node.wait_for_pool(deadline)
        return pb.MountsResponse(mounts=wire.mounts(self._node.snapshots.mounts(request.key, deadline)))

    def Commit(self, request: Any, deadline: Deadline) -> Message:
        self._node.wait_for_pool(deadline)
        self._node.snapshots.commit(request.name, request.key, request.labels, request.parent, deadline)
        return Empty()

    def Remove(self, request: Any, deadline: Deadline) -> Message:
        self._node.snapshots.remove(request.key, deadline)
        return Empty()

    def Stat(self, request: Any, deadline: Deadline) -> Message:
        return pb.StatSnapshotResponse(info=wire.info(self._node.snapshots.stat(request.key, deadline)))

    def Update(self, request: Any, deadline: Deadline) -> Message:
        paths = list(request.update_mask.paths) if request.HasField("update_mask") else None
        row = self._node.snapshots.update(request.info.name, request.info.labels, paths, deadline)
        return pb.UpdateSnapshotResponse(info=wire.info(row))

    def Usage(self, request: Any, deadline: Deadline) -> Message:
        self._node.wait_for_pool(deadline)
        size, inodes = self._node.snapshots.usage(request.key, deadline)
        return pb.UsageResponse(size=size, inodes=inodes)

    def Cleanup(self, _request: Any, _deadline: Deadline) -> Message:
        """Deletion goes on by itself; this only asks for it now."""
        self._node.cleanup()
        return Empty()

    def Lend(self, request: Any, deadline: Deadline) -> Message:
        self._node.wait_for_pool(deadline)
        return pb.MountsResponse(mounts=wire.mounts([self._node.lender.lend(request.key, deadline)]))

    def GiveBack(self, request: Any, _deadline: Deadline) -> Message:
        """`key` is the node that was lent."""
        self._node.lender.give_back(request.key)
        self._node.cleanup()
        return Empty()

    def _reading(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.ListSnapshotsResponse]:
        started, number, running = self._begin("List", "", context)
        try:
            _refuse_if_all_hang(running)
            self._make_room()
            for page in self._listing(list(request.filters), running):
                now = time.monotonic()
                running.until, running.sending = min(now + _STILL, started + _LONGEST), True
                with aside():
                    yield page
                running.until, running.sending = now + self._limit, False
        except Exception as error:
            self._refuse("List", "", number, time.monotonic() - started, error, context)
        finally:
            self._ended(number, running)
        self._done("List", "", time.monotonic() - started)

    def _listing(self, filters: list[str], running: _Running) -> Iterator[pb.ListSnapshotsResponse]:
        for page in self._node.snapshots.list(filters):
            if time.monotonic() > running.until:
                raise TookTooLong(f"List found nothing for {self._limit:.0f} s; ask with simpler filters")
            yield from _answers(page)

    def _make_room(self) -> None:
        """Of too many Lists the one that has stood still for longest is ended. Unavailable if all are read."""
        lists = [one for one in list(self._running.values()) if one.name == "List" and not one.released]
        if len(lists) <= _LISTS:
            return
        surely = time.monotonic() - _SURELY
        still = [one for one in lists if one.sending and one.until - _STILL < surely]
        if not still:
            raise Unavailable(f"{_LISTS} Lists are being read already; try again when one has ended")
        self._end_list(min(still, key=lambda one: one.until))


def _facts(name: str, key: str, seconds: float | None = None) -> dict[str, object]:
    """Of a call, for the log."""
    facts: dict[str, object] = {"rpc": name, "key": sentences.short(key)}
    return facts if seconds is None else {**facts, "ms": round(seconds * 1000, 2)}


def _answers(page: Sequence[Snapshot]) -> Iterator[pb.ListSnapshotsResponse]:
    """In messages that gRPC takes, whatever labels the snapshots have: a pod's annotations become its sandbox's."""
    found: list[Any] = []
    length = 0
    for info in map(wire.info, page):
        if found and (len(found) == _PAGE or length + info.ByteSize() > _PAGE_BYTES):
            yield pb.ListSnapshotsResponse(info=found)
            found, length = [], 0
        found.append(info)
        length += info.ByteSize()
    if found:
        yield pb.ListSnapshotsResponse(info=found)


def _on(lane: Workers, call: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
    """The same, to be run by this lane."""

    def on_lane(request: Any, context: grpc.ServicerContext) -> Any:
        return call(request, context)

    on_lane.experimental_thread_pool = lane  # type: ignore[attr-defined]
    return on_lane


def _refuse_if_all_hang(running: _Running) -> None:
    if running.worker is not None and running.worker.refuses:
        raise Unavailable("too many calls hang in the kernel; see the snapshotter's log, which names them")
