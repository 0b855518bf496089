"""What a pool's status means: who is refused then, and with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockdev.dm_targets import PoolStatus
from snapshotter.errors import PoolFull, SnapshotterError, Unavailable
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
