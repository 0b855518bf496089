"""Which runtime will run the pod. Fails closed: not knowing is an error, never "then it is runc"."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from blockdev import Deadline
from guestmount import kata_config, runtimes
from guestmount.claims import HOST, SANDBOX
from guestmount.errors import Refused, RuntimeUnknown
from guestmount.kata_config import GO, KataConfig
from guestmount.pods import PodFacts, PodRef, PodSource, PodUnknown, with_own
from guestmount.runtimes import ContainerdConfig, Handler

log = logging.getLogger("runvol.detect")

_GENERIC_SANDBOX = "sandbox"
_RUNC = frozenset({"runc", "crun", "youki", "host"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where to look, and an operator's words for what cannot be looked up."""

    containerd_config: str = "/etc/containerd/config.toml"
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

    def warm(self) -> None:
        """Begin what the first question would wait for."""
        if self._pods is not None:
            self._pods.warm()

    def detect(self, ref: PodRef, attribute: str, deadline: Deadline) -> Runtime:
        """The pod's runtime. `attribute` is the volume's `runtime` parameter, empty if it has none.

        RuntimeUnknown if nobody can tell; Refused where the attribute contradicts what is known for certain.
        """
        containerd = runtimes.read_containerd(self._settings.containerd_config, self._settings.host_root)
        answer = self._ask(ref, attribute, containerd, deadline)
        log.info("runtime detected", extra={"pod": str(ref), "handler": answer.handler, "kind": answer.kind,
                                            "source": answer.source})  # fmt: skip
        return answer

    def of_handler(self, handler: str) -> Runtime:
        """What this handler is, the empty one for containerd's default. RuntimeUnknown if nobody can tell."""
        containerd = runtimes.read_containerd(self._settings.containerd_config, self._settings.host_root)
        if not handler and containerd is None:
            raise RuntimeUnknown(f"the default handler is not known: {self._settings.containerd_config} cannot be read")
        name = handler or (containerd.default_handler if containerd is not None else "")
        return self._runtime(name, containerd, "the container runtime")

    def _ask(self, ref: PodRef, attribute: str, containerd: ContainerdConfig | None, deadline: Deadline) -> Runtime:
        doubts = []
        if containerd is not None and not containerd.has_sandbox and not self._operator_knows(containerd):
            answer = Runtime(kind=HOST, handler=containerd.default_handler, source="containerd has no sandbox handler")
            return self._agreeing(answer, attribute, containerd, ref)
        if self._pods is None:
            doubts.append("no Kubernetes API is configured (detect.kubeconfig)")
        else:
            try:
                return self._agreeing(self._of_pod(ref, self._pods, containerd, deadline), attribute, containerd, ref)
            except PodUnknown as error:
                doubts.append(str(error))
        if attribute:
            return self._runtime(attribute, containerd, "the volume's attribute runtime")
        doubts.append("the volume has no attribute runtime")
        if self._settings.default_runtime:
            return self._runtime(self._settings.default_runtime, containerd, "the setting detect.default_runtime")
        doubts.append("detect.default_runtime is not set")
        raise RuntimeUnknown(f"which runtime will run {ref} is not known: {'; '.join(doubts)}")

    def _operator_knows(self, containerd: ContainerdConfig) -> bool:
        return any(runtimes.matches(name, self._settings.sandbox_handlers) for name in containerd.handlers)

    def _of_pod(self, ref: PodRef, pods: PodSource, containerd: ContainerdConfig | None, deadline: Deadline) -> Runtime:
        pod = with_own(pods.pod(ref, deadline), ref, pods, deadline)
        if pod.runtime_class:
            handler = pods.handler(pod.runtime_class, deadline)
            return self._runtime(handler, containerd, f"the pod's RuntimeClass {pod.runtime_class}", pod)
        if pod.untrusted:
            return self._runtime("untrusted", containerd, "the pod's untrusted-workload annotation", pod)
        if containerd is None:
            raise PodUnknown(
                f"pod {ref} has no RuntimeClass, and {self._settings.containerd_config}, which names the default "
                "handler, cannot be read"
            )
        return self._runtime(containerd.default_handler, containerd, "containerd's default_runtime_name", pod)

    def _agreeing(self, answer: Runtime, attribute: str, containerd: ContainerdConfig | None, ref: PodRef) -> Runtime:
        """The attribute may fill a gap, but never overrule what is known."""
        if attribute:
            said = self._runtime(attribute, containerd, "attribute")
            named = attribute not in (_GENERIC_SANDBOX, *_RUNC)
            if said.kind != answer.kind or (named and said.handler != answer.handler):
                raise Refused(
                    f"the volume's attribute runtime = {attribute!r} contradicts {ref}, which will run with the "
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
                f"the runtime handler {name!r} ({source}) is neither in {self._settings.containerd_config} nor among "
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
