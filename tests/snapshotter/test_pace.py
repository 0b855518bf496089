"""What runs behind waits for calls, but not for ever."""

from __future__ import annotations

import threading
import time

import pytest

from snapshotter import pace
from snapshotter.pace import Pace


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_LONGEST_WAIT", 0.3)
    monkeypatch.setattr(pace, "_LOOK", 0.005)


def _took(paced: Pace, left: int = 0) -> float:
    began = time.monotonic()
    paced.step(left)
    return time.monotonic() - began


def test_without_calls_nothing_waits() -> None:
    paced = Pace(lambda: 9.0, threading.Event())
    assert max(_took(paced) for _ in range(50)) < 0.1


def test_it_begins_when_the_calls_have_passed() -> None:
    until = time.monotonic() + 0.1
    paced = Pace(lambda: 9.0 if time.monotonic() > until else 0.0, threading.Event())
    assert 0.05 < _took(paced) < 0.28


def test_under_endless_calls_it_works_for_a_part_of_the_time() -> None:
    paced = Pace(lambda: 0.0, threading.Event())
    assert 0.25 < _took(paced) < 1, "it begins in spite of them"
    for left, least, most in ((1, 0.15, 0.3), (1000, 0.03, 0.15), (4000, 0.0, 0.1), (100_000, 0.0, 0.01)):
        time.sleep(0.02)
        took = _took(paced, left)
        assert least <= took, left
        assert took < most + 0.2, left


def test_an_end_is_not_waited_for() -> None:
    stop = threading.Event()
    stop.set()
    assert _took(Pace(lambda: 0.0, stop)) < 0.1
