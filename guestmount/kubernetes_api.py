"""Pods and RuntimeClasses from a Kubernetes API server, which may be a proxy on the node itself.

The `kubernetes` package is imported only where an API is configured: it costs more memory than all the rest.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from blockdev import Deadline
from guestmount.pods import PodFacts, PodRef, PodUnknown, facts_from

_LONGEST = 1.0


class KubernetesApi:
    """Asks with a deadline of one second at most; remembers RuntimeClasses, whose handler never changes."""

    def __init__(self, *, kubeconfig: str = "", server: str = "") -> None:
        """`kubeconfig`: a file; `server`: an address that takes the place of the configured one."""
        self._kubeconfig, self._server = kubeconfig, server
        self._lock = threading.Lock()
        self._client: Any = None
        self._handlers: dict[str, str] = {}

    def pod(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        if not ref.name or not ref.namespace:
            raise PodUnknown("the request does not name its pod (CSIDriver without podInfoOnMount?)")
        core, _node = self._apis()
        facts = facts_from(_read(f"pod {ref}", deadline, core.read_namespaced_pod, ref.name, ref.namespace))
        if ref.uid and facts.uid != ref.uid:
            raise PodUnknown(f"pod {ref} has the uid {facts.uid} now, not {ref.uid}")
        return facts

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        known = self._handlers.get(runtime_class)
        if known is None:
            _core, node = self._apis()
            found = _read(f"RuntimeClass {runtime_class}", deadline, node.read_runtime_class, runtime_class)
            known = str(found.get("handler", ""))
            if not known:
                raise PodUnknown(f"RuntimeClass {runtime_class} names no handler")
            self._handlers[runtime_class] = known
        return known

    def _apis(self) -> tuple[Any, Any]:
        from kubernetes import client, config

        with self._lock:
            if self._client is None:
                settings = client.Configuration()
                try:
                    if self._kubeconfig:
                        config.load_kube_config(  # type: ignore[no-untyped-call]
                            self._kubeconfig, client_configuration=settings
                        )
                    elif not self._server:
                        config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
                except (config.ConfigException, OSError) as error:
                    raise PodUnknown(f"the Kubernetes API's configuration cannot be used: {error}") from error
                if self._server:
                    settings.host = self._server
                settings.retries = 0
                self._client = client.ApiClient(settings)
            return client.CoreV1Api(self._client), client.NodeV1Api(self._client)


def _read(what: str, deadline: Deadline, call: Callable[..., Any], *names: str) -> dict[str, Any]:
    """One object as JSON, without the package's models, which would cost milliseconds and know no new fields."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    wait = max(0.05, min(_LONGEST, deadline.remaining()))
    try:
        reply = json.loads(call(*names, _preload_content=False, _request_timeout=wait).data)
    except (ApiException, HTTPError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise PodUnknown(f"asking the API server for {what}: {reason}") from error
    if not isinstance(reply, dict):
        raise PodUnknown(f"the API server's answer for {what} is no object")
    return reply
