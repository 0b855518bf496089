"""A server that is killed and frozen at random: every call ends in its deadline, nothing leaks, everything recovers."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import grpc
import pytest

from tests.driver import POD, Driver, mount_capability
from tests.kernel.inside.nfs import Ganesha

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
DEADLINE = 8.0


def test_a_server_killed_and_frozen_at_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds, seed = int(os.environ.get("RUNVOL_ROUNDS", "5")), 20261124
    chance, outcomes, slowest = random.Random(seed), Counter[str](), 0.0
    server = Ganesha(tmp_path / "server")
    server.start()

    def called(what: str, call) -> str:
        nonlocal slowest
        started = time.monotonic()
        try:
            call()
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
            told = error.details()
            assert "127.0.0.1" in told or any(
                word in told for word in ("did not end within", "Deadline", "is not at")
            ), told
        took = time.monotonic() - started
        slowest = max(slowest, took)
        assert took < DEADLINE + 2, f"{what} took {took:.1f} s"
        outcomes[f"{what} {code}"] += 1
        return code

    try:
        with Driver(tmp_path / "d") as driver:
            volume = driver.create("one", capability=RWX, backend="nfs", server="127.0.0.1", path="/exp", vers="4.1")
            for number in range(rounds):
                deed = chance.choice(["kill", "freeze"])
                trouble = threading.Timer(chance.uniform(0, 0.6), server.signal,
                                          [signal.SIGKILL if deed == "kill" else signal.SIGSTOP])  # fmt: skip
                pod = POD.format(number % 9 + 1)
                trouble.start()
                driver.stage(volume, RWX)
                target = driver.target(volume.volume_id, pod)
                called(
                    "publish", partial(driver.publish, volume, pod, runtime="runc", capability=RWX, timeout=DEADLINE)
                )
                stats = partial(driver.client.NodeGetVolumeStats, volume_id=volume.volume_id, volume_path=target)
                called("stats", partial(stats, timeout=DEADLINE))
                trouble.join()
                assert called("unpublish", partial(driver.unpublish, volume, pod, timeout=DEADLINE)) == "OK"
                assert called("unstage", partial(driver.unstage, volume, timeout=DEADLINE)) == "OK"
                if deed == "kill":
                    server.start()
                else:
                    server.signal(signal.SIGCONT)
                until = time.monotonic() + 40
                while True:
                    driver.stage(volume, RWX)
                    try:
                        target = driver.publish(volume, pod, runtime="runc", capability=RWX, timeout=DEADLINE)
                        (Path(target) / "f").write_text(str(number))
                        break
                    except (grpc.RpcError, OSError):
                        assert time.monotonic() < until, "the volume did not recover"
                        driver.unpublish(volume, pod)
                        time.sleep(0.5)
                driver.unpublish(volume, pod)
                driver.unstage(volume)
                left = {what: found for what, found in driver.left_over().items() if found and what != "rows"}
                assert not left, f"after round {number}: {left}"
                helpers = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if _is_helper(path)]
                assert not helpers, f"after round {number}: processes that mount: {helpers}"
            driver.delete(volume)
            assert driver.process is not None
            assert driver.process.poll() is None
    finally:
        server.close()
    with capsys.disabled():
        told = ", ".join(f"{what}: {count}" for what, count in sorted(outcomes.items()))
        print(f"\n  {rounds} rounds, seed {seed}: {told}; the slowest call {slowest:.1f} s ", end="")


def _is_helper(path: Path) -> bool:
    try:
        return b"one_syscall" in path.read_bytes()
    except OSError:
        return False
