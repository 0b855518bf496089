"""The pods of this node, from kubelet's own `/pods`: a PodList in JSON (Kubernetes' pkg/kubelet/server, `getPods`).

Kubelet has the pod before it asks for its volumes, so it can tell while the API server cannot be reached from here. It
tells nothing of RuntimeClasses, and its list may lag: a pod that is not in it may be there all the same.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import NoThread
from guestmount import loopback
from guestmount.api_access import ByKubeconfig, answered
from guestmount.kubeconfig import Resolved
from guestmount.kubernetes_api import KubernetesApi
from guestmount.pods import PodFacts, PodRef, PodUnknown, facts_from

# Seconds, the whole exchange.
_LONGEST = 1.0
# Bytes of an answer: 500 pods of 32 KiB. And of its commas, since each element of a list takes memory; a pod of 10 kB
# has some 300.
_LARGEST, _MOST_COMMAS = 16 << 20, 1_000_000
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


class _List(msgspec.Struct):
    items: list[msgspec.Raw] | None


class KubeletPods:
    """Who asks is whom the API server knows; one question at a time, whose answer is for all that wait."""

    def __init__(
        self, address: str, api: KubernetesApi, *, node: str, authority: Sequence[str],
        is_beside: Callable[[int], bool] = lambda _pid: False,
    ) -> None:  # fmt: skip
        """`address`: http:// for the read-only port, which is told no token; `authority`: files of certificates, of
        which the first that is there has to prove kubelet's; `is_beside`: of a process (its id), whether it is the
        node's own as kubelet is, which a port without a certificate is proved by."""
        self._address, self._api, self._node, self._authority = address, api, node, authority
        self._is_beside = is_beside
        self._lock = threading.Lock()
        self._began = 0.0
        self._told: dict[str, PodFacts] = {}

    def __call__(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        """Raises PodUnknown, never NotThere."""
        found = self.pods(deadline).get(ref.uid)
        if found is None:
            raise PodUnknown(f"kubelet ({self._address}) lists no whole pod {ref} of that uid")
        if found.node not in ("", self._node):
            raise PodUnknown(f"kubelet ({self._address}) is the node {found.node!r}'s, and this one is {self._node!r}")
        return found

    def pods(self, deadline: Deadline) -> Mapping[str, PodFacts]:
        """All of them, by uid. Raises PodUnknown."""
        now, asking = time.monotonic(), f"asking kubelet ({self._address}) for its pods"
        until = now + max(0.05, min(_LONGEST, deadline.remaining()))
        if not self._lock.acquire(timeout=max(0.0, until - now)):
            raise PodUnknown(f"{asking}: it is being asked")
        try:
            if self._began < now:
                began = time.monotonic()
                body = self._answered(asking, max(0.05, until - began))
                self._told, self._began = _told(body), began
            return self._told
        except WaitExpired as error:  # by other seconds each time, and kubelet would make an event of each sentence
            raise PodUnknown(f"{asking}: no answer within a second") from error
        except (OSError, ValueError, RecursionError, NoThread) as error:
            raise PodUnknown(f"{asking}: {error}") from error
        finally:
            self._lock.release()

    def _answered(self, asking: str, seconds: float) -> bytes:
        parts = urlsplit(self._address)
        if parts.scheme == "https":
            return answered(asking, self._access(), "/pods", seconds, largest=_LARGEST)
        port = parts.port or 80
        before = loopback.listeners(port)
        body = answered(asking, self._access(), "/pods", seconds, largest=_LARGEST)
        # Whose answer it was is asked of the sockets that have listened all the time.
        if before != loopback.listeners(port) or not before.all_of(self._is_beside):
            raise ValueError(
                "it is not proved that kubelet has that port (by a process of root's in the mount namespace of "
                "node.kubelet_process, which takes hostPID), and anybody may have it while kubelet is down; use https://"
            )
        return body

    def _access(self) -> ByKubeconfig:
        """Its certificate is in the node's name, whatever the address: its own, and one that a cluster signs."""
        parts = urlsplit(self._address)
        if parts.scheme == "http":
            return ByKubeconfig(Resolved(server=self._address), "")
        account = self._api.account()
        known = account.resolved if isinstance(account, ByKubeconfig) else Resolved(server="")
        made = Resolved(
            server=self._address, token=account.headers().get("Authorization", ""),
            authority=_certificates(self._authority), server_name=self._node,
            certificate=known.certificate, key=known.key,
        )  # fmt: skip
        return ByKubeconfig(made, "")


def _certificates(files: Sequence[str]) -> str:
    """Those of the first file that is there; kubelet's own has its key too. OSError, ValueError."""
    for path in files:
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            found = _CERTIFICATE.findall(file.read())
            if not found:
                raise ValueError(f"{path} has no certificate (detect.kubelet_ca)")
            return "\n".join(found)
    raise ValueError(f"nothing proves kubelet's certificate: {' and '.join(files)} is not there (detect.kubelet_ca)")


def _told(body: bytes) -> dict[str, PodFacts]:
    """What is no pod is nobody's trouble but its own. ValueError for what is no list at all."""
    if body.count(b",") > _MOST_COMMAS:
        raise ValueError(f"an answer with more than {_MOST_COMMAS} commas")
    told = {}
    for raw in msgspec.json.decode(body, type=_List).items or ():
        with contextlib.suppress(ValueError, RecursionError, PodUnknown):
            facts = facts_from(msgspec.json.decode(raw, type=dict[str, Any]))
            told[facts.uid] = facts
    return told
