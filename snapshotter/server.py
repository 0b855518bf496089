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

_GRACE, _WORKERS = 10.0, 16
_LARGEST_MESSAGE = 16 << 20


def socket_path(endpoint: str) -> str:
    """The path in `unix:///run/runvol/snapshotter.sock`; BadRequest for anything else."""
    try:
        return daemon.socket_path(endpoint)
    except ValueError as error:
        raise BadRequest("--endpoint", endpoint, str(error)) from None


def serve(node: Node, *, endpoint: str, limit: float, observe: Observer | None = None) -> None:
    """Serve until SIGTERM or SIGINT; calls under way then have ten seconds."""
    path, told = socket_path(endpoint), daemon.signals()
    workers = Workers(_WORKERS)
    service = Service(node, workers, limit=limit, observe=observe, background=node.background)
    server = grpc.server(
        workers,  # type: ignore[arg-type]  # an Executor is what it uses
        options=[
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
            ("grpc.max_send_message_length", _LARGEST_MESSAGE),
        ],
    )
    server.add_generic_rpc_handlers((service.handler(), service.health()))
    daemon.listen(server, path)
    server.start()
    node.start()
    daemon.notify("READY=1")
    told.recv(1)
    daemon.notify("STOPPING=1")
    server.stop(_GRACE).wait()
    service.close()
    node.stop()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def alone(endpoint: str, state_dir: str, identity: str = "") -> list[int]:
    """Prove that no other process serves the socket, the state, or the pool of this identity, which a copy of the state
    has too; descriptors that say so to the next one.

    BadRequest if there is one, or if a command changes the pool as a whole.
    """
    if daemon.is_taken(socket_path(endpoint)):
        raise BadRequest("--endpoint", endpoint, "another process serves this socket; stop it first")
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
