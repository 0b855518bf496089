"""One flush for all who wait: how many there are, what a failed one means, and that nobody is told too early."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter import flushes
from snapshotter.errors import StoreFailed
from snapshotter.store import Store
from tests.snapshotter.test_store import ROW


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "snapshots.db"))


def _slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """A disk whose flush takes its time; the length of the log at each."""
    real, seen = os.fdatasync, []

    def flush(fd: int) -> None:
        seen.append(os.fstat(fd).st_size)
        time.sleep(seconds)
        real(fd)

    monkeypatch.setattr(flushes.os, "fdatasync", flush)
    return seen


def test_a_lone_call_waits_for_one_flush(store: Store) -> None:
    before = store.flushes
    with store.transaction():
        store.insert(ROW)
    assert store.flushes == before + 1
    with store.transaction(durable=False):
        store.set_labels("k", {}, 2)
    assert store.flushes == before + 1


def test_sixty_four_in_flight_share_their_flushes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow(monkeypatch, 0.005)
    together = threading.Barrier(64)
    calls = 64 * 8

    def prepare(number: int) -> None:
        together.wait()
        for turn in range(8):
            with store.transaction():
                store.insert(replace(ROW, key=f"{number}/{turn}", device=store.new_device()))

    before = store.flushes
    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count() == calls
    assert (store.flushes - before) / calls <= 0.2


def test_nobody_is_told_before_what_was_written_is_on_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that began before a change says nothing of it."""
    begun, go = threading.Event(), threading.Event()
    real = os.fdatasync

    def flush(fd: int) -> None:
        begun.set()
        assert go.wait(10)
        real(fd)

    monkeypatch.setattr(flushes.os, "fdatasync", flush)
    done: list[str] = []

    def change(key: str, device: int) -> None:
        with store.transaction():
            store.insert(replace(ROW, key=key, device=device))
        done.append(key)

    first = threading.Thread(target=change, args=("first", 1))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=change, args=("second", 2))
    second.start()
    while store.get("second") is None:
        time.sleep(0.001)
    assert done == []
    count = store.flushes
    go.set()
    first.join()
    second.join()
    assert sorted(done) == ["first", "second"]
    assert store.flushes == count + 1


def test_a_flush_that_fails_is_told_to_all_who_waited_and_all_is_written_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failing, wrote = os.fdatasync, [True], []

    def flush(fd: int) -> None:
        if failing[0]:
            raise OSError(5, "Input/output error")
        real(fd)

    def pwrite(fd: int, content: bytes, at: int) -> int:
        wrote.append(len(content))
        return write(fd, content, at)

    write = os.pwrite
    monkeypatch.setattr(flushes.os, "fdatasync", flush)
    monkeypatch.setattr(flushes.os, "pwrite", pwrite)
    with pytest.raises(StoreFailed, match="Input/output error"), store.transaction():
        store.insert(ROW)
    with pytest.raises(StoreFailed, match="Input/output error"), store.transaction():
        store.insert(replace(ROW, key="other", device=2))
    failing[0] = False
    size = os.path.getsize(f"{store.path}-wal")
    with store.transaction():
        store.insert(replace(ROW, key="third", device=3))
    assert sum(wrote) >= size, "the kernel may hold for written what is not on the disk"
    wrote.clear()
    with store.transaction():
        store.insert(replace(ROW, key="fourth", device=4))
    assert wrote == []
    assert Store(store.path).count() == 4


def test_ids_are_given_once_though_flushes_fail_now_and_then(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, turn = os.fdatasync, [0]

    def flush(fd: int) -> None:
        turn[0] += 1
        if turn[0] % 3 == 0:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(flushes.os, "fdatasync", flush)
    given: list[int] = []
    for _ in range(200):
        try:
            with store.transaction():
                device = store.new_device()
        except StoreFailed:
            continue
        given.append(device)
    assert len(set(given)) == len(given) > 100
