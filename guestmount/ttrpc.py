"""ttRPC: frames, a client and a server over one byte stream (a unix or vsock socket, a virtio-serial port).

Format: containerd/ttrpc's PROTOCOL.md. A frame is a ten-byte header (length and stream id, big-endian 32 bits each,
type, flags) and its data. Only unary calls, which is all that Kata and NRI use. Needs nothing but the standard
library and the generated envelope, so that it runs in a guest's agent too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from runvol_proto import ttrpc_pb2

log = logging.getLogger("runvol.ttrpc")

HEADER = struct.Struct(">IIBB")
LARGEST = 4 << 20
REQUEST, RESPONSE = 1, 2
OK, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED = 0, 2, 3, 4
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 8, 9, 12, 13, 14

M = TypeVar("M", bound=Message)


class RpcError(Exception):
    """The other side's answer was an error; `code` is gRPC's number."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


class Closed(Exception):
    """The stream has ended."""


class Stream(Protocol):
    """A byte stream in both directions."""

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; empty at the end."""

    def write(self, data: bytes) -> None:
        """All of it."""

    def close(self) -> None:
        """Wakes a reader."""


class FileStream:
    """A stream on a file descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, count: int) -> bytes:
        return os.read(self._fd, count)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


def frame(stream_id: int, kind: int, data: bytes) -> bytes:
    """One frame, as it goes over the wire."""
    return HEADER.pack(len(data), stream_id, kind, 0) + data


def read_exactly(stream: Stream, count: int) -> bytes:
    """`count` bytes, however they are split; Closed at the end of the stream."""
    parts = []
    while count:
        try:
            part = stream.read(min(count, 1 << 16))
        except OSError as error:
            raise Closed(str(error)) from error
        if not part:
            raise Closed("the other side closed the stream")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_frame(stream: Stream) -> tuple[int, int, bytes | None]:
    """Stream id, type and data; None for the data of a frame that is too large, which is read and thrown away."""
    length, stream_id, kind, _flags = HEADER.unpack(read_exactly(stream, HEADER.size))
    if length > LARGEST:
        while length:
            length -= len(read_exactly(stream, min(length, 1 << 20)))
        return stream_id, kind, None
    return stream_id, kind, read_exactly(stream, length)


class Client:
    """Calls over one stream, from any number of threads."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._writing = threading.Lock()
        self._waiting: dict[int, _Answer] = {}
        self._next = 1
        self._ended: str | None = None
        threading.Thread(target=self._receive, name="ttrpc-client", daemon=True).start()

    def call(self, service: str, method: str, request: Message, response: type[M], timeout: float) -> M:
        """One unary call. Raises RpcError (DEADLINE_EXCEEDED after `timeout` seconds) or Closed."""
        envelope = ttrpc_pb2.Request(
            service=service, method=method, payload=request.SerializeToString(), timeout_nano=int(timeout * 1e9)
        ).SerializeToString()
        if len(envelope) > LARGEST:
            raise RpcError(RESOURCE_EXHAUSTED, f"a request of {len(envelope)} bytes is larger than {LARGEST}")
        answer = _Answer()
        # Ids must go out in their order, so allocating and sending are one step.
        with self._writing:
            if self._ended is not None:
                raise Closed(self._ended)
            stream_id, self._next = self._next, self._next + 2
            self._waiting[stream_id] = answer
            try:
                self._stream.write(frame(stream_id, REQUEST, envelope))
            except OSError as error:
                self._waiting.pop(stream_id, None)
                raise Closed(str(error)) from error
        if not answer.done.wait(timeout):
            self._waiting.pop(stream_id, None)
            raise RpcError(DEADLINE_EXCEEDED, f"{service}/{method} did not answer within {timeout:.1f} s")
        if answer.data is None:
            raise Closed(self._ended or "closed")
        return _result(answer.data, response)

    def close(self) -> None:
        self._stream.close()

    def _receive(self) -> None:
        try:
            while True:
                stream_id, kind, data = read_frame(self._stream)
                waiting = self._waiting.pop(stream_id, None) if kind == RESPONSE else None
                if waiting is not None:
                    waiting.give(data if data is not None else _too_large())
        except Closed as error:
            with self._writing:
                self._ended = str(error)
                for waiting in self._waiting.values():
                    waiting.done.set()
                self._waiting.clear()


class _Answer:
    def __init__(self) -> None:
        self.done, self.data = threading.Event(), None  # type: threading.Event, bytes | None

    def give(self, data: bytes) -> None:
        self.data = data
        self.done.set()


def _too_large() -> bytes:
    status = ttrpc_pb2.Status(code=RESOURCE_EXHAUSTED, message="the answer is too large")
    return ttrpc_pb2.Response(status=status).SerializeToString()


def _result(data: bytes, response: type[M]) -> M:
    try:
        envelope = ttrpc_pb2.Response.FromString(data)
        if envelope.status.code != OK:
            raise RpcError(envelope.status.code, envelope.status.message)
        return response.FromString(envelope.payload)
    except DecodeError as error:
        raise RpcError(INTERNAL, f"the answer cannot be decoded: {error}") from error


Handler = Callable[[Any], Message]


class Service:
    """The methods of one service: those of its descriptor that `implementation` has."""

    def __init__(self, descriptor: ServiceDescriptor, implementation: object) -> None:
        self.name = descriptor.full_name
        self.methods: Mapping[str, tuple[type[Message], Handler]] = {
            method.name: (GetMessageClass(method.input_type), getattr(implementation, method.name))
            for method in descriptor.methods
            if hasattr(implementation, method.name)
        }


class Server:
    """Serves one stream until it ends; every request has a thread of its own."""

    def __init__(self, stream: Stream, services: list[Service]) -> None:
        self._stream = stream
        self._services = {service.name: service for service in services}
        self._writing = threading.Lock()
        self._last = 0

    def serve(self) -> None:
        """Returns when the other side has closed the stream."""
        try:
            while True:
                stream_id, kind, data = read_frame(self._stream)
                if kind == REQUEST:
                    self._accept(stream_id, data)
        except Closed:
            return

    def _accept(self, stream_id: int, data: bytes | None) -> None:
        if data is None:
            self._refuse(stream_id, RESOURCE_EXHAUSTED, f"a frame is larger than {LARGEST} bytes")
        elif stream_id % 2 == 0:
            self._refuse(stream_id, INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")
        elif stream_id <= self._last:
            self._refuse(stream_id, INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")
        else:
            self._last = stream_id
            try:
                threading.Thread(target=self._answer, args=(stream_id, data), daemon=True).start()
            except RuntimeError as error:  # no thread can be started now; the stream goes on
                self._refuse(stream_id, RESOURCE_EXHAUSTED, str(error))

    def _answer(self, stream_id: int, data: bytes) -> None:
        started = time.monotonic()
        try:
            request = ttrpc_pb2.Request.FromString(data)
            service = self._services.get(request.service)
            if service is None:
                raise RpcError(UNIMPLEMENTED, f"service {request.service}")
            if request.method not in service.methods:
                raise RpcError(UNIMPLEMENTED, f"method {request.method}")
            kind, handler = service.methods[request.method]
            payload = handler(kind.FromString(request.payload)).SerializeToString()
        except RpcError as error:
            self._refuse(stream_id, error.code, str(error))
        except DecodeError as error:
            self._refuse(stream_id, INVALID_ARGUMENT, f"the request cannot be decoded: {error}")
        except Exception as error:
            log.exception("handler failed")
            self._refuse(stream_id, INTERNAL, f"{type(error).__name__}: {error}")
        else:
            if request.timeout_nano and time.monotonic() - started > request.timeout_nano / 1e9:
                return  # nobody waits any more
            self._send(stream_id, ttrpc_pb2.Response(payload=payload))

    def _refuse(self, stream_id: int, code: int, message: str) -> None:
        self._send(stream_id, ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=message)))

    def _send(self, stream_id: int, response: ttrpc_pb2.Response) -> None:
        with self._writing, contextlib.suppress(OSError):
            self._stream.write(frame(stream_id, RESPONSE, response.SerializeToString()))
