"""One wrapper around every call: decoding, deadline, errors to codes, one line in the log.

Handlers are made from the descriptors in csi.proto, so a method that exists there and not here answers UNIMPLEMENTED.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from blockdev import Deadline, log_context, sentences
from csi.call_book import CallBook
from csi.errors import CallError, code_of, sentence_of
from csi.secrets import stripped
from csi.workers import Workers
from runvol_proto import csi_pb2

log = logging.getLogger("runvol.csi")

# A caller without a deadline gets this one, in seconds: kubelet's own for CSI is two minutes.
_DEFAULT = 115.0
_LONGEST = 3600.0
# Answer before the caller has gone, so that it reads a sentence instead of "deadline exceeded".
_MARGIN = 0.2
_QUIET = frozenset({"Probe", "NodeGetVolumeStats", "NodeGetVolumeHealth"})
_LOOKS = frozenset(
    {"NodeGetVolumeStats", "NodeGetVolumeHealth", "ControllerGetVolumeHealth", "ControllerListVolumeHealth"}
)

# What kubelet says of a pod (podInfoOnMount), and where a target's path has its uid.
_POD, _OF_POD = "csi.storage.k8s.io/pod.", re.compile(r"/pods/([^/]+)/")

Method = Callable[[Any, Deadline], Message]


@dataclass(frozen=True)
class Malformed:
    """What stands for a request that could not be decoded."""

    reason: str


def service_handler(
    name: str, implementation: object, workers: Workers, looking: Workers, book: CallBook
) -> grpc.GenericRpcHandler[Any, Any]:
    """A handler for the service `csi.v1.<name>`: each RPC is the method of that name, in a thread of `workers`, or of
    `looking` for those that only look at what may hang."""
    service = csi_pb2.DESCRIPTOR.services_by_name[name]
    handlers = {
        method.name: _handler(
            method, getattr(implementation, method.name), looking if method.name in _LOOKS else workers, book
        )
        for method in service.methods
        if hasattr(implementation, method.name)
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _handler(
    descriptor: MethodDescriptor, method: Method, workers: Workers, book: CallBook
) -> grpc.RpcMethodHandler[Any, Any]:
    request_class = GetMessageClass(descriptor.input_type)

    def decode(raw: bytes) -> Message | Malformed:
        try:
            return request_class.FromString(raw)
        except DecodeError as error:
            return Malformed(str(error))

    def call(request: Message | Malformed, context: grpc.ServicerContext) -> Message:
        return _counted(descriptor.name, method, workers, request, context, book)

    call.experimental_thread_pool = workers.pool  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(
        call, request_deserializer=decode, response_serializer=GetMessageClass(descriptor.output_type).SerializeToString
    )


def _counted(
    name: str, method: Method, workers: Workers, request: Message | Malformed, context: grpc.ServicerContext,
    book: CallBook,
) -> Message:  # fmt: skip
    """The call, written down in the book from its begin to its end, whatever that is."""
    deadline, started = _deadline(context.time_remaining()), time.monotonic()
    place, codes = book.begun(name, deadline), [grpc.StatusCode.INTERNAL.name]
    try:
        with log_context.about(**_about(name, request)):
            return _run(name, method, workers, request, context, deadline, codes)
    finally:
        book.ended(place, codes[-1], time.monotonic() - started)


def _run(
    name: str, method: Method, workers: Workers, request: Message | Malformed, context: grpc.ServicerContext,
    deadline: Deadline, codes: list[str],
) -> Message:  # fmt: skip
    """The answer; with whatever code it ends, `codes` gets its name."""
    started = time.monotonic()
    try:
        if isinstance(request, Malformed):
            raise CallError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the request is no valid {name}Request (is all text UTF-8?): {request.reason}",
            )
        if not context.is_active():
            raise CallError(grpc.StatusCode.CANCELLED, "the caller has gone; nothing was begun")
        with workers.admitted(request):
            response = method(request, deadline)
    except Exception as error:
        code = code_of(error)
        codes.append(code.name)
        if code is grpc.StatusCode.INTERNAL:
            log.exception("call failed", extra=_facts(name, request, started, code.name))
            _abort(context, code, sentences.short(f"{type(error).__name__}: {error}", "; see the driver's log"))
        said = sentences.short(sentence_of(error))  # a pod's paths may have a megabyte, in the log too
        # What has no sentence of its own says where it came from.
        facts = {**_facts(name, request, started, code.name), "reason": said}
        log.warning("call refused", extra=facts, exc_info=isinstance(error, OSError))
        _abort(context, code, said)
    codes.append("OK")
    level = logging.DEBUG if name in _QUIET or name.endswith(("Capabilities", "Info")) else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "call done", extra=_facts(name, request, started, "OK"))
    return response


def _about(name: str, request: Message | Malformed) -> dict[str, str]:
    """What all lines of a call say: which it is, and of which volume and pod. Nothing of it was checked yet."""
    found = {"request_id": log_context.request_id(), "rpc": name}
    if isinstance(request, Malformed):
        return found
    for field in ("volume_id", "source_volume_id", "snapshot_id"):
        if value := str(getattr(request, field, "")):
            found["snapshot" if field == "snapshot_id" else "volume"] = value
    context = getattr(request, "volume_context", {})
    pod = {key: str(context.get(f"{_POD}{key}", "")) for key in ("namespace", "name", "uid")}
    in_path = _OF_POD.search(str(getattr(request, "target_path", "") or getattr(request, "volume_path", "")))
    named = f"{pod['namespace']}/{pod['name']}" if pod["name"] else ""
    return {**found, "pod": named, "pod_uid": pod["uid"] or (in_path[1] if in_path else "")}


def _deadline(remaining: float | None) -> Deadline:
    """gRPC says None, or some 290 million years, where the caller has set none."""
    if remaining is None or remaining > _LONGEST:
        return Deadline.after(_DEFAULT)
    return Deadline.after(max(0.0, remaining - min(_MARGIN, remaining / 4)))


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    """`message` is one that travels (`sentences.short`)."""
    context.abort(code, message)
    raise AssertionError("abort returned")


def _facts(name: str, request: Message | Malformed, started: float, code: str) -> dict[str, object]:
    shown = {} if isinstance(request, Malformed) else stripped(request)
    return {
        "rpc": name,
        "code": code,
        "ms": round((time.monotonic() - started) * 1000, 1),
        "request": shown,
    }
