"""A descriptor that keeps a volume in use for all, from its caller's lock to the end of work that goes on behind."""

from __future__ import annotations

import os
import threading


class Held:
    """It belongs to the caller until the work begins, and to the work from then on."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        self._begun, self._lock = False, threading.Lock()

    def begin(self) -> bool:
        """Whether it is the work's now; not where the caller has left."""
        with self._lock:
            self._begun = self._fd is not None
            return self._begun

    def abandon(self) -> None:
        """The caller leaves. Unless the work goes on, it never begins: somebody else may get the volume."""
        with self._lock:
            if not self._begun:
                self.close()

    def close(self) -> None:
        held, self._fd = self._fd, None
        if held is not None:
            os.close(held)
