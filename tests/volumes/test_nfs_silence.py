"""A server that does not answer: what the sentence says of it is where to look."""

from __future__ import annotations

import socket

import pytest

from blockdev import Deadline, nfs


def _silent(port: int) -> str:
    with pytest.raises(nfs.ServerSilent) as caught:
        nfs.probe("nas", "127.0.0.1", "4.1", Deadline.after(0.5), port=port)
    return str(caught.value)


def test_one_that_takes_connections_and_one_whose_address_nobody_has_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        assert "takes connections and does not reply" in _silent(port)
        # A backlog that is full drops what asks for more, as a firewall does.
        waiting = []
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(("127.0.0.1", port))
        try:
            assert "firewall" in _silent(port)
        finally:
            for one in waiting:
                one.close()
    assert "Connection refused" in _silent(port)
