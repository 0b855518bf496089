"""A pool that an earlier release has made is assembled, served and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.node import STORE
from tests.kernel.inside.lab import MIB, Lab, mounted
from tests.snapshotter import old


class _Old(Lab):
    @staticmethod
    def _pool_name(directory: Path) -> str:
        return "oldpool"


@pytest.fixture
def lab(tmp_path: Path, make_lab: Callable[..., Lab]) -> Iterator[Lab]:
    old.unpack(tmp_path)
    lab = _Old(tmp_path, made=True, size=16 * MIB)
    yield lab
    lab.destroy()


@pytest.mark.short
def test_what_it_holds_is_served_finished_and_added_to(lab: Lab) -> None:
    assert (lab.found.orphans, lab.found.foreign, lab.found.lost) == ([], [], [])
    assert set(lab.names()) == {old.LOWER, old.UPPER, old.CONTAINER, old.VIEW}, "the intent was never fulfilled"
    with mounted(lab.mounts(old.CONTAINER)) as root:
        assert {path.name: path.read_bytes() for path in root.iterdir()} == {
            "file": b"of the bottom layer", "second": b"of the layer above", "written": b"by the container",
        }  # fmt: skip
    with mounted(lab.mounts(old.VIEW)) as root:
        assert [path.name for path in root.iterdir()] == ["file"]
    with mounted(lab.prepare("new", old.UPPER)) as root:
        assert (root / "second").read_bytes() == b"of the layer above"
    assert lab.stat("new").device > old.INTENDED
    lab.layer("another", files={"f": b"x"})
    lab.reap()
    assert old.DOOMED not in lab.ids()
    assert not lab.leaks()
    lab.reboot()
    assert lab.read("another", "f") == b"x"
    assert not lab.leaks()


def test_without_the_marks_and_the_store_it_is_recognised_and_nothing_of_it_is_touched(lab: Lab) -> None:
    before = lab.ids()
    lab.stop()
    for name in (STORE, f"{STORE}-wal", f"{STORE}-shm", "pool.made"):
        (Path(lab.state) / name).unlink(missing_ok=True)
    lab.start()
    assert set(lab.node.store.quarantined()) == before
    lab.prepare("new")
    lab.reap()
    assert before < lab.ids()
