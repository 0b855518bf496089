"""containerd's snapshots service: one event loop, short answers in it, everything that may wait in threads.

Each call ends within its limit whatever the kernel does: a thread that hangs in device-mapper is left behind, and the
caller reads which call it was. containerd itself sets no deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from blockdev import Deadline
from runvol_proto import containerd_snapshots_pb2 as pb
from runvol_proto import grpc_health_pb2 as health_pb
from snapshotter import wire
from snapshotter.errors import SnapshotterError, TookTooLong
from snapshotter.model import Kind
from snapshotter.node import Node

log = logging.getLogger("runvol.snapshotter")
NAME = "containerd.services.snapshots.v1.Snapshots"
_PAGE = 100
_QUIET = frozenset({"Stat", "Mounts", "Usage", "List"})
T = TypeVar("T")
Observer = Callable[[str, str, float], None]


class Service:
    """The RPCs over a node's snapshotter. `limit` is the longest that a call may take, in seconds."""

    def __init__(self, node: Node, *, limit: float, workers: int = 32, observe: Observer | None = None) -> None:
        self._node, self._limit = node, limit
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="snapshots")
        self._observe = observe
        self._numbers = itertools.count(1)

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
            self._listing, request_deserializer=pb.ListSnapshotsRequest.FromString,
            response_serializer=pb.ListSnapshotsResponse.SerializeToString,
        )  # fmt: skip
        return grpc.method_handlers_generic_handler(NAME, methods)

    def health(self) -> grpc.GenericRpcHandler[Any, Any]:
        """gRPC's health service: SERVING while the loop turns, whatever the pool's state is."""

        async def check(_request: Any, _context: grpc.aio.ServicerContext[Any, Any]) -> Message:
            return health_pb.HealthCheckResponse(status=health_pb.HealthCheckResponse.SERVING)

        handler = grpc.unary_unary_rpc_method_handler(
            check, request_deserializer=health_pb.HealthCheckRequest.FromString,
            response_serializer=health_pb.HealthCheckResponse.SerializeToString,
        )  # fmt: skip
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})

    def _unary(
        self, name: str, method: Callable[[Any], Awaitable[Message]]
    ) -> Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Message]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
            started = time.perf_counter()
            self._node.activity.begin()
            try:
                response = await method(request)
            except Exception as error:
                await self._refuse(name, request, started, error, context)
                raise AssertionError("abort returned") from error
            finally:
                self._node.activity.end()
            self._done(name, request, started, "OK")
            return response

        return call

    def _done(self, name: str, request: Any, started: float, code: str) -> None:
        seconds = time.perf_counter() - started
        if self._observe is not None:
            self._observe(name, code, seconds)
        level = logging.DEBUG if name in _QUIET else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "call done", extra={"rpc": name, "key": getattr(request, "key", ""), "code": code,
                                               "ms": round(seconds * 1000, 2)})  # fmt: skip

    async def _refuse(
        self, name: str, request: Any, started: float, error: Exception, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:  # fmt: skip
        code, number = wire.code_of(error), next(self._numbers)
        seconds = time.perf_counter() - started
        if self._observe is not None:
            self._observe(name, code.name, seconds)
        facts = {"rpc": name, "key": getattr(request, "key", ""), "code": code.name, "ms": round(seconds * 1000, 2)}
        message = str(error)
        if code is grpc.StatusCode.INTERNAL:
            log.error("call failed", extra={**facts, "refusal": number}, exc_info=error)
            if not isinstance(error, SnapshotterError):
                message = f"{type(error).__name__}: {error}; see the snapshotter's log, refusal {number}"
        elif code is not grpc.StatusCode.NOT_FOUND:
            log.warning("call refused", extra={**facts, "reason": message})
        await context.abort(code, message.encode("utf-8", "replace").decode()[:4000])

    async def _behind(self, name: str, work: Callable[[Deadline], T], *, pool: bool = True) -> T:
        """Run `work` in a thread, no longer than the limit."""
        deadline = Deadline.after(self._limit)

        def run() -> T:
            if pool:
                self._node.wait_for_pool(deadline)
            return work(deadline)

        running = asyncio.get_running_loop().run_in_executor(self._threads, run)
        done, _ = await asyncio.wait({running}, timeout=self._limit + 1)
        if not done:
            running.add_done_callback(lambda late: late.exception())
            raise TookTooLong(f"{name} did not end within {self._limit:.0f} s; it goes on and holds its snapshot")
        return running.result()

    async def Prepare(self, request: Any) -> Message:
        found = await self._behind(
            "Prepare", lambda d: self._node.snapshots.prepare(request.key, request.parent, request.labels, d)
        )
        return pb.PrepareSnapshotResponse(mounts=wire.mounts(found))

    async def View(self, request: Any) -> Message:
        found = await self._behind(
            "View",
            lambda d: self._node.snapshots.prepare(request.key, request.parent, request.labels, d, kind=Kind.VIEW),
        )
        return pb.ViewSnapshotResponse(mounts=wire.mounts(found))

    async def Mounts(self, request: Any) -> Message:
        found = self._node.snapshots.known_mounts(request.key) if self._node.ready else None
        if found is None:
            found = await self._behind("Mounts", lambda d: self._node.snapshots.mounts(request.key, d))
        return pb.MountsResponse(mounts=wire.mounts(found))

    async def Commit(self, request: Any) -> Message:
        await self._behind(
            "Commit",
            lambda d: self._node.snapshots.commit(request.name, request.key, request.labels, request.parent, d),
        )
        return Empty()

    async def Remove(self, request: Any) -> Message:
        await self._behind("Remove", lambda d: self._node.snapshots.remove(request.key, d), pool=False)
        return Empty()

    async def Stat(self, request: Any) -> Message:
        row = self._node.snapshots.stat(request.key)
        if row is None:
            row = await self._behind("Stat", lambda d: self._node.snapshots.stat_settled(request.key, d))
        return pb.StatSnapshotResponse(info=wire.info(row))

    async def Update(self, request: Any) -> Message:
        paths = list(request.update_mask.paths) if request.HasField("update_mask") else None
        row = await self._behind(
            "Update",
            lambda d: self._node.snapshots.update(request.info.name, request.info.labels, paths, d),
            pool=False,
        )
        return pb.UpdateSnapshotResponse(info=wire.info(row))

    async def Usage(self, request: Any) -> Message:
        size, inodes = await self._behind("Usage", lambda d: self._node.snapshots.usage(request.key, d))
        return pb.UsageResponse(size=size, inodes=inodes)

    async def Cleanup(self, _request: Any) -> Message:
        """Deletion goes on by itself; this only asks for it now."""
        self._node.cleanup()
        return Empty()

    async def _listing(
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ListSnapshotsResponse]:  # fmt: skip
        started = time.perf_counter()
        pages = None
        try:
            pages = self._node.snapshots.list(list(request.filters))
            while (page := await asyncio.to_thread(next, pages, None)) is not None:
                for start in range(0, len(page), _PAGE):
                    yield pb.ListSnapshotsResponse(info=[wire.info(row) for row in page[start : start + _PAGE]])
        except SnapshotterError as error:
            await self._refuse("List", request, started, error, context)
        self._done("List", request, started, "OK")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
