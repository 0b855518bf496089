"""Whether a pod has a sandbox: asked of the container runtime, by CRI (`ListPodSandbox`).

Kubernetes' cri-api, runtime.v1. containerd lists a sandbox once it takes containers, so a pod that is not listed has no
container that could have read its hand-off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from blockdev import Deadline

_METHOD = "/runtime.v1.RuntimeService/ListPodSandbox"
_LARGEST = 64 << 20
_OPTIONS = (("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", _LARGEST))


class _Doubt(Exception):
    """What the runtime does not tell."""


class _Stranger(_Doubt):
    """Of a runtime that may be another one than kubelet's."""


@dataclass(frozen=True, kw_only=True)
class Sandboxes:
    """`endpoint`: the runtime's socket, as kubelet has it, or who finds it, and all others that may be it; empty if it
    is never asked. `patience`: in seconds.

    `roots`: kubelet's directories, which tell whether it is kubelet's runtime that answers."""

    endpoint: str | Callable[[], str | Sequence[str]]
    roots: Sequence[str] = ()
    patience: float = 3.0

    def doubt(self, pods: Collection[str], deadline: Deadline) -> str:
        """Why a sandbox of one of the pods (uids) may live, in words; empty where none does for certain.

        What cannot be asked, or cannot be asked of, counts as alive.
        """
        if not all(pods) or any("/" in one for one in pods):
            return "which pod it is for is not known"
        try:
            listed = self._listed(deadline)
        except _Doubt as doubt:
            return str(doubt)
        return next((f"the pod runs (sandbox {each})" for uid, each in listed if uid in pods and each), "")

    def stranger(self, deadline: Deadline) -> str:
        """Why the runtime may be another one than kubelet's, in words; empty if it has a pod of kubelet's."""
        try:
            self._listed(deadline)
        except _Doubt as doubt:
            return str(doubt)
        return ""

    def _listed(self, deadline: Deadline) -> list[tuple[str, str]]:
        """The uid of each pod that has a sandbox, and the sandbox if it lives. _Doubt unless a pod is kubelet's:
        another runtime, or another kubelet's, would know none of this node's pods, and say that none runs."""
        found = self.endpoint if isinstance(self.endpoint, str) else self.endpoint()
        endpoints = [one for one in ([found] if isinstance(found, str) else found) if one]
        if not endpoints:
            raise _Doubt("the container runtime is never asked whether the pod runs (cri.endpoint is empty)")
        listed: list[tuple[str, str]] = []
        strangers: list[_Doubt] = []
        for one in endpoints:
            try:
                listed += self._listed_by(one, deadline)
            except _Stranger as doubt:
                strangers.append(doubt)
        if len(strangers) == len(endpoints):
            raise strangers[0]
        return listed

    def _listed_by(self, endpoint: str, deadline: Deadline) -> list[tuple[str, str]]:
        """_Stranger of one that has no pod of kubelet's, or no CRI, or is not there; _Doubt of a silent one."""
        import grpc

        from runvol_proto import cri_pb2

        try:
            with grpc.insecure_channel(endpoint, options=_OPTIONS) as channel:
                ask = channel.unary_unary(
                    _METHOD,
                    request_serializer=cri_pb2.ListPodSandboxRequest.SerializeToString,
                    response_deserializer=cri_pb2.ListPodSandboxResponse.FromString,
                )
                answer = ask(cri_pb2.ListPodSandboxRequest(), timeout=min(self.patience, deadline.remaining()))
        except grpc.RpcError as error:
            code = error.code()
            why = f"the container runtime at {endpoint} does not tell whether the pod runs ({code.name})"
            path = endpoint.removeprefix("unix:").removeprefix("//")
            may_be = os.path.lexists(path) and code != grpc.StatusCode.UNIMPLEMENTED
            raise (_Doubt if may_be else _Stranger)(why) from error
        if not any(self._has(sandbox.metadata.uid) for sandbox in answer.items):
            raise _Stranger(f"the container runtime at {endpoint} lists no pod that kubelet has; see cri.endpoint")
        ready = cri_pb2.SANDBOX_READY
        return [(each.metadata.uid, each.id[:13] or "?" if each.state == ready else "") for each in answer.items]

    def _has(self, uid: str) -> bool:
        return bool(uid) and "/" not in uid and any(os.path.isdir(f"{root}/pods/{uid}") for root in self.roots)
