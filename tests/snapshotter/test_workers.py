"""Calls that hang in the kernel cost their callers an error and nobody else anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from blockdev import Deadline
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter.errors import NotFound, Unavailable
from snapshotter.node import Activity
from snapshotter.service import NAME, Service
from snapshotter.workers import Workers, aside

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


def test_a_job_does_not_wait_for_another_while_there_may_be_a_thread() -> None:
    for _ in range(50):
        workers, go_on = Workers(16), threading.Event()
        workers.submit(pow, 2, 2).result(5)
        slow, quick = workers.submit(go_on.wait, 30), workers.submit(pow, 2, 5)
        assert quick.result(5) == 32
        go_on.set()
        slow.result(5)


def test_as_many_jobs_as_may_run_at_once_do_so() -> None:
    workers, together = Workers(16), threading.Barrier(16)
    for _ in range(20):
        jobs = [workers.submit(together.wait, 5) for _ in range(16)]
        assert sorted(job.result(10) for job in jobs) == list(range(16))
    assert workers.threads == 16


def test_who_waits_steps_aside_and_there_is_an_end_to_it() -> None:
    workers, go_on = Workers(2, most=5), threading.Event()

    def wait() -> str:
        try:
            with aside():
                go_on.wait(30)
        except Unavailable as error:
            return str(error)
        return ""

    jobs = [workers.submit(wait) for _ in range(8)]
    assert workers.submit(pow, 2, 5).result(5) == 32
    assert workers.given_up == 5
    assert workers.threads <= 2 + 5
    go_on.set()
    said = [job.result(5) for job in jobs]
    assert sum("too many calls wait" in one for one in said) == 3
    _until(lambda: workers.threads <= 2)
    assert workers.given_up == 0


def test_stepping_aside_twice_is_once_and_outside_of_a_lane_nothing() -> None:
    workers = Workers(1, most=5)

    def twice() -> tuple[int, int, int]:
        with aside():
            with aside():
                inner = workers.given_up
            outer = workers.given_up
        return inner, outer, workers.given_up

    assert workers.submit(twice).result(5) == (1, 1, 0)
    with aside():
        assert workers.given_up == 0


def test_what_takes_long_gives_up_its_place_only_where_others_wait() -> None:
    workers, go_on = Workers(2, most=10), threading.Event()
    slow = [workers.submit(go_on.wait, 30) for _ in range(2)]
    for _ in range(3):
        workers.look()
    assert workers.given_up == 0
    quick = workers.submit(pow, 2, 5)
    assert not quick.done()
    workers.look()
    assert quick.result(5) == 32
    assert workers.given_up == 1
    go_on.set()
    assert all(job.result(5) for job in slow)
    _until(lambda: workers.given_up == 0 and workers.threads <= 2)


def test_without_a_thread_for_it_a_job_is_begun_later(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(2)

    def refused() -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(workers, "_begin", refused)
        job = workers.submit(pow, 2, 5)
        workers.look()
        assert not job.done()
    workers.look()
    assert job.result(5) == 32


def test_once_too_many_hang_the_rest_is_refused_and_not_kept(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.workers._most = 2
    with futures.ThreadPoolExecutor(3 * LIMIT) as callers:
        codes = list(callers.map(served.stat, [f"hang {number}" for number in range(3 * LIMIT)]))
        assert set(codes) == {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    assert served.workers.threads <= LIMIT + 2
    assert served.stat("another") is grpc.StatusCode.UNAVAILABLE
    assert any("too many calls hang" in record.message for record in caplog.records)
    served.verbs.let_go.set()
    _until(lambda: served.workers.given_up == 0)
    assert served.stat("another") is grpc.StatusCode.NOT_FOUND


def _until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)
