"""Walks that give a volume's files to a group: nothing of one is kept longer than it lasts, and it can be ended."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from blockdev import Deadline
from guestmount import groups
from guestmount.claims import Claims
from guestmount.detect import Detector
from guestmount.giving import Giving
from guestmount.node import Node
from volumes import Catalog, VolumeNotFound, VolumeUnfinished
from tests.until import until


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    place = tmp_path / "volume"
    place.mkdir()
    (place / "file").touch()
    return place


class Walk:
    """The walk of the room `groups`, which stands still until it is told to go on or to end."""

    def __init__(self) -> None:
        self.begun, self.go, self.runs = threading.Event(), threading.Event(), 0

    def apply(self, _root: int, _group: int, deadline: Deadline) -> bool:
        self.runs += 1
        self.begun.set()
        while not self.go.wait(0.005):
            deadline.check("a walk")
        return True


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    made = Walk()
    monkeypatch.setattr(groups, "are_given", lambda *_arguments: False)
    monkeypatch.setattr(groups, "apply", made.apply)
    yield made
    made.go.set()


def give(giving: Giving, tree: Path, group: str = "4321", volume: str = "v", seconds: float = 10) -> None:
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        giving.files(volume, root, group, Deadline.after(seconds))
    finally:
        os.close(root)


def nothing_is_kept(giving: Giving) -> bool:
    return not giving._walks and not giving._jobs._jobs


def test_nothing_is_kept_of_walks_that_have_ended(tree, walk):
    giving = Giving()
    walk.go.set()
    for number in range(50):
        give(giving, tree, volume=f"v{number}")
    assert walk.runs == 50
    until(lambda: nothing_is_kept(giving))


def test_nothing_is_kept_of_a_walk_that_ended_behind_its_call(tree, walk):
    giving = Giving(patience=0.01)
    with pytest.raises(VolumeUnfinished):
        give(giving, tree)
    assert giving.is_at_work("v")
    walk.go.set()
    until(lambda: nothing_is_kept(giving))
    assert walk.runs == 1


def test_nothing_is_kept_of_a_walk_that_never_began(tree, walk):
    giving = Giving(patience=0.01)
    for number in range(6):
        with pytest.raises(VolumeUnfinished):
            give(giving, tree, volume=f"v{number}")
    assert sorted(giving._walks) == ["v0", "v1", "v2", "v3"]
    walk.go.set()
    until(lambda: nothing_is_kept(giving))


def test_a_walk_that_failed_is_told_once_and_then_nothing_is_kept(tree, monkeypatch):
    def failing(*_arguments: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(groups, "are_given", lambda *_arguments: False)
    monkeypatch.setattr(groups, "apply", failing)
    giving = Giving()
    with pytest.raises(OSError, match="Input/output"):
        give(giving, tree)
    assert nothing_is_kept(giving)


def test_what_is_taken_back_is_walked_no_further_and_its_answer_is_nobodys(tree, walk):
    giving = Giving(patience=0.01)
    with pytest.raises(VolumeUnfinished):
        give(giving, tree)
    giving.end("v")
    assert not giving.is_at_work("v")
    assert nothing_is_kept(giving)
    walk.go.set()
    give(giving, tree, seconds=10)


def test_a_walk_that_cannot_end_yet_is_joined_by_no_other_group(tree, monkeypatch):
    """It hangs in the kernel, and is told to end; what it has given is not what the next pod asks for."""
    go = threading.Event()

    def hanging(*_arguments: object) -> bool:
        return go.wait(20)

    monkeypatch.setattr(groups, "are_given", lambda *_arguments: False)
    monkeypatch.setattr(groups, "apply", hanging)
    monkeypatch.setattr("guestmount.giving._END", 0.05)
    giving = Giving(patience=0.01)
    with pytest.raises(VolumeUnfinished):
        give(giving, tree, "1000")
    giving.end("v")
    with pytest.raises(VolumeUnfinished, match="group 1000 first"):
        give(giving, tree, "2000")
    go.set()
    until(lambda: nothing_is_kept(giving))


def test_a_walk_that_begins_can_be_ended_though_an_earlier_one_ended_while_its_call_joined_that(
    tree, walk, monkeypatch
):  # fmt: skip
    giving = Giving(patience=0.05)
    with pytest.raises(VolumeUnfinished):
        give(giving, tree)
    joined = giving._joined

    def slowly(volume: str, *more: str) -> object:
        earlier = joined(volume, *more)
        walk.go.set()
        until(lambda: not giving.is_at_work(volume))
        walk.go.clear()
        return earlier

    with monkeypatch.context() as patch:
        patch.setattr(giving, "_joined", slowly)
        with pytest.raises(VolumeUnfinished):
            give(giving, tree)
    giving.end("v")
    assert not giving.is_at_work("v"), "nobody could end it"
    with pytest.raises(VolumeUnfinished):
        give(giving, tree)
    assert giving.is_at_work("v"), "the next call begins one"
    giving.end("v")
    until(lambda: nothing_is_kept(giving))


class _Volumes:
    """A catalog that knows no volume."""

    def watch_copies(self, _node: Node) -> None:
        pass

    def is_image(self, _volume: str) -> bool:
        return False

    def of(self, volume: str) -> None:
        raise VolumeNotFound(volume)


@pytest.mark.parametrize("verb", ["unpublish", "unstage", "delete"])
def test_a_volume_whose_claim_was_lost_is_walked_no_further_once_it_is_taken_back(tmp_path, tree, walk, verb):
    (tmp_path / "run").mkdir()
    node = Node(catalog=cast(Catalog, _Volumes()), claims=Claims(str(tmp_path / "run")),
                detector=cast(Detector, None), dialects=(), roots=[str(tmp_path)], check_patience=0.01)  # fmt: skip
    with contextlib.suppress(VolumeUnfinished):
        give(node.means.giving, tree)
    assert node.means.giving.is_at_work("v")
    if verb == "delete":
        with node.unused("v", Deadline.after(10)):
            assert not node.means.giving.is_at_work("v")
    else:
        getattr(node, verb)("v", str(tmp_path / "target"), Deadline.after(10))
    assert not node.means.giving.is_at_work("v")
    assert nothing_is_kept(node.means.giving)
