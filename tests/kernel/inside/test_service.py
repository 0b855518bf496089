"""The process on its socket: calls that hang, a pool that is not there, metrics, doctor, a second one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockdev.devicemapper import Mapper
from blockdev.dm_targets import Error
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter.errors import SnapshotterError
from snapshotter.service import NAME
from tests.kernel.inside.lab import Lab
from tests.kernel.inside.server import Server

pytestmark = pytest.mark.short


class Client:
    """containerd's side of the socket, without a deadline of its own unless one is given."""

    def __init__(self, server: Server) -> None:
        self._channel = grpc.insecure_channel(f"unix:{server.socket}")

    def call(self, name: str, request: Any, answer: Any = None, timeout: float = 60) -> Any:
        decode = answer.FromString if answer is not None else bytes
        return self._channel.unary_unary(
            f"/{NAME}/{name}", request_serializer=type(request).SerializeToString, response_deserializer=decode
        )(request, timeout=timeout, wait_for_ready=True)

    def prepare(self, key: str, parent: str = "", **more: Any) -> Any:
        request = pb.PrepareSnapshotRequest(key=key, parent=parent)
        return self.call("Prepare", request, pb.PrepareSnapshotResponse, **more)

    def stat(self, key: str) -> Any:
        return self.call("Stat", pb.StatSnapshotRequest(key=key), pb.StatSnapshotResponse)

    def commit(self, name: str, key: str) -> Any:
        return self.call("Commit", pb.CommitSnapshotRequest(name=name, key=key))

    def remove(self, key: str) -> Any:
        return self.call("Remove", pb.RemoveSnapshotRequest(key=key))

    def refused(self, name: str, *arguments: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as refusal:
            getattr(self, name)(*arguments)
        return refusal.value.code(), refusal.value.details()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, data=512 << 20, RUNVOL_SNAPSHOTTER_CALL_SECONDS="2",
                RUNVOL_SNAPSHOTTER_METRICS="127.0.0.1:19809") as running:  # fmt: skip
        yield running


def test_a_call_that_hangs_in_the_kernel_is_let_go_of_and_hurts_nobody(server: Server) -> None:
    client = Client(server)
    client.prepare("a")
    client.prepare("b")
    with open(f"/dev/mapper/{_name(client, server)}", "r+b", buffering=0) as device:
        # Something to flush, over a pool that does not answer.
        os.pwrite(device.fileno(), b"x" * 4096, 8 << 20)
        with Mapper() as mapper:
            mapper.suspend(server.pool_name, flush=False)
            outcome: list[tuple[grpc.StatusCode, str]] = []
            started = time.monotonic()
            hanging = threading.Thread(target=lambda: outcome.append(client.refused("commit", "layer", "a")))
            hanging.start()
            time.sleep(0.5)
            assert client.stat("b").info.name == "b"
            client.remove("b")
            hanging.join(20)
            took = time.monotonic() - started
            mapper.resume(server.pool_name)
    assert outcome
    assert outcome[0][0] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED), outcome
    assert took < 8
    assert "hangs in the kernel" in server.said()
    time.sleep(1)
    client.prepare("c")


def _name(client: Client, server: Server) -> str:
    request = pb.MountsRequest(key="a")
    found: str = client.call("Mounts", request, pb.MountsResponse).mounts[0].source
    assert server.pool_name
    return os.path.basename(found)


def test_the_socket_answers_before_the_pool_is_there_and_says_what_is_missing(server: Server) -> None:
    client = Client(server)
    client.prepare("a")
    away = server.lose_data()
    server.start()
    assert client.stat("a").info.name == "a"
    until = time.monotonic() + 30
    while True:
        code, words = client.refused("prepare", "b")
        assert code is grpc.StatusCode.UNAVAILABLE
        if "is being assembled" not in words:
            break
        assert time.monotonic() < until
    assert f"{server.pool_name}.data does not exist" in words
    assert "pool" in server.runvol("doctor", ok=(1,))
    away.rename(server.data_file)
    until = time.monotonic() + 30
    while True:
        try:
            client.prepare("b")
            break
        except grpc.RpcError:
            assert time.monotonic() < until
            time.sleep(0.5)


def test_metrics_tell_calls_and_the_pool(server: Server) -> None:
    client = Client(server)
    client.prepare("a")
    assert client.refused("stat", "none")[0] is grpc.StatusCode.NOT_FOUND
    with urllib.request.urlopen("http://127.0.0.1:19809/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'runvol_snapshotter_call_seconds_count{code="OK",rpc="Prepare"} 1.0' in text
    assert 'runvol_snapshotter_call_seconds_count{code="NOT_FOUND",rpc="Stat"} 1.0' in text
    assert "runvol_pool_ready 1.0" in text
    assert 'runvol_pool_mode{mode="rw"} 1.0' in text
    assert "runvol_snapshots 1.0" in text


def test_doctor_and_the_tables_know_it(server: Server) -> None:
    Client(server).prepare("a")
    found = {one["subject"]: one for one in json.loads(server.runvol("doctor", "--json", ok=(0, 1, 3)))["items"]}
    assert found["pool"]["state"] == "ok"
    assert "1 snapshots" in found["snapshotter's store"]["finding"]
    assert "proxy_plugins.runvol" in found["snapshotter in containerd"]["finding"]
    assert [row["key"] for row in server.snapshots()] == ["a"]
    assert "KEY" in server.runvol("snapshots")
    assert server.pool()["state"] == "ok"


def test_a_second_one_on_the_socket_is_refused(server: Server) -> None:
    second = subprocess.run([sys.executable, "-m", "runvol", "snapshotter"], env=server.environment, capture_output=True,
                            text=True, timeout=60, check=False)  # fmt: skip
    assert second.returncode != 0
    assert "another process serves this socket" in second.stderr
    assert Client(server).prepare("a").mounts


def test_a_name_that_somebody_took_is_an_error_and_not_already_exists(lab: Lab, mapper: Mapper) -> None:
    lab.prepare("a")
    taken = lab.node.pool.device_name(lab.stat("a").device + 1)
    mapper.create(taken, "SOMEBODY")
    mapper.load(taken, [Error(length=8)])
    mapper.resume(taken)
    with pytest.raises(SnapshotterError, match="somebody else"):
        lab.prepare("b")
    mapper.remove(taken)
    lab.prepare("b")
    lab.remove("b")
    assert not lab.leaks()


def test_an_endpoint_that_is_none_is_refused(server: Server) -> None:
    for endpoint in ("", "tcp://127.0.0.1:1", "unix:///x", "unix:///" + "d" * 120 + ".sock"):
        done = subprocess.run([sys.executable, "-m", "runvol", "snapshotter", "--endpoint", endpoint],
                              env=server.environment, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        assert done.returncode == 2, endpoint
        assert "--endpoint" in done.stderr, endpoint


def test_malformed_requests_are_refused_and_the_next_one_works(server: Server) -> None:
    channel = grpc.insecure_channel(f"unix:{server.socket}")
    for name in ("Prepare", "Stat", "Update", "List"):
        for raw in (b"\xff" * 20, os.urandom(200)):
            call = (channel.unary_stream if name == "List" else channel.unary_unary)(
                f"/{NAME}/{name}", request_serializer=bytes, response_deserializer=bytes
            )
            with pytest.raises(grpc.RpcError):
                found = call(raw, timeout=10)
                list(found) if name == "List" else None
    assert Client(server).prepare("a").mounts


def test_a_lost_store_is_cleaned_up_from_the_command_line(server: Server) -> None:
    client = Client(server)
    client.prepare("a")
    server.stop()
    for path in server.state.glob("snapshots.db*"):
        path.unlink()
    # Its base is made anew first, for which a machine with much to do needs longer than the calls of the others here.
    server.environment["RUNVOL_SNAPSHOTTER_CALL_SECONDS"] = "60"
    server.start()
    Client(server).prepare("a")
    rows = json.loads(server.runvol("pool", "quarantine", "--json"))["items"]
    assert len(rows) == 2
    assert server.runvol("pool", "quarantine", "--free", "4711", "--yes", ok=(1,)) == ""
    server.runvol("pool", "quarantine", "--free", str(rows[0]["device"]), "--yes")
    server.runvol("pool", "quarantine", "--free-all", "--yes")
    server.stop()
    server.start()
    server.settled(1)
    assert server.pool()["quarantinedDevices"] == []
    server.runvol("pool", "check")
    server.runvol("pool", "extend", "--by", str(64 << 20))
    assert server.pool()["dataTotalBytes"] == (512 + 64) << 20


def test_the_running_process_extends_its_pool_under_load(tmp_path: Path) -> None:
    with Server(tmp_path, data=128 << 20, size=512 << 20, RUNVOL_POOL_AUTOEXTEND_PERCENT="100",
                RUNVOL_POOL_AUTOEXTEND_THRESHOLD="50") as server:  # fmt: skip
        mount = Client(server).prepare("a").mounts[0]
        # More than the pool has at first: the writer waits until there is room, and never fails.
        written = subprocess.run(["dd", "if=/dev/urandom", f"of={mount.source}", "bs=1M", "count=300", "oflag=direct"],
                                 capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
        assert written.returncode == 0, written.stderr
        assert int(str(server.pool()["dataTotalBytes"])) >= 300 << 20
        assert "extended the data" in server.said()
        assert server.pool()["mode"] == "rw"
        Client(server).prepare("b")
