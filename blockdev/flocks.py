"""Letting go of a flock(2) in a process that forks."""

from __future__ import annotations

import fcntl
import os


def release(fd: int) -> None:
    """Unlock and close. Said, not left to close(2): a child between fork and exec has a copy of the descriptor, and
    would hold the lock with it."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
