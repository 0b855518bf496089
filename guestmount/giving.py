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


@dataclass(frozen=True, eq=False)
class _Walk:
    """`stop` tells it to end."""

    group: str
    stop: threading.Event = field(default_factory=threading.Event)


class Giving:
    """The walks of a process. `patience`: seconds that a call waits for one."""

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._jobs = Jobs(running=4, waiting=12)
        self._lock = threading.Lock()
        # Of each volume that has a walk, or is about to: until it has ended, whoever asks for its end.
        self._walks: dict[str, _Walk] = {}

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

        `held`: a descriptor that keeps the volume in use meanwhile, closed here in any case. For callers that have the
        volume's lock.
        """
        what = f"giving the files of volume {volume} to group {group}"
        owned = Held(held)

        def work(_progress: Progress) -> None:
            try:
                if not owned.begin() or not self._is_of(volume, walk):
                    raise VolumeUnfinished(f"{what} did not begin; ask again")
                with opened() as root:
                    groups.apply(root, int(group), until)
                done()
            finally:
                owned.close()
                self._has_ended(volume, walk)

        try:
            walk = self._joined(volume, group, what)
            try:
                until = _Until(*_ends(), stop=walk.stop)
                patience = max(0.0, min(self._patience, deadline.remaining() - _SPARE))
                self._jobs.finished(volume, what, work, patience)
            finally:
                if not self.is_at_work(volume):  # it may never have begun
                    self._has_ended(volume, walk)
        finally:
            owned.abandon()

    def _joined(self, volume: str, group: str, what: str) -> _Walk:
        """The walk that goes on, or a new one. VolumeUnfinished where another has to end first."""
        with self._lock:
            known = self._walks.get(volume)
            if self.is_at_work(volume):
                if known is None:  # in this moment
                    raise VolumeUnfinished(f"{what}: an earlier walk has just ended; ask again")
                if known.group != group:
                    raise VolumeUnfinished(f"{what}: they are being given to group {known.group} first; ask again")
                return known
            walk = self._walks[volume] = _Walk(group)
            return walk

    def _is_of(self, volume: str, walk: _Walk) -> bool:
        """Whether who ends the volume's walk ends this one, and has not done so. A caller that joined one that ended
        before it could wait for it begins another, which is nobody's to end."""
        with self._lock:
            return self._walks.get(volume) is walk and not walk.stop.is_set()

    def _has_ended(self, volume: str, walk: _Walk) -> None:
        with self._lock:
            if self._walks.get(volume) is walk:
                del self._walks[volume]

    def is_at_work(self, volume: str) -> bool:
        """Whether a walk has the volume open."""
        return self._jobs.progress(volume) is not None

    def end(self, volume: str) -> None:
        """Nobody gives the volume's files to anybody; what was given stays so. A walk that hangs ends when it can, and
        until then no other begins."""
        with self._lock:
            walk = self._walks.get(volume)
        if walk is not None:
            walk.stop.set()
            until = Deadline.after(_END)
            while self.is_at_work(volume) and until.remaining():
                time.sleep(0.005)
        self._jobs.forget(volume)


def _ends() -> tuple[float, float]:
    one = Deadline.after(_LONGEST)
    return one.at, one.given
