"""Looks at who has left a volume's quota: what was not looked at is said to be unknown, and what was found stays known.

Projects are made up here; those of a real filesystem are in the kernel tier.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.errors import TooDeep
from volumes import quota_watch
from volumes.quota_watch import Left, QuotaWatch, Unseen
from tests.until import until

MINE, OTHER = 7, 99


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty files of project 7; whatever is called `bad` has another one."""
    place = tmp_path / "volume"
    place.mkdir()
    for number in range(20):
        (place / f"f{number}").touch()

    def project_at(fd: int) -> int:
        return OTHER if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) == "bad" else MINE

    monkeypatch.setattr(quota_watch.quotas, "project_at", project_at)
    return place


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> QuotaWatch:
    """It is always time for the next look."""
    monkeypatch.setattr(quota_watch, "_EVERY", 0.0)
    return QuotaWatch()


def seen(watch: QuotaWatch, volume: Path) -> Left | Unseen | None:
    """What a look finds that begins now."""
    watch.left("v", str(volume), MINE)
    end = time.monotonic() + 10
    while watch._waiting or watch._at_work:
        assert time.monotonic() < end
        time.sleep(0.005)
    return watch._seen.get("v")


def look(volume: Path) -> Left | Unseen | None:
    return seen(QuotaWatch(), volume)


def failing(error: BaseException) -> Callable[..., None]:
    def walk(*_arguments: object) -> None:
        raise error

    return walk


def test_a_volume_whose_files_all_count_has_no_problem(watch, volume):
    assert seen(watch, volume) is None
    (volume / "bad").touch()
    assert seen(watch, volume) == Left(1, "bad")
    (volume / "bad").unlink()
    assert seen(watch, volume) is None


def test_what_lies_behind_the_files_of_a_look_is_not_known_to_count(watch, volume, monkeypatch):
    monkeypatch.setattr(quota_watch, "_MOST", 10)
    found = seen(watch, volume)
    assert isinstance(found, Unseen)
    assert "more than 10 files" in str(found)
    monkeypatch.setattr(quota_watch, "_MOST", 21)  # with the volume's own directory
    assert seen(watch, volume) is None


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), TooDeep("a look", 5), KeyError("x")])
def test_a_look_that_fails_forgets_nothing_and_says_that_nothing_is_known(watch, volume, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(quota_watch.trees, "walk", failing(error))
        found = seen(watch, volume)
        assert isinstance(found, Unseen), "all well, though nobody has looked"
    (volume / "bad").touch()
    assert seen(watch, volume) == Left(1, "bad")
    with monkeypatch.context() as patch:
        patch.setattr(quota_watch.trees, "walk", failing(error))
        assert seen(watch, volume) == Left(1, "bad"), "what was found is forgotten"
    (volume / "bad").unlink()
    assert seen(watch, volume) is None


def test_a_node_without_descriptors_does_not_make_files_well(volume, monkeypatch):
    (volume / "bad").touch()

    def regular(_directory: int, _name: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(quota_watch.beneath, "regular", regular)
    assert look(volume) == Unseen("Too many open files")


def test_a_file_that_a_pod_keeps_closed_is_not_known_to_count(volume):
    """A lease of its own, which is broken only for who waits."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel tells its holder
    with open(volume / "f3", "w") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        try:
            found = look(volume)
        finally:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            signal.signal(signal.SIGIO, before)
    assert isinstance(found, Unseen)
    assert "lease" in str(found)
    assert look(volume) is None


def test_a_thread_that_cannot_be_started_is_tried_again(watch, volume, monkeypatch):
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    (volume / "bad").touch()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        assert isinstance(watch.left("v", str(volume), MINE), Unseen)
    monkeypatch.setattr(quota_watch, "_EVERY", 600.0)
    assert seen(watch, volume) == Left(1, "bad")


def test_a_volume_that_was_deleted_meanwhile_is_forgotten(watch, volume, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(_file: int) -> int:
        begun.set()
        go.wait(10)
        return OTHER

    monkeypatch.setattr(quota_watch.quotas, "project_at", slow)
    watch.left("v", str(volume), MINE)
    assert begun.wait(10)
    watch.forget("v")
    go.set()
    while watch._at_work:
        time.sleep(0.005)
    assert not watch._seen
    assert not watch._next
    assert not watch._looks


# -- many volumes


class Endless:
    """Volumes whose files never end, until they are told to; what is looked at, in order."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.order: list[str] = []

    def projects(self, root: int) -> Iterator[tuple[str, int | None]]:
        name = Path(os.readlink(f"/proc/self/fd/{root}")).name
        self.order.append(name)
        yield name, MINE
        while name in self.names:
            yield name, MINE


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endless]:
    made = Endless()
    for name in ("large0", "large1", "large2", "small"):
        (tmp_path / name).mkdir()
        if name != "small":
            made.names.add(name)
    monkeypatch.setattr(quota_watch, "_projects", made.projects)
    monkeypatch.setattr(quota_watch, "_SLICE", 0.05)
    yield made
    made.names.clear()


def begun(watch: QuotaWatch, tmp_path: Path, *names: str) -> None:
    for name in names:
        watch.left(name, str(tmp_path / name), MINE)


def open_directories(tmp_path: Path) -> int:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return len([link for link in links if link.startswith(str(tmp_path))])


def test_a_small_volume_does_not_wait_for_large_ones(volumes, tmp_path):
    watch = QuotaWatch()
    begun(watch, tmp_path, "large0", "large1", "large2", "small")
    until(lambda: "small" in watch._seen)
    assert not [name for name in watch._seen if name != "small"]
    assert open_directories(tmp_path) <= 1


def test_large_volumes_are_looked_at_to_their_end_one_after_the_other(volumes, tmp_path):
    watch = QuotaWatch()
    begun(watch, tmp_path, "large0", "large1", "large2")
    until(lambda: len(volumes.order) == 3)
    for name in ("large0", "large1", "large2"):
        time.sleep(0.2)
        assert name not in watch._seen
        volumes.names.discard(name)
        until(lambda name=name: name in watch._seen)
    assert volumes.order == ["large0", "large1", "large2", "large1", "large2"], "none is begun anew twice"
    until(lambda: not watch._at_work)
    assert open_directories(tmp_path) == 0


def test_a_look_has_its_own_time_and_not_that_of_others(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr(quota_watch, "_LONGEST", 0.3)
    watch = QuotaWatch()
    begun(watch, tmp_path, "large0", "large1", "small")
    until(lambda: len(watch._seen) == 3)
    assert watch._seen["small"] is None
    for name in ("large0", "large1"):
        assert "did not end within 0.3 s" in str(watch._seen[name])


def test_a_large_volume_that_was_deleted_is_looked_at_no_further(volumes, tmp_path):
    watch = QuotaWatch()
    begun(watch, tmp_path, "large0")
    until(lambda: "large0" in volumes.order)
    watch.forget("large0")
    until(lambda: not watch._at_work)
    assert (watch._seen, open_directories(tmp_path)) == ({}, 0)
