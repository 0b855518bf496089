"""What a filesystem, a disk or a server refuses is never INTERNAL: the caller reads what, and what to do."""

from __future__ import annotations

import errno
import os
import socket
import time
import urllib.error
import urllib.request

import grpc
import pytest
from prometheus_client import CollectorRegistry, Gauge

from blockdev import scraped
from csi.errors import code_of, sentence_of

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
        scraped.listen(address, CollectorRegistry())


def test_nobody_holds_the_metrics(monkeypatch):
    monkeypatch.setattr(scraped, "_SECONDS", 2.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    registry = CollectorRegistry()
    Gauge("one", "A metric.", registry=registry).set(7)
    well = [True]
    scraped.listen(f"127.0.0.1:{port}", registry, lambda: well[0])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
        assert answer.status == 200
    well[0] = False
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return answer.read().decode()

    assert "one 7.0" in scrape()
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(scraped._MOST)]
    idle[0].sendall(b"GET / HT")
    time.sleep(0.1)
    with pytest.raises(OSError):
        scrape()
    for one in idle:
        one.settimeout(5)
        assert one.recv(1) == b""
        one.close()
    assert "one 7.0" in scrape()
