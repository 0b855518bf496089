"""NRI's multiplexer: several byte streams over one socket.

Each write is `connection id | length | payload`, big-endian 32 bits each. A Go peer reads a payload into 4096 bytes, so
no more are ever sent at once; what it sends may be larger, and split anywhere.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading

from guestmount.ttrpc import Closed

HEADER = struct.Struct(">II")
# The most that a Go peer takes in one frame, and the most that it sends.
SENT, RECEIVED = 4096, (4 << 20) + 10
PLUGIN, RUNTIME = 1, 2


class Mux:
    """Owns the socket; `stream` gives one of its connections. Frames of others are dropped."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._writing = threading.Lock()
        self._streams = {number: MuxStream(self, number) for number in (PLUGIN, RUNTIME)}
        threading.Thread(target=self._receive, name="nri-mux", daemon=True).start()

    def stream(self, number: int) -> MuxStream:
        return self._streams[number]

    def send(self, number: int, data: bytes) -> None:
        """All of it, in frames that the other side can take. OSError once the socket is closed."""
        with self._writing:
            for at in range(0, len(data), SENT):
                part = data[at : at + SENT]
                self._connection.sendall(HEADER.pack(number, len(part)) + part)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _receive(self) -> None:
        try:
            while True:
                number, length = HEADER.unpack(self._exactly(HEADER.size))
                if length > RECEIVED:
                    raise Closed(f"a frame of {length} bytes is no frame of NRI's multiplexer")
                data = self._exactly(length)
                if number in self._streams:
                    self._streams[number].feed(data)
        except (Closed, OSError):
            self.close()
        finally:
            for stream in self._streams.values():
                stream.feed(b"")

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._connection.recv(min(count, 1 << 16))
            if not part:
                raise Closed("the runtime closed the connection")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class MuxStream:
    """One connection as a byte stream, for ttRPC."""

    def __init__(self, mux: Mux, number: int) -> None:
        self._mux, self._number = mux, number
        self._parts: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._rest = b""
        self._ended = False

    def feed(self, data: bytes) -> None:
        """What came for it; nothing at the end."""
        self._parts.put(data)

    def read(self, count: int) -> bytes:
        if not self._rest and not self._ended:
            self._rest = self._parts.get()
            self._ended = not self._rest
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def write(self, data: bytes) -> None:
        self._mux.send(self._number, data)

    def close(self) -> None:
        self._mux.close()
