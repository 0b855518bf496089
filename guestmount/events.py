"""Events on pods and claims: what a user has to know and nobody else tells.

kubelet tells why a volume is refused or cannot grow (FailedMount, VolumeResizeFailed), and the sidecars why it is not
made: that is not said again here. What is said again within a while is the same event, counted; nobody waits for it,
and where there is no API nothing happens. Kubernetes' core/v1 Event, as client-go's recorder writes it.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from blockdev import Deadline
from blockdev.deadlines import NoThread, started
from blockdev.families import COUNTER, Family
from blockdev.printable import printable
from guestmount.pods import NotThere, PodUnknown

if TYPE_CHECKING:
    from guestmount.kubernetes_api import KubernetesApi

log = logging.getLogger("runvol.events")

EVENTS = Family(
    name="runvol_events_total", kind=COUNTER, labels=("outcome",),
    help="Events on pods and claims: written, counted (said again), failed, dropped (too many at once).",
)  # fmt: skip

NORMAL, WARNING = "Normal", "Warning"
# Seconds for one exchange.
_EXCHANGE = 5.0
# Events that wait, that are remembered, and bytes of one (Kubernetes takes 1024).
_WAITING, _REMEMBERED, _LONGEST = 200, 2000, 1000
# So many at once, and then one in so many seconds: a node of a thousand pods with one trouble floods no API server.
_BURST, _EACH = 25, 2.0
COMPONENT = "runvol"


@dataclass(frozen=True, kw_only=True)
class About:
    """A pod or a claim: `kind` is Pod or PersistentVolumeClaim."""

    kind: str
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, kw_only=True)
class _Said:
    about: About
    kind: str
    reason: str
    message: str


@dataclass
class _Known:
    """An event that was written: what it is called, how often it was said, when last, and the last time it was sent."""

    name: str
    first: str
    count: int = 1
    sent: float = 0.0


class Events:
    """Says things behind the calls; its thread begins with the first. `reporter`: the node's name; `again`: seconds
    after which the same is said again, if it is still so."""

    def __init__(self, api: KubernetesApi, *, reporter: str, again: float) -> None:
        self._api, self._reporter, self._again = api, reporter, again
        self._queue: queue.Queue[_Said] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._known: collections.OrderedDict[_Said, _Known] = collections.OrderedDict()
        self._tokens, self._since = float(_BURST), time.monotonic()
        # What became of them.
        self.outcomes: Counter[str] = Counter(dict.fromkeys(("written", "counted", "failed", "dropped"), 0))

    def tell(self, about: About, kind: str, reason: str, message: str) -> None:
        """Waits for nothing. What is about nobody that is known is not said."""
        if not (about.namespace and about.name and about.uid):
            return
        text = printable(message, lines=True).encode()[:_LONGEST].decode(errors="ignore")
        said = _Said(about=about, kind=kind, reason=reason, message=text)
        with self._lock:
            known = self._known.get(said)
            if known is not None and time.monotonic() - known.sent < self._again:
                known.count += 1
                return
            try:
                self._queue.put_nowait(said)
            except queue.Full:
                self.outcomes["dropped"] += 1
                return
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="events", daemon=True)
                with contextlib.suppress(NoThread):  # the next one tries again
                    started("telling events", thread)
                    self._thread = thread

    def _run(self) -> None:
        while True:
            said = self._queue.get()
            self._pace()
            try:
                self.outcomes[self._write(said)] += 1
            except Exception as error:
                self.outcomes["failed"] += 1
                expected = isinstance(error, PodUnknown)
                log.warning("an event was not written", extra={"reason": said.reason, "why": str(error)[:500]},
                            exc_info=None if expected else error)  # fmt: skip

    def _pace(self) -> None:
        now = time.monotonic()
        self._tokens, self._since = min(_BURST, self._tokens + (now - self._since) / _EACH), now
        if self._tokens < 1:
            time.sleep((1 - self._tokens) * _EACH)
            self._since = time.monotonic()
            self._tokens = 1.0
        self._tokens -= 1

    def _write(self, said: _Said) -> str:
        """What became of it. PodUnknown."""
        with self._lock:
            known = self._known.get(said)
            if known is not None and time.monotonic() - known.sent < self._again:
                known.count += 1  # two came before the first was written
                return "counted"
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        where = f"/api/v1/namespaces/{quote(said.about.namespace, safe='')}/events"
        deadline = Deadline.after(_EXCHANGE)
        if known is not None:
            try:
                known.count += 1
                changed = {"count": known.count, "lastTimestamp": at}
                self._api.merge(f"the event {known.name}", f"{where}/{quote(known.name, safe='')}", changed, deadline)
                self._remember(said, known)
                return "counted"
            except NotThere:
                pass  # an API server forgets events after an hour
        known = _Known(name=f"{said.about.name[:200]}.{time.time_ns():x}", first=at)
        self._api.create(f"the event {said.reason}", where, self._made(said, known, at), deadline)
        self._remember(said, known)
        return "written"

    def _made(self, said: _Said, known: _Known, at: str) -> dict[str, Any]:
        about = said.about
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": known.name, "namespace": about.namespace},
            "involvedObject": {"apiVersion": "v1", "kind": about.kind, "namespace": about.namespace, "name": about.name,
                               "uid": about.uid},
            "type": said.kind,
            "reason": said.reason,
            "message": said.message,
            "source": {"component": COMPONENT, "host": self._reporter},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._reporter,
            "firstTimestamp": known.first,
            "lastTimestamp": at,
            "count": 1,
        }  # fmt: skip

    def _remember(self, said: _Said, known: _Known) -> None:
        with self._lock:
            known.sent = time.monotonic()
            self._known[said] = known
            self._known.move_to_end(said)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
