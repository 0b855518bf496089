"""Giving a volume's files to a pod's group, for as long as that takes: it goes on behind the call that began it.

Who asks again waits for the same walk, and who takes the volume back ends it; the next one goes on where it was, since
what is right already is passed over. From its making to its end the walk has the volume open, so in use for all.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from blockdev import Deadline
from guestmount import groups
from guestmount.held import Held
from volumes import VolumeUnfinished
from volumes.jobs import PATIENCE, Jobs, Progress

# Seconds: a walk that goes on still is not the wait of any call.
_LONGEST = 86400.0
# Seconds in which a call that has waited still answers, and for the end of a walk that was told to end.
_SPARE, _END = 0.2, 5.0


class _Ended(VolumeUnfinished):
    """The volume was taken back meanwhile."""


@dataclass(frozen=True)
class _Until(Deadline):
    """Ends as well when it is told to."""

    stop: threading.Event = field(default_factory=threading.Event)

    def check(self, what: str) -> None:
        if self.stop.is_set():
            raise _Ended(f"{what} was ended, as the volume was taken back; ask again")
        super().check(what)


class Giving:
    """The walks of a process. `patience`: seconds that a call waits for one."""

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._jobs = Jobs(running=4, waiting=12)
        self._lock = threading.Lock()
        # Of each volume that has a walk: its group, and what tells it to end.
        self._walks: dict[str, tuple[str, threading.Event]] = {}

    def files(self, volume: str, root: int, group: str, deadline: Deadline) -> None:
        """The tree below the directory descriptor `root` belongs to the group. VolumeUnfinished while that goes on."""
        if not groups.are_given(root, int(group)):
            held = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
            self.whole(volume, held, lambda: contextlib.nullcontext(held), group, deadline)

    def whole(
        self, volume: str, held: int, opened: Callable[[], AbstractContextManager[int]], group: str, deadline: Deadline,
        done: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """The same for the tree that `opened` opens; `done` is called once it is given.

        `held`: a descriptor that keeps the volume in use meanwhile, closed here in any case.
        """
        what = f"giving the files of volume {volume} to group {group}"
        owned = Held(held)

        def work(_progress: Progress) -> None:
            if not owned.begin():
                raise VolumeUnfinished(f"{what} did not begin; ask again")
            try:
                with opened() as root:
                    groups.apply(root, int(group), until)
                done()
            finally:
                owned.close()

        try:
            with self._lock:
                other, stop = self._walks.get(volume, (group, threading.Event()))
                if not self.is_at_work(volume):
                    other, stop = self._walks[volume] = group, threading.Event()
            if other != group:
                raise VolumeUnfinished(f"{what}: they are being given to group {other} first; ask again")
            until = _Until(*_ends(), stop=stop)
            patience = max(0.0, min(self._patience, deadline.remaining() - _SPARE))
            self._jobs.finished(volume, what, work, patience)
        finally:
            owned.abandon()

    def is_at_work(self, volume: str) -> bool:
        """Whether a walk has the volume open."""
        return self._jobs.progress(volume) is not None

    def end(self, volume: str) -> None:
        """Nobody gives the volume's files to anybody; what was given stays so."""
        with self._lock:
            walk = self._walks.pop(volume, None)
        if walk is None:
            return
        walk[1].set()
        until = Deadline.after(_END)
        while self.is_at_work(volume) and until.remaining():
            time.sleep(0.005)
        self._jobs.forget(volume)


def _ends() -> tuple[float, float]:
    one = Deadline.after(_LONGEST)
    return one.at, one.given
