"""Pods and RuntimeClasses from a Kubernetes API server, which may be a proxy on the node itself.

The server is asked with the standard library, with the service account's files or what a kubeconfig resolves to
(`guestmount.kubeconfig`): the `kubernetes` package would add 45 MiB to a process that runs on every node.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from typing import Any, Protocol
from urllib.parse import urlsplit

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import bounded
from guestmount.kubeconfig import Kubeconfig, Resolved, Unusable
from guestmount.pods import PodFacts, PodRef, PodUnknown, facts_from

_LONGEST = 1.0
# For a kubeconfig that nobody has read yet.
_READING = 20.0
# Seconds.
_REMEMBERED = 60.0
_MOST = 10_000
# A pod is at most 1.5 MiB (etcd's limit).
_LARGEST = 4 << 20
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

# A DNS subdomain; nothing else becomes a part of an address.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")


class _Denied(ValueError):
    """401: who asks is not known to the server (any more)."""


class _Access(Protocol):
    """How the server is reached. Both may be asked anew for each exchange."""

    def connection(self, seconds: float) -> HTTPConnection: ...

    def headers(self) -> dict[str, str]: ...


class KubernetesApi:
    """Asks with a deadline of one second at most, the whole exchange; remembers RuntimeClasses for a while: their
    handler never changes, but one may be deleted and made anew. A kubeconfig that was changed is read again."""

    def __init__(
        self,
        *,
        kubeconfig: str = "",
        server: str = "",
        account: str = SERVICE_ACCOUNT,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """`kubeconfig`: a file, empty for the service account's files in `account`; `server`: an address that takes
        the place of the configured one."""
        self._kubeconfig, self._server = kubeconfig, server
        self._config = Kubeconfig(kubeconfig) if kubeconfig else None
        self._account = _ByAccount(server, account, environment)
        self._handlers: dict[str, tuple[str, float]] = {}
        # A bound PersistentVolume never gets another claim.
        self._claims: dict[str, tuple[str, str]] = {}

    def pod(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        if not ref.name or not ref.namespace:
            raise PodUnknown("the request does not name its pod (CSIDriver without podInfoOnMount?)")
        if not (_NAME.match(ref.name) and _NAME.match(ref.namespace)):
            raise PodUnknown(f"{ref} is no name that a pod can have")
        found = self._read(f"pod {ref}", f"/api/v1/namespaces/{ref.namespace}/pods/{ref.name}", deadline)
        facts = facts_from(found)
        if ref.uid and facts.uid != ref.uid:
            raise PodUnknown(f"pod {ref} has the uid {facts.uid} now, not {ref.uid}")
        return facts

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        known, until = self._handlers.get(runtime_class, ("", 0.0))
        if time.monotonic() > until:
            if not _NAME.match(runtime_class):
                raise PodUnknown(f"{runtime_class!r} is no name that a RuntimeClass can have")
            path = f"/apis/node.k8s.io/v1/runtimeclasses/{runtime_class}"
            known = str(self._read(f"RuntimeClass {runtime_class}", path, deadline).get("handler", ""))
            if not known:
                raise PodUnknown(f"RuntimeClass {runtime_class} names no handler")
            self._handlers[runtime_class] = known, time.monotonic() + _REMEMBERED
        return known

    def claim_of(self, persistent_volume: str, deadline: Deadline) -> tuple[str, str]:
        known = self._claims.get(persistent_volume)
        if known is None:
            if not _NAME.match(persistent_volume):
                raise PodUnknown(f"{persistent_volume!r} is no name that a PersistentVolume can have")
            what, path = f"PersistentVolume {persistent_volume}", f"/api/v1/persistentvolumes/{persistent_volume}"
            spec = self._read(what, path, deadline).get("spec")
            claim = spec.get("claimRef") if isinstance(spec, dict) else None
            if not isinstance(claim, dict) or not claim.get("name"):
                raise PodUnknown(f"{what} is bound to no claim")
            known = str(claim.get("namespace", "")), str(claim["name"])
            if len(self._claims) >= _MOST:
                self._claims.clear()
            self._claims[persistent_volume] = known
        return known

    def warm(self) -> None:
        """Begin what the first question would wait for. For processes that will be asked."""
        if self._config is not None:
            self._config.begin()

    def _read(self, what: str, path: str, deadline: Deadline) -> dict[str, Any]:
        try:
            access = self._access(deadline)
            try:
                body = self._asked(what, path, access, deadline)
            except (_Denied, ssl.SSLError):
                access = self._access_anew(access, deadline)
                body = self._asked(what, path, access, deadline)
            reply = json.loads(body)
        except (OSError, ValueError, WaitExpired, Unusable) as error:
            raise PodUnknown(f"asking the API server for {what}: {error}") from error
        if not isinstance(reply, dict):
            raise PodUnknown(f"the API server's answer for {what} is no object")
        return reply

    def _asked(self, what: str, path: str, access: _Access, deadline: Deadline) -> bytes:
        """Each wait for a byte has its time; all of them together have one here."""
        seconds = max(0.05, min(_LONGEST, deadline.remaining()))
        return bounded(
            f"asking the API server for {what}", Deadline.after(seconds), lambda: _exchanged(access, path, seconds)
        )

    def _access(self, deadline: Deadline) -> _Access:
        if self._config is None:
            return self._account
        try:
            resolved = self._config.resolved(min(_READING, deadline.remaining()))
        except Unusable as error:
            raise PodUnknown(f"the kubeconfig {self._kubeconfig} cannot be used: {error}") from error
        return _ByKubeconfig(resolved, self._server)

    def _access_anew(self, access: _Access, deadline: Deadline) -> _Access:
        """Tokens and certificates end. Those of a service account are read for each exchange; others once more."""
        if self._config is not None and isinstance(access, _ByKubeconfig):
            reading = self._config.refused(access.resolved)
            if reading is not None:
                reading.wait(min(_READING, deadline.remaining()))
        return self._access(deadline)


def _exchanged(access: _Access, path: str, seconds: float) -> bytes:
    import http.client

    connection = access.connection(seconds)
    try:
        connection.request("GET", path, headers={"Accept": "application/json", **access.headers()})
        reply = connection.getresponse()
        body = reply.read(_LARGEST + 1)
    except http.client.HTTPException as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if reply.status == 401:
        raise _Denied("401 Unauthorized")
    if reply.status != 200:
        raise ValueError(f"{reply.status} {reply.reason}")
    if len(body) > _LARGEST:
        raise ValueError(f"an answer of more than {_LARGEST} bytes")
    return body


class _ByAccount:
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


class _ByKubeconfig:
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
        raise ValueError(f"the address {base!r} is neither http:// nor https://")
    via = urlsplit(proxy) if proxy else parts
    if proxy and via.scheme != "http":
        raise ValueError(f"proxy-url {proxy!r}: only http:// proxies are known")
    made: HTTPConnection
    if parts.scheme == "http":
        made = _Plain(via.hostname or "", via.port, seconds, parts.path)
    else:
        made = _Tls(via.hostname or "", via.port or 443, seconds, parts.path, context(), name or parts.hostname or "")
    if proxy:
        made.set_tunnel(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
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
