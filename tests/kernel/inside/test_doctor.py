"""Pools that are broken: doctor finds each, names it, and what it says to do puts it right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from blockdev import Deadline
from blockdev.devicemapper import Mapper
from snapshotter import assembly
from snapshotter.store import STORE
from tests.kernel.inside.server import Server
from tests.kernel.inside.test_service import Client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, data=256 << 20) as running:
        yield running


def rows(server: Server) -> list[dict[str, str]]:
    said = json.loads(server.runvol("doctor", "--json", ok=(0, 1, 3)))
    found: list[dict[str, str]] = said if isinstance(said, list) else next(
        one for one in said.values() if isinstance(one, list))  # fmt: skip
    return found


def ill(server: Server, known: str) -> dict[str, str]:
    found = rows(server)
    return next(one for one in found if one["id"] == known)


def is_well(server: Server, known: str) -> bool:
    return known not in [one["id"] for one in rows(server)]


def apply(server: Server, finding: dict[str, str]) -> None:
    """The first command of the fix, as it stands."""
    command = finding["fix"].split("`")[1]
    assert command.startswith("runvol "), finding
    done = subprocess.run(f"{sys.executable} -m {command}", shell=True, env=server.environment, capture_output=True,  # noqa: S602
                          text=True, check=False, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def prepared(server: Server, key: str = "a") -> None:
    """A snapshot, as soon as the pool is assembled."""
    until = time.monotonic() + 120
    while True:
        try:
            Client(server).prepare(key, timeout=120)
            return
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                return
            assert time.monotonic() < until, error
            time.sleep(0.5)


def _take_apart(server: Server) -> None:
    server.stop()
    with Mapper() as mapper:
        pool, below = assembly.assemble(mapper, str(server.state), Deadline.after(60))
        assembly.disassemble(mapper, pool, below, Deadline.after(60))


def test_a_pool_that_is_well(server: Server) -> None:
    known = {one["id"]: one["state"] for one in rows(server)}
    assert known["pool.health"] == known["devicemapper.kernel"] == known["snapshotter.store"] == "ok"


def test_a_device_of_somebody_elses_that_has_its_name(server: Server) -> None:
    _take_apart(server)
    with Mapper() as mapper:
        mapper.create(server.pool_name, "OTHER")
        found = ill(server, "pool.foreign")
        assert "rename it" in found["fix"]
        mapper.remove(server.pool_name)
    server.start()
    prepared(server)
    assert is_well(server, "pool.foreign")


def test_a_pool_that_is_nearly_full(tmp_path: Path) -> None:
    with Server(tmp_path, data=256 << 20, RUNVOL_POOL_AUTOEXTEND_THRESHOLD="20") as server:
        prepared(server)
        (name,) = (one for one in os.listdir("/dev/mapper") if one.startswith("runvol-") and not one.endswith("keeper"))
        with open(f"/dev/mapper/{name}", "r+b", buffering=0) as device:
            for at in range(4 << 20, 60 << 20, 4 << 20):
                os.pwrite(device.fileno(), b"x" * (4 << 20), at)
            os.fsync(device.fileno())
        found = ill(server, "pool.filling")
        assert found["state"] == "warning"
        assert found["fix"].startswith("`runvol pool extend`")
        # By how much is a setting; the service, which has another, leaves it to the operator.
        server.environment["RUNVOL_POOL_AUTOEXTEND_PERCENT"] = "100"
        apply(server, found)
        assert is_well(server, "pool.filling")


def test_devices_that_others_made(server: Server) -> None:
    with Mapper() as mapper:
        mapper.message(server.pool_name, "create_thin 4000")
    server.stop()
    server.start()
    prepared(server)
    found = ill(server, "snapshotter.quarantine")
    server.runvol(*found["fix"].split("`")[1].split()[1:], "--free-all", "--yes")
    assert is_well(server, "snapshotter.quarantine")


def test_a_store_that_is_damaged(server: Server) -> None:
    prepared(server)
    server.stop()
    path = server.state / STORE
    path.write_bytes(b"no database" * 1000)
    for more in ("-wal", "-shm"):
        path.with_name(f"{STORE}{more}").unlink(missing_ok=True)
    found = ill(server, "snapshotter.store-damaged")
    assert found["state"] == "broken"
    path.unlink()
    apply(server, found)
    server.start()
    assert is_well(server, "snapshotter.store-damaged")


def test_nothing_was_changed_by_looking(server: Server) -> None:
    prepared(server)
    server.stop()
    with Mapper() as mapper:
        before = sorted((one.name, one.major, one.minor, one.event) for one in mapper.devices())
        files = {one: (server.state / one).read_bytes() for one in sorted(os.listdir(server.state))
                 if (server.state / one).is_file()}  # fmt: skip
        rows(server)
        assert sorted((one.name, one.major, one.minor, one.event) for one in mapper.devices()) == before
    assert {one: (server.state / one).read_bytes() for one in sorted(os.listdir(server.state))
            if (server.state / one).is_file()} == files  # fmt: skip
