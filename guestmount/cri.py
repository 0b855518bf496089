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


@dataclass(frozen=True, kw_only=True)
class Sandboxes:
    """`endpoint`: the runtime's socket, as kubelet has it, or who finds it; empty if it is never asked. `patience`: in
    seconds.

    `roots`: kubelet's directories, which tell whether it is kubelet's runtime that answers."""

    endpoint: str | Callable[[], str]
    roots: Sequence[str] = ()
    patience: float = 3.0

    def doubt(self, pods: Collection[str], deadline: Deadline) -> str:
        """Why a sandbox of one of the pods (uids) may live, in words; empty where none does for certain.

        What cannot be asked, or cannot be asked of, counts as alive.
        """
        endpoint = self.endpoint if isinstance(self.endpoint, str) else self.endpoint()
        if not endpoint:
            return "the container runtime is never asked whether the pod runs (cri.endpoint is empty)"
        if not all(pods) or any("/" in one for one in pods):
            return "which pod it is for is not known"
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
            return f"the container runtime at {endpoint} does not tell whether the pod runs ({code.name})"
        for sandbox in answer.items:
            if sandbox.metadata.uid in pods and sandbox.state == cri_pb2.SANDBOX_READY:
                return f"the pod runs (sandbox {sandbox.id[:13]})"
        if not any(self._has(sandbox.metadata.uid) for sandbox in answer.items):
            # Another runtime's, or another kubelet's, would know none of this node's pods, and say that none runs.
            return f"the container runtime at {endpoint} lists no pod that kubelet has; see cri.endpoint"
        return ""

    def _has(self, uid: str) -> bool:
        return bool(uid) and "/" not in uid and any(os.path.isdir(f"{root}/pods/{uid}") for root in self.roots)
