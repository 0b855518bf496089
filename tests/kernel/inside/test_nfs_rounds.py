"""A server that is killed and frozen at random: every call ends in its deadline, nothing leaks, everything recovers."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent import futures
from functools import partial
from pathlib import Path

import grpc
import pytest

from tests.driver import POD, Driver, mount_capability
from tests.kernel.inside.nfs import Ganesha

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
DEADLINE = 8.0


def test_a_server_killed_and_frozen_at_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds, seed = int(os.environ.get("RUNVOL_ROUNDS", "3")), 20261124
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


def test_statistics_of_a_server_that_dies_and_freezes_hold_up_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty of them at a time, of ten volumes; beside them Probe, and a publish of a volume of the node."""
    rounds, chance = int(os.environ.get("RUNVOL_ROUNDS", "2")), random.Random(20261127)
    server, probes, publishes, outcomes = Ganesha(tmp_path / "server"), [], [], Counter[str]()
    server.start()
    try:
        with Driver(tmp_path / "d") as driver:
            parameters = {"backend": "nfs", "server": "127.0.0.1", "path": "/exp", "vers": "4.1"}
            volumes = [driver.create(f"v{number}", capability=RWX, **parameters) for number in range(10)]
            for volume in volumes:
                driver.stage(volume, RWX)
            targets = [driver.publish(volume, POD.format(1), runtime="runc", capability=RWX) for volume in volumes]
            local = driver.create("local", backend="directory", quota="none")
            driver.stage(local)

            def asked(number: int) -> str:
                try:
                    driver.client.NodeGetVolumeStats(
                        volume_id=volumes[number % 10].volume_id, volume_path=targets[number % 10], timeout=30
                    )
                    return "OK"
                except grpc.RpcError as error:
                    return str(error.code().name)

            for _round in range(rounds):
                deed = chance.choice([signal.SIGKILL, signal.SIGSTOP])
                server.signal(deed)
                with futures.ThreadPoolExecutor(40) as pool:
                    answers = [pool.submit(asked, number) for number in range(40)]
                    while not all(answer.done() for answer in answers):
                        probes.append(_timed(partial(driver.client.Probe, timeout=10)))
                        publishes.append(
                            _timed(partial(driver.publish, local, POD.format(2), runtime="runc", timeout=10))
                        )
                        driver.unpublish(local, POD.format(2))
                    outcomes.update(answer.result() for answer in answers)
                if deed == signal.SIGKILL:
                    server.start()
                else:
                    server.signal(signal.SIGCONT)
                until = time.monotonic() + 60
                while asked(0) != "OK":
                    assert time.monotonic() < until, "its statistics do not come back"
                    time.sleep(0.5)
            driver.unstage(local)
            driver.delete(local)
            for volume in volumes:
                driver.unpublish(volume, POD.format(1))
                driver.unstage(volume)
                driver.delete(volume)
            assert set(outcomes) <= {"OK", "UNAVAILABLE"}
    finally:
        server.close()
    worst = [sorted(one)[int(0.99 * (len(one) - 1))] for one in (probes, publishes)]
    assert max(worst) < DEADLINE
    with capsys.disabled():
        print(f"\n  {rounds} rounds of 40 statistics: {dict(outcomes)}; beside them p99 of {len(probes)} Probes "
              f"{worst[0] * 1000:.0f} ms, of {len(publishes)} publishes {worst[1] * 1000:.0f} ms ", end="")  # fmt: skip


def _timed(call) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started
