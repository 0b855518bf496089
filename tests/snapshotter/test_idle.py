"""When a mapped device is idle, and what happens to one that is asked for in that moment."""

from __future__ import annotations

import threading
import time

import pytest

from blockdev import Deadline
from snapshotter.errors import TookTooLong
from snapshotter.idle import Idle


def test_the_longest_idle_come_first_and_only_when_they_are_due() -> None:
    idle = Idle(10)
    for device, at in ((1, 100.0), (2, 101.0), (3, 102.0), (1, 103.0)):
        idle.handed(device, at)
    assert idle.due(110.0, 5) == []
    assert idle.due(112.0, 5) == [2, 3]
    assert idle.due(120.0, 2) == [2, 3]
    idle.forget(2)
    assert idle.due(120.0, 5) == [3, 1]


def test_zero_is_never() -> None:
    idle = Idle(0)
    idle.handed(1, 0.0)
    idle.found([2], 0.0)
    assert idle.due(1e9, 5) == []


def test_one_that_was_handed_out_meanwhile_is_not_unmapped() -> None:
    idle = Idle(10)
    idle.handed(1, 100.0)
    idle.handed(1, 115.0)
    assert not idle.leave(1, 120.0, lambda _device: pytest.fail("it was unmapped"))


def test_one_that_is_open_is_looked_at_again_after_the_same_time() -> None:
    idle = Idle(10)
    idle.handed(1, 100.0)
    assert not idle.leave(1, 120.0, lambda _device: False)
    assert idle.due(125.0, 5) == []
    assert idle.due(130.0, 5) == [1]


def test_a_time_never_goes_back() -> None:
    """The reaper's clock was read before the caller's."""
    idle = Idle(10)
    idle.handed(1, 100.0)

    def opened_meanwhile(device: int) -> bool:
        idle.handed(device, 125.0)
        return False

    idle.leave(1, 120.0, opened_meanwhile)
    assert idle.due(131.0, 5) == []


def test_who_asks_while_it_is_unmapped_waits_and_is_remembered() -> None:
    idle = Idle(10)
    now = time.monotonic()
    idle.handed(1, now - 60)
    begun, go_on = threading.Event(), threading.Event()

    def unmap(_device: int) -> bool:
        begun.set()
        return go_on.wait(10)

    reaper = threading.Thread(target=idle.leave, args=(1, now, unmap))
    reaper.start()
    assert begun.wait(10)
    with pytest.raises(TookTooLong, match="device 1 "):
        idle.keep(1, Deadline.after(0.05))
    idle.keep(2, Deadline.after(0.05))
    caller = threading.Thread(target=idle.keep, args=(1, Deadline.after(10)))
    caller.start()
    go_on.set()
    caller.join(10)
    reaper.join(10)
    assert not idle.leaving(1)
    assert idle.due(time.monotonic() + 20, 5) == [2, 1]
