"""What a filesystem, a disk or a server refuses is never INTERNAL: the caller reads what, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import urllib.request
from concurrent import futures

import grpc
import pytest
from prometheus_client.metrics_core import Metric

from blockdev import Deadline, scraped
from blockdev.places import Places
from blockdev.deadlines import bounded
from blockdev.families import GAUGE, Family
from csi.errors import code_of, sentence_of
from volumes.jobs import Jobs

FOREIGN = ("EPERM", "EACCES", "EROFS", "ENOENT", "ENOTEMPTY", "ENODEV", "ESTALE", "EIO", "ENOSPC", "EDQUOT", "ENOTCONN",
           "ETIMEDOUT", "ELOOP", "ENOTDIR", "EBUSY", "EUCLEAN", "ESHUTDOWN", "EOPNOTSUPP", "ENAMETOOLONG")  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_no_trouble_of_the_world_is_a_mistake_of_ours(name):
    number = getattr(errno, name)
    for error in (
        OSError(number, os.strerror(number), "/a/place"),
        OSError(number, os.strerror(number)),
        OSError(number, "x", 7),
    ):
        assert code_of(error) is not grpc.StatusCode.INTERNAL
        assert os.strerror(number) in sentence_of(error)
        assert sentence_of(error).startswith("/a/place" if error.filename == "/a/place" else "a file of the volume")


def test_a_mistake_of_ours_is_one():
    for error in (OSError(errno.EBADF, "bad"), OSError(errno.EINVAL, "bad"), TypeError("x"), OSError("no number")):
        assert code_of(error) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("address", ["x", ":1", "127.0.0.1:0", "127.0.0.1:99999", "a..b:9100", "192.0.2.1:9100"])
def test_an_address_for_metrics_is_refused_in_words(address):
    with pytest.raises(ValueError, match=r"takes HOST:PORT|cannot be listened on"):
        scraped.listen(address, [], part="csi", version="1")


def test_nobody_holds_the_metrics(monkeypatch):
    monkeypatch.setattr(scraped, "_SECONDS", 2.0)
    port = _free()
    scraped.listen(f"127.0.0.1:{port}", [_One()], part="csi", version="1")
    assert "one 7.0" in _scrape(port)
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * scraped._MOST)]
    for one in idle:
        with contextlib.suppress(OSError):
            one.sendall(b"GET / HT")
    for _ in range(5):
        assert "one 7.0" in _scrape(port), "whoever asks comes before those who do not"
    for one in idle:
        one.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(1) == b""
        one.close()
    assert "one 7.0" in _scrape(port)


def test_one_address_never_has_all_places_and_who_has_asked_keeps_his():
    places = Places(4, 3)
    first, *rest = (socket.socketpair()[0] for _ in range(8))
    assert places.take(first, "a") and places.take(rest[0], "a") and places.take(rest[1], "a")
    for one in (first, rest[0], rest[1]):
        places.asks(one)
    assert not places.take(rest[2], "a"), "all of its own have asked"
    assert places.take(rest[3], "b")
    assert places.take(rest[4], "c"), "instead of the one that says nothing"
    places.asks(rest[4])
    assert not places.take(rest[5], "d")
    places.give(first)
    assert places.take(rest[5], "d")
    places.give(rest[3])  # which lost its place before, and takes none with it
    places.asks(rest[5])
    assert not places.take(rest[6], "e")
    for one in (first, *rest):
        one.close()


def test_who_asks_all_the_time_takes_no_more_than_who_asks_now_and_then(caplog):
    asked = []

    class Costly(_One):
        def collect(self) -> list[Metric]:
            asked.append(time.monotonic())
            return super().collect()

    class Fails(_One):
        part = "fails"

        def collect(self) -> list[Metric]:
            raise ValueError("of nobody's making")

    port = _free()
    scraped.listen(f"127.0.0.1:{port}", [Costly(), Fails()], part="csi", version="1")
    began = time.monotonic()
    for number in range(40):
        address = f"http://127.0.0.1:{port}/metrics?name[]=x{number}"
        asking = urllib.request.Request(address, headers={"Accept": f"text/plain; q=0.{number}"})
        with urllib.request.urlopen(asking, timeout=5) as answer:
            assert "one 7.0" in answer.read().decode()
    assert len(asked) <= 1 + (time.monotonic() - began) / scraped._FRESH
    wanted = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1"
    with urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": wanted}), timeout=5
    ) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert answer.read().endswith(b"# EOF\n")
    time.sleep(scraped._FRESH)
    _scrape(port)
    said = [record for record in caplog.records if record.name == "runvol.metrics"]
    assert len(said) == 1 and said[0].exc_info


@pytest.mark.parametrize("kind", [threading.Timer, threading.Thread])
def test_a_thread_that_cannot_be_started_takes_no_place_of_the_metrics(monkeypatch, kind):
    port = _free()
    scraped.listen(f"127.0.0.1:{port}", [_One()], part="csi", version="1")

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "start", refused)
        for _ in range(scraped._MOST):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
                assert one.recv(1) == b"", "it is kept open"
    assert "one 7.0" in _scrape(port)


def test_metrics_wait_for_descriptors_without_a_busy_loop(monkeypatch):
    port, taken, accept = _free(), [], socket.socket.accept

    def scarce(listener: socket.socket) -> tuple[socket.socket, object]:
        taken.append(listener)
        if len(taken) < 4:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    scraped.listen(f"127.0.0.1:{port}", [_One()], part="csi", version="1")
    monkeypatch.setattr(socket.socket, "accept", scarce)
    began = time.monotonic()
    assert "one 7.0" in _scrape(port)
    assert time.monotonic() - began > 2 * scraped._PAUSE


def _free() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class _One:
    part = "one"

    def collect(self) -> list[Metric]:
        return [Family(name="one", kind=GAUGE, help="A metric.").of(7)]


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_a_thread_that_cannot_be_started_is_scarcity_in_words(monkeypatch):
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    asked = (
        lambda: bounded("looking at /a/place", Deadline.after(5), lambda: None),
        lambda: Jobs().finished("k", "deleting volume k", lambda _progress: None, 5),
        lambda: futures.ThreadPoolExecutor(1).submit(time.sleep, 0),  # of a room that knows nothing of it
    )
    for call in asked:
        with pytest.raises(Exception) as caught:
            call()
        assert code_of(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no thread can be started" in sentence_of(caught.value)
    assert code_of(RuntimeError("anything else")) is grpc.StatusCode.INTERNAL
    monkeypatch.undo()
    assert bounded("looking at /a/place", Deadline.after(5), lambda: 7) == 7
