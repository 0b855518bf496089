"""A list of objects, and then what becomes of them: the API server's watch, begun again for ever.

It stays on one connection, so that who asks about a pod waits for nobody. What it is told last stays true of objects
that never change in what is asked of them, whether the server is there or not.
"""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from blockdev import Deadline, WaitExpired
from guestmount.pods import PodUnknown

if TYPE_CHECKING:
    from guestmount.api_access import Connection
    from guestmount.kubernetes_api import KubernetesApi

log = logging.getLogger("runvol.watch")

# Seconds: of one watch, by the server's clock, and by ours; for a line that has begun; for a list; between two tries.
_SPAN, _SILENCE, _LINE, _LIST = 300, 340.0, 30.0, 60.0
# Seconds without an event or a bookmark, which an API server sends every 60 to 75.
_NEWS = 90.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Objects of one answer, where they are as large as a pod with its status, which has some ten thousand bytes.
_PAGE = 50
# Bytes of one event: an object of 1.5 MiB, written in JSON.
_LONGEST_LINE = 4 << 20
Object = Mapping[str, Any]


class Watch:
    """Follows the objects at `path` from `start` to `stop`.

    `listed` is told all of them, one after the other; `changed` one that appeared or changed; `gone` one that is no
    more.
    """

    def __init__(
        self, api: KubernetesApi, what: str, path: str, query: str = "", *,
        listed: Callable[[Iterator[Object]], None], changed: Callable[[Object], None], gone: Callable[[Object], None],
        page: int = _PAGE,
    ) -> None:  # fmt: skip
        self._api, self._what, self._path, self._query, self._page = api, what, path, query, page
        self._listed, self._changed, self._gone = listed, changed, gone
        self._stop = threading.Event()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch of {what}", daemon=True)
        self._version = ""
        self._heard: float | None = None
        # When the server said something last, on whatever connection, in seconds since 1970; 0 for never.
        self.last = 0.0
        # Whether this account may not list or follow them, as the server said last (403).
        self.refused = False
        self._odd = False

    @property
    def what(self) -> str:
        """Of what it is a watch."""
        return self._what

    @property
    def healthy(self) -> bool:
        """Whether what is known is as new as the server's: it said something on this connection, and lately."""
        heard = self._heard
        return heard is not None and time.monotonic() - heard < _NEWS

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The thread ends soon, and is not waited for where the server holds it."""
        self._stop.set()
        connection = self._connection
        if connection is not None:
            connection.sever()
        self._thread.join(1.0)

    def _run(self) -> None:
        from guestmount.api_access import Refusal

        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            began = math.inf
            try:
                if not self._version:
                    self._list()
                began = time.monotonic()
                self._follow()
            except (OSError, ValueError, PodUnknown, WaitExpired) as error:
                # 410, mostly: that moment is forgotten. 429 is about how much is asked, which a list would add to.
                if isinstance(error, Refusal) and 400 <= error.status < 500 and error.status != 429:
                    self._version = ""
                said = error if isinstance(error, Refusal) else error.__cause__
                if isinstance(said, Refusal):
                    self.refused = said.status == 403
                if self.healthy or pause == _FIRST_PAUSE:
                    log.warning(
                        "the watch ended; it is begun again", extra={"what": self._what, "why": str(error)[:500]}
                    )
            except Exception:
                log.exception("the watch failed", extra={"what": self._what})
                self._version = ""
            self._heard = None
            pause = _FIRST_PAUSE if time.monotonic() - began > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
            self._stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  (nodes that do not all come at once)

    def _list(self) -> None:
        """All objects, page by page; what is watched next goes on from there."""
        found: list[str] = []
        self._listed(self._api.listed(self._what, self._path, Deadline.after(_LIST), query=self._query, version=found,
                                      page=self._page))  # fmt: skip
        self._version = found[-1] if found else ""
        self.last = time.time()
        self.refused = False

    def _follow(self) -> None:
        """Until the server ends it, or says that it has forgotten where this one was."""
        query = f"{self._query}&watch=1&allowWatchBookmarks=true&timeoutSeconds={_SPAN}"
        path = f"{self._path}?{query.lstrip('&')}&resourceVersion={quote(self._version, safe='')}"
        with self._api.streamed(path, _SILENCE) as (connection, lines):
            self._connection, ends = connection, connection.until
            try:
                while not self._stop.is_set():
                    connection.until = ends
                    lines.peek(1)
                    connection.until = min(ends, time.monotonic() + _LINE)
                    line = lines.readline(_LONGEST_LINE + 1)
                    if not line:
                        return
                    if len(line) > _LONGEST_LINE:
                        raise ValueError(f"an event of more than {_LONGEST_LINE} bytes")
                    self._line(line)
            finally:
                self._connection = None

    def _line(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except RecursionError:
            self._passed_over("an event is nested too deep")
            return
        if not isinstance(event, dict):
            raise ValueError("a line that is no event")
        self._told(event)

    def _passed_over(self, why: str) -> None:
        if not self._odd:  # a server that goes on so is told of once
            log.warning("what the server says is passed over", extra={"what": self._what, "why": why})
        self._odd = True

    def _told(self, event: Mapping[str, Any]) -> None:
        kind, what = event.get("type"), event.get("object")
        if kind == "ERROR":
            self._version = ""  # too old, mostly; everything is listed again
            raise ValueError(f"the server says: {what.get('message', what) if isinstance(what, dict) else what}")
        if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK"):
            raise ValueError("an event of a kind that no API server sends")
        if not isinstance(what, dict):
            self._passed_over("an event without an object")
            return
        if kind == "DELETED":
            self._gone(what)
        elif kind != "BOOKMARK":
            self._changed(what)
        metadata = what.get("metadata")
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if version:
            self._version = str(version)
        self._heard, self.last = time.monotonic(), time.time()
