"""A record is whole or as it was, and two that write it at once never write into each other's."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import durable


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 16 pages."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_record_that_the_disk_cannot_take_whole_is_as_it_was(small):
    record = small / "record"
    durable.replace(str(record), b"old")
    (small / "journal").write_bytes(b"x" * 4096 * 12)
    with pytest.raises(OSError) as caught:
        durable.replace(str(record), b"n" * 4096 * 5)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(record), "the same sentence each time"
    assert record.read_bytes() == b"old"
    with pytest.raises(OSError):
        durable.write(str(small / "another"), b"n" * 4096 * 5)
    assert sorted(os.listdir(small)) == ["journal", "record"], "what was half-made is gone"


def test_a_write_that_takes_less_goes_on(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, content[:7]))
    durable.replace(str(tmp_path / "record"), b"0123456789" * 10)
    assert (tmp_path / "record").read_bytes() == b"0123456789" * 10


def test_writers_with_one_process_id_never_share_a_file(tmp_path, monkeypatch):
    """Two controllers are both process 1 of their containers."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    record, contents = tmp_path / "record", [bytes([65 + number]) * 20000 for number in range(8)]
    failed: list[BaseException] = []

    def work(content: bytes) -> None:
        try:
            for _ in range(20):
                durable.replace(str(record), content)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if record.exists():
            assert record.read_bytes() in contents
    assert not failed
    assert os.listdir(tmp_path) == ["record"]


def test_a_place_is_written_to_by_one_call_only(tmp_path):
    (tmp_path / "taken").symlink_to("/etc/nobody-writes-this")
    with pytest.raises(FileExistsError):
        durable.write(str(tmp_path / "taken"), b"x")


def test_the_mode_and_the_place_beside_are_the_callers(tmp_path):
    (tmp_path / "beside").mkdir()
    durable.replace(str(tmp_path / "record"), b"x", beside=str(tmp_path / "beside/one."), mode=0o755)
    assert (tmp_path / "record").stat().st_mode & 0o7777 == 0o755
    fd = os.open(tmp_path, os.O_RDONLY)
    durable.replace("relative", b"y", dir_fd=fd)
    os.close(fd)
    assert (tmp_path / "relative").read_bytes() == b"y"


def test_only_what_was_left_long_ago_is_swept(tmp_path):
    for name in ("record.1-old.new", "record.2-young.new", "record", "other.1-old.new"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "record.1-old.new", (0, time.time() - 120))
    os.utime(tmp_path / "other.1-old.new", (0, time.time() - 120))
    durable.sweep(str(tmp_path / "record."))
    assert sorted(os.listdir(tmp_path)) == ["other.1-old.new", "record", "record.2-young.new"]
