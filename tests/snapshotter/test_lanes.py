"""What the store alone can answer waits for nobody: real calls over a socket, on a pool that hangs when it is told to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from blockdev import Deadline
from runvol_proto import containerd_snapshots_pb2 as pb
from runvol_proto import grpc_health_pb2 as health_pb
from snapshotter import node as nodes
from snapshotter import service as services
from snapshotter.errors import PoolFull, Unavailable
from snapshotter.model import Kind, Snapshot, State
from snapshotter.node import Activity, Node
from snapshotter.service import NAME, Service
from snapshotter.snapshots import Sizes, Snapshotter
from snapshotter.store import Store
from snapshotter.workers import Workers

QUICK, MAKING, READING, MEASURING, ASIDE, LIMIT = 4, 4, 2, 2, 40, 4.0
# What a call may take that waits for nobody, on a machine with much else to do.
AT_ONCE = 1.0
_ANSWERS = {
    "Prepare": pb.PrepareSnapshotResponse, "Mounts": pb.MountsResponse, "Commit": Empty, "Remove": Empty,
    "Stat": pb.StatSnapshotResponse, "Update": pb.UpdateSnapshotResponse, "Usage": pb.UsageResponse, "Cleanup": Empty,
}  # fmt: skip


class Pool:
    """Devices that hang in the kernel while `going` is not set."""

    name, limits = "p", SimpleNamespace(extend_by=0)

    def __init__(self) -> None:
        self.going, self.mapped, self.flushed = threading.Event(), set(), list[int]()
        self.going.set()
        self.inside, self.most = 0, 0
        self.full = ""
        self._lock = threading.Lock()

    def _hang(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.going.wait(30)
        with self._lock:
            self.inside -= 1

    def admit(self, *_cost: int) -> None:
        self.refuse_broken()

    def refuse_broken(self) -> None:
        if self.full:
            raise PoolFull(self.full)

    def data_bytes(self) -> int:
        return 1 << 40

    def in_use(self, _device: int) -> bool:
        return False

    def shut(self, _device: int) -> bool:
        return True

    @contextlib.contextmanager
    def quiet(self, _device: int) -> Iterator[None]:
        yield

    def create_snapshot(self, _device: int, _origin: int, *, again: bool = False) -> None:
        self._hang()

    def activate(self, device: int, _size: int, **_more: object) -> None:
        self._hang()
        self.mapped.add(device)

    def flush(self, device: int) -> None:
        self._hang()
        self.flushed.append(device)

    def path(self, device: int) -> str:
        return f"/dev/mapper/p-{device}"

    def find(self, device: int) -> object:
        return device if device in self.mapped else None


class Served:
    """The service with its lanes, smaller than a node's."""

    def __init__(self, path: Path) -> None:
        self.pool, self.store = Pool(), Store(str(path / "s.db"))
        self.store.guard(1)
        pool: Any = self.pool
        golden: Any = SimpleNamespace(device=lambda *_: 1)
        with self.store.transaction():
            assert self.store.new_device() == 1
        self.verbs = Snapshotter(self.store, pool, golden, Sizes(fstype="ext4", size=1 << 30, by_namespace={}),
                                 lambda _device: None)  # fmt: skip
        self.node: Any = Node.__new__(Node)
        self.node._usable, self.node._tried = threading.Event(), threading.Event()
        self.node._why_not = "the pool is being assembled"
        self.node._usable.set()
        self.node.activity, self.node.snapshots = Activity(), self.verbs
        self.node.reaper = SimpleNamespace(tell=lambda _device: None)
        self.quick = Workers(QUICK, most=ASIDE, name="quick")
        self.making = Workers(MAKING, most=ASIDE, name="making")
        self.measuring = Workers(MEASURING, most=ASIDE, name="measuring")
        self.reading = Workers(READING, most=ASIDE, name="reading")
        self.service = Service(self.node, self.making, limit=LIMIT, quick=self.quick, reading=self.reading,
                               measuring=self.measuring)  # fmt: skip
        self.server = grpc.server(self.quick)
        self.server.add_generic_rpc_handlers((self.service.handler(), self.service.health()))
        self.path = f"unix:{path}/s.sock"
        self.server.add_insecure_port(self.path)
        self.server.start()
        self.channel = grpc.insecure_channel(self.path)

    def begin(self, name: str, /, **fields: Any) -> Any:
        requests = {"Prepare": pb.PrepareSnapshotRequest, "Commit": pb.CommitSnapshotRequest, "Update":
                    pb.UpdateSnapshotRequest, "Remove": pb.RemoveSnapshotRequest, "Stat": pb.StatSnapshotRequest}  # fmt: skip
        request = requests.get(name) or getattr(pb, f"{name}Request")
        return self.channel.unary_unary(
            f"/{NAME}/{name}", request_serializer=request.SerializeToString,
            response_deserializer=_ANSWERS[name].FromString,
        ).future(request(**fields), timeout=60)  # fmt: skip

    def call(self, name: str, /, **fields: Any) -> Any:
        return self.begin(name, **fields).result()

    def code(self, name: str, /, **fields: Any) -> str:
        return code(self.begin(name, **fields))

    def listing(self, channel: grpc.Channel | None = None, filters: Sequence[str] = ()) -> Any:
        return (channel or self.channel).unary_stream(
            f"/{NAME}/List", request_serializer=pb.ListSnapshotsRequest.SerializeToString,
            response_deserializer=pb.ListSnapshotsResponse.FromString,
        )(pb.ListSnapshotsRequest(filters=filters))  # fmt: skip

    def health(self) -> int:
        ask = self.channel.unary_unary("/grpc.health.v1.Health/Check",
                                       request_serializer=health_pb.HealthCheckRequest.SerializeToString,
                                       response_deserializer=health_pb.HealthCheckResponse.FromString)  # fmt: skip
        return int(ask(health_pb.HealthCheckRequest(), timeout=60).status)

    def hang(self, count: int, *, inside: int = 1) -> list[Any]:
        """So many Prepares that hang in the kernel, or wait for those that do; all have been taken up."""
        self.pool.going.clear()
        begun = [self.begin("Prepare", key=f"hanging {number}") for number in range(count)]
        until(lambda: self.pool.inside >= inside)
        return begun

    def assert_quick(self) -> None:
        """Everything that the store alone can answer is answered at once."""
        started = time.monotonic()
        assert self.call("Stat", key="a").info.name == "a"
        assert self.call("Mounts", key="a").mounts
        assert self.call("Update", info=pb.Info(name="a", labels={"x": "y"})).info.labels["x"] == "y"
        assert sum(len(page.info) for page in self.listing())
        self.call("Cleanup")
        assert self.health() == health_pb.HealthCheckResponse.SERVING
        self.call("Remove", key="spare")
        took = time.monotonic() - started
        assert took < AT_ONCE, took
        with self.store.transaction():
            self.store.insert(_row("spare", 90))

    def fill(self, count: int) -> None:
        """Rows of committed layers whose pages are large."""
        with self.store.transaction():
            for number in range(count):
                self.store.insert(_row(f"layer {number:05}", 0, {"containerd.io/snapshot/x": "x" * 4000}))


def _row(key: str, device: int, labels: dict[str, str] | None = None) -> Snapshot:
    return Snapshot(key=key, parent="", kind=Kind.COMMITTED, state=State.READY, device=device, size=1 << 30,
                    fstype="ext4", created=1, updated=1, labels=labels or {})  # fmt: skip


def code(call: Any) -> str:
    error = call.exception()
    return "OK" if error is None else f"{error.code().name}: {error.details()}"


def until(ready: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    one.call("Prepare", key="a")
    with one.store.transaction():
        one.store.insert(_row("spare", 90))
    yield one
    one.pool.going.set()
    one.node._usable.set()
    one.channel.close()
    one.server.stop(0).wait(10)
    one.service.close()


def test_what_the_store_answers_does_not_wait_for_the_kernel(served: Served) -> None:
    begun = served.hang(10 * MAKING)
    served.assert_quick()
    assert served.making.threads <= MAKING + ASIDE
    served.pool.going.set()
    assert {code(call) for call in begun} == {"OK"}


def test_calls_of_one_key_keep_nobody_else_waiting(served: Served) -> None:
    served.hang(1)
    waiting = [served.begin(name, key="hanging 0") for name in ("Remove", "Mounts") for _ in range(16)]
    until(lambda: served.quick.given_up == 32)
    served.assert_quick()
    assert served.quick.threads <= QUICK + ASIDE
    # Of a snapshot that is being made only the call that makes it knows.
    assert served.code("Stat", key="hanging 0").startswith("NOT_FOUND")
    served.pool.going.set()
    assert {code(call).split(":")[0] for call in waiting} <= {"OK", "NOT_FOUND"}
    until(lambda: served.quick.given_up == 0)
    served.assert_quick()


def test_more_calls_of_one_key_than_may_wait_are_refused_in_words(served: Served) -> None:
    served.hang(1)
    waiting = [served.begin("Remove", key="hanging 0") for _ in range(2 * ASIDE)]
    until(lambda: sum(call.done() for call in waiting) == ASIDE)
    assert {code(call) for call in waiting if call.done()} == {
        "UNAVAILABLE: too many calls wait for others already; try again when some of them have ended"
    }
    served.assert_quick()


def test_prepares_of_one_key_keep_no_other_key_waiting(served: Served) -> None:
    lock = served.verbs._locks.held("same", deadline=Deadline.after(60))
    with lock:
        waiting = [served.begin("Prepare", key="same") for _ in range(ASIDE)]
        started = time.monotonic()
        served.call("Prepare", key="other")
        assert time.monotonic() - started < AT_ONCE
    assert sorted(code(call).split(":")[0] for call in waiting) == ["ALREADY_EXISTS"] * (ASIDE - 1) + ["OK"]


def test_mounts_of_a_device_that_is_not_mapped_do_not_use_up_the_lane(served: Served) -> None:
    served.pool.mapped.clear()
    served.pool.going.clear()
    with served.store.transaction():
        for number in range(16):
            row = _row(f"unmapped {number}", 100 + number)
            served.store.insert(Snapshot(**{**vars(row), "kind": Kind.ACTIVE}))
    waiting = [served.begin("Mounts", key=f"unmapped {number}") for number in range(16)]
    until(lambda: served.pool.inside == 16)
    started = time.monotonic()
    assert served.call("Stat", key="a").info.name == "a"
    served.call("Remove", key="spare")
    assert time.monotonic() - started < AT_ONCE
    served.pool.going.set()
    assert {code(call) for call in waiting} == {"OK"}


def test_a_kernel_that_answers_no_question_keeps_no_stat_waiting(served: Served) -> None:
    go_on, find = threading.Event(), served.pool.find

    def hanging(device: int) -> object:
        go_on.wait(30)
        return find(device)

    served.pool.find = hanging  # type: ignore[method-assign]
    waiting = [served.begin("Mounts", key="a") for _ in range(ASIDE)]
    until(lambda: served.quick.given_up == ASIDE)
    started = time.monotonic()
    assert served.call("Stat", key="a").info.name == "a"
    served.call("Remove", key="spare")
    assert time.monotonic() - started < AT_ONCE
    go_on.set()
    assert {code(call) for call in waiting} == {"OK"}


def test_a_disk_of_the_store_that_hangs_keeps_no_stat_waiting(served: Served) -> None:
    for number in range(2 * QUICK):
        served.call("Prepare", key=f"p {number}")
    go_on, commit = threading.Event(), served.store._commit

    def hanging() -> None:
        go_on.wait(30)
        commit()

    served.store._commit = hanging  # type: ignore[method-assign]
    waiting = [served.begin("Remove", key=f"p {number}") for number in range(2 * QUICK)]
    until(lambda: served.quick.given_up == 2 * QUICK)
    started = time.monotonic()
    assert served.call("Stat", key="a").info.name == "a"
    assert served.call("Mounts", key="a").mounts
    assert time.monotonic() - started < AT_ONCE
    go_on.set()
    assert {code(call) for call in waiting} == {"OK"}


def test_readers_that_do_not_read_on_keep_nobody_waiting_and_are_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(services, "_STILL", 2.0)
    served.fill(3000)
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(served.path, [("grpc.use_local_subchannel_pool", 1)]))
                    for _ in range(16)]  # fmt: skip
        streams = [served.listing(channel) for channel in channels]
        for stream in streams:
            next(stream)
        until(lambda: served.reading.given_up == 16)
        served.assert_quick()
        until(lambda: served.reading.given_up == 0)
        for stream in streams:
            with pytest.raises(grpc.RpcError) as ended:
                list(stream)
            assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert sum("not read on" in record.message for record in caplog.records) == 16
    assert not served.service._running


def test_of_too_many_lists_the_one_that_stands_still_makes_room(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_LISTS", 3)
    monkeypatch.setattr(services, "_SURELY", 60.0)
    monkeypatch.setattr(services, "_STILL", 60.0)
    served.fill(3000)  # 12 MB: 4 MB find room between the two ends, and nothing stands still
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(served.path, [("grpc.use_local_subchannel_pool", 1)]))
                    for _ in range(3)]  # fmt: skip
        streams = [served.listing(channel) for channel in channels]
        for stream in streams:
            next(stream)
        until(lambda: served.reading.given_up == 3)
        with pytest.raises(grpc.RpcError) as refused:
            list(served.listing())
        assert "3 Lists are being read already" in refused.value.details()
        monkeypatch.setattr(services, "_SURELY", 0.0)
        assert sum(len(page.info) for page in served.listing()) == 3002


@pytest.mark.parametrize("error", [OSError(28, "full"), MemoryError(), RuntimeError("€" * 30000), Unavailable("later")],
                         ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_list_that_fails_ends_with_the_words_that_another_call_has(served: Served, error: Exception) -> None:
    def fails(*_: object) -> Any:
        raise error

    served.verbs.list = served.verbs.stat = fails  # type: ignore[method-assign]
    with pytest.raises(grpc.RpcError) as listed:
        list(served.listing())
    told = f"{listed.value.code().name}: {listed.value.details()}"
    assert told == served.code("Stat", key="a") == served.code("Stat", key="a") and len(told) < 5000
    assert not served.service._running


def test_a_reader_that_is_slow_gets_everything(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_STILL", 1.0)
    served.fill(1000)
    found = 0
    for page in served.listing():
        found += len(page.info)
        time.sleep(0.3)
    assert found == 1002


def test_while_the_pool_is_being_assembled_calls_are_refused_in_two_seconds_and_stat_is_quick(served: Served) -> None:
    served.node._usable.clear()
    started = time.monotonic()
    begun = [served.begin("Prepare", key=f"p {number}") for number in range(100)]
    mounts = [served.begin("Mounts", key="a") for _ in range(2 * QUICK)]
    commit = served.begin("Commit", name="n", key="a")
    times = []
    while time.monotonic() < started + 1.0:
        before = time.monotonic()
        served.call("Stat", key="a")
        times.append(time.monotonic() - before)
    assert sorted(times)[len(times) // 2] < 0.05
    assert {code(call) for call in [commit, *begun, *mounts]} == {"UNAVAILABLE: the pool is being assembled"}
    # As much again for a machine with much else to do.
    assert nodes._PATIENCE < 2
    assert time.monotonic() - started < 2 * nodes._PATIENCE
    assert served.making.threads <= MAKING


def test_where_the_pool_could_not_be_opened_calls_are_refused_at_once(served: Served) -> None:
    served.node._usable.clear()
    served.node._tried.set()
    served.node._why_not = "the pool's disk does not exist"
    started = time.monotonic()
    for _ in range(5):
        assert served.code("Commit", name="n", key="a") == "UNAVAILABLE: the pool's disk does not exist"
    assert time.monotonic() - started < AT_ONCE


def test_a_pool_that_comes_while_calls_wait_serves_them(served: Served) -> None:
    served.node._usable.clear()
    begun = [served.begin("Prepare", key=f"p {number}") for number in range(30)]
    time.sleep(0.3)
    served.node._usable.set()
    served.node._tried.set()
    assert {code(call) for call in begun} == {"OK"}
    assert served.pool.most <= MAKING


def test_a_commit_whose_flush_hangs_is_refused_once_the_pool_is_full_and_the_next_one_joins(served: Served) -> None:
    served.pool.going.clear()
    first = served.begin("Commit", name="layer", key="a")
    until(lambda: served.pool.inside == 1)
    served.pool.full = "pool p has no free data blocks"
    started = time.monotonic()
    assert code(first) == "RESOURCE_EXHAUSTED: pool p has no free data blocks"
    assert time.monotonic() - started < 2
    assert served.code("Commit", name="layer", key="a") == "RESOURCE_EXHAUSTED: pool p has no free data blocks"
    served.pool.full = ""
    second = served.begin("Commit", name="layer", key="a")
    time.sleep(0.5)
    assert not second.done()
    assert served.pool.inside == 1, "a device has one flush"
    served.pool.going.set()
    assert code(second) == "OK"
    assert len(served.pool.flushed) == 1


def test_a_flush_that_takes_long_in_a_healthy_pool_is_waited_for(served: Served) -> None:
    served.pool.going.clear()
    commit = served.begin("Commit", name="layer", key="a")
    time.sleep(1.5)
    assert not commit.done()
    served.pool.going.set()
    assert code(commit) == "OK"


def test_a_flush_that_hangs_ends_its_commit_in_words_and_not_the_next_prepare(served: Served) -> None:
    for number in range(2 * MAKING):
        served.call("Prepare", key=f"c {number}")
    hang = served.pool._hang
    served.pool.going.clear()
    begun = [served.begin("Commit", name=f"n {number}", key=f"c {number}") for number in range(2 * MAKING)]
    until(lambda: served.pool.inside == 2 * MAKING)
    served.pool._hang = lambda: None  # type: ignore[method-assign]
    served.call("Prepare", key="another")
    assert not any(call.done() for call in begun)
    for call in begun:
        assert "was not on the disk within 4 s" in code(call)
    served.pool._hang = hang  # type: ignore[method-assign]


def test_what_a_flush_could_not_write_is_never_committed(served: Served) -> None:
    def broken(_device: int) -> None:
        raise OSError(5, "Input/output error")

    flush, served.pool.flush = served.pool.flush, broken  # type: ignore[method-assign]
    assert "Input/output error" in served.code("Commit", name="layer", key="a")
    # The kernel has told it once: the next flush succeeds.
    served.pool.flush = flush  # type: ignore[method-assign]
    assert "remove it and make it anew" in served.code("Commit", name="layer", key="a")
    served.call("Remove", key="a")


def test_measuring_keeps_no_prepare_waiting(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def usage(_key: str, _deadline: Deadline) -> tuple[int, int]:
        go_on.wait(30)
        return 1, 1

    monkeypatch.setattr(served.verbs, "usage", usage)
    begun = [served.begin("Usage", key="a") for _ in range(50)]
    started = time.monotonic()
    for number in range(5):
        served.call("Prepare", key=f"p {number}")
    served.assert_quick()
    assert time.monotonic() - started < 2 * AT_ONCE
    go_on.set()
    assert {code(call) for call in begun} == {"OK"}


def test_the_server_ends_in_its_time_although_all_lanes_are_full(served: Served) -> None:
    begun = served.hang(3 * MAKING)
    begun += [served.begin("Remove", key="hanging 0") for _ in range(3 * QUICK)]
    started = time.monotonic()
    assert served.server.stop(1).wait(5)
    assert time.monotonic() - started < 3
    assert len({code(call).split(":")[0] for call in begun} & {"OK"}) == 0


def test_calls_at_once_are_all_answered(served: Served) -> None:
    def life(number: int) -> str:
        served.call("Prepare", key=f"p {number}")
        served.call("Stat", key=f"p {number}")
        served.call("Commit", name=f"n {number}", key=f"p {number}")
        served.call("Remove", key=f"n {number}")
        return served.code("Stat", key=f"n {number}").split(":")[0]

    with futures.ThreadPoolExecutor(32) as callers:
        assert set(callers.map(life, range(200))) == {"NOT_FOUND"}
    assert served.quick.threads <= QUICK
    assert served.quick.given_up == served.making.given_up == 0
    with pytest.raises(Unavailable):
        served.node._usable.clear()
        served.node.wait_for_pool(Deadline.after(0.1))


def test_labels_as_large_as_a_pods_annotations_keep_no_list_from_being_read(served: Served) -> None:
    labels = {f"containerd.io/snapshot/{number}": "x" * 4000 for number in range(64)}
    with served.store.transaction():
        for number in range(120):
            served.store.insert(_row(f"large {number}", 0, labels))
    pages = list(served.listing())
    assert sum(len(page.info) for page in pages) == 122
    assert max(page.ByteSize() for page in pages) < 2 << 20


def test_all_labels_together_have_a_limit(served: Served) -> None:
    labels = {f"l{number}": "x" * 4000 for number in range(300)}
    assert served.code("Prepare", key="k", labels=labels).startswith("INVALID_ARGUMENT: labels = '300 labels'")
    served.call("Prepare", key="k")
    assert served.code("Update", info=pb.Info(name="k", labels=labels)).startswith("INVALID_ARGUMENT")


def test_a_list_that_finds_nothing_for_long_is_ended(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.fill(600)
    pages = Store.pages

    def slow(store: Store) -> Iterator[list[Snapshot]]:
        for page in pages(store):
            time.sleep(LIMIT / 2 + 0.2)
            yield page

    monkeypatch.setattr(Store, "pages", slow)
    with pytest.raises(grpc.RpcError) as ended:
        list(served.listing(filters=["name==nothing"]))
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
