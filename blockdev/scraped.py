"""Where Prometheus comes for metrics: one listener, for whoever has some."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def listen(address: str, registry: CollectorRegistry) -> None:
    """Serve the registry at `HOST:PORT`. ValueError, with what is wrong in words."""
    from prometheus_client import start_http_server

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("takes HOST:PORT")
    try:
        start_http_server(int(port), addr=host, registry=registry)
    except OSError as error:
        raise ValueError(f"cannot be listened on: {error.strerror}") from None
    except UnicodeError:
        raise ValueError("cannot be listened on: this is no host's name") from None
