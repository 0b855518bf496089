"""What runs behind the calls survives what happens to it, and says so."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from runvol_proto import grpc_health_pb2 as health_pb
from snapshotter.background import Background
from snapshotter.errors import StoreFailed
from snapshotter.idle import Idle
from snapshotter.reaper import Reaper
from snapshotter.seals import Sealer
from snapshotter.service import Service
from snapshotter.workers import Workers


def _fail(background: Background, error: Exception) -> None:
    with background.survived("work"):
        raise error


def test_what_is_raised_is_counted_and_told_until_it_goes_well_again(caplog: pytest.LogCaptureFixture) -> None:
    background = Background()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            _fail(background, ValueError("a line of a tool"))
    assert background.failures() == {"work": 3}
    assert background.troubles() == ["work: ValueError: a line of a tool"]
    assert len(caplog.records) == 1, "the same trouble each second is logged each second"
    with background.survived("work"):
        pass
    assert background.troubles() == []
    assert background.failures() == {"work": 3}


def test_what_ends_the_process_is_not_held_up() -> None:
    background = Background()
    with pytest.raises(KeyboardInterrupt), background.survived("work"):
        raise KeyboardInterrupt


def test_a_thread_that_has_ended_is_told() -> None:
    background, end = Background(), threading.Event()
    thread = threading.Thread(target=end.wait, name="reaper")
    thread.start()
    background.started(thread)
    assert background.troubles() == []
    end.set()
    thread.join()
    assert background.troubles() == ["the thread reaper has ended"]


def _until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def _health(background: Background, path: Path) -> int:
    node: Any = SimpleNamespace()
    workers = Workers(2)
    service = Service(node, workers, limit=1, background=background)
    server = grpc.server(workers)
    server.add_generic_rpc_handlers((service.health(),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        with grpc.insecure_channel(f"unix:{path}") as channel:
            ask = channel.unary_unary("/grpc.health.v1.Health/Check",
                                      request_serializer=health_pb.HealthCheckRequest.SerializeToString,
                                      response_deserializer=health_pb.HealthCheckResponse.FromString)  # fmt: skip
            return int(ask(health_pb.HealthCheckRequest()).status)
    finally:
        server.stop(0).wait()


def test_health_says_what_the_background_says(tmp_path: Path) -> None:
    background = Background()
    assert _health(background, tmp_path / "a") == health_pb.HealthCheckResponse.SERVING
    _fail(background, ValueError("x"))
    assert _health(background, tmp_path / "b") == health_pb.HealthCheckResponse.NOT_SERVING


class _Store:
    """A store on a disk that is full, until it is not."""

    def __init__(self) -> None:
        self.full, self.looks = True, 0

    def doomed(self) -> dict[int, int]:
        self.looks += 1
        if self.full:
            raise StoreFailed("disk is full")
        return {}

    get = sound = pages = write_made = lambda self, *_: [] if not self.full else self.doomed()

    def quarantine_refused(self, _now: int) -> None:
        pass

    def tidy(self) -> None:
        pass


def test_the_reaper_goes_on_after_whatever_it_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.reaper._RETRY", 0.01)
    monkeypatch.setattr("snapshotter.reaper._LOOK", 0.01)
    store, background = _Store(), Background()
    anything: Any = store
    reaper = Reaper(anything, SimpleNamespace(), Idle(0), discard=False, busy=lambda: 9.0, background=background)  # type: ignore[arg-type]
    reaper.start()
    _until(lambda: store.looks > 3)
    assert background.troubles() == ["giving devices back: disk is full"]
    store.full = False
    _until(lambda: not background.troubles())
    reaper.stop()


def test_the_sealer_goes_on_after_whatever_it_met() -> None:
    store, background = _Store(), Background()
    anything: Any = store
    sealer = Sealer(SimpleNamespace(), anything, lambda _device: None, background)  # type: ignore[arg-type]
    store.full = False
    sealer.start()
    store.full = True
    sealer.tell("k")
    _until(lambda: bool(background.troubles()))
    assert background.troubles() == ["sealing layers: disk is full"]
    sealer.stop()
