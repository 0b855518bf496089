"""Room that is kept for a full disk: it is there, or it is not said to be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blockdev import reserve
from blockdev.reserve import Reserve

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reserve"


def kept(path: Path) -> int:
    return path.stat().st_blocks * 512


def killed_before(path: Path, *, kept_by_then: int = 0) -> None:
    """As a process leaves it that is killed after the file is made, and before it has all its room."""
    with open(path, "wb") as file:
        if kept_by_then:
            os.posix_fallocate(file.fileno(), 0, kept_by_then)


@pytest.mark.parametrize("before", [0, SIZE // 2])
def test_what_a_killed_process_began_is_made_whole(path, before):
    killed_before(path, kept_by_then=before)
    Reserve(str(path), SIZE).keep()
    assert kept(path) >= SIZE
    assert Reserve(str(path), SIZE).give_up()
    assert not path.exists()


def test_what_is_kept_is_kept_once(path, monkeypatch):
    Reserve(str(path), SIZE).keep()

    def again(*_arguments: object) -> None:
        raise AssertionError("it is kept")

    monkeypatch.setattr(os, "posix_fallocate", again)
    Reserve(str(path), SIZE).keep()
    assert kept(path) >= SIZE


def test_nothing_is_given_up_where_nothing_was_kept(path):
    assert not Reserve(str(path), SIZE).give_up()
    killed_before(path)
    assert not Reserve(str(path), SIZE).give_up(), "an empty file has no room to give"
    assert not path.exists()


def test_a_disk_that_cannot_keep_it_has_no_file_of_it(path, monkeypatch):
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    killed_before(path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    Reserve(str(path), SIZE).keep()
    assert not path.exists()


def test_a_disk_without_room_to_spare_is_left_alone(path, monkeypatch):
    monkeypatch.setattr(reserve, "has_room", lambda *_arguments: False)
    Reserve(str(path), SIZE).keep()
    assert not path.exists()
