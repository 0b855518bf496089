"""A container runtime as CRI shows it: which pods have a sandbox, and which runtimes there are."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc

from runvol_proto import cri_pb2

# A pod that kubelet has, whatever else it runs.
WITNESS = "99999999-9999-9999-9999-999999999999"
READY, NOT_READY = cri_pb2.SANDBOX_READY, cri_pb2.SANDBOX_NOTREADY


class Runtime:
    """`pods` are the uids and states that it lists. `before(n)` is called before the nth answer, from 1.

    `config`: what its Status has as `info["config"]`; None for a runtime without CRI. `path`: its socket's. `kubelets`:
    whether it has a pod of kubelet's."""

    def __init__(self, path: str = "") -> None:
        self.config: str | None = None
        self.kubelets = True
        self.told = 0
        self.pods: list[tuple[str, Any]] = []
        self.asked = 0
        self.before: Callable[[int], None] = lambda _n: None
        self._lock = threading.Lock()
        self._directory = tempfile.mkdtemp(prefix="cri-", dir="/dev/shm")
        self.path = path or os.path.join(self._directory, "cri.sock")
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        handlers = {
            "ListPodSandbox": grpc.unary_unary_rpc_method_handler(
                self._list,
                request_deserializer=cri_pb2.ListPodSandboxRequest.FromString,
                response_serializer=cri_pb2.ListPodSandboxResponse.SerializeToString,
            ),
            "Status": grpc.unary_unary_rpc_method_handler(
                self._status,
                request_deserializer=cri_pb2.StatusRequest.FromString,
                response_serializer=cri_pb2.StatusResponse.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("runtime.v1.RuntimeService", handlers),)
        )
        self._server.add_insecure_port(f"unix:{self.path}")

    @property
    def endpoint(self) -> str:
        return f"unix://{self.path}"

    def _list(self, _request: Any, _context: Any) -> Any:
        with self._lock:
            self.asked += 1
            number = self.asked
        self.before(number)
        answer = cri_pb2.ListPodSandboxResponse()
        for at, (uid, state) in enumerate([*self.pods, *([(WITNESS, READY)] if self.kubelets else [])]):
            answer.items.add(id=f"{at:064x}", state=state, metadata={"name": "pod", "namespace": "default", "uid": uid})
        return answer

    def _status(self, request: Any, context: Any) -> Any:
        self.told += 1
        self.before(self.told)
        if self.config is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown service runtime.v1.RuntimeService")
        return cri_pb2.StatusResponse(info={"config": self.config} if request.verbose else {})

    def __enter__(self) -> Runtime:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()
        for name in os.listdir(self._directory):
            os.unlink(os.path.join(self._directory, name))
        os.rmdir(self._directory)
