"""A recovery never meets a creation or a deletion that is under way, also not one of another process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from blockdev import flocks
from volumes.errors import StoreFailed, VolumeUnfinished

# Seconds.
_PATIENCE = 5.0


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
            elif not flocks.locked(fd, fcntl.LOCK_SH, _PATIENCE):
                raise VolumeUnfinished(f"a recovery is under way ({self._path} is locked); ask again")
            yield
        finally:
            flocks.release(fd)
