"""Which runtime will run the pod. Fails closed: not knowing is an error, never "then it is runc"."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from blockdev import Deadline
from guestmount import kata_config, runtimes
from guestmount.claims import HOST, SANDBOX
from guestmount.containerd_places import Places
from guestmount.errors import Refused, RuntimeUnknown
from guestmount.kata_config import GO, KataConfig
from guestmount.pods import PodFacts, PodRef, PodSource, PodUnknown, with_own
from guestmount.running_containerd import Answer, KubeletsContainerd
from guestmount.runtimes import ContainerdConfig, Handler

log = logging.getLogger("runvol.detect")

_GENERIC_SANDBOX = "sandbox"
_RUNC = frozenset({"runc", "crun", "youki", "host"})
# Seconds, for a question that comes without a deadline.
_ASKING = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where to look, and an operator's words for what cannot be looked up."""

    # Each of them, or `auto`; an empty socket is never asked. `kept`: the file of its last answer, empty for none;
    # `roots`: kubelet's directories.
    containerd_config: str = "/etc/containerd/config.toml"
    cri_endpoint: str = ""
    kept: str = ""
    roots: Sequence[str] = ()
    sandbox_handlers: Sequence[str] = ("kata*", "runv*", "rund*")
    default_runtime: str = ""
    host_handlers: Sequence[str] = ()
    sandbox_handler: str = "kata"
    rund: str = "rund2"
    root: str = "/"
    host_root: str = "/"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The answer: `kind` is HOST or SANDBOX; `source` says who gave it, for the log."""

    kind: str
    handler: str
    source: str
    dialect: str = ""
    kata: KataConfig | None = None
    pod: PodFacts | None = None

    @property
    def gives_group(self) -> bool:
        """Whether the runtime certainly has its guest's agent give a volume's files to a group."""
        return self.dialect == "kata" and self.kata is not None and self.kata.shim == GO


class Detector:
    """Asks, in this order: containerd (is there a sandbox at all?), the pod, the volume's attribute, the setting."""

    def __init__(self, settings: Settings, pods: PodSource | None = None) -> None:
        self._settings, self._pods = settings, pods
        places = Places(config=settings.containerd_config, endpoint=settings.cri_endpoint, root=settings.host_root)
        self._containerd = KubeletsContainerd(places, settings.kept, settings.roots)
        # How often each source has decided; `nobody` where none could.
        self.decided: Counter[str] = Counter({"nobody": 0})

    @property
    def pods(self) -> PodSource | None:
        """Who tells of pods; None where nobody does."""
        return self._pods

    def warm(self) -> None:
        """Begin what the first question would wait for."""
        if self._pods is not None:
            self._pods.warm()

    def detect(self, ref: PodRef, attribute: str, deadline: Deadline) -> Runtime:
        """The pod's runtime. `attribute` is the volume's `runtime` parameter, empty if it has none.

        RuntimeUnknown if nobody can tell; Refused where the attribute contradicts what is known for certain.
        """
        try:
            answer, by = self._ask(ref, attribute, self._containerd.read(deadline), deadline)
        except (RuntimeUnknown, Refused):
            self.decided["nobody"] += 1
            raise
        self.decided[by] += 1
        log.info("runtime detected", extra={"pod": str(ref), "handler": answer.handler, "kind": answer.kind,
                                            "source": answer.source})  # fmt: skip
        return answer

    def of_handler(self, handler: str) -> Runtime:
        """What this handler is, the empty one for containerd's default. RuntimeUnknown if nobody can tell."""
        return self._of_name(handler, self._containerd.read(Deadline.after(_ASKING)), "the container runtime")

    def _of_name(self, handler: str, asked: Answer, source: str) -> Runtime:
        found = self._named(handler, asked.having(handler), asked, source)
        if asked.running is None and any(self._is_other(found, handler, one, asked) for one in asked.possible):
            name = f"the runtime handler {handler!r}" if handler else "the default runtime handler"
            raise RuntimeUnknown(f"what {name} ({source}) is is not known: {_several(asked)}")
        return found

    def _named(self, handler: str, containerd: ContainerdConfig | None, asked: Answer, source: str) -> Runtime:
        if not handler and containerd is None:
            raise RuntimeUnknown(f"the default handler is not known: {asked.taken.config} {asked.unread}")
        name = handler or (containerd.default_handler if containerd is not None else "")
        return self._runtime(name, containerd, source)

    def _is_other(self, answer: Runtime, handler: str, other: ContainerdConfig | None, asked: Answer) -> bool:
        """Whether the handler is another one by this configuration; one that it does not have cannot run."""
        if handler and other is not None and handler not in other.handlers:
            return False
        try:
            return _differ(answer, self._named(handler, other, asked, ""))
        except RuntimeUnknown:
            return True

    def _ask(self, ref: PodRef, attribute: str, asked: Answer, deadline: Deadline) -> tuple[Runtime, str]:
        """And what has decided it, in one word."""
        doubts, containerd = [], asked.believed
        any_sandbox = any(one.has_sandbox or self._operator_knows(one) for one in asked.all)
        if containerd is not None and None not in asked.others and not any_sandbox:
            source = f"{containerd.source} has no sandbox handler"
            pod = self._pods.followed(ref.uid) if self._pods is not None and ref.uid else None
            answer = Runtime(kind=HOST, handler=containerd.default_handler, source=source, pod=pod)
            return self._agreeing(answer, attribute, containerd, ref), "containerd"
        if self._pods is None:
            doubts.append("no Kubernetes API is configured (detect.kubeconfig)")
        else:
            try:
                found = self._of_pod(ref, self._pods, asked, deadline)
                return self._agreeing(found, attribute, containerd, ref), _decider(found)
            except PodUnknown as error:
                doubts.append(str(error))
        if attribute:
            return self._of_name(attribute, asked, "the volume's parameter runtime"), "attribute"
        doubts.append("the volume has no parameter runtime")
        if self._settings.default_runtime:
            name = self._settings.default_runtime
            return self._of_name(name, asked, "the setting detect.default_runtime"), "setting"
        doubts.append("detect.default_runtime is not set")
        raise RuntimeUnknown(f"which runtime will run {ref} is not known: {'; '.join(doubts)}")

    def _operator_knows(self, containerd: ContainerdConfig) -> bool:
        return any(runtimes.matches(name, self._settings.sandbox_handlers) for name in containerd.handlers)

    def _of_pod(self, ref: PodRef, pods: PodSource, asked: Answer, deadline: Deadline) -> Runtime:
        pod = with_own(pods.pod(ref, deadline), ref, pods, deadline)
        handler = pods.handler(pod.runtime_class, deadline) if pod.runtime_class else ""
        if handler and asked.running is not None and handler not in asked.running.handlers:
            raise RuntimeUnknown(
                f"{asked.running.source} has no handler {handler!r}, which the RuntimeClass {pod.runtime_class} of "
                f"{ref} names, so the pod cannot start; {_missing(handler, asked)}"
            )
        answer = self._by(asked.having(handler), asked, pod, handler, ref)
        if asked.running is None and any(self._differs(answer, one, asked, handler, ref) for one in asked.possible):
            raise RuntimeUnknown(f"what {ref} will run with is not known: {_several(asked)}")
        return answer

    def _by(
        self, containerd: ContainerdConfig | None, asked: Answer, pod: PodFacts, handler: str, ref: PodRef
    ) -> Runtime:
        """By this configuration. `handler`: of the pod's RuntimeClass, empty if it has none."""
        if handler:
            return self._runtime(handler, containerd, f"the pod's RuntimeClass {pod.runtime_class}", pod)
        if pod.untrusted:
            return self._runtime("untrusted", containerd, "the pod's untrusted-workload annotation", pod)
        if containerd is None:
            raise PodUnknown(
                f"pod {ref} has no RuntimeClass, and {asked.taken.config}, which names the default handler, "
                f"{asked.unread}"
            )
        return self._runtime(
            containerd.default_handler, containerd, f"default_runtime_name of {containerd.source}", pod
        )

    def _differs(
        self, answer: Runtime, other: ContainerdConfig | None, asked: Answer, handler: str, ref: PodRef
    ) -> bool:
        """Whether the pod may have another runtime by this configuration; without its handler it cannot start."""
        if answer.pod is None or (handler and other is not None and handler not in other.handlers):
            return False
        try:
            found = self._by(other, asked, answer.pod, handler, ref)
        except (PodUnknown, RuntimeUnknown):
            return True
        return _differ(found, answer)

    def _agreeing(self, answer: Runtime, attribute: str, containerd: ContainerdConfig | None, ref: PodRef) -> Runtime:
        """The attribute may fill a gap, but never overrule what is known."""
        if attribute:
            said = self._runtime(attribute, containerd, "attribute")
            named = attribute not in (_GENERIC_SANDBOX, *_RUNC)
            if said.kind != answer.kind or (named and said.handler != answer.handler):
                raise Refused(
                    f"the volume's parameter runtime = {attribute!r} contradicts {ref}, which will run with the "
                    f"handler {answer.handler!r} ({answer.source}); correct the StorageClass or the "
                    "pod's runtimeClassName"
                )
        return answer

    def _runtime(
        self, name: str, containerd: ContainerdConfig | None, source: str, pod: PodFacts | None = None
    ) -> Runtime:
        known = containerd.handlers if containerd is not None else {}
        if name == _GENERIC_SANDBOX and name not in known:
            sandboxes = sorted(handler.name for handler in known.values() if handler.is_sandbox)
            name = sandboxes[0] if len(sandboxes) == 1 else self._settings.sandbox_handler
        handler = known.get(name, Handler(name=name))
        if runtimes.matches(name, self._settings.host_handlers):
            return Runtime(kind=HOST, handler=name, source=source, pod=pod)
        sandbox = handler.is_sandbox or runtimes.matches(name, self._settings.sandbox_handlers) or name == "untrusted"
        if not sandbox and name not in known and name not in _RUNC:
            raise RuntimeUnknown(
                f"the runtime handler {name!r} ({source}) is neither in {_whose(containerd)} nor among "
                f"detect.sandbox_handlers ({', '.join(self._settings.sandbox_handlers)})"
            )
        if not sandbox and handler.is_unknown:
            raise RuntimeUnknown(
                f"the runtime handler {name!r} ({source}) has runtime_type {handler.runtime_type!r}, which looks like "
                "a virtual machine's and is none that is known here; name it in detect.sandbox_handlers if it takes "
                "Kata's hand-off, in detect.host_handlers if its pods run on the node's kernel"
            )
        if not sandbox:
            return Runtime(kind=HOST, handler=name, source=source, pod=pod)
        dialect = self._dialect(handler)
        kata = kata_config.read(handler, root=self._settings.root) if dialect == "kata" else None
        return Runtime(kind=SANDBOX, handler=name, source=source, dialect=dialect, kata=kata, pod=pod)

    def _dialect(self, handler: Handler) -> str:
        for word, dialect in (("runv", "runv"), ("rund", self._settings.rund)):
            if word in handler.runtime_type or handler.name.startswith(word):
                return dialect
        return "kata"


def _decider(answer: Runtime) -> str:
    """Of what is known of a pod, what names its runtime."""
    if answer.pod is not None and answer.pod.runtime_class:
        return "runtime_class"
    return "annotation" if answer.pod is not None and answer.pod.untrusted else "default_runtime"


def _differ(one: Runtime, other: Runtime) -> bool:
    """By what decides; where Kata's configuration is as well."""
    return any(getattr(one, field) != getattr(other, field) for field in ("kind", "handler", "dialect", "kata"))


def _several(asked: Answer) -> str:
    """Why more than one configuration may count, and what to do."""
    if asked.taken.others:
        return (f"which containerd of this node is kubelet's is not known ({asked.doubt}), and they differ in it; set "
                "paths.containerd_config and cri.endpoint")  # fmt: skip
    return (f"the running containerd does not tell ({asked.doubt}), and its versions 1 and 2 read {asked.taken.config} "
            "with its imports differently; set cri.endpoint, or put all of a handler into one file")  # fmt: skip


def _missing(handler: str, asked: Answer) -> str:
    """What to do about a handler that the running containerd does not have."""
    if asked.on_file is not None and handler in asked.on_file.handlers:
        return f"{asked.taken.config} has it: restart containerd"
    return f"add it to {asked.taken.config} and restart containerd, or see cri.endpoint if that is not kubelet's"


def _whose(containerd: ContainerdConfig | None) -> str:
    return containerd.source if containerd is not None else "containerd's configuration, which cannot be read,"
