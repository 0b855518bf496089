"""What a pool's status means: who is refused then, and with which words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from blockdev.dm_targets import PoolStatus
from snapshotter.errors import PoolFull, SnapshotterError, Unavailable
from snapshotter.messages import ToldPool
from snapshotter.watermarks import Limits, Remedies, Watermarks

WELL = PoolStatus(mode="rw", data_used=10, data_total=100, metadata_used=10, metadata_total=1000)
MARKS = Watermarks(name="p", limits=Limits(), remedies=Remedies(data="buy a disk", metadata="buy another"))


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({}, "ok", "uses 10% of its data and 1% of its metadata"),
        ({"data_used": 80}, "warning", "uses 80% of its data"),
        ({"mode": "fail"}, "broken", "has failed"),
        ({"needs_check": True}, "broken", "waits for a check"),
        ({"mode": "ro"}, "broken", "is read-only: stop"),
        ({"mode": "ro", "metadata_used": 1000}, "broken", "buy another"),
        ({"mode": "out_of_data_space"}, "broken", "fail after a minute. Remove images, or buy a disk"),
        ({"mode": "out_of_data_space", "queues": False}, "broken", "writes fail. Remove images"),
    ],
)
def test_the_finding_says_what_to_do(change: dict[str, object], state: str, words: str) -> None:
    found = MARKS.health(replace(WELL, **change))  # type: ignore[arg-type]
    assert found.state == state
    assert found.message.startswith("pool p ") and words in found.message


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mode": "fail"}, Unavailable, "has failed"),
        ({"mode": "out_of_data_space"}, PoolFull, "no free data blocks"),
        ({"mode": "ro", "metadata_used": 1000}, PoolFull, "metadata device is full"),
        ({"data_used": 98}, PoolFull, "2 of 100 blocks are free"),
        ({"metadata_used": 900}, PoolFull, "100 of 1000 blocks are free, and 125 are kept"),
    ],
)
def test_a_pool_without_room_and_one_that_takes_no_writes_are_told_apart(
    change: dict[str, object], error: type[SnapshotterError], words: str
) -> None:
    MARKS.admit(WELL)
    with pytest.raises(error, match=words):
        MARKS.admit(replace(WELL, **change))  # type: ignore[arg-type]


def test_what_a_filesystem_will_write_is_counted_before() -> None:
    MARKS.admit_writes(WELL, 87)
    with pytest.raises(PoolFull, match="up to 88 data and 3 metadata blocks, and 87 and 865 may be used.*buy a disk"):
        MARKS.admit_writes(WELL, 88)
    with pytest.raises(PoolFull, match="buy another"):
        MARKS.admit_writes(replace(WELL, data_total=1 << 20), 32 * 900)


class _Kernel:
    """What it says of the pool, and how often it was asked."""

    def __init__(self, status: PoolStatus) -> None:
        self.now, self.asked = status, 0

    def pool_status(self, _name: str) -> PoolStatus:
        self.asked += 1
        return self.now


@pytest.mark.parametrize("look", [ToldPool.admit, ToldPool.refuse_broken])
def test_nobody_is_refused_for_what_the_pool_was(
    look: Callable[[ToldPool], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    kernel = _Kernel(replace(WELL, mode="out_of_data_space"))
    pool = ToldPool(kernel, "p")  # type: ignore[arg-type]
    with pytest.raises(PoolFull):
        look(pool)
    kernel.now = WELL  # it was extended
    clock[0] += 0.1  # while what was seen is still good enough to let a snapshot be made
    look(pool)
    assert kernel.asked == 2
    for _ in range(100):
        look(pool)
    assert kernel.asked == 2


def test_many_who_are_refused_ask_the_kernel_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    kernel = _Kernel(replace(WELL, mode="fail"))
    pool = ToldPool(kernel, "p")  # type: ignore[arg-type]
    for _ in range(1000):
        clock[0] += 0.0002
        with pytest.raises(Unavailable):
            pool.admit()
    assert kernel.asked <= 6


def test_a_status_is_as_old_as_the_question_and_takes_the_place_of_no_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever asks may stand still before it has the answer, while somebody else sees more."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    kernel = _Kernel(WELL)
    pool = ToldPool(kernel, "p")  # type: ignore[arg-type]
    full = replace(WELL, mode="out_of_data_space")

    class Held(_Kernel):
        def pool_status(self, name: str) -> PoolStatus:
            answer = super().pool_status(name)
            clock[0] += 2.0
            pool.mapper = later
            with pytest.raises(PoolFull):
                pool.admit()
            return answer

    later: Any = _Kernel(full)
    pool.mapper = Held(WELL)  # type: ignore[assignment]
    assert pool.status() == WELL
    with pytest.raises(PoolFull):
        pool.admit()
