"""One volume's trouble is nobody else's: lists and starts go past what they cannot handle, name it, and come back."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from blockdev.errors import BlockdevError
from volumes.busy import Busy
from volumes.errors import VolumeError, VolumeUnfinished

log = logging.getLogger("runvol.volumes")

# Is told a sentence about what a list leaves out.
Trouble = Callable[[str], None]
# What goes wrong with a volume, its file or its server; anything else is a mistake of ours.
EXPECTED = (OSError, VolumeError, BlockdevError)


def logged(sentence: str) -> None:
    """For callers that have nobody to tell."""
    log.warning("left out of a list", extra={"why": sentence})


@contextlib.contextmanager
def told_before(what: str) -> Iterator[None]:
    """For undoing what has failed: that is what the caller is told. What cannot be undone, the next call undoes."""
    try:
        yield
    except EXPECTED as error:
        log.warning(
            "not undone; tried again by the next call and the next start", extra={"what": what, "why": str(error)}
        )


@contextlib.contextmanager
def speaking_of(path: str) -> Iterator[None]:
    """OSError inside speaks of `path`: of what the caller knows, not of a name that its files had on the way."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def without_name(error: OSError, name: str, place: str) -> OSError:
    """The same error, of `place` if it speaks of no path or of one with `name` in it, which only this attempt has: the
    same trouble is always the same sentence."""
    if isinstance(error.filename, str) and name not in error.filename:
        return error
    return OSError(error.errno, error.strerror, place)


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A volume, a snapshot or a store that a start has not put right (yet). `why` is half a sentence."""

    name: str
    why: str


# A name, the key under which somebody may be at work on it, what a killed process has left of it (empty for nothing),
# and what puts it right as it stands by then: what was done, in words.
Step = tuple[str, str, str, Callable[[], str | None]]


class Recovery:
    """A backend's recovery. `steps` looks at the store; `busy` keeps it from whoever is at work, one by one."""

    def __init__(self, store: str, busy: Busy, steps: Callable[[], Iterable[Step]]) -> None:
        self._store, self._busy, self._steps = store, busy, steps
        self._failed: dict[str, str] = {}

    def run(self) -> list[str]:
        """What was done, in words. What could not be done is logged, stays `unfinished`, and stops nothing."""
        self._failed = {}
        try:
            with self._busy(self._store, seconds=0):  # or nothing can be put right at all
                steps = list(self._steps())
        except VolumeUnfinished:
            return []
        except EXPECTED as error:
            self._fail(self._store, error)
            return []
        return [said for name, key, _left, settle in steps if (said := self._settled(name, key, settle))]

    def _settled(self, name: str, key: str, settle: Callable[[], str | None]) -> str | None:
        try:
            with self._busy(key, seconds=0):
                return settle()
        except VolumeUnfinished:
            return None  # somebody is at work on it, and finishes or undoes it
        except EXPECTED as error:
            self._fail(name, error)
            return None

    def _fail(self, name: str, error: Exception) -> None:
        log.error("not recovered; tried again by the next start and by `runvol gc`",
                  extra={"what": name, "why": str(error)})  # fmt: skip
        self._failed[name] = str(error)

    def unfinished(self) -> list[Unfinished]:
        """What `run` would do now, or could not do when it was called; changes nothing, and makes nothing."""
        if not os.path.exists(self._store):
            return []
        said = {}
        try:
            for name, key, left, _settle in self._steps():
                why = ", but ".join(filter(None, (left, self._failed.get(name))))
                if why and self._is_idle(key):
                    said[name] = why
        except EXPECTED as error:
            said[self._store] = str(error)
        return [Unfinished(name=name, why=why) for name, why in sorted(said.items())]

    def _is_idle(self, key: str) -> bool:
        try:
            with self._busy(key, seconds=0):
                return True
        except VolumeUnfinished:
            return False  # it is somebody's work, not somebody's remains
