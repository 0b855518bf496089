"""Pods and RuntimeClasses from a Kubernetes API server, which may be a proxy on the node itself.

In a cluster, and with an address of its own, the server is asked with the standard library and the service account's
files: the `kubernetes` package would add 40 MiB to a process that runs on every node, and a quarter of a second to a
FlexVolume call. It reads kubeconfig files, whose many ways to authenticate are its own, and is imported for them alone.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import bounded
from guestmount.pods import PodFacts, PodRef, PodUnknown, facts_from

if TYPE_CHECKING:
    from http.client import HTTPConnection

_LONGEST = 1.0
# Seconds.
_REMEMBERED = 60.0
_MOST = 10_000
# A pod is at most 1.5 MiB (etcd's limit).
_LARGEST = 4 << 20
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

# A DNS subdomain; nothing else becomes a part of an address.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")

# Asks for one path: (path, seconds) to the body. OSError or ValueError, with the reason.
Ask = Callable[[str, float], bytes]


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
        self._kubeconfig, self._server, self._account, self._environment = kubeconfig, server, account, environment
        self._lock = threading.Lock()
        self._ask: Ask | None = None
        self._read_from: tuple[int, ...] = ()
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

    def _read(self, what: str, path: str, deadline: Deadline) -> dict[str, Any]:
        asked = self._asked()
        seconds = max(0.05, min(_LONGEST, deadline.remaining()))
        try:
            # Each wait for a byte has its time; all of them together have one here.
            body = bounded(f"asking the API server for {what}", Deadline.after(seconds), lambda: asked(path, seconds))
            reply = json.loads(body)
        except (OSError, ValueError, WaitExpired) as error:
            raise PodUnknown(f"asking the API server for {what}: {error}") from error
        if not isinstance(reply, dict):
            raise PodUnknown(f"the API server's answer for {what} is no object")
        return reply

    def _asked(self) -> Ask:
        """Who asks; made anew where the kubeconfig was changed."""
        with self._lock:
            stamp = _stamp(self._kubeconfig) if self._kubeconfig else ()
            if self._ask is None or stamp != self._read_from:
                self._ask = self._from_kubeconfig() if self._kubeconfig else self._from_account()
                self._read_from = stamp
            return self._ask

    def _from_account(self) -> Ask:
        host, port = (self._environment.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
        if not self._server and not host:
            raise PodUnknown("the Kubernetes API's address is not known: KUBERNETES_SERVICE_HOST is not set")
        base = self._server or f"https://{f'[{host}]' if ':' in host else host}:{port}"

        def ask(path: str, seconds: float) -> bytes:
            import http.client

            connection = self._connection(base, seconds)
            try:
                prefix = urlsplit(base).path.rstrip("/")
                connection.request("GET", prefix + path, headers=self._headers())
                reply = connection.getresponse()
                body = reply.read(_LARGEST + 1)
            except http.client.HTTPException as error:
                raise ValueError(f"{type(error).__name__}: {error}") from error
            finally:
                connection.close()
            if reply.status != 200:
                raise ValueError(f"{reply.status} {reply.reason}")
            if len(body) > _LARGEST:
                raise ValueError(f"an answer of more than {_LARGEST} bytes")
            return body

        return ask

    def _connection(self, base: str, seconds: float) -> HTTPConnection:
        import http.client

        parts = urlsplit(base)
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)
        if parts.scheme != "https":
            raise ValueError(f"the address {base!r} is neither http:// nor https://")
        import ssl

        authority = os.path.join(self._account, "ca.crt")
        trusted = ssl.create_default_context(cafile=authority if os.path.exists(authority) else None)
        return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=seconds, context=trusted)

    def _headers(self) -> dict[str, str]:
        """The token is read anew each time: kubelet replaces it while the process runs."""
        headers = {"Accept": "application/json"}
        try:
            with open(os.path.join(self._account, "token")) as token:
                headers["Authorization"] = f"Bearer {token.read().strip()}"
        except OSError:
            pass  # an API without authentication, or one that answers 401
        return headers

    def _from_kubeconfig(self) -> Ask:
        import urllib3
        import yaml
        from kubernetes import client, config

        settings = client.Configuration()
        try:
            config.load_kube_config(self._kubeconfig, client_configuration=settings)  # type: ignore[no-untyped-call]
        except (config.ConfigException, yaml.YAMLError, OSError) as error:
            raise PodUnknown(f"the kubeconfig {self._kubeconfig} cannot be used: {error}") from error
        if self._server:
            settings.host = self._server
        settings.retries = 0
        api = client.ApiClient(settings)

        def ask(path: str, seconds: float) -> bytes:
            parts = path.split("/")
            try:
                more: dict[str, Any] = {"_preload_content": False, "_request_timeout": seconds}
                reply: Any
                if "pods" in parts:
                    reply = client.CoreV1Api(api).read_namespaced_pod(parts[-1], parts[-3], **more)
                elif "persistentvolumes" in parts:
                    reply = client.CoreV1Api(api).read_persistent_volume(parts[-1], **more)
                else:
                    reply = client.NodeV1Api(api).read_runtime_class(parts[-1], **more)
                return bytes(reply.data)
            except client.ApiException as error:
                raise ValueError(f"{error.status} {error.reason}") from error
            except urllib3.exceptions.HTTPError as error:
                raise ValueError(str(getattr(error, "reason", None) or error)) from error

        return ask


def _stamp(path: str) -> tuple[int, ...]:
    try:
        facts = os.stat(path)
    except OSError:
        return ()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
