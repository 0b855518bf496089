"""Where Prometheus comes for metrics: one listener, for whoever has some.

Whoever reaches it may be anybody: it takes few connections at a time, and none of them for long. What is collected has
an end: of what hangs the last values are told, with when they were true.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from blockdev.deadlines import Deadline, NoThread, bounded
from blockdev.errors import WaitExpired
from blockdev.families import GAUGE, Family

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

log = logging.getLogger("runvol.metrics")

# Connections at a time, those of one address, and seconds that one may take from its first byte to its last.
_MOST, _OF_ONE, _SECONDS = 8, 4, 10.0
# Seconds for what one part of a process has to tell.
_COLLECTING = 2.0
# Seconds after a connection that could not be taken: it is there still, and cannot be taken again.
_PAUSE = 0.1


BUILD = Family(
    name="runvol_build_info",
    kind=GAUGE,
    labels=("part", "version"),
    help="1; the process, and the version that it runs.",
)
COLLECTED = Family(
    name="runvol_collected_timestamp_seconds", kind=GAUGE, labels=("part",),
    help="When a part of the process was asked for its values, in seconds since 1970: now, unless what it asks hangs.",
)  # fmt: skip
FAMILIES = (BUILD, COLLECTED)


_PORT = re.compile(r"[0-9]{1,5}\Z")


class Places:
    """Who is served at this moment. One address never has all places; where there is none left, whoever has had one for
    longest without having asked anything loses it: a scrape asks at once."""

    def __init__(self, most: int = _MOST, of_one: int = _OF_ONE) -> None:
        self._most, self._of_one = most, of_one
        self._lock = threading.Lock()
        # In the order in which they came.
        self._served: dict[socket.socket, str] = {}
        self._silent: dict[socket.socket, None] = {}

    def take(self, connection: socket.socket, address: str) -> bool:
        """Whether the connection has a place."""
        with self._lock:
            own = [one for one, other in self._served.items() if other == address]
            if len(own) >= self._of_one:
                return self._instead(connection, address, [one for one in self._silent if one in own])
            if len(self._served) >= self._most:
                return self._instead(connection, address, list(self._silent))
            self._served[connection], self._silent[connection] = address, None
            return True

    def _instead(self, connection: socket.socket, address: str, silent: Sequence[socket.socket]) -> bool:
        if not silent:
            return False
        _cut(silent[0])
        self._forget(silent[0])
        self._served[connection], self._silent[connection] = address, None
        return True

    def asks(self, connection: socket.socket) -> None:
        """It has said what it wants."""
        with self._lock:
            self._silent.pop(connection, None)

    def give(self, connection: socket.socket) -> None:
        with self._lock:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        self._served.pop(connection, None)
        self._silent.pop(connection, None)


class Collector(Protocol):
    """Who has metrics to tell at each scrape; `part`: what it is called."""

    part: str

    def collect(self) -> Iterable[Metric]:
        """All that it has; families as they stand in the table."""


class _Bounded:
    """What a collector says; what it said last where it hangs, or fails."""

    def __init__(self, inner: Collector, seconds: float) -> None:
        self._inner, self._seconds, self._last, self._at = inner, seconds, list["Metric"](), 0.0
        self.name = inner.part

    def collect(self) -> Iterator[Metric]:
        try:
            self._last = bounded(
                f"collecting {self.name}", Deadline.after(self._seconds), lambda: list(self._inner.collect()),
                key=f"collecting {id(self)}",
            )  # fmt: skip
            self._at = time.time()
        except (WaitExpired, NoThread) as error:
            log.warning("metrics are told as they were", extra={"part": self.name, "why": str(error)})
        except Exception:
            log.exception("metrics are told as they were", extra={"part": self.name})
        yield from self._last

    @property
    def at(self) -> float:
        return self._at


class _All:
    """Every part, one after the other, and how old each is."""

    def __init__(self, collectors: Sequence[Collector], part: str, version: str) -> None:
        self._parts = [_Bounded(one, _COLLECTING) for one in collectors]
        self._part, self._version = part, version

    def collect(self) -> Iterator[Metric]:
        yield BUILD.of([((self._part, self._version), 1.0)])
        for one in self._parts:
            yield from one.collect()
        yield COLLECTED.of(((one.name,), one.at) for one in self._parts)


def listen(address: str, collectors: Sequence[Collector], *, part: str, version: str) -> None:
    """Serve what they tell at `HOST:PORT`, and what the process takes. ValueError, with what is wrong in words."""
    host, _, port = address.rpartition(":")
    if not host or not _PORT.match(port) or not 0 < int(port) < 65536:
        raise ValueError("takes HOST:PORT")
    try:
        server = _server(host.removeprefix("[").removesuffix("]"), int(port), _registry(collectors, part, version))
    except OSError as error:
        raise ValueError(f"cannot be listened on: {error.strerror}") from None
    except UnicodeError:
        raise ValueError("cannot be listened on: this is no host's name") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _registry(collectors: Sequence[Collector], part: str, version: str) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry, ProcessCollector

    registry = CollectorRegistry()
    registry.register(_All(collectors, part, version))
    ProcessCollector(registry=registry)
    return registry


def _server(host: str, port: int, registry: CollectorRegistry) -> Any:
    # Most processes are asked for no metrics.
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    from prometheus_client import make_wsgi_app

    places = Places()

    class Handler(WSGIRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def get_environ(self) -> Any:
            places.asks(self.connection)
            return super().get_environ()

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        daemon_threads = True

        def server_bind(self) -> None:
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = host, port  # without asking for the host's full name
            self.setup_environ()

        def get_request(self) -> Any:
            try:
                return super().get_request()
            except OSError:
                time.sleep(_PAUSE)
                raise

        def process_request(self, request: Any, client_address: Any) -> None:
            if not places.take(request, str(client_address[0])):
                self.shutdown_request(request)
                return
            try:
                super().process_request(request, client_address)
            except BaseException:
                places.give(request)
                raise

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            end = threading.Timer(_SECONDS, _cut, (request,))
            end.daemon = True
            try:
                end.start()
                super().process_request_thread(request, client_address)
            except RuntimeError:  # no thread could be started to end it
                self.handle_error()
            finally:
                end.cancel()
                places.give(request)
                self.shutdown_request(request)

        def handle_error(self, *_: Any) -> None:
            log.debug("a request for metrics ended early", exc_info=True)

    server = Server((host, port), Handler)
    server.set_app(make_wsgi_app(registry))
    return server


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("a connection for metrics was closed already")
