"""Where Prometheus comes for metrics: one listener, for whoever has some.

Whoever reaches it may be anybody: it takes few connections at a time, and none of them for long.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger("runvol.metrics")

# Connections at a time, and seconds that one may take from its first byte to its last.
_MOST, _SECONDS = 8, 10.0
# Seconds after a connection that could not be taken: it is there still, and cannot be taken again.
_PAUSE = 0.1


def listen(address: str, registry: CollectorRegistry) -> None:
    """Serve the registry at `HOST:PORT`. ValueError, with what is wrong in words."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("takes HOST:PORT")
    try:
        server = _server(host.removeprefix("[").removesuffix("]"), int(port), registry)
    except OSError as error:
        raise ValueError(f"cannot be listened on: {error.strerror}") from None
    except UnicodeError:
        raise ValueError("cannot be listened on: this is no host's name") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _server(host: str, port: int, registry: CollectorRegistry) -> Any:
    # Most processes are asked for no metrics.
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    from prometheus_client import make_wsgi_app

    class Handler(WSGIRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        daemon_threads = True
        free = threading.BoundedSemaphore(_MOST)

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
            if not self.free.acquire(blocking=False):
                self.shutdown_request(request)
                return
            try:
                super().process_request(request, client_address)
            except BaseException:
                self.free.release()
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
                self.shutdown_request(request)
                self.free.release()

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
