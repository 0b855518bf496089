"""What is asked of the pool before anything is made, and what a pool that cannot be read keeps back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockdev import Deadline
from blockdev.errors import CommandMissing
from snapshotter import assembly, backing, keeper, node, stamps
from snapshotter.backing import Description
from snapshotter.errors import PoolFull, Unavailable
from snapshotter.model import Kind, Snapshot, State
from snapshotter.snapshots import Sizes, Snapshotter
from snapshotter.store import Base, Store

GIB = 1 << 30


@pytest.mark.parametrize("error", [CommandMissing("thin_ls"), OSError(5, "Input/output error")])
def test_what_is_there_is_served_although_the_pool_cannot_be_compared(tmp_path: Path, monkeypatch, error) -> None:
    backing.save(str(tmp_path), Description(name="p", identity="0" * 16, kind="loop", data="/d", metadata="/m",
                                            metadata_bytes=2 << 20, block=65536))  # fmt: skip
    monkeypatch.setattr(node, "Mapper", lambda: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(assembly, "assemble", lambda *_: (SimpleNamespace(metadata="/m"), None))
    monkeypatch.setattr(stamps.Stamp, "take", lambda *_: None)
    monkeypatch.setattr(keeper.Keeper, "open", lambda *_: None)
    served = node.Node(node.Settings(state_dir=str(tmp_path)))
    pool: Any = served.pool
    pool.status = lambda: SimpleNamespace(mode="rw", needs_check=False, transaction=1)
    known: set[int] = set()

    def ids(_deadline: Deadline) -> set[int]:
        if error is not None:
            raise error
        return known

    pool.ids = ids
    served.open_pool()
    assert served.ready and str(error) in served.store.barred
    with served.store.transaction(), pytest.raises(Unavailable, match="cannot be compared"):
        served.store.new_device()
    error = None
    served._compare()
    with served.store.transaction():
        assert not served.store.barred and served.store.new_device() == 1


def test_the_cost_of_an_xfs_without_a_parent_goes_by_the_base_that_it_grows_from(tmp_path: Path) -> None:
    asked: list[tuple[int, ...]] = []

    class Pool:
        name = "p"

        def admit(self, *cost: int) -> None:
            asked.append(cost)
            if cost:
                raise PoolFull("that is all that is asked here")

        def data_bytes(self) -> int:
            return 200 * GIB

    store = Store(str(tmp_path / "s.db"))
    pool: Any = Pool()
    golden: Any = SimpleNamespace(device=lambda *_: 1)
    sizes = Sizes(fstype="xfs", size=10 * GIB, by_namespace={"big": 100 * GIB})
    snapshots = Snapshotter(store, pool, golden, sizes, lambda _device: None)
    with pytest.raises(PoolFull):
        snapshots.prepare("big/1/c", "", {"containerd.io/snapshot/max-size": str(GIB)}, Deadline.after(5))
    ((places, _each),) = (cost for cost in asked if cost)
    assert places == 99 * 4
    asked.clear()
    with store.transaction():
        store.set_base(Base(fstype="xfs", size=GIB, device=1, ready=True))
        store.insert(Snapshot(key="big/2/layer", parent="", kind=Kind.COMMITTED, state=State.READY, device=2,
                              size=100 * GIB, fstype="xfs", created=1, updated=1))  # fmt: skip
    with pytest.raises(PoolFull):
        snapshots.prepare(
            "big/3/d", "big/2/layer", {"containerd.io/snapshot/max-size": str(200 * GIB)}, Deadline.after(5)
        )
    ((places, _each),) = (cost for cost in asked if cost)
    assert places == 100 * 4, "the first layer was grown from a base of 1 GiB"
    store.close()


def test_a_stop_ends_the_pauses_of_what_hashes_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are waited for with the very event that a stop sets."""
    backing.save(str(tmp_path), Description(name="p", identity="0" * 16, kind="loop", data="/d", metadata="/m",
                                            metadata_bytes=2 << 20, block=65536))  # fmt: skip
    monkeypatch.setattr(node, "Mapper", lambda: SimpleNamespace(close=lambda: None))
    served = node.Node(node.Settings(state_dir=str(tmp_path), verity=True))
    assert served.seals is not None
    pause: Any = served.seals._rest
    served._stop.set()
    assert pause.__self__._stop.is_set()
    served.store.close()
