"""What the gauge has to show: nothing is available before new snapshots are refused."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockdev.dm_targets import PoolStatus
from snapshotter import gauge
from snapshotter.background import Background
from snapshotter.errors import PoolFull, SnapshotterError, Unavailable
from snapshotter.gauge import Fill, Follower, Gauge, fill
from snapshotter.pool import Limits, Pool

BLOCK = 64 << 10


def status(data: int, metadata: int = 100, mode: str = "rw", **more: Any) -> PoolStatus:
    """Of 1000 blocks of data and 4000 of metadata, so many are used."""
    return PoolStatus(mode=mode, data_used=data, data_total=1000, metadata_used=metadata, metadata_total=4000, **more)


@pytest.mark.parametrize(
    ("of", "share"),
    [
        (status(0, 0), 0.97),
        (status(500), 0.47),
        (status(970), 0),
        (status(969), 0.001),
        (status(1000), 0),
        (status(100, 3744), 0),
        (status(100, 1872), 0.5),
        (status(0, mode="ro"), 0),
        (status(0, mode="out_of_data_space"), 0),
        (status(0, needs_check=True), 0),
    ],
)
def test_the_fuller_of_data_and_metadata_counts(of: PoolStatus, share: float) -> None:
    found = fill(of, BLOCK, 3)
    assert found.total == 1000 * BLOCK
    assert found.available / found.total == pytest.approx(share, abs=1e-6)


def test_a_pool_that_tells_nothing_has_nothing() -> None:
    assert fill(PoolStatus(mode="fail"), BLOCK, 3) == Fill(total=0, available=0)


def test_what_is_refused_has_nothing_available_and_all_else_is_admitted() -> None:
    chance = random.Random(7)
    for _ in range(3000):
        reserve = chance.choice((0, 3, 50))
        of = status(chance.randrange(1001), chance.randrange(4001), chance.choice(("rw", "rw", "ro")),
                    needs_check=chance.random() < 0.1)  # fmt: skip
        pool: Any = Pool(SimpleNamespace(), "p", "0" * 16, "", Limits(data_reserve=reserve))  # type: ignore[arg-type]
        pool.status = lambda of=of: of
        available = fill(of, BLOCK, reserve).available
        assert 0 <= available <= 1000 * BLOCK
        try:
            pool.admit()
        except (PoolFull, Unavailable):
            assert available == 0, of


def _follower(tmp_path: Path, show: Any, background: Background) -> Follower:
    one = Gauge(str(tmp_path / "gauge"), str(tmp_path))
    one.show = show  # type: ignore[method-assign]
    pool: Any = SimpleNamespace(status=lambda: status(500), block_bytes=lambda: BLOCK, limits=Limits())
    return Follower(one, pool, lambda: True, background)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SnapshotterError("no")])
def test_what_keeps_it_from_following_is_its_own_trouble(tmp_path: Path, error: Exception) -> None:
    background, asked = Background(), []

    def show(wanted: Fill) -> None:
        asked.append(wanted)
        if len(asked) < 3:
            raise error

    follower = _follower(tmp_path, show, background)
    for number in range(3):
        with background.survived("the gauge"):
            follower.follow()
        assert (follower.trouble == "") == (number == 2)
        assert not background.troubles()
    assert asked == [fill(status(500), BLOCK, 3)] * 3


def test_one_that_hangs_is_told_and_begun_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "_PATIENCE", 0.1)
    answer, asked = threading.Event(), []

    def show(wanted: Fill) -> None:
        asked.append(wanted)
        answer.wait(20)

    follower = _follower(tmp_path, show, Background())
    for _ in range(3):
        follower.follow()
        assert "did not end within" in follower.trouble
    assert len(asked) == 1
    answer.set()
    for _ in range(100):
        follower.follow()
        if not follower.trouble:
            break
        threading.Event().wait(0.02)
    assert not follower.trouble


def test_there_is_none_where_nothing_is_mounted(tmp_path: Path) -> None:
    one = Gauge(str(tmp_path / "gauge"), str(tmp_path))
    for _ in range(2):
        assert not one.is_mounted()
        one.be_there()
        one.be_absent()
        with pytest.raises(Unavailable, match="the gauge is not mounted on"):
            one.shown()
    (tmp_path / "gauge").mkdir()
    with pytest.raises(Unavailable, match="the gauge is not mounted on"):
        one.shown()
