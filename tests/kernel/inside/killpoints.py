"""kill -9 in front of the n-th step: every device-mapper ioctl, every commit of the store, every program that is run.

Steps are wrapped from outside, in the process that is to die; the product knows nothing of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from blockdev import commands, devicemapper, filesystems
from snapshotter import assembly, backing, bases, metadata
from snapshotter.store import Store

# Looking changes nothing, so that a kill before it is a kill before the next change.
_LOOKS = frozenset({"status", "table", "list", "version", "dependencies of", "list of targets"})


class Steps:
    """Counts steps; dies in front of number `fatal` (0 for never)."""

    def __init__(self, fatal: int = 0) -> None:
        self.fatal, self.count = fatal, 0
        self.names: list[str] = []

    def reached(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Wrap the steps of this process for good; call it in a child."""
        ioctl, commit, run = devicemapper.control, Store._commit, commands.run

        def control(fd: int, request: int, buffer: Any, operation: str, name: str) -> None:
            if operation not in _LOOKS:
                self.reached(f"{operation} {name}")
            ioctl(fd, request, buffer, operation, name)

        def committing(store: Store) -> None:
            self.reached("commit of the store")
            commit(store)

        def running(program: str, *arguments: str, **more: Any) -> tuple[int, str]:
            self.reached(program)
            return run(program, *arguments, **more)

        devicemapper.control = control
        Store._commit = committing  # type: ignore[method-assign]
        for module in (commands, filesystems, assembly, backing, bases, metadata):
            module.run = running  # type: ignore[attr-defined]


def dies_at(number: int, work: Callable[[Steps], object]) -> Callable[[], object]:
    """`work` in a process that dies in front of its step `number`; `work` calls `install` when it wants to."""
    return lambda: work(Steps(number))
