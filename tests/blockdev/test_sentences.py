"""Refusals that quote what a caller has sent arrive with their own code, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc
import pytest

from blockdev import sentences

NAMES = [
    "x" * 100_000,
    "ü" * 4000,
    "漢" * 4000,
    "\U0001f4be" * 1000,
    "\n" * 4000,
    "%" * 4000,
    "\udce9" * 4000,
    "a" * 3998 + "漢",
]


class _Refusing(grpc.GenericRpcHandler):
    def service(self, _details: object) -> grpc.RpcMethodHandler:
        def refuse(request: bytes, context: grpc.ServicerContext) -> NoReturn:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentences.short(NAMES[int(request)], "; do that"))
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture(scope="module")
def call() -> Iterator[grpc.UnaryUnaryMultiCallable]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[_Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_unary("/a/b")
    server.stop(None)


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_refusal_arrives_with_its_code_and_its_end(call: grpc.UnaryUnaryMultiCallable, number: int) -> None:
    for _ in range(10):  # between a soft and a hard limit, gRPC throws dice
        with pytest.raises(grpc.RpcError) as caught:
            call(str(number).encode())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().endswith("…; do that")


@pytest.mark.parametrize("text", ["", "a sentence", "x" * 4000, "ü" * 600])
def test_what_travels_is_not_cut(text: str) -> None:
    assert sentences.short(text) == text
