"""Which containerd runs: asked at its socket, else the program is."""

from __future__ import annotations

import os
import re

from blockdev import Deadline
from guestmount.containerd_files import Version
from guestmount.containerd_places import Taken
from guestmount.errors import Refused

_METHOD = "/containerd.services.version.v1.Version/Version"
_ASKING = 3.0


def detect(taken: Taken, root: str = "/") -> Version:
    """Refused where neither tells. `root`: where the node's own root is seen; a program below another is not run."""
    path = taken.endpoint.removeprefix("unix:").removeprefix("//")
    doubts = []
    if path.startswith("/"):
        if os.path.exists(path):
            found, doubt = _asked(path)
            if found:
                return Version.parse(found)
            doubts.append(doubt)
        else:
            doubts.append(f"no containerd has the socket {path}")
    if root == "/":
        found = _of_program()
        if found:
            return Version.parse(found)
        doubts.append("no program called containerd was found")
    raise Refused(f"which version containerd has is not known: {', and '.join(doubts)}; say --containerd-version 1.7")


def _asked(path: str) -> tuple[str, str]:
    import grpc
    from google.protobuf import empty_pb2, wrappers_pb2

    try:
        with grpc.insecure_channel(f"unix:{path}", options=(("grpc.default_authority", "localhost"),)) as channel:
            ask = channel.unary_unary(
                _METHOD,
                request_serializer=empty_pb2.Empty.SerializeToString,
                # VersionResponse: its first field is the version.
                response_deserializer=wrappers_pb2.StringValue.FromString,
            )
            return str(ask(empty_pb2.Empty(), timeout=_ASKING).value), ""
    except grpc.RpcError as error:
        return "", f"the containerd at {path} does not tell ({error.code().name})"


def _of_program() -> str:
    from blockdev.commands import run
    from blockdev.errors import BlockdevError

    try:
        _, said = run("containerd", "--version", deadline=Deadline.after(_ASKING))
    except BlockdevError:
        return ""
    found = re.search(r"\bv?[0-9]+\.[0-9]+(\.[0-9]+)?\S*", said)
    return found[0] if found else ""
