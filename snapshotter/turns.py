"""Who may change a pool as a whole: one process, and none beside a server.

Locks that go with their process, whatever ends it. `lock` in the state directory, and one in /run/runvol that bears the
pool's identity (a copied state directory has a `lock` of its own), are held by a server for its life, and by a command
as long as it makes, takes over or repairs the pool. What may be done beside a server takes turns by locks of its own.
Where the pool is mapped, its `keeper` excludes besides.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from blockdev import Deadline, flocks
from snapshotter.errors import PoolRefused

# Of all processes of the machine, wherever their state lies.
_LOCKS = "/run/runvol"
# A process that was just told to end may need a moment.
_PATIENCE = 1.0


def try_lock(path: str, seconds: float = 0.0) -> int | None:
    """A descriptor that holds the lock; None if somebody else has it for so many seconds."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if flocks.locked(lock, fcntl.LOCK_EX, seconds):
        return lock
    os.close(lock)
    return None


def state_lock(state_dir: str) -> str:
    return os.path.join(state_dir, "lock")


def pool_lock(identity: str) -> str:
    """The lock of a pool, wherever it is described; its directory is made."""
    os.makedirs(_LOCKS, mode=0o750, exist_ok=True)
    return os.path.join(_LOCKS, f"pool-{identity}.lock")


@contextlib.contextmanager
def whole(state_dir: str, identity: str = "") -> Iterator[None]:
    """No server serves the state or the pool inside, and no other command changes them. PoolRefused where one does."""
    os.makedirs(state_dir, mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        _take(stack, state_lock(state_dir), state_dir)
        _take(stack, _changing(state_dir), state_dir)
        if identity:
            stack.enter_context(only_pool(identity))
        yield


@contextlib.contextmanager
def only_pool(identity: str) -> Iterator[None]:
    """Nobody serves the pool of this identity inside, wherever it is described. PoolRefused where somebody does."""
    with contextlib.ExitStack() as stack:
        _take(stack, pool_lock(identity), f"pool {identity}")
        yield


def _take(stack: contextlib.ExitStack, path: str, what: str) -> None:
    held = try_lock(path, _PATIENCE)
    if held is None:
        raise PoolRefused(
            f"another process serves or changes {what} ({path} is locked); stop it first (`systemctl stop "
            "runvol-snapshotter`)"
        )
    stack.callback(flocks.release, held)


@contextlib.contextmanager
def beside(state_dir: str, deadline: Deadline) -> Iterator[None]:
    """No command that changes the state runs inside; a server may. WaitExpired at the deadline."""
    with _waited_for(_changing(state_dir), "another command that changes the pool", deadline):
        yield


@contextlib.contextmanager
def extension(state_dir: str, deadline: Deadline) -> Iterator[None]:
    """Nobody else makes the pool larger inside: server and command line take turns. WaitExpired at the deadline."""
    with _waited_for(os.path.join(state_dir, "extending.lock"), "another extension of the pool", deadline):
        yield


@contextlib.contextmanager
def _waited_for(path: str, what: str, deadline: Deadline) -> Iterator[None]:
    held: list[int] = []

    def taken() -> bool:
        found = try_lock(path)
        held.extend([found] if found is not None else [])
        return bool(held)

    deadline.poll(what, taken)
    try:
        yield
    finally:
        flocks.release(held[0])


def _changing(state_dir: str) -> str:
    return os.path.join(state_dir, "changing.lock")


__all__ = ["beside", "extension", "only_pool", "pool_lock", "state_lock", "try_lock", "whole"]
