"""What is known of this node's pods, by whoever can tell at this moment.

First the watches, which have the answer before anybody asks; then the API server, for a second; then what was answered
last, which is kept on the disk by the pod's UID: after a reboot with the API away it is still true, since
nothing of it can change while the pod exists. That is for silence only: who says that there is no such pod or class is
believed, but not who asks for a token (401, 403) or has troubles of its own (5xx), which says nothing of the pod.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from blockdev import Deadline, durable
from guestmount.api_watch import Object, Watch
from guestmount.pods import NotThere, PodFacts, PodRef, PodUnknown, facts_from

if TYPE_CHECKING:
    from guestmount.kubernetes_api import KubernetesApi

log = logging.getLogger("runvol.pods")

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,127}\Z")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
# Answers that are kept, by what they are of, and seconds that one of a pod which is no more may stay.
_MOST, _STAYS = {"pod": 5000, "class": 200, "claim": 2000}, 24 * 3600.0
# Seconds, or answers, after which is looked at what may go.
_TIDY, _MANY = 3600.0, 500

T = TypeVar("T")


class KnownPods:
    """A source of all sources. `kept`: the directory of answers."""

    def __init__(
        self, api: KubernetesApi, *, node: str, kept: str, follows: bool = True, roots: Sequence[str] = ()
    ) -> None:
        """`follows`: whether the watches are wanted, by a process that stays and serves the node's pods; `roots`:
        kubelet's directories, which tell whether a pod is still there."""
        self._api, self._node, self._follows = api, node, follows
        self._roots = roots
        self._kept = Kept(kept, gone=self._is_gone if follows else None)
        self._pods: dict[str, PodFacts] = {}
        self._classes: dict[str, str] = {}
        # What was answered since the watch last said something; empty for a class that is not there.
        self._answered: dict[str, str] = {}
        self._watches: list[Watch] = []
        self._odd = ""

    def start(self) -> None:
        """Follow this node's pods, and the RuntimeClasses, from now on."""
        of_node = f"fieldSelector={quote(f'spec.nodeName={self._node}', safe='')}"
        self._watches = [
            Watch(self._api, "pods of this node", "/api/v1/pods", of_node, listed=self._all_pods,
                  changed=self._pod, gone=self._no_pod),
            Watch(self._api, "RuntimeClasses", "/apis/node.k8s.io/v1/runtimeclasses", listed=self._all_classes,
                  changed=self._class, gone=self._no_class),
        ]  # fmt: skip
        for watch in self._watches:
            watch.start()

    def stop(self) -> None:
        for watch in self._watches:
            watch.stop()

    def healthy(self) -> bool:
        """Whether the API server tells what becomes of pods and classes now."""
        return bool(self._watches) and all(watch.healthy for watch in self._watches)

    def warm(self) -> None:
        self._api.warm()
        if self._follows and not self._watches:
            self.start()

    # -- as a source

    def pod(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        facts = self._pods.get(ref.uid) if ref.uid else None
        if facts is None:
            facts = self._asked(ref, deadline)
        if self._node and facts.node not in ("", self._node):
            raise NotThere(f"pod {ref} is on the node {facts.node!r}, and this one is {self._node!r} (node.id)")
        self._kept.put("pod", facts.uid, facts)
        return facts

    def _asked(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        try:
            return self._api.pod(ref, deadline)
        except NotThere:
            raise
        except PodUnknown as error:
            found = self._kept.get("pod", ref.uid, PodFacts) if ref.uid else None
            if found is None or found.uid != ref.uid:
                raise PodUnknown(f"{error}; and nothing is kept of it on this node") from error
            log.warning("a pod is known from before only", extra={"pod": str(ref), "why": str(error)})
            return found

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        known = self._classes.get(runtime_class) if self.healthy() else None
        if known is None:
            known = self._class_asked(runtime_class, deadline)
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
        return found

    def claim_of(self, persistent_volume: str, deadline: Deadline) -> tuple[str, str]:
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


def _word(fields: object, name: str) -> str:
    found = fields.get(name) if isinstance(fields, dict) else None
    return found if isinstance(found, str) else ""


class _Answer(msgspec.Struct, Generic[T], frozen=True):
    """A file that got another's name is no answer. `cluster`: what tells clusters apart; empty for a pod, whose UID no
    other pod anywhere has."""

    of: str
    what: T
    cluster: str = ""


class Kept:
    """Answers on the disk, one file each. Writing happens behind: nobody waits for a disk to be told what is known."""

    def __init__(self, directory: str, *, gone: Callable[[str], bool | None] | None = None) -> None:
        """`gone`: whether the pod of a UID is no more, None for not known; without it nothing is tidied."""
        self._directory, self._gone = directory, gone
        self._written: dict[str, object] = {}
        self._waiting: queue.SimpleQueue[tuple[str, _Answer[Any] | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def put(self, kind: str, name: str, what: object, *, cluster: str = "") -> None:
        """Kept from some moment on, unless it is already."""
        file, answer = _file(kind, name), _Answer(of=name, what=what, cluster=cluster)
        if not file or self._written.get(file) == answer:
            return
        with self._lock:
            if len(self._written) > 3 * _MOST["pod"]:
                self._written.clear()
            self._written[file] = answer
            if not self._writes(file):
                del self._written[file]
                return
        self._waiting.put((file, answer))

    def drop(self, kind: str, name: str) -> None:
        """Kept no longer, from some moment on."""
        file = _file(kind, name)
        if not file or not self.has(kind, name):
            return
        with self._lock:
            self._written.pop(file, None)
            if not self._writes(file):
                return
        self._waiting.put((file, None))

    def _writes(self, file: str) -> bool:
        """Whether somebody writes."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="answers", daemon=True)
            try:
                self._writer.start()
            except RuntimeError as error:  # no thread is to be had
                self._writer = None
                log.warning("an answer is not kept", extra={"of": file, "why": str(error)})
        return self._writer is not None

    def has(self, kind: str, name: str) -> bool:
        """Whether something is kept, or will be in a moment."""
        file = _file(kind, name)
        return bool(file) and (file in self._written or os.path.lexists(os.path.join(self._directory, file)))

    def get(self, kind: str, name: str, form: type[T], *, cluster: str = "") -> T | None:
        """None where nothing is kept, or cannot be read, or is another cluster's. An empty `cluster` is not known."""
        file = _file(kind, name)
        if not file:
            return None
        try:
            content = durable.read(os.path.join(self._directory, file))
            found: _Answer[T] = msgspec.json.decode(content, type=_Answer[form])  # type: ignore[valid-type]
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("an answer that was kept cannot be read", extra={"of": file, "why": str(error)})
            return None
        if found.of != name or (cluster and found.cluster and cluster != found.cluster):
            log.warning("an answer that was kept is of something else", extra={"of": file})
            return None
        return found.what

    def flush(self, seconds: float = 5.0) -> None:
        """Until everything that was put is on the disk, or the time is over."""
        until = time.monotonic() + seconds
        while not self._waiting.empty() and time.monotonic() < until:
            time.sleep(0.01)

    def tidy(self) -> None:
        """What is kept of pods that are no more goes after a day, and of everything the oldest of too many, but nothing
        of a pod that is there."""
        now = time.time()
        for kind, most in _MOST.items():
            found = sorted(self._files(kind))
            for place, (changed, file) in enumerate(found):
                name = file.removeprefix(f"{kind}-").removesuffix(".json")
                gone = self._gone(name) if kind == "pod" and self._gone is not None else None
                old = gone is True and not 0 <= now - changed < _STAYS
                if old or (gone is not False and len(found) - place > most):
                    self._written.pop(file, None)
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self._directory, file))

    def _files(self, kind: str) -> Iterator[tuple[float, str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(f"{kind}-") and entry.name.endswith(".json"):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.stat(follow_symlinks=False).st_mtime, entry.name

    def _write(self) -> None:
        again, count = 0.0, 0
        while True:
            with contextlib.suppress(queue.Empty):
                self._now(*self._waiting.get(timeout=_TIDY))
                count += 1
            if self._gone is not None and (time.monotonic() > again or count > _MANY):
                again, count = time.monotonic() + _TIDY, 0
                try:
                    self.tidy()
                except OSError as error:
                    log.warning("what is kept was not tidied", extra={"why": str(error)})

    def _now(self, file: str, answer: _Answer[Any] | None) -> None:
        path = os.path.join(self._directory, file)
        try:
            if answer is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                return
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            durable.replace(path, msgspec.json.encode(answer), beside=os.path.join(self._directory, f".{file}."))
        except (OSError, ValueError) as error:
            self._written.pop(file, None)
            log.warning("an answer is not kept", extra={"of": file, "why": str(error)})


def _file(kind: str, name: str) -> str:
    """Empty for what no pod's UID, and no object's name, can be."""
    return f"{kind}-{name}.json" if (_UID if kind == "pod" else _NAME).match(name) else ""
