"""What is known of this node's pods, by whoever can tell at this moment.

First the watches, which have the answer before anybody asks; then the API server, for a second; then kubelet; then what
was answered last, which is kept on the disk by the pod's UID: after a reboot with the API away it is still true, since
nothing of it can change while the pod exists.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import msgspec

from blockdev import Deadline, durable
from guestmount.api_watch import Object, Watch
from guestmount.pods import PodFacts, PodRef, PodSource, PodUnknown, facts_from

if TYPE_CHECKING:
    from guestmount.kubernetes_api import KubernetesApi

log = logging.getLogger("runvol.pods")

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,127}\Z")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
# Answers of each kind that are kept, and seconds that one of a pod which is no more may stay.
_MOST, _STAYS = 5000, 24 * 3600.0


T = TypeVar("T")


class KnownPods:
    """A source of all sources. `kept`: the directory of answers. `others` are asked after the API server."""

    def __init__(
        self, api: KubernetesApi, *, node: str, kept: str, others: Sequence[PodSource] = (), follows: bool = True
    ) -> None:
        """`follows`: whether the watches are wanted, by a process that stays and serves the node's pods."""
        self._api, self._node, self._others, self._follows = api, node, others, follows
        self._kept = Kept(kept)
        self._pods: dict[str, PodFacts] = {}
        self._classes: dict[str, str] = {}
        self._watches: list[Watch] = []

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
        self._kept.put("pod", facts.uid, facts)
        return facts

    def _asked(self, ref: PodRef, deadline: Deadline) -> PodFacts:
        doubts = []
        for source in (self._api, *self._others):
            try:
                return source.pod(ref, deadline)
            except PodUnknown as error:
                doubts.append(str(error))
        found = self._kept.get("pod", ref.uid, PodFacts) if ref.uid else None
        if found is None:
            raise PodUnknown("; ".join([*doubts, "and nothing is kept of it on this node"]))
        log.warning("a pod is known from before only", extra={"pod": str(ref), "why": "; ".join(doubts)})
        return found

    def handler(self, runtime_class: str, deadline: Deadline) -> str:
        known = self._classes.get(runtime_class) if self.healthy() else None
        if known is None:
            try:
                known = self._api.handler(runtime_class, deadline)
            except PodUnknown as error:
                known = self._classes.get(runtime_class) or self._kept.get("class", runtime_class, str)
                if known is None:
                    raise PodUnknown(f"{error}; and nothing is kept of that class on this node") from error
        self._kept.put("class", runtime_class, known)
        return known

    def claim_of(self, persistent_volume: str, deadline: Deadline) -> tuple[str, str]:
        try:
            found = self._api.claim_of(persistent_volume, deadline)
        except PodUnknown:
            kept = self._kept.get("claim", persistent_volume, tuple[str, str])
            if kept is None:
                raise
            return kept
        self._kept.put("claim", persistent_volume, found)
        return found

    def listed(self, what: str, path: str, deadline: Deadline) -> Iterator[dict[str, Any]]:
        return self._api.listed(what, path, deadline)

    # -- what the watches say

    def _all_pods(self, pods: Iterator[Object]) -> None:
        found = {facts.uid: facts for facts in map(facts_from, pods) if facts.uid}
        self._pods = found
        self._kept.tidy("pod", found)

    def _pod(self, pod: Object) -> None:
        facts = facts_from(pod)
        if facts.uid:
            self._pods[facts.uid] = facts

    def _no_pod(self, pod: Object) -> None:
        self._pods.pop(str((pod.get("metadata") or {}).get("uid", "")), None)

    def _all_classes(self, classes: Iterator[Object]) -> None:
        self._classes = {name: handler for name, handler in map(_class_of, classes) if name and handler}

    def _class(self, one: Object) -> None:
        name, handler = _class_of(one)
        if name and handler:
            self._classes[name] = handler

    def _no_class(self, one: Object) -> None:
        self._classes.pop(_class_of(one)[0], None)


def _class_of(one: Object) -> tuple[str, str]:
    return str((one.get("metadata") or {}).get("name", "")), str(one.get("handler", ""))


class Kept:
    """Answers on the disk, one file each. Writing happens behind: nobody waits for a disk to be told what is known."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._written: dict[str, object] = {}
        self._waiting: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def put(self, kind: str, name: str, what: object) -> None:
        """Kept from some moment on, unless it is already."""
        file = _file(kind, name)
        if not file or self._written.get(file) == what:
            return
        with self._lock:
            if len(self._written) > 3 * _MOST:
                self._written.clear()
            self._written[file] = what
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="answers", daemon=True)
                try:
                    self._writer.start()
                except RuntimeError as error:  # no thread is to be had
                    self._writer = None
                    del self._written[file]
                    log.warning("an answer is not kept", extra={"of": file, "why": str(error)})
                    return
        self._waiting.put((file, what))

    def get(self, kind: str, name: str, form: type[T]) -> T | None:
        """None where nothing is kept, or cannot be read."""
        file = _file(kind, name)
        if not file:
            return None
        try:
            return msgspec.json.decode(durable.read(os.path.join(self._directory, file)), type=form)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("an answer that was kept cannot be read", extra={"of": file, "why": str(error)})
            return None

    def flush(self, seconds: float = 5.0) -> None:
        """Until everything that was put is on the disk, or the time is over."""
        until = time.monotonic() + seconds
        while not self._waiting.empty() and time.monotonic() < until:
            time.sleep(0.01)

    def tidy(self, kind: str, living: object) -> None:
        """What is kept of names that are not among the `living` goes after a day, and the oldest of too many."""
        now, found = time.time(), []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(f"{kind}-") and entry.name.endswith(".json"):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
        found.sort()
        for place, (changed, file) in enumerate(found):
            name = file.removeprefix(f"{kind}-").removesuffix(".json")
            known = name in living  # type: ignore[operator]  # a mapping or a set
            if (not known and not 0 <= now - changed < _STAYS) or len(found) - place > _MOST:
                self._written.pop(file, None)
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self._directory, file))

    def _write(self) -> None:
        while True:
            file, what = self._waiting.get()
            try:
                os.makedirs(self._directory, mode=0o700, exist_ok=True)
                path = os.path.join(self._directory, file)
                durable.replace(path, msgspec.json.encode(what), beside=os.path.join(self._directory, f".{file}."))
            except OSError as error:
                self._written.pop(file, None)
                log.warning("an answer is not kept", extra={"of": file, "why": str(error)})


def _file(kind: str, name: str) -> str:
    """Empty for what no pod's UID, and no object's name, can be."""
    return f"{kind}-{name}.json" if (_UID if kind == "pod" else _NAME).match(name) else ""
