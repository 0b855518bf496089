"""Calls that hang in the kernel cost their callers an error and nobody else anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from blockdev import Deadline
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter.errors import NotFound
from snapshotter.node import Activity
from snapshotter.service import NAME, Service
from snapshotter.workers import Workers

LIMIT = 4


class Hanging:
    """Verbs of a snapshotter whose kernel keeps the thread for keys that begin with `hang`."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def stat(self, key: str, _deadline: Deadline) -> Any:
        if key.startswith("hang"):
            self.let_go.wait(60)
        raise NotFound(key)


class Served:
    def __init__(self, path: Path) -> None:
        self.verbs, self.workers = Hanging(), Workers(LIMIT)
        node: Any = SimpleNamespace(snapshots=self.verbs, activity=Activity())
        self.service = Service(node, self.workers, limit=0.3)
        self.server = grpc.server(self.workers)
        self.server.add_generic_rpc_handlers((self.service.handler(),))
        self.server.add_insecure_port(f"unix:{path}")
        self.server.start()
        self.channel = grpc.insecure_channel(f"unix:{path}")
        self._stat = self.channel.unary_unary(
            f"/{NAME}/Stat", request_serializer=pb.StatSnapshotRequest.SerializeToString,
            response_deserializer=pb.StatSnapshotResponse.FromString,
        )  # fmt: skip

    def stat(self, key: str) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            self._stat(pb.StatSnapshotRequest(key=key), timeout=20)
        return caught.value.code()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path / "s.sock")
    yield one
    one.verbs.let_go.set()
    one.service.close()
    one.channel.close()
    one.server.stop(1).wait()


def test_more_hanging_calls_than_threads_leave_room_for_others(served: Served) -> None:
    with futures.ThreadPoolExecutor(3 * LIMIT) as callers:
        codes = list(callers.map(served.stat, [f"hang {number}" for number in range(3 * LIMIT)]))
    assert set(codes) == {grpc.StatusCode.CANCELLED}
    assert served.workers.given_up == 3 * LIMIT
    assert served.stat("another") is grpc.StatusCode.NOT_FOUND


def test_a_caller_is_released_although_no_thread_can_take_the_place(served: Served, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    assert served.stat("another") is grpc.StatusCode.NOT_FOUND
    with monkeypatch.context() as patched:
        patched.setattr(served.workers, "_begin", refused)
        assert served.stat("hang") is grpc.StatusCode.CANCELLED
    assert served.workers.given_up == 0
    with futures.ThreadPoolExecutor(2 * LIMIT) as callers:
        assert set(callers.map(served.stat, ["x"] * 30)) == {grpc.StatusCode.NOT_FOUND}


def test_threads_that_come_back_are_not_kept(served: Served) -> None:
    with futures.ThreadPoolExecutor(2 * LIMIT) as callers:
        list(callers.map(served.stat, [f"hang {number}" for number in range(2 * LIMIT)]))
    served.verbs.let_go.set()
    until = time.monotonic() + 10
    while served.workers.given_up and time.monotonic() < until:
        time.sleep(0.02)
    assert served.workers.given_up == 0
    with futures.ThreadPoolExecutor(3 * LIMIT) as callers:
        assert set(callers.map(served.stat, ["x"] * 30)) == {grpc.StatusCode.NOT_FOUND}
    while served.workers.threads > LIMIT and time.monotonic() < until:
        time.sleep(0.02)
    assert served.workers.threads <= LIMIT


def test_there_is_an_end_to_giving_up() -> None:
    workers = Workers(2, most=3)
    assert [workers.give_up() for _ in range(5)] == [True, True, True, False, False]


def test_what_a_job_raises_is_its_futures(tmp_path: Path) -> None:
    workers = Workers(2)
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0).result(5)
    assert workers.submit(pow, 2, 5).result(5) == 32
