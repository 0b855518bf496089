"""Looks at mounts of servers: a dead one costs seconds, and a healthy one is silent for nobody."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from blockdev import Deadline, WaitExpired, nfs
from guestmount.claims import Claim, NfsMount, Use
from guestmount.ways import servers

CLAIM = Claim(volume="v", source="nas:/e", staging_path="/s", use=Use(mode="multi_node_multi_writer", fstype=""),
              nfs=NfsMount(server="nas", path="/e", version="4.1"))  # fmt: skip


class Mounts:
    """How long statvfs(2) takes at a path; `hang` until the test ends."""

    def __init__(self) -> None:
        self.takes: dict[str, float] = {}
        self.end = threading.Event()
        self.looks: list[str] = []

    def slow(self, real: Callable[..., os.statvfs_result]) -> Callable[..., os.statvfs_result]:
        def statvfs(path: str) -> os.statvfs_result:
            self.looks.append(path)
            self.end.wait(self.takes.get(path, 0.0))
            return real("/")

        return statvfs

    def hang(self, path: str) -> None:
        self.takes[path] = 30.0


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounts]:
    made = Mounts()
    monkeypatch.setattr(os, "statvfs", made.slow(os.statvfs))
    monkeypatch.setattr(servers, "_silence", servers._Silence())
    monkeypatch.setattr(servers, "_PATIENCE", 0.6)
    yield made
    made.end.set()


def test_a_caller_without_time_makes_no_healthy_server_silent(mounted, tmp_path):
    slow, other = str(tmp_path / "slow"), str(tmp_path / "other")
    mounted.takes[slow] = 0.3
    with pytest.raises(WaitExpired):
        servers.usage(CLAIM, slow, Deadline.after(0.1))
    assert servers.usage(CLAIM, other, Deadline.after(10)).total_bytes
    assert servers.problems(CLAIM, other) == []


def test_who_comes_while_such_a_look_goes_on_waits_for_the_server_as_long_as_anybody(mounted, tmp_path):
    slow = str(tmp_path / "slow")
    mounted.takes[slow] = 0.2
    with pytest.raises(WaitExpired):
        servers.usage(CLAIM, slow, Deadline.after(0.05))
    assert servers.usage(CLAIM, slow, Deadline.after(10)).total_bytes
    assert servers.problems(CLAIM, slow) == []


def test_a_server_that_had_all_its_time_is_silent_for_all_its_mounts(mounted, tmp_path):
    dead, other = str(tmp_path / "dead"), str(tmp_path / "other")
    mounted.hang(dead)
    began = time.monotonic()
    with pytest.raises(nfs.ServerSilent, match="nas"):
        servers.usage(CLAIM, dead, Deadline.after(10))
    assert 0.5 < time.monotonic() - began < 2.0
    began = time.monotonic()
    for path in (dead, other):
        with pytest.raises(nfs.ServerSilent):
            servers.usage(CLAIM, path, Deadline.after(10))
        (problem,) = servers.problems(CLAIM, path)
        assert problem.unreachable
    assert time.monotonic() - began < 0.3
    assert mounted.looks == [dead]


def test_health_alone_finds_a_dead_server(mounted, tmp_path):
    dead = str(tmp_path / "dead-again")
    mounted.hang(dead)
    (problem,) = servers.problems(CLAIM, dead)
    assert problem.reason == "ServerSilent"
    with pytest.raises(nfs.ServerSilent):
        servers.usage(CLAIM, str(tmp_path / "other"), Deadline.after(0.1))
