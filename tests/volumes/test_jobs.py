"""Works that go on behind calls: how many go on at once, of all and of one server, however many calls come at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import nfs
from blockdev.deadlines import NoThread
from volumes import VolumeUnfinished, export_ids, jobs
from volumes.exports import Exports, Said
from volumes.jobs import Jobs, Progress

SLOW, OTHER, HEALTHY = (nfs.Export(server=server, path=path) for server, path in
                        (("slow", "/a"), ("slow", "/b"), ("healthy", "/c")))  # fmt: skip


class Works:
    """Works that go on until the test ends, counted by their keys' beginnings."""

    def __init__(self) -> None:
        self.end, self.most = threading.Event(), Counter[str]()
        self._lock, self._now = threading.Lock(), Counter[str]()

    def of(self, kind: str) -> Callable[[Progress], None]:
        def work(_progress: Progress) -> None:
            with self._lock:
                self._now[kind] += 1
                self.most[kind] = max(self.most[kind], self._now[kind])
            self.end.wait(20)
            with self._lock:
                self._now[kind] -= 1

        return work


@pytest.fixture
def works() -> Iterator[Works]:
    made = Works()
    yield made
    made.end.set()


def _asked(many: Jobs, key: str, work: Callable[[Progress], None], patience: float = 0.3) -> None:
    with contextlib.suppress(VolumeUnfinished):
        many.finished(key, key, work, patience)


def test_calls_that_come_at_once_start_no_more_works_of_one_family_than_it_has_places(works):
    many = Jobs(running=16, of_one=12, family=lambda key: key[0])
    at_once = threading.Barrier(24)

    def call(number: int) -> None:
        at_once.wait()
        _asked(many, f"a{number}", works.of("a"))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(24)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert works.most["a"] == 8, "half of them"
    many.finished("b", "another's", lambda _progress: None, 5)


def test_a_server_finds_a_place_whatever_four_others_do_for_ever(works):
    """Each of them has as many works as it gets, and as many callers that wait for these."""
    many = Jobs(running=16, of_one=12, family=lambda key: key[0])
    for name in "abcd":
        callers = [threading.Thread(target=_asked, args=(many, f"{name}{number}", works.of(name), 20.0), daemon=True)
                   for number in range(20)]  # fmt: skip
        for one in callers:
            one.start()
        time.sleep(0.3)
    assert dict(works.most) == {"a": 8, "b": 4, "c": 2, "d": 1}
    for number in range(3):
        many.finished(f"e{number}", "a fifth's", lambda _progress: time.sleep(0.05), 5)


def test_a_family_has_all_its_places_again_once_others_have_left_theirs(works):
    many, others = Jobs(running=4, of_one=2, family=lambda key: key[0]), threading.Event()
    for number in range(2):
        _asked(many, f"o{number}", lambda _progress: others.wait(20) and None, 0.0)
    for number in range(3):
        _asked(many, f"a{number}", works.of("a"), 0.0)
    until = time.monotonic() + 10
    others.set()
    while works.most["a"] < 2:
        assert time.monotonic() < until
        _asked(many, "a", works.of("a"), 0.05)


def test_calls_that_wait_for_a_place_count_when_they_get_it(works):
    """All places are taken while they are looked at, and free at once."""
    many = Jobs(running=4, of_one=2, family=lambda key: key[0])
    first = threading.Event()
    for number in range(4):
        _asked(many, f"{number}", lambda _progress: first.wait(20) and None, 0.0)
    callers = [threading.Thread(target=_asked, args=(many, f"a{number}", works.of("a"), 2.0)) for number in range(8)]
    for one in callers:
        one.start()
    time.sleep(0.2)
    first.set()
    for one in callers:
        one.join()
    assert 0 < works.most["a"] <= 2


def test_who_waits_for_a_place_joins_the_work_that_another_has_begun_meanwhile(works):
    many, runs, first = Jobs(running=1), [], threading.Event()
    _asked(many, "first", lambda _progress: first.wait(20) and None, 0.0)

    def work(progress: Progress) -> None:
        runs.append(progress)
        time.sleep(1)  # all that wait are told meanwhile

    callers = [threading.Thread(target=many.finished, args=("k", "k", work, 10)) for _ in range(4)]
    for one in callers:
        one.start()
    time.sleep(0.1)
    first.set()
    for one in callers:
        one.join()
    assert len(runs) == 1, "who came while it waited made another"


def test_a_place_is_free_again_whatever_its_family_is_by_then(works):
    """What a server is called may be learnt while a work of it goes on."""
    names = ["unknown"]
    many = Jobs(running=4, of_one=1, family=lambda _key: names[0])
    go = threading.Event()
    _asked(many, "one", lambda _progress: go.wait(20) and None, 0.0)
    names[0] = "known"
    go.set()
    many.finished("two", "two", lambda _progress: None, 5)
    until = time.monotonic() + 10
    while many.progress("one") is not None:
        assert time.monotonic() < until
        time.sleep(0.005)
    names[0] = "unknown"
    many.finished("three", "three", lambda _progress: None, 5)
    assert not many._running._taken
    assert not many._waiting._taken


def test_a_thread_that_cannot_be_started_takes_no_place(monkeypatch):
    many = Jobs(running=1, of_one=1)

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(NoThread, match="no thread can be started"):
            many.finished("k", "k", lambda _progress: None, 0.1)
    many.finished("k", "k", lambda _progress: None, 5)


def test_failures_that_nobody_asks_for_are_not_kept_for_ever(monkeypatch):
    many = Jobs()

    def failing(_progress: Progress) -> None:
        raise OSError("no")

    for number in range(20):
        many.cancel(f"{number}", 0)  # of another life
        _asked(many, f"{number}", failing, 0.0)
        while many.progress(f"{number}") is not None:
            time.sleep(0.005)
    monkeypatch.setattr(jobs, "_STALE", 0.0)
    many.finished("k", "k", lambda _progress: None, 5)
    assert not many._jobs


# -- whose works they are


def _id(export: nfs.Export, number: int = 0) -> str:
    return export_ids.id_of(export, f"v{number}", "nfs-")


def test_two_exports_of_one_server_are_one_family(tmp_path: Path, works):
    """The server hangs, whatever path of it is meant."""
    known = Exports(str(tmp_path))
    known.remember(SLOW)
    known.remember(OTHER)
    many = Jobs(running=16, of_one=12, family=known.server_of)
    for number in range(8):
        _asked(many, export_ids.short(_id(SLOW, number)), works.of("slow"), 0.0)
    for number in range(4):
        with pytest.raises(VolumeUnfinished, match="its server"):
            many.finished(f"deleting volume {_id(OTHER, number)}", "x", works.of("slow"), 0.1)
    many.finished(f"deleting volume {_id(HEALTHY)}", "x", lambda _progress: None, 5)


def test_the_server_of_a_work_is_what_its_words_or_the_known_exports_say(tmp_path: Path):
    volume, short = _id(SLOW), export_ids.short(_id(SLOW))
    fresh = Exports(str(tmp_path))
    assert fresh.server_of(f"deleting volume {volume}") == "slow"
    assert fresh.server_of(short) == export_ids.key(SLOW), "nobody knows it"
    assert fresh.server_of("tidying slow:/a") == "slow"
    assert fresh.server_of("tidying [fd00::1]:/a b:/c") == "fd00::1"
    assert fresh.server_of("anything") == "anything"
    fresh.of(volume, "nfs-")  # it has been worked with
    assert fresh.server_of(short) == "slow"
    Exports(str(tmp_path)).remember(OTHER)  # by another process
    assert fresh.server_of(export_ids.short(_id(OTHER))) == "slow"
    snapshot = f"nfssnap-{export_ids.key(HEALTHY)}-{'0' * 20}"
    assert Exports(str(tmp_path), ["healthy:/c"]).server_of(snapshot) == "healthy"
    (tmp_path / "exports.json").write_text("{")
    assert Exports(str(tmp_path)).server_of(short) == export_ids.key(SLOW)


def test_who_asks_for_a_server_asks_no_cluster(tmp_path: Path):
    def cluster() -> list[Said]:
        raise AssertionError("it takes seconds")

    assert Exports(str(tmp_path), cluster=cluster).server_of(export_ids.short(_id(SLOW))) == export_ids.key(SLOW)
