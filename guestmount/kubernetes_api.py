"""Pods and RuntimeClasses from a Kubernetes API server, which may be a proxy on the node itself.

The server is asked with the standard library, with the service account's files or what a kubeconfig resolves to
(`guestmount.kubeconfig`): the `kubernetes` package would add 45 MiB to a process that runs on every node.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import NoThread
from guestmount.kubeconfig import Kubeconfig, Unusable
from guestmount.pods import NotThere, PodFacts, PodRef, PodUnknown, facts_from

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from guestmount.api_access import Access, Connection, Sent

_LONGEST = 1.0
# For a kubeconfig that nobody has read yet.
_READING = 20.0
# Seconds.
_REMEMBERED = 60.0
# Objects of a list that come in one answer: far below what an answer may have.
_PAGE, _PAGES = 250, 400
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

# A DNS subdomain; nothing else becomes a part of an address.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")


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
        self._account, self._environment = account, environment
        self._handlers: dict[str, tuple[str, float]] = {}

    def pod(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        if not ref.name or not ref.namespace:
            raise PodUnknown("the request does not name its pod (CSIDriver without podInfoOnMount?)")
        if not (_NAME.match(ref.name) and _NAME.match(ref.namespace)):
            raise PodUnknown(f"{ref} is no name that a pod can have")
        found = self._read(f"pod {ref}", f"/api/v1/namespaces/{ref.namespace}/pods/{ref.name}", deadline)
        facts = facts_from(found)
        if ref.uid and facts.uid != ref.uid:
            raise NotThere(f"pod {ref} has the uid {facts.uid} now, not {ref.uid}")
        return facts

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        known, until = self._handlers.get(runtime_class, ("", 0.0))
        if time.monotonic() > until:
            if not _NAME.match(runtime_class):
                raise PodUnknown(f"{runtime_class!r} is no name that a RuntimeClass can have")
            path = f"/apis/node.k8s.io/v1/runtimeclasses/{runtime_class}"
            found = self._read(f"RuntimeClass {runtime_class}", path, deadline).get("handler")
            if not isinstance(found, str) or not found:
                raise NotThere(f"RuntimeClass {runtime_class} names no handler")
            known = found
            self._handlers[runtime_class] = known, time.monotonic() + _REMEMBERED
        return known

    def claim_of(self, persistent_volume: str, deadline: Deadline, *, anew: bool = False) -> tuple[str, str]:  # noqa: ARG002
        """Asked for each time: a volume that is retained may be given to another claim at any moment."""
        what, spec = f"PersistentVolume {persistent_volume}", self.volume(persistent_volume, deadline).get("spec")
        if not isinstance(spec, dict):
            raise PodUnknown(f"the API server's answer for {what} has no spec")
        claim = spec.get("claimRef")
        if not isinstance(claim, dict) or not claim.get("name"):
            raise NotThere(f"{what} is bound to no claim")
        return str(claim.get("namespace", "")), str(claim["name"])

    def volume(self, name: str, deadline: Deadline) -> dict[str, Any]:
        """The PersistentVolume of this name. PodUnknown, NotThere."""
        if not _NAME.match(name):
            raise PodUnknown(f"{name!r} is no name that a PersistentVolume can have")
        return self._read(f"PersistentVolume {name}", f"/api/v1/persistentvolumes/{name}", deadline)

    def followed(self, _uid: str) -> PodFacts | None:
        return None

    def cluster(self) -> str:
        """What tells this cluster from another, without a question to it; empty where that is not known."""
        try:
            return self._access(Deadline.after(0.0)).cluster()
        except PodUnknown:
            return ""

    def one(self, what: str, path: str, deadline: Deadline) -> dict[str, Any]:
        """The object, or the list, at a path. PodUnknown, WaitExpired."""
        return self._read(what, path, deadline, longest=deadline.remaining())

    def replace(self, what: str, path: str, changed: dict[str, Any], deadline: Deadline) -> None:
        """Puts an object in the place of the one of the same resourceVersion. PodUnknown where that was not done:
        somebody has changed it since, or this process may not, or it does not say of which moment it is: such a one the
        server would put over everybody's changes."""
        metadata = changed.get("metadata")
        if not isinstance(metadata, dict) or not metadata.get("resourceVersion"):
            raise PodUnknown(f"the API server's answer for {what} has no resourceVersion, so it is not replaced")
        self._send(what, path, deadline, "PUT", changed)

    def create(self, what: str, path: str, made: Mapping[str, Any], deadline: Deadline) -> None:
        """Puts a new object into the list at `path`. PodUnknown where that was not done."""
        self._send(what, path, deadline, "POST", made)

    def merge(self, what: str, path: str, changed: Mapping[str, Any], deadline: Deadline) -> None:
        """Changes some fields of an object (RFC 7396); NotThere, PodUnknown."""
        self._send(what, path, deadline, "PATCH", changed, "application/merge-patch+json")

    def _send(
        self, what: str, path: str, deadline: Deadline, method: str, body: Mapping[str, Any],
        form: str = "application/json",
    ) -> None:  # fmt: skip
        from guestmount.api_access import Sent

        sent = Sent(method=method, body=json.dumps(body).encode(), form=form)
        self._read(what, path, deadline, longest=deadline.remaining(), sent=sent)

    def listed(
        self,
        what: str,
        path: str,
        deadline: Deadline,
        *,
        query: str = "",
        version: list[str] | None = None,
        page: int = _PAGE,
    ) -> Iterator[dict[str, Any]]:
        """The objects of one kind, page by page, all in the time of the deadline. `version` is told of which moment
        they are, with the last of them. PodUnknown, WaitExpired."""
        more = f"&{query}" if query else ""
        for _page in range(_PAGES):
            deadline.check(f"asking the API server for {what}")
            found = self._read(what, f"{path}?limit={page}{more}", deadline, longest=deadline.remaining())
            items, metadata = found.get("items"), found.get("metadata")
            if not isinstance(items, list) or not isinstance(metadata, dict):
                raise PodUnknown(f"the API server's answer for {what} is no list")
            yield from (one for one in items if isinstance(one, dict))
            token = metadata.get("continue")
            if not token:
                if version is not None:
                    version.append(str(metadata.get("resourceVersion", "")))
                return
            more = f"{f'&{query}' if query else ''}&continue={quote(str(token), safe='')}"
        raise PodUnknown(f"the API server has more than {_PAGES * page} {what}, or says so")

    @contextlib.contextmanager
    def streamed(self, path: str, seconds: float) -> Iterator[tuple[Connection, HTTPResponse]]:
        """An answer that goes on, such as a watch's, line by line, for so many seconds. PodUnknown, OSError,
        ValueError: Refusal among them."""
        from guestmount.api_access import Denied, streamed

        deadline = Deadline.after(_READING)
        access = self._access(deadline)
        with contextlib.ExitStack() as stack:
            try:
                opened = stack.enter_context(streamed(access, path, seconds))
            except Denied:
                opened = stack.enter_context(streamed(self._access_anew(access, deadline), path, seconds))
            yield opened

    def warm(self) -> None:
        """Begin what the first question would wait for. For processes that will be asked."""
        if self._config is not None:
            self._config.begin()

    def _read(
        self, what: str, path: str, deadline: Deadline, *, longest: float = _LONGEST, sent: Sent | None = None
    ) -> dict[str, Any]:
        from guestmount.api_access import Denied, Refusal, answered

        asking = f"asking the API server for {what}"
        try:
            access = self._access(deadline)
            try:
                body = answered(asking, access, path, max(0.05, min(longest, deadline.remaining())), sent=sent)
            except Denied:
                access = self._access_anew(access, deadline)
                body = answered(asking, access, path, max(0.05, min(longest, deadline.remaining())), sent=sent)
            reply = json.loads(body)
        except Refusal as error:
            # Others say nothing of what was asked for: 401 and 403 of who asks, 5xx of the server.
            gone = error.status == 404 and error.said
            raise (NotThere if gone else PodUnknown)(f"{asking}: {error}") from error
        except (OSError, ValueError, RecursionError, WaitExpired, NoThread, Unusable) as error:
            raise PodUnknown(f"{asking}: {error}") from error
        if not isinstance(reply, dict):
            raise PodUnknown(f"the API server's answer for {what} is no object")
        return reply

    def account(self) -> Access:
        """Who asks, as far as that is known at this moment. PodUnknown."""
        return self._access(Deadline.after(0.0))

    def _access(self, deadline: Deadline) -> Access:
        from guestmount.api_access import ByAccount, ByKubeconfig

        if self._config is None:
            return ByAccount(self._server, self._account, self._environment)
        try:
            resolved = self._config.resolved(min(_READING, deadline.remaining()))
        except Unusable as error:
            raise PodUnknown(f"the kubeconfig {self._kubeconfig} cannot be used: {error}") from error
        return ByKubeconfig(resolved, self._server)

    def _access_anew(self, access: Access, deadline: Deadline) -> Access:
        """Tokens and certificates end. Those of a service account are read for each exchange; others once more."""
        from guestmount.api_access import ByKubeconfig

        if self._config is not None and isinstance(access, ByKubeconfig):
            reading = self._config.refused(access.resolved)
            if reading is not None:
                reading.wait(min(_READING, deadline.remaining()))
        return self._access(deadline)
