"""Who is served at this moment by a listener that anybody may reach, so that nobody who says nothing holds it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence


class Places:
    """Who is served at this moment. One address never has all places; where there is none left, whoever has had one for
    longest without having asked anything loses it: a scrape asks at once."""

    def __init__(self, most: int, of_one: int) -> None:
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
        cut(silent[0])
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


def cut(connection: socket.socket) -> None:
    """Whoever reads from it, or writes to it, in whatever thread, ends."""
    with contextlib.suppress(OSError):  # it was closed already
        connection.shutdown(socket.SHUT_RDWR)
