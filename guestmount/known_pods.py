"""What is known of this node's pods, by whoever can tell at this moment.

First the watches, which have the answer before anybody asks; then the API server, for a second; then kubelet, if it may
be asked, for a second; then what was answered last, which is kept on the disk by the pod's UID: after a reboot with the
API away it is still true, since nothing of it can change while the pod exists. That is for silence only: the API server
that says that there is no such pod or class is believed, but not one that asks for a token (401, 403) or has troubles
of its own (5xx), which says nothing of the pod.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from blockdev import Deadline
from guestmount.api_watch import Object, Watch
from guestmount.claims_by_name import Claimed, ClaimsByName
from guestmount.drivers import DRIVERS
from guestmount.kept_answers import Kept
from guestmount.pods import NotThere, PodFacts, PodRef, PodUnknown, facts_from

if TYPE_CHECKING:
    from guestmount.kubernetes_api import KubernetesApi

log = logging.getLogger("runvol.pods")


# PersistentVolumes of one answer, with some two thousand bytes each: 400 answers, which are the most, are 200,000.
_VOLUMES = 500


class KnownPods:
    """A source of all sources. `kept`: the directory of answers."""

    def __init__(
        self, api: KubernetesApi, *, node: str, kept: str, follows: bool = True, roots: Sequence[str] = (),
        kubelet: Callable[[PodRef, Deadline], PodFacts] | None = None,
    ) -> None:  # fmt: skip
        """`follows`: whether the watches are wanted, by a process that stays and serves the node's pods; `roots`:
        kubelet's directories, which tell whether a pod is still there; `kubelet`: its own answer for a pod, or
        PodUnknown."""
        self._api, self._node, self._follows = api, node, follows
        self._roots, self._kubelet = roots, kubelet
        self._kept = Kept(kept, gone=self._is_gone if follows else None)
        self._pods: dict[str, PodFacts] = {}
        self._classes: dict[str, str] = {}
        # Namespace and name of the claim, by PersistentVolume.
        self._claims: dict[str, tuple[str, str]] = {}
        # And its UID.
        self._uids: dict[str, str] = {}
        # What was answered since the watch last said something; empty for a class that is not there.
        self._answered: dict[str, str] = {}
        self._watches: list[Watch] = []
        self._volumes: Watch | None = None
        self._by_name = ClaimsByName(self._named)
        self._odd = ""
        # Who told of a pod, and how often: watch, api, kubelet, kept or nobody.
        self.told: Counter[str] = Counter(dict.fromkeys(("watch", "api", "kubelet", "kept", "nobody"), 0))

    def start(self) -> None:
        """Follow this node's pods, the RuntimeClasses and runvol's PersistentVolumes from now on."""
        of_node = f"fieldSelector={quote(f'spec.nodeName={self._node}', safe='')}"
        self._watches = [
            Watch(self._api, "pods of this node", "/api/v1/pods", of_node, listed=self._all_pods,
                  changed=self._pod, gone=self._no_pod),
            Watch(self._api, "RuntimeClasses", "/apis/node.k8s.io/v1/runtimeclasses", listed=self._all_classes,
                  changed=self._class, gone=self._no_class),
        ]  # fmt: skip
        self._volumes = Watch(self._api, "PersistentVolumes", "/api/v1/persistentvolumes", listed=self._all_volumes,
                              changed=self._volume, gone=self._no_volume, page=_VOLUMES)  # fmt: skip
        self._by_name = ClaimsByName(self._named)
        for watch in self._watches:
            watch.start()
        self._volumes.start()

    def stop(self) -> None:
        for watch in self._watches:
            watch.stop()
        if self._volumes is not None:
            self._volumes.stop()
        self._by_name.stop()

    def healthy(self) -> bool:
        """Whether the API server tells what becomes of pods and classes now."""
        return bool(self._watches) and all(watch.healthy for watch in self._watches)

    @property
    def watches(self) -> Sequence[Watch]:
        """Those that are followed; that of volumes is not, where they may be asked for by their names only."""
        volumes = self._volumes
        return [*self._watches, *([volumes] if volumes is not None and not volumes.refused else [])]

    def claim_heard_of(self, persistent_volume: str, patience: float = 0.0) -> Claimed:
        """Namespace, name and UID of the claim, as the watch has told; empty where it has not. Who may not list volumes
        asks for them by name: in so many seconds, or without any behind the caller, who learns it the next time."""
        if self._volumes is not None and self._volumes.refused:
            return self._by_name.heard_of(persistent_volume, patience)
        return (*self._claims.get(persistent_volume, ("", "")), self._uids.get(persistent_volume, ""))

    def _named(self, persistent_volume: str, deadline: Deadline) -> Claimed:
        """One volume's claim, by its name; NotThere for one that is nobody's, or not of ours. PodUnknown."""
        one = self._api.volume(persistent_volume, deadline)
        _name, claim = _claim_of(one)
        if claim is None:
            raise NotThere(f"PersistentVolume {persistent_volume} is bound to no claim")
        return (*claim, _claims_uid(one))

    def warm(self) -> None:
        self._api.warm()
        if self._follows and not self._watches:
            self.start()

    # -- as a source

    def followed(self, uid: str) -> PodFacts | None:
        return self._pods.get(uid)

    def pod(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        facts = self._pods.get(ref.uid) if ref.uid else None
        if facts is None:
            facts = self._asked(ref, deadline)
        else:
            self.told["watch"] += 1
        if self._node and facts.node not in ("", self._node):
            raise NotThere(f"pod {ref} is on the node {facts.node!r}, and this one is {self._node!r} (node.id)")
        self._kept.put("pod", facts.uid, facts)
        return facts

    def _asked(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        try:
            return self._by("api", self._api.pod(ref, deadline))
        except NotThere:
            self.told["nobody"] += 1
            raise
        except PodUnknown as error:
            why = str(error)
        if self._kubelet is not None and ref.uid:
            try:
                return self._by("kubelet", self._kubelet(ref, deadline))
            except PodUnknown as error:
                why = f"{why}; {error}"
        found = self._kept.get("pod", ref.uid, PodFacts) if ref.uid else None
        if found is None or found.uid != ref.uid:
            self.told["nobody"] += 1
            raise PodUnknown(f"{why}; and nothing is kept of it on this node")
        log.warning("a pod is known from before only", extra={"pod": str(ref), "why": why})
        return self._by("kept", found)

    def _by(self, who: str, facts: PodFacts) -> PodFacts:
        self.told[who] += 1
        return facts

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        known = self._classes.get(runtime_class) if self.healthy() else None
        if known is None:
            return self._class_asked(runtime_class, deadline)
        self._kept.put("class", runtime_class, known, cluster=self._api.cluster())
        return known

    def _class_asked(self, runtime_class: str, deadline: Deadline) -> str:
        try:
            found = self._api.handler(runtime_class, deadline)
        except NotThere:
            self._answered[runtime_class] = ""
            self._kept.drop("class", runtime_class)
            raise
        except PodUnknown as error:
            last = self._answered.get(runtime_class, self._classes.get(runtime_class))
            if last is None:
                last = self._kept.get("class", runtime_class, str, cluster=self._api.cluster())
            if not last:
                raise PodUnknown(f"{error}; and nothing is kept of that class on this node") from error
            return last
        self._answered[runtime_class] = found
        self._kept.put("class", runtime_class, found, cluster=self._api.cluster())
        return found

    def claim_of(self, persistent_volume: str, deadline: Deadline, *, anew: bool = False) -> tuple[str, str]:
        followed = not anew and self._volumes is not None and self._volumes.healthy
        if followed and (known := self._claims.get(persistent_volume)):
            self._kept.put("claim", persistent_volume, known, cluster=self._api.cluster())
            return known
        try:
            found = self._api.claim_of(persistent_volume, deadline)
        except NotThere:
            self._kept.drop("claim", persistent_volume)
            raise
        except PodUnknown:
            kept = self._kept.get("claim", persistent_volume, tuple[str, str], cluster=self._api.cluster())
            if kept is None:
                raise
            return kept
        self._kept.put("claim", persistent_volume, found, cluster=self._api.cluster())
        return found

    # -- what the watches say

    def _all_pods(self, pods: Iterator[Object]) -> None:
        self._pods = {facts.uid: facts for facts in self._ours(pods)}

    def _pod(self, pod: Object) -> None:
        self._pods |= {facts.uid: facts for facts in self._ours([pod])}

    def _ours(self, pods: Iterable[Object]) -> Iterator[PodFacts]:
        """Those of this node, whatever the server was asked for. What is no pod is nobody's trouble but its own."""
        for pod in pods:
            try:
                facts = facts_from(pod)
            except PodUnknown as error:
                if self._odd != str(error):  # a server that says it again and again is told of once
                    self._odd = str(error)
                    log.warning("what the API server says of a pod is passed over", extra={"why": self._odd[:500]})
                continue
            if facts.node == self._node:
                yield facts

    def _no_pod(self, pod: Object) -> None:
        self._pods.pop(_word(pod.get("metadata"), "uid"), None)

    def _all_classes(self, classes: Iterator[Object]) -> None:
        self._classes = {name: handler for name, handler in map(_class_of, classes) if name and handler}
        self._answered.clear()
        for name, handler in self._classes.items():
            self._renewed(name, handler)

    def _class(self, one: Object) -> None:
        name, handler = _class_of(one)
        if name and handler:
            self._classes[name] = handler
            self._answered.pop(name, None)
            self._renewed(name, handler)

    def _no_class(self, one: Object) -> None:
        name, _handler = _class_of(one)
        self._classes.pop(name, None)
        self._answered.pop(name, None)
        self._kept.drop("class", name)

    def _all_volumes(self, volumes: Iterator[Object]) -> None:
        claims: dict[str, tuple[str, str]] = {}
        uids: dict[str, str] = {}
        for one in volumes:
            name, claim = _claim_of(one)
            if claim is not None:
                claims[name], uids[name] = claim, _claims_uid(one)
        self._claims, self._uids = claims, uids

    def _volume(self, one: Object) -> None:
        name, claim = _claim_of(one)
        if claim is None:
            self._forget_volume(name)
        else:
            self._claims[name], self._uids[name] = claim, _claims_uid(one)

    def _no_volume(self, one: Object) -> None:
        self._forget_volume(_claim_of(one)[0])

    def _forget_volume(self, name: str) -> None:
        self._claims.pop(name, None)
        self._uids.pop(name, None)

    def _renewed(self, name: str, handler: str) -> None:
        """What is kept of a class is what the server says now, of this cluster."""
        if self._kept.has("class", name):
            self._kept.put("class", name, handler, cluster=self._api.cluster())

    def _is_gone(self, uid: str) -> bool | None:
        """Whether a pod is no more: neither the API server nor kubelet has it. None where kubelet's directory is not to
        be seen. A list without it alone proves nothing: it may be a proxy's that knows of none yet."""
        if uid in self._pods or any(os.path.lexists(os.path.join(root, "pods", uid)) for root in self._roots):
            return False
        return True if self._roots and os.path.isdir(os.path.join(self._roots[0], "pods")) else None


def _class_of(one: Object) -> tuple[str, str]:
    return _word(one.get("metadata"), "name"), _word(one, "handler")


def _claim_of(one: Object) -> tuple[str, tuple[str, str] | None]:
    """The name of a PersistentVolume, and the claim that it is bound to, if it may be one of runvol's."""
    name, spec = _word(one.get("metadata"), "name"), one.get("spec")
    if not isinstance(spec, dict) or not name:
        return name, None
    namespace, claim = (_word(spec.get("claimRef"), key) for key in ("namespace", "name"))
    ours = "flexVolume" in spec or _word(spec.get("csi"), "driver") in DRIVERS
    return name, (namespace, claim) if ours and namespace and claim else None


def _claims_uid(one: Object) -> str:
    spec = one.get("spec")
    return _word(spec.get("claimRef"), "uid") if isinstance(spec, dict) else ""


def _word(fields: object, name: str) -> str:
    found = fields.get(name) if isinstance(fields, dict) else None
    return found if isinstance(found, str) else ""
