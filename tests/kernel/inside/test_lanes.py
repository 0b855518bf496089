"""The process on its socket: what is slow, full, away or not read on keeps nothing waiting that needs none of it."""

from __future__ import annotations

import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockdev.devicemapper import Mapper
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter.model import Kind, Snapshot, State
from snapshotter.service import NAME
from snapshotter.store import Store
from tests.kernel.inside.server import MIB, Server
from tests.kernel.inside.test_service import Client

pytestmark = pytest.mark.short
# Seconds that a call may take which waits for nobody, in a kernel of one processor that all others want too.
QUICK = 4.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, data=128 * MIB, size=256 * MIB, RUNVOL_POOL_DATA_RESERVE_PERCENT="0") as running:
        yield running


_WRITER = """
import os, sys
opened = os.open(sys.argv[1], os.O_WRONLY)
for at in range(16, 176):
    os.pwrite(opened, b"x" * (1 << 20), at << 20)
print("written", flush=True)
os.close(opened)
"""


def _mode(server: Server) -> str:
    with Mapper() as mapper:
        return mapper.pool_status(server.pool_name).mode


def _begin(client: Client, name: str, request: Any) -> Any:
    return client._channel.unary_unary(
        f"/{NAME}/{name}", request_serializer=type(request).SerializeToString, response_deserializer=bytes
    ).future(request, timeout=100)


def _code(call: Any) -> grpc.StatusCode:
    error = call.exception()
    return grpc.StatusCode.OK if error is None else error.code()


def _stat_is_quick(client: Client, key: str) -> None:
    started = time.monotonic()
    assert client.stat(key).info.name == key
    assert time.monotonic() - started < QUICK


def test_a_commit_on_the_way_is_refused_once_the_pool_is_full_and_goes_well_when_it_is_not(server: Server) -> None:
    client = Client(server)
    (mount,) = client.prepare("x").mounts
    client.prepare("y")
    # More than the pool has, in the page cache: the flush meets the pool's end.
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, mount.source], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    select.select([writer.stdout], [], [], 10)
    commit, full = _begin(client, "Commit", pb.CommitSnapshotRequest(name="layer", key="x")), 0.0
    while not commit.done():
        if not full and _mode(server) == "out_of_data_space":
            full = time.monotonic()
        time.sleep(0.02)
    ended = time.monotonic()
    assert _code(commit) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "no free data blocks" in commit.details()
    assert full
    assert ended - full < 2
    for _ in range(2):
        started = time.monotonic()
        assert client.refused("commit", "layer", "x")[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.refused("prepare", "z")[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert time.monotonic() - started < 2
    _stat_is_quick(client, "y")
    client.remove("y")
    server.runvol("pool", "extend", "--by", str(256 * MIB))
    assert writer.wait(60) == 0
    client.commit("layer", "x")
    assert client.stat("layer").info.kind == Kind.COMMITTED


def test_while_the_pool_is_away_stat_is_quick_and_commit_is_refused_at_once(server: Server) -> None:
    client = Client(server)
    client.prepare("x")
    away = server.lose_data()
    server.start()
    client = Client(server)
    waiting = [_begin(client, "Prepare", pb.PrepareSnapshotRequest(key=f"p{number}")) for number in range(100)]
    started = time.monotonic()
    commit = _begin(client, "Commit", pb.CommitSnapshotRequest(name="layer", key="x"))
    _stat_is_quick(client, "x")
    assert _code(commit) is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - started < 2
    assert "does not exist" in commit.details()
    assert {_code(call) for call in waiting} == {grpc.StatusCode.UNAVAILABLE}
    away.rename(server.data_file)
    until = time.monotonic() + 20
    while _code(_begin(client, "Commit", pb.CommitSnapshotRequest(name="layer", key="x"))) is not grpc.StatusCode.OK:
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_flush_that_hangs_keeps_no_prepare_of_others_and_the_process_ends_all_the_same(server: Server) -> None:
    client = Client(server)
    sources = [client.prepare(f"x{number}").mounts[0].source for number in range(20)]
    with Mapper() as mapper:
        for source in sources:
            with open(source, "r+b", buffering=0) as device:
                device.seek(8 * MIB)
                device.write(b"x" * 4096)
        mapper.suspend(server.pool_name, flush=False)
        try:
            commits = [_begin(client, "Commit", pb.CommitSnapshotRequest(name=f"l{number}", key=f"x{number}"))
                       for number in range(20)]  # fmt: skip
            time.sleep(1.5)
            _stat_is_quick(client, "x0")
            listing = client._channel.unary_stream(
                f"/{NAME}/List", request_serializer=pb.ListSnapshotsRequest.SerializeToString,
                response_deserializer=pb.ListSnapshotsResponse.FromString,
            )  # fmt: skip
            assert sum(len(page.info) for page in listing(pb.ListSnapshotsRequest(), timeout=2)) == 20
            assert not any(call.done() for call in commits)
            assert server.process is not None
            with open(f"/proc/{server.process.pid}/status") as status:
                assert next(int(line.split()[1]) for line in status if line.startswith("Threads")) < 100
            started = time.monotonic()
            ending = threading.Thread(target=server.stop)
            ending.start()
            ending.join(1)
        finally:
            mapper.resume(server.pool_name)
    ending.join(30)
    assert not ending.is_alive()
    assert time.monotonic() - started < 25
    server.start()
    client = Client(server)
    found = {_code(_begin(client, "Stat", pb.StatSnapshotRequest(key=f"x{number}"))) for number in range(20)}
    assert found <= {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}


def test_lists_that_are_not_read_on_are_ended_and_the_next_one_is_read(server: Server) -> None:
    server.stop()
    store = Store(str(server.state / "snapshots.db"))
    with store.transaction():
        for number in range(400):
            store.insert(Snapshot(key=f"k8s.io/{number}/sha256:{number:064x}", parent="", kind=Kind.COMMITTED,
                                  state=State.READY, device=0, size=16 * MIB, fstype="ext4", created=1, updated=1,
                                  labels={"containerd.io/snapshot/cri.image-layers": "x" * 20000}))  # fmt: skip
    store.close()
    server.start()
    client = Client(server)
    client.prepare("a")

    def listing(channel: grpc.Channel) -> Any:
        return channel.unary_stream(
            f"/{NAME}/List", request_serializer=pb.ListSnapshotsRequest.SerializeToString,
            response_deserializer=pb.ListSnapshotsResponse.FromString,
        )(pb.ListSnapshotsRequest())  # fmt: skip

    channels = [grpc.insecure_channel(f"unix:{server.socket}", [("grpc.use_local_subchannel_pool", 1)])
                for _ in range(17)]  # fmt: skip
    streams = [listing(channel) for channel in channels]
    for stream in streams:
        next(stream)
    time.sleep(1)
    _stat_is_quick(client, "a")
    assert sum(len(page.info) for page in listing(client._channel)) == 401
    until = time.monotonic() + 30
    while "a List that is not read on is ended" not in server.said():
        assert time.monotonic() < until, server.said()
        time.sleep(0.2)
    for channel in channels:
        channel.close()
