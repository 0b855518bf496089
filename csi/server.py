"""The gRPC server: one socket, any subset of the services, a graceful end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from typing import Any

import grpc

from blockdev import daemon
from csi.call_book import CallBook
from csi.calls import service_handler
from csi.controller import Controller
from csi.drivers import CsiDriver
from csi.identity import Identity
from csi.node import NodeService
from csi.snapshots import GroupController
from csi.workers import Workers
from guestmount import BadRequest, ClaimSources, Node
from runvol_proto import csi_pb2

SERVICES = ("identity", "controller", "node")
_WORKERS, _LOOKING, _PROBING = 32, 16, 4
_GRACE, _AFTER = 10.0, 1.0
# Seconds for one answer about nothing.
_ANSWER = 3.0


def socket_path(endpoint: str) -> str:
    """The path in `unix:///run/runvol/csi.sock`; BadRequest for anything else."""
    try:
        return daemon.socket_path(endpoint)
    except ValueError as error:
        raise BadRequest("endpoint", endpoint, str(error)) from None


class Server:
    """Listens from `start` to `stop`."""

    def __init__(
        self,
        node: Node,
        *,
        node_id: str,
        endpoint: str,
        version: str,
        services: Collection[str],
        driver: CsiDriver,
        sources: ClaimSources | None = None,
        book: CallBook | None = None,
    ) -> None:
        unknown = sorted(set(services) - set(SERVICES))
        if unknown:
            raise BadRequest("services", ",".join(unknown), f"takes {', '.join(SERVICES)}")
        self.path, self.name, book = socket_path(endpoint), driver.name, book or CallBook()
        probing, looking = Workers("identity", _PROBING), Workers("looking", _LOOKING)
        self._workers = [probing, looking, Workers("controller", _WORKERS), Workers("node", _WORKERS)]
        _, _, controller, nodes = self._workers
        self._server = grpc.server(
            probing.pool,
            options=[("grpc.max_receive_message_length", 4 << 20)],
        )
        handlers = [
            service_handler(
                "Identity",
                Identity(version, driver, with_controller="controller" in services),
                probing,
                looking,
                book,
            )
        ]
        if "controller" in services:
            catalog = driver.catalog
            service = Controller(node, node_id, catalog, sources)
            handlers.append(service_handler("Controller", service, controller, looking, book))
            if catalog.takes_groups and catalog.grouping is not None:
                groups = GroupController(catalog.grouping, node_id, catalog)
                handlers.append(service_handler("GroupController", groups, controller, looking, book))
        if "node" in services:
            handlers.append(service_handler("Node", NodeService(node, node_id, driver), nodes, looking, book))
        self._server.add_generic_rpc_handlers(tuple(handlers))

    @property
    def workers(self) -> Sequence[Workers]:
        """The threads that its calls have."""
        return self._workers

    def start(self) -> None:
        """BadRequest if another process answers on the socket; a socket that nobody serves is replaced."""
        if daemon.is_taken(self.path):
            raise BadRequest("endpoint", f"unix://{self.path}", "another process serves this socket; stop it first")
        daemon.listen(self._server, self.path)
        self._server.start()

    def answers(self) -> bool:
        """Whether a caller gets an answer at the socket now."""
        return answers(self.path, self.name)

    def stop(self) -> None:
        """Let the calls under way end (ten seconds at most), then remove the socket. A call that hangs in the kernel is
        left behind."""
        self._server.stop(_GRACE).wait(_GRACE + _AFTER)
        for workers in self._workers:
            workers.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def answers(path: str, name: str) -> bool:
    """Whether the driver of this name answers at the socket."""
    found = _info(path)
    return found is not None and bool(found.name == name)


def version_at(path: str) -> str:
    """The release of what answers at the socket; empty if nobody does."""
    found = _info(path)
    return str(found.vendor_version) if found is not None else ""


def _info(path: str) -> Any:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        ask = channel.unary_unary(
            "/csi.v1.Identity/GetPluginInfo",
            request_serializer=csi_pb2.GetPluginInfoRequest.SerializeToString,
            response_deserializer=csi_pb2.GetPluginInfoResponse.FromString,
        )
        try:
            return ask(csi_pb2.GetPluginInfoRequest(), timeout=_ANSWER)
        except grpc.RpcError:
            return None
