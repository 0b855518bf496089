"""The socket: listens before the pool is there, ends gracefully, and lets a successor take its place."""

from __future__ import annotations

import contextlib
import os

import grpc

from blockdev import daemon, flocks
from snapshotter import turns
from snapshotter.errors import BadRequest
from snapshotter.node import Node
from snapshotter.service import Observer, Service
from snapshotter.workers import Workers

_GRACE, _AFTER = 10.0, 1.0
# Threads of each lane, and how many more of it may wait or hang at once: for what makes devices, for what the store
# alone answers, for Lists, and for Usage.
_MAKING, _QUICK, _READING, _MEASURING = (16, 112), (16, 112), (2, 40), (4, 12)
_LARGEST_MESSAGE = 16 << 20


def socket_path(endpoint: str) -> str:
    """The path in `unix:///run/runvol/snapshotter.sock`; BadRequest for anything else."""
    try:
        return daemon.socket_path(endpoint)
    except ValueError as error:
        raise BadRequest("endpoint", endpoint, str(error)) from None


def serve(node: Node, *, endpoint: str, limit: float, observe: Observer | None = None) -> bool:
    """Serve until SIGTERM or SIGINT; calls under way then have ten seconds, and what hangs is left behind: False then,
    and the process must not wait for its threads."""
    path, told = socket_path(endpoint), daemon.signals()
    quick = _lane("quick", *_QUICK)
    service = Service(
        node, _lane("making", *_MAKING), limit=limit, observe=observe, background=node.background, quick=quick,
        reading=_lane("reading", *_READING), measuring=_lane("measuring", *_MEASURING),
    )  # fmt: skip
    server = grpc.server(
        quick,
        options=[
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
            ("grpc.max_send_message_length", _LARGEST_MESSAGE),
        ],
    )
    server.add_generic_rpc_handlers((service.handler(), service.lending(), service.health()))
    daemon.listen(server, path)
    server.start()
    node.start()
    daemon.notify("READY=1")
    told.recv(1)
    daemon.notify("STOPPING=1")
    server.stop(_GRACE).wait(_GRACE + _AFTER)
    service.close()
    ended = node.stop()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return ended


def _lane(name: str, limit: int, most: int) -> Workers:
    return Workers(limit, most=most, name=name)


def alone(endpoint: str, state_dir: str, identity: str = "") -> list[int]:
    """Prove that no other process serves the socket, the state, or the pool of this identity, which a copy of the state
    has too; descriptors that say so to the next one.

    BadRequest if there is one, or if a command changes the pool as a whole.
    """
    if daemon.is_taken(socket_path(endpoint)):
        raise BadRequest("endpoint", endpoint, "another process serves this socket; stop it first")
    held = [_locked(turns.state_lock(state_dir), state_dir, "another process uses it; stop that first")]
    try:
        if identity:
            held.append(_locked(turns.pool_lock(identity), state_dir,
                                "is a copy: another process serves its pool; stop that first"))  # fmt: skip
    except BaseException:
        flocks.release(held.pop())
        raise
    return held


def _locked(path: str, state_dir: str, why_not: str) -> int:
    lock = turns.try_lock(path)
    if lock is None:
        raise BadRequest("snapshotter.state_dir", state_dir, why_not)
    return lock
