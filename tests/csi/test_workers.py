"""No volume, no store and no recovery uses up what others need: threads, and an end on SIGTERM."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import pytest

from csi.errors import CallError
from csi.workers import Workers, family_of
from runvol_proto import csi_pb2
from tests.driver import mount_capability
from volumes.busy import Busy

pytestmark = pytest.mark.kernel
MIB = 1 << 20


def test_one_store_leaves_threads_for_others():
    workers = Workers("test", 4)
    silent = csi_pb2.NodePublishVolumeRequest(volume_id="nfs-aaaa-1")
    other = csi_pb2.NodePublishVolumeRequest(volume_id="loop-2")
    with contextlib.ExitStack() as hanging:
        for _ in range(3):
            hanging.enter_context(workers.admitted(silent))
        with pytest.raises(CallError, match="nfs-aaaa"), workers.admitted(silent):
            pass
        with workers.admitted(other), pytest.raises(CallError), workers.admitted(other):
            pass
    with workers.admitted(silent):
        pass
    workers.close()
    made = csi_pb2.CreateVolumeRequest(name="x", parameters={"server": "nas", "path": "/e"})
    assert family_of(made) == "nas:/e" and family_of(csi_pb2.CreateVolumeRequest(name="x")) == ""
    assert family_of(csi_pb2.ProbeRequest()) == "" and family_of("no message") == ""


def test_a_recovery_of_another_process_holds_up_its_volume_and_nothing_else(driver):
    client = driver.client
    asked = {"volume_capabilities": [mount_capability()], "timeout": 30.0}
    with Busy(str(driver.state / "volumes.lock"))("volume held"), futures.ThreadPoolExecutor(40) as several:
        held = [several.submit(client.CreateVolume, name="held", **asked) for _ in range(20)]
        others = [several.submit(client.CreateVolume, name=f"v{number}", **asked) for number in range(10)]
        assert client.Probe(timeout=3.0).ready.value
        target = str(driver.kubelet / "t")
        client.NodeUnpublishVolume(volume_id="loop-x", target_path=target, timeout=3.0)
        assert all(one.result().volume.volume_id for one in others)
        assert {one.exception().code() for one in held} == {grpc.StatusCode.ABORTED}
    assert client.CreateVolume(name="held", **asked).volume.volume_id


def test_a_process_ends_whatever_its_threads_wait_for():
    hanging = (
        "import time; from concurrent.futures import ThreadPoolExecutor; from runvol import serve\n"
        "pool = ThreadPoolExecutor(1); pool.submit(time.sleep, 1000); pool.shutdown(wait=False)\n"
        "serve.leave(); print('not reached')"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", hanging], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "" and "left behind" in done.stderr and time.monotonic() - started < 20


def test_many_restores_at_once_hold_up_nobody(driver):
    """A StatefulSet's: few are copied at a time, who waits too long is told so, and each is made in the end."""
    volume = driver.create("source", 64 * MIB)
    with open(driver.state / "volumes" / f"{volume.volume_id}.img", "r+b") as file:
        for _ in range(60):
            file.write(os.urandom(MIB))
    content = {"volume": {"volume_id": volume.volume_id}}
    made: set[str] = set()

    def restored(number: int) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(grpc.RpcError):
                made.add(
                    driver.client.CreateVolume(
                        name=f"r{number}",
                        volume_capabilities=[mount_capability()],
                        volume_content_source=content,
                        timeout=5.0,
                    ).volume.volume_id
                )
                return
            time.sleep(0.2)

    with futures.ThreadPoolExecutor(32) as several:
        restores = [several.submit(restored, number) for number in range(32)]
        slowest = 0.0
        while not all(one.done() for one in restores):
            asked = time.monotonic()
            driver.client.Probe(timeout=5.0)
            driver.client.NodeUnpublishVolume(volume_id="loop-x", target_path=str(driver.kubelet / "t"), timeout=5.0)
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.05)
    assert len(made) == 32 and slowest < 4


def test_a_caller_that_has_gone_while_its_call_waited_has_nothing_begun(driver):
    asked, busy = {"volume_capabilities": [mount_capability()]}, Busy(str(driver.state / "volumes.lock"))
    with futures.ThreadPoolExecutor(32) as several, contextlib.ExitStack() as held:
        for number in range(32):
            held.enter_context(busy(f"volume v{number}"))
        creations = [
            several.submit(driver.client.CreateVolume, name=f"v{number}", timeout=30.0, **asked) for number in range(32)
        ]
        time.sleep(0.5)
        with pytest.raises(grpc.RpcError):
            driver.client.CreateVolume(name="late", timeout=1.0, **asked)
        held.close()
        assert len({one.result().volume.volume_id for one in creations}) == 32
    time.sleep(0.5)
    assert len(driver.client.ListVolumes().entries) == 32


def test_a_pool_has_its_threads_before_it_is_asked(monkeypatch):
    """Who listens for all calls submits them, and ends with the first that raises."""
    workers = Workers("test", 6)

    def none(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    started = [workers.pool.submit(time.sleep, 0.1) for _ in range(20)]
    assert [one.result(5) for one in started] == [None] * 20
    workers.close()
    with pytest.raises(RuntimeError):
        Workers("test", 2)


def test_a_probe_waits_for_nobody_who_writes_the_store(driver):
    """Another process keeps it locked, and a creation waits for that."""
    import sqlite3

    driver.create("first")
    with contextlib.closing(sqlite3.connect(driver.state / "volumes.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with futures.ThreadPoolExecutor(1) as one:
            waiting = one.submit(driver.client.CreateVolume, name="v", volume_capabilities=[mount_capability()])
            time.sleep(0.3)
            for _ in range(3):
                assert driver.client.Probe(timeout=2.0).ready.value
            db.execute("ROLLBACK")
            assert waiting.result().volume.volume_id
