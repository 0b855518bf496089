"""Pods and RuntimeClasses from a Kubernetes API server, which may be a proxy on the node itself.

The `kubernetes` package is imported only where an API is configured: it costs more memory than all the rest.
"""

from __future__ import annotations

import threading
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
        facts = facts_from(self._get(f"/api/v1/namespaces/{ref.namespace}/pods/{ref.name}", deadline))
        if ref.uid and facts.uid != ref.uid:
            raise PodUnknown(f"pod {ref} has the uid {facts.uid} now, not {ref.uid}")
        return facts

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        known = self._handlers.get(runtime_class)
        if known is None:
            found = self._get(f"/apis/node.k8s.io/v1/runtimeclasses/{runtime_class}", deadline)
            known = str(found.get("handler", ""))
            if not known:
                raise PodUnknown(f"RuntimeClass {runtime_class} names no handler")
            self._handlers[runtime_class] = known
        return known

    def _get(self, path: str, deadline: Deadline) -> dict[str, Any]:
        try:
            reply = self._api().call_api(
                path,
                "GET",
                header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
                response_type="object",
                _return_http_data_only=True,
                _request_timeout=max(0.05, min(_LONGEST, deadline.remaining())),
            )
        except Exception as error:  # the package raises urllib3's, ssl's and its own errors
            reason = getattr(error, "reason", None) or type(error).__name__
            raise PodUnknown(f"asking the API server for {path}: {reason}") from error
        if not isinstance(reply, dict):
            raise PodUnknown(f"the API server's answer for {path} is no object")
        return reply

    def _api(self) -> Any:
        from kubernetes import client, config

        with self._lock:
            if self._client is None:
                settings = client.Configuration()
                if self._kubeconfig:
                    config.load_kube_config(  # type: ignore[no-untyped-call]
                        self._kubeconfig, client_configuration=settings
                    )
                elif not self._server:
                    config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
                if self._server:
                    settings.host = self._server
                settings.retries = 0
                self._client = client.ApiClient(settings)
            return self._client
