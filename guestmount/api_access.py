"""The exchange with a Kubernetes API server: one request, with a service account's files or a kubeconfig's answer.

A module of its own, as what it imports costs a process of kubelet's that asks nobody.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from importlib import metadata
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from guestmount.kubeconfig import Resolved
from guestmount.pods import PodUnknown

# A pod is at most 1.5 MiB (etcd's limit).
_LARGEST = 4 << 20


@functools.cache
def agent() -> dict[str, str]:
    """Who asks: a node-local proxy may keep answers by it, one set for each program."""
    try:
        return {"User-Agent": f"runvol/{metadata.version('runvol')}"}
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return {"User-Agent": "runvol/0"}


class Denied(ValueError):
    """Who asks is not known to the server (any more): 401, or a certificate that one side does not take."""


class Access(Protocol):
    """How the server is reached. Both may be asked anew for each exchange."""

    def connection(self, seconds: float) -> HTTPConnection: ...

    def headers(self) -> dict[str, str]: ...


def exchanged(access: Access, path: str, seconds: float, opened: list[HTTPConnection]) -> bytes:
    """The body of the answer. OSError or ValueError, with the reason; Denied for 401.

    `opened` is told the connection, so that who waits no longer can end it."""
    try:
        connection = access.connection(seconds)
    except ssl.SSLError as error:
        raise Denied(f"the certificates cannot be used: {error}") from error
    opened.append(connection)
    try:
        connection.request("GET", path, headers={"Accept": "application/json", **agent(), **access.headers()})
        reply = connection.getresponse()
        body = reply.read(_LARGEST + 1)
    except ssl.SSLError as error:
        raise Denied(str(error)) from error
    except HTTPException as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if reply.status == 401:
        raise Denied("401 Unauthorized")
    if reply.status != 200:
        raise ValueError(f"{reply.status} {reply.reason}")
    if len(body) > _LARGEST:
        raise ValueError(f"an answer of more than {_LARGEST} bytes")
    return body


@contextlib.contextmanager
def streamed(access: Access, path: str, silence: float) -> Iterator[tuple[HTTPConnection, BinaryIO]]:
    """An answer that goes on, to be read line by line. What `exchanged` raises."""
    try:
        connection = access.connection(silence)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Accept": "application/json", **agent(), **access.headers()})
            reply = connection.getresponse()
            if reply.status == 401:
                raise Denied("401 Unauthorized")
            if reply.status != 200:
                raise ValueError(f"{reply.status} {reply.reason}")
            yield connection, reply
    except ssl.SSLError as error:
        raise Denied(str(error)) from error
    except HTTPException as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


class ByAccount:
    """The service account's files, which kubelet replaces while the process runs."""

    def __init__(self, server: str, directory: str, environment: Mapping[str, str]) -> None:
        self._server, self._directory, self._environment = server, directory, environment

    def connection(self, seconds: float) -> HTTPConnection:
        authority = os.path.join(self._directory, "ca.crt")
        return _connection(
            self._base(),
            seconds,
            lambda: ssl.create_default_context(cafile=authority if os.path.exists(authority) else None),
        )

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

    def connection(self, seconds: float) -> HTTPConnection:
        return _connection(self._server, seconds, lambda: _context(self.resolved), proxy=self.resolved.proxy,
                           name=self.resolved.server_name)  # fmt: skip

    def headers(self) -> dict[str, str]:
        return {"Authorization": self.resolved.token} if self.resolved.token else {}


def _connection(
    base: str, seconds: float, context: Callable[[], ssl.SSLContext], *, proxy: str = "", name: str = ""
) -> HTTPConnection:
    """To `base`, below whose path the paths of requests lie; through `proxy`; `name`: of the server's certificate."""
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"the address {parts.scheme}://{parts.hostname or ''} is neither http:// nor https://")
    via = urlsplit(proxy) if proxy else parts
    if proxy and via.scheme != "http":
        raise ValueError(f"proxy-url {via.scheme}://{via.hostname or ''}: only http:// proxies are known")
    made: HTTPConnection
    if parts.scheme == "http":
        made = _Plain(via.hostname or "", via.port, seconds, parts.path)
    else:
        made = _Tls(via.hostname or "", via.port or 443, seconds, parts.path, context(), name or parts.hostname or "")
    if proxy:
        known = f"{unquote(via.username or '')}:{unquote(via.password or '')}".encode()
        headers = {"Proxy-Authorization": f"Basic {base64.b64encode(known).decode()}"} if via.username else {}
        made.set_tunnel(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), headers)
    return made


class _Plain(HTTPConnection):
    def __init__(self, host: str, port: int | None, seconds: float, prefix: str) -> None:
        super().__init__(host, port, timeout=seconds)
        self._prefix = prefix.rstrip("/")

    def putrequest(self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False) -> None:
        super().putrequest(method, self._prefix + url, skip_host, skip_accept_encoding)


class _Tls(_Plain):
    """The certificate's name may be another one than the address's."""

    def __init__(
        self, host: str, port: int, seconds: float, prefix: str, context: ssl.SSLContext, name: str
    ) -> None:  # fmt: skip
        super().__init__(host, port, seconds, prefix)
        self._context, self._name = context, name

    def connect(self) -> None:
        super().connect()
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self._name)


@functools.lru_cache(maxsize=4)
def _context(resolved: Resolved) -> ssl.SSLContext:
    made = ssl.create_default_context(cadata=resolved.authority or None)
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
