"""Whose a PersistentVolume is, for an account that may not list them: a node's own credentials may get those that pods
of the node have, one by one (Kubernetes' Node authorizer), and neither list nor watch any.

So what the watch would tell is asked for by name, behind whoever wants to know it: the first who asks is told nothing,
and the next one what was answered.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import NoThread, started
from guestmount.pods import NotThere, PodUnknown

log = logging.getLogger("runvol.pods")

# Namespace, name and UID of a claim; empty words for none.
Claimed = tuple[str, str, str]
NOBODY: Claimed = ("", "", "")
# Seconds: for one question, for which an answer is believed, and none is; between questions to a server that fails.
_ASKING, _BELIEVED, _AGAIN, _PAUSE = 1.0, 300.0, 30.0, 5.0
# Volumes that are remembered, and that wait to be asked for: more than a node has.
_MOST = 2000


@dataclass(frozen=True, kw_only=True)
class _Answer:
    claimed: Claimed
    until: float

    def is_fresh(self) -> bool:
        return time.monotonic() < self.until


class ClaimsByName:
    """`ask`: the server's word on one volume; NotThere, PodUnknown. For several threads."""

    def __init__(self, ask: Callable[[str, Deadline], Claimed]) -> None:
        self._ask = ask
        self._lock = threading.Condition()
        self._answers: collections.OrderedDict[str, _Answer] = collections.OrderedDict()
        self._wanted: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def heard_of(self, volume: str, patience: float = 0.0) -> Claimed:
        """As it was answered last. What was not, or a while ago, is asked for now: in at most `patience` seconds, or
        behind the caller without any."""
        answer = self._answers.get(volume)
        if answer is not None and answer.is_fresh():
            return answer.claimed
        if answer is None and patience > 0:
            return self._answered(volume, min(patience, _ASKING))
        self._want(volume)
        return answer.claimed if answer is not None else NOBODY

    def stop(self) -> None:
        """The thread ends with its question; nobody waits for it."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()

    def _want(self, volume: str) -> None:
        with self._lock:
            if self._stopped or len(self._wanted) >= _MOST:
                return
            self._wanted[volume] = None
            self._lock.notify_all()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="claims by name", daemon=True)
                try:
                    started("asking for claims", thread)
                except NoThread:
                    return  # the next one tries again
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._wanted or self._stopped)
                if self._stopped:
                    return
                volume, _ = self._wanted.popitem(last=False)
            answer = self._answers.get(volume)
            if answer is not None and answer.is_fresh():
                continue  # it was wanted once more while it was asked for
            try:
                failed = not self._known(volume)
            except Exception:
                log.exception("a volume's claim was not found out", extra={"persistent_volume": volume})
                failed = True
            if failed:
                with self._lock:
                    self._lock.wait_for(lambda: self._stopped, _PAUSE)

    def _known(self, volume: str) -> bool:
        """Whether the server has said something about it."""
        try:
            self._put(volume, self._ask(volume, Deadline.after(_ASKING)), _BELIEVED)
        except NotThere:
            self._put(volume, NOBODY, _AGAIN)
        except (PodUnknown, WaitExpired) as error:
            last = self._answers.get(volume)
            self._put(volume, last.claimed if last is not None else NOBODY, _AGAIN)
            log.debug("a volume's claim is not told", extra={"persistent_volume": volume, "why": str(error)})
            return False
        return True

    def _answered(self, volume: str, seconds: float) -> Claimed:
        """By this thread, for who comes once."""
        try:
            claimed = self._ask(volume, Deadline.after(seconds))
        except (PodUnknown, WaitExpired):  # NotThere, too
            return NOBODY
        self._put(volume, claimed, _BELIEVED)
        return claimed

    def _put(self, volume: str, claimed: Claimed, seconds: float) -> None:
        with self._lock:
            self._answers[volume] = _Answer(claimed=claimed, until=time.monotonic() + seconds)
            self._answers.move_to_end(volume)
            while len(self._answers) > _MOST:
                self._answers.popitem(last=False)
