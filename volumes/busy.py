"""A recovery never meets a creation or a deletion that is under way, also not one of another process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from blockdev import flocks
from volumes.errors import StoreFailed, VolumeUnfinished

# Seconds.
_PATIENCE, _STEP = 5.0, 0.01


class Busy:
    """One file, locked shared by whoever makes or deletes, exclusively by whoever recovers."""

    def __init__(self, path: str) -> None:
        self._path = path

    @contextlib.contextmanager
    def __call__(self, *, exclusive: bool = False) -> Iterator[None]:
        """BlockingIOError for an exclusive one while somebody is at work. VolumeUnfinished for a shared one while a
        recovery takes longer than a call waits; StoreFailed where nothing can be written."""
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreFailed(f"{self._path} cannot be locked: {error.strerror}") from error
        try:
            if exclusive:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                _wait(fd, self._path)
            yield
        finally:
            flocks.release(fd)


def _wait(fd: int, path: str) -> None:
    """Shared, once no recovery has it."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise VolumeUnfinished(f"a recovery is under way ({path} is locked); ask again") from None
            time.sleep(_STEP)
