"""The exchange with a Kubernetes API server: one request, with a service account's files or a kubeconfig's answer.

A module of its own, as what it imports costs a process of kubelet's that asks nobody.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from importlib import metadata
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import bounded
from guestmount.kubeconfig import Resolved
from guestmount.pods import PodUnknown

# A pod is at most 1.5 MiB (etcd's limit).
_LARGEST = 4 << 20
# Seconds, for a connection whose answer may take longer.
_CONNECTING = 20.0


@functools.cache
def agent() -> dict[str, str]:
    """Who asks: a node-local proxy may keep answers by it, one set for each program."""
    try:
        return {"User-Agent": f"runvol/{metadata.version('runvol')}"}
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return {"User-Agent": "runvol/0"}


class Denied(ValueError):
    """Who asks is not known to the server (any more): 401, or a certificate that one side does not take."""


class Refusal(ValueError):
    """An answer with another status than 200; `said`: by the API server itself, not by something on the way to it."""

    def __init__(self, status: int, reason: str, *, said: bool = False) -> None:
        super().__init__(f"{status} {reason}")
        self.status, self.said = status, said


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What is sent with a request that changes something."""

    method: str
    body: bytes
    form: str = "application/json"


class Access(Protocol):
    """How the server is reached. Both may be asked anew for each exchange."""

    def connection(self, seconds: float) -> Connection: ...

    def headers(self) -> dict[str, str]: ...

    def cluster(self) -> str:
        """What tells clusters apart: the authority's certificates, or the address; hashed."""


def answered(
    what: str, access: Access, path: str, seconds: float, *, largest: int = _LARGEST, sent: Sent | None = None
) -> bytes:
    """The body of the answer, of at most so many bytes. OSError or ValueError, with the reason: Denied for 401,
    Refusal; WaitExpired. Each wait for a byte has its time; all of them together have one here. With `sent` something
    is changed there."""
    opened: list[Connection] = []
    try:
        return bounded(what, Deadline.after(seconds), lambda: _exchanged(access, path, seconds, largest, opened, sent))
    except WaitExpired:
        for connection in opened:  # the thread that waits for it ends
            connection.sever()
        raise


def _exchanged(
    access: Access, path: str, seconds: float, largest: int, opened: list[Connection], sent: Sent | None
) -> bytes:
    """`opened` is told the connection, so that who waits no longer can end it."""
    try:
        connection = access.connection(seconds)
    except ssl.SSLError as error:
        raise Denied(f"the certificates cannot be used: {error}") from error
    opened.append(connection)
    try:
        headers = {"Accept": "application/json", **agent(), **access.headers()}
        if sent is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request(sent.method, path, sent.body, {"Content-Type": sent.form, **headers})
        reply = connection.getresponse()
        body = reply.read(largest + 1)
    except ssl.SSLError as error:
        raise Denied(str(error)) from error
    except HTTPException as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if reply.status == 401:
        raise Denied("401 Unauthorized")
    if reply.status != 200 and not (sent is not None and reply.status == 201):
        raise Refusal(reply.status, reply.reason, said=_is_status(body))
    if len(body) > largest:
        raise ValueError(f"an answer of more than {largest} bytes")
    return body


def _is_status(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == "Status"


@contextlib.contextmanager
def streamed(access: Access, path: str, seconds: float) -> Iterator[tuple[Connection, HTTPResponse]]:
    """An answer that goes on, to be read line by line until `seconds` are over, or whatever the connection's `until`
    is set to. What `exchanged` raises."""
    try:
        connection = access.connection(min(_CONNECTING, seconds))
        with contextlib.closing(connection):
            connection.until = time.monotonic() + seconds
            connection.request("GET", path, headers={"Accept": "application/json", **agent(), **access.headers()})
            reply = connection.getresponse()
            if reply.status == 401:
                raise Denied("401 Unauthorized")
            if reply.status != 200:
                raise Refusal(reply.status, reply.reason)
            yield connection, reply
    except ssl.SSLError as error:
        raise Denied(str(error)) from error
    except HTTPException as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


class ByAccount:
    """The service account's files, which kubelet replaces while the process runs."""

    def __init__(self, server: str, directory: str, environment: Mapping[str, str]) -> None:
        self._server, self._directory, self._environment = server, directory, environment

    def connection(self, seconds: float) -> Connection:
        authority = os.path.join(self._directory, "ca.crt")
        return _connection(
            self._base(),
            seconds,
            lambda: ssl.create_default_context(cafile=authority if os.path.exists(authority) else None),
        )

    def cluster(self) -> str:
        try:
            with open(os.path.join(self._directory, "ca.crt")) as authority:
                return _hashed(authority.read())
        except (OSError, ValueError):
            return _hashed(self._base())

    def _base(self) -> str:
        if self._server:
            return self._server
        host, port = (self._environment.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
        if not host:
            raise PodUnknown("the Kubernetes API's address is not known: KUBERNETES_SERVICE_HOST is not set")
        return f"https://{f'[{host}]' if ':' in host else host}:{port}"

    def headers(self) -> dict[str, str]:
        try:
            with open(os.path.join(self._directory, "token")) as token:
                return {"Authorization": f"Bearer {token.read().strip()}"}
        except OSError:
            return {}  # an API without authentication, or one that answers 401


class ByKubeconfig:
    """What a kubeconfig resolved to."""

    def __init__(self, resolved: Resolved, server: str) -> None:
        self.resolved, self._server = resolved, server or resolved.server

    def connection(self, seconds: float) -> Connection:
        return _connection(self._server, seconds, lambda: _context(self.resolved), proxy=self.resolved.proxy,
                           name=self.resolved.server_name)  # fmt: skip

    def headers(self) -> dict[str, str]:
        return {"Authorization": self.resolved.token} if self.resolved.token else {}

    def cluster(self) -> str:
        return _hashed(self.resolved.authority or self.resolved.server)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _connection(
    base: str, seconds: float, context: Callable[[], ssl.SSLContext], *, proxy: str = "", name: str = ""
) -> Connection:
    """To `base`, below whose path the paths of requests lie; through `proxy`; `name`: of the server's certificate."""
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"the address {parts.scheme}://{parts.hostname or ''} is neither http:// nor https://")
    via = urlsplit(proxy) if proxy else parts
    if proxy and via.scheme != "http":
        raise ValueError(f"proxy-url {via.scheme}://{via.hostname or ''}: only http:// proxies are known")
    made: Connection
    if parts.scheme == "http":
        made = Connection(via.hostname or "", via.port, seconds, parts.path)
    else:
        made = _Tls(via.hostname or "", via.port or 443, seconds, parts.path, context(), name or parts.hostname or "")
    if proxy:
        known = f"{unquote(via.username or '')}:{unquote(via.password or '')}".encode()
        headers = {"Proxy-Authorization": f"Basic {base64.b64encode(known).decode()}"} if via.username else {}
        made.set_tunnel(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), headers)
    return made


class Connection(HTTPConnection):
    """All reading ends at `until`, of the monotonic clock: a server that drips has each byte come in time."""

    def __init__(self, host: str, port: int | None, seconds: float, prefix: str) -> None:
        super().__init__(host, port, timeout=seconds)
        self._prefix = prefix.rstrip("/")
        self._opened: socket.socket | None = None
        self.until = time.monotonic() + seconds
        self.response_class = functools.partial(_Reply, self)  # type: ignore[assignment]

    def putrequest(self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False) -> None:
        super().putrequest(method, self._prefix + url, skip_host, skip_accept_encoding)

    def connect(self) -> None:
        super().connect()
        self._opened = self.sock

    def sever(self) -> None:
        """Whoever reads is told at once. With `Connection: close` the answer has the socket, and `sock` is None."""
        if self._opened is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._opened, socket.SHUT_RDWR)  # a TLS socket's own forgets that it was one


class _Tls(Connection):
    """The certificate's name may be another one than the address's."""

    def __init__(
        self, host: str, port: int, seconds: float, prefix: str, context: ssl.SSLContext, name: str
    ) -> None:  # fmt: skip
        super().__init__(host, port, seconds, prefix)
        self._context, self._name = context, name

    def connect(self) -> None:
        super().connect()
        secured = self._context.wrap_socket(self.sock, server_hostname=self._name, do_handshake_on_connect=False)
        self.sock = self._opened = secured
        secured.do_handshake()


class _Reply(HTTPResponse):
    def __init__(
        self, connection: Connection, sock: socket.socket, debuglevel: int = 0, method: str | None = None
    ) -> None:
        super().__init__(sock, debuglevel, method)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(connection, sock))


class _Timed(io.RawIOBase):
    """Each wait has the time that is left of all of them."""

    def __init__(self, connection: Connection, sock: socket.socket) -> None:
        self._connection, self._sock = connection, sock
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._connection.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


@functools.lru_cache(maxsize=4)
def _context(resolved: Resolved) -> ssl.SSLContext:
    made = ssl.create_default_context(cadata=resolved.authority or None)
    # What is given is trusted as it is, though it may be signed by somebody else, as Go's programs take it.
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if not resolved.verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    if resolved.certificate:
        with _as_file(resolved.certificate) as certificate, _as_file(resolved.key) as key:
            made.load_cert_chain(certificate, key)
    return made


@contextlib.contextmanager
def _as_file(text: str) -> Iterator[str]:
    """OpenSSL reads files; this one never lies on a disk."""
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, text.encode())
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
