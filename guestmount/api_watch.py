"""A list of objects, and then what becomes of them: the API server's watch, begun again for ever.

It stays on one connection, so that who asks about a pod waits for nobody. What it is told last stays true of objects
that never change in what is asked of them, whether the server is there or not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from blockdev import Deadline
from guestmount.pods import PodUnknown

if TYPE_CHECKING:
    from guestmount.kubernetes_api import KubernetesApi

log = logging.getLogger("runvol.watch")

# Seconds: of one watch, by the server's clock; without a word, which is longer; for a list; between two tries.
_SPAN, _SILENCE, _LIST = 300, 340.0, 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Objects of one answer: a pod with its status has some ten thousand bytes.
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
    ) -> None:  # fmt: skip
        self._api, self._what, self._path, self._query = api, what, path, query
        self._listed, self._changed, self._gone = listed, changed, gone
        self._stop = threading.Event()
        self._connection: HTTPConnection | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch of {what}", daemon=True)
        self._version = ""
        # Whether what is known is as new as the server's.
        self.healthy = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The thread ends soon, and is not waited for where the server holds it."""
        self._stop.set()
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self._follow()
            except (OSError, ValueError, HTTPException, PodUnknown) as error:
                if self.healthy or pause == _FIRST_PAUSE:
                    log.warning(
                        "the watch ended; it is begun again", extra={"what": self._what, "why": str(error)[:500]}
                    )
            except Exception:
                log.exception("the watch failed", extra={"what": self._what})
                self._version = ""
            self.healthy = False
            pause = _FIRST_PAUSE if time.monotonic() - began > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
            self._stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  (nodes that do not all come at once)

    def _list(self) -> None:
        """All objects, page by page; what is watched next goes on from there."""
        found: list[str] = []
        self._listed(self._api.listed(self._what, self._path, Deadline.after(_LIST), query=self._query, version=found,
                                      page=_PAGE))  # fmt: skip
        self._version = found[-1] if found else ""

    def _follow(self) -> None:
        """Until the server ends it, or says that it has forgotten where this one was."""
        query = f"{self._query}&watch=1&allowWatchBookmarks=true&timeoutSeconds={_SPAN}"
        path = f"{self._path}?{query.lstrip('&')}&resourceVersion={quote(self._version, safe='')}"
        with self._api.streamed(path, _SILENCE) as (connection, lines):
            self._connection = connection
            self.healthy = True
            try:
                while not self._stop.is_set():
                    line = lines.readline(_LONGEST_LINE + 1)
                    if not line:
                        return
                    if len(line) > _LONGEST_LINE:
                        raise ValueError(f"an event of more than {_LONGEST_LINE} bytes")
                    self._told(json.loads(line))
            finally:
                self._connection = None

    def _told(self, event: Mapping[str, Any]) -> None:
        kind, what = event.get("type"), event.get("object")
        if not isinstance(what, dict):
            raise ValueError("an event without an object")
        if kind == "ERROR":
            self._version = ""  # too old, mostly; everything is listed again
            raise ValueError(f"the server says: {what.get('message', what)}")
        version = (what.get("metadata") or {}).get("resourceVersion")
        if kind in ("ADDED", "MODIFIED"):
            self._changed(what)
        elif kind == "DELETED":
            self._gone(what)
        if version:
            self._version = str(version)
