"""Where Prometheus comes for metrics: one listener, for whoever has some.

Whoever reaches it may be anybody: it takes few connections at a time, and none of them for long. What is collected has
an end: of what hangs the last values are told, with when they were true.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from blockdev.addresses import host_and_port
from blockdev.deadlines import Deadline, NoThread, bounded
from blockdev.errors import WaitExpired
from blockdev.families import GAUGE, Family
from blockdev.places import Places, cut

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

log = logging.getLogger("runvol.metrics")

# Connections at a time, those of one address, and seconds that one may take from its first byte to its last.
_MOST, _OF_ONE, _SECONDS = 8, 4, 10.0
# Seconds for which what was told is told again: whoever asks all the time takes no more of a processor than that.
_FRESH = 0.5
# Seconds after which what is wrong is said again.
_SILENT = 60.0
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


class Collector(Protocol):
    """Who has metrics to tell at each scrape; `part`: what it is called."""

    part: str

    def collect(self) -> Iterable[Metric]:
        """All that it has; families as they stand in the table."""


class _Bounded:
    """What a collector says; what it said last where it hangs, or fails."""

    def __init__(self, inner: Collector, seconds: float) -> None:
        self._inner, self._seconds, self._last, self._at = inner, seconds, list["Metric"](), 0.0
        self.name, self._silent_until = inner.part, 0.0

    def collect(self) -> Iterator[Metric]:
        try:
            self._last = bounded(
                f"collecting {self.name}", Deadline.after(self._seconds), lambda: list(self._inner.collect()),
                key=f"collecting {id(self)}",
            )  # fmt: skip
            self._at = time.time()
        except (WaitExpired, NoThread) as error:
            self._tell(error, traceback=False)
        except Exception as error:
            self._tell(error, traceback=True)
        yield from self._last

    def _tell(self, error: Exception, *, traceback: bool) -> None:
        """Not once for each that asks, who may be anybody."""
        if time.monotonic() < self._silent_until:
            return
        self._silent_until = time.monotonic() + _SILENT
        log.warning("metrics are told as they were", exc_info=error if traceback else None,
                    extra={"part": self.name, "why": str(error)})  # fmt: skip

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
    host, port = host_and_port(address)
    try:
        server = _server(host, port, _registry(collectors, part, version))
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


class _Page:
    """The text, as the client library makes it of an Accept header; one who asks after the other."""

    _OPEN, _PLAIN = "application/openmetrics-text; version=1.0.0", "text/plain"

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import make_wsgi_app

        self._made, self._lock = make_wsgi_app(registry), threading.Lock()
        # By form and compression: until when it is fresh, with its status and headers.
        self._kept: dict[tuple[str, str], tuple[float, list[Any], list[bytes]]] = {}

    def __call__(self, environment: Mapping[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environment.get("REQUEST_METHOD") != "GET" or environment.get("PATH_INFO") == "/favicon.ico":
            answer: Iterable[bytes] = self._made(dict(environment), start)
            return answer
        form = self._OPEN if self._OPEN.partition(";")[0] in environment.get("HTTP_ACCEPT", "") else self._PLAIN
        packed = "gzip" if "gzip" in environment.get("HTTP_ACCEPT_ENCODING", "") else ""
        with self._lock:
            until, said, text = self._kept.get((form, packed), (0.0, [], []))
            if time.monotonic() >= until:
                said = []
                text = list(self._made(
                    {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": "", "HTTP_ACCEPT": form,
                     "HTTP_ACCEPT_ENCODING": packed}, lambda *given: said.extend(given)))  # fmt: skip
                self._kept[form, packed] = time.monotonic() + _FRESH, said, text
        start(*said)
        return text


def _server(host: str, port: int, registry: CollectorRegistry) -> Any:
    # Most processes are asked for no metrics.
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    places = Places(_MOST, _OF_ONE)

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
            end = threading.Timer(_SECONDS, cut, (request,))
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
    server.set_app(_Page(registry))
    return server
