"""CSI's Controller service for the volumes of one driver: of this node, or of servers that any node reaches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import grpc
from google.protobuf.wrappers_pb2 import Int64Value

from blockdev import Deadline
from csi import checks, health, topology
from csi.errors import CallError
from csi.pages import page
from csi.snapshots import SnapshotCalls
from guestmount import BadRequest, Busy, ClaimSources, Node, Refused
from guestmount.requests import check_capability, check_options
from runvol_proto import csi_pb2
from volumes import (
    Capability,
    Catalog,
    ContentSource,
    InvalidParameter,
    OfANode,
    OfAnotherDriver,
    StoreAway,
    Volume,
    VolumeNotFound,
    parameters,
    sizes,
)
from volumes.backend import Backend
from volumes.sizes import LARGEST

_RPC = csi_pb2.ControllerServiceCapability.RPC
# What a provisioner with --extra-create-metadata says of the claim.
_OF_CLAIM = f"{parameters.RESERVED}pvc/"
_OF_SNAPSHOTS = (_RPC.CREATE_DELETE_SNAPSHOT, _RPC.LIST_SNAPSHOTS, _RPC.GET_SNAPSHOT, _RPC.CLONE_VOLUME)
_CAPABILITIES = (
    _RPC.CREATE_DELETE_VOLUME,
    _RPC.LIST_VOLUMES,
    _RPC.GET_CAPACITY,
    _RPC.EXPAND_VOLUME,
    _RPC.VOLUME_CONDITION,
    _RPC.GET_VOLUME,
    _RPC.SINGLE_NODE_MULTI_WRITER,
    _RPC.GET_VOLUME_HEALTH,
    _RPC.LIST_VOLUME_HEALTH,
)


class Names:
    """One creation at a time for each name; who comes second is told to come again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[str] = set()

    @contextlib.contextmanager
    def taken(self, name: str) -> Iterator[None]:
        with self._lock:
            if name in self._taken:
                raise Busy(name)
            self._taken.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._taken.discard(name)


class Controller(SnapshotCalls):
    """Creates, deletes, lists and sizes volumes."""

    def __init__(self, node: Node, node_id: str, catalog: Catalog, sources: ClaimSources | None = None) -> None:
        """`sources`: who knows where the source of a claim is that is not here."""
        super().__init__(node, node_id, catalog)
        self._sources = sources
        self._names = Names()

    def ControllerGetCapabilities(
        self, _request: csi_pb2.ControllerGetCapabilitiesRequest, _deadline: Deadline
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        response = csi_pb2.ControllerGetCapabilitiesResponse()
        for capability in _CAPABILITIES + (_OF_SNAPSHOTS if self._catalog.takes_snapshots else ()):
            response.capabilities.add().rpc.type = capability
        return response

    def CreateVolume(self, request: csi_pb2.CreateVolumeRequest, _deadline: Deadline) -> csi_pb2.CreateVolumeResponse:
        name = checks.required("name", request.name)
        if not request.volume_capabilities:
            raise BadRequest("volume_capabilities", None, "must be given")
        uses = [checks.capability("volume_capabilities", one) for one in request.volume_capabilities]
        chosen = parameters.check(checks.bounded_map("parameters", request.parameters), default=self._catalog.default)
        self._check_uses(uses, self._catalog.for_parameters(chosen))
        checks.bounded_map("secrets", request.secrets, secret=True)
        if request.mutable_parameters:
            raise BadRequest(
                "mutable_parameters", sorted(request.mutable_parameters), "no parameter can be changed later"
            )
        if not self._catalog.for_parameters(chosen).multi_node:
            self._check_topology(request.accessibility_requirements)
        with self._names.taken(name):
            backend = self._catalog.for_parameters(chosen)
            source = _content_source(request)
            self._catalog.check_name(name, backend)
            if source is not None:
                self._check_source(source, backend, request.parameters)
            volume = backend.create(name, checks.size_range(request.capacity_range), chosen, uses, source)
        message = self._message(volume)
        if request.HasField("volume_content_source"):
            message.content_source.CopyFrom(request.volume_content_source)
        return csi_pb2.CreateVolumeResponse(volume=message)

    def _check_source(self, source: ContentSource, backend: Backend, parameters: Mapping[str, str]) -> None:
        """A backend makes volumes from its own alone, and one of this node only from what is here."""
        catalog = self._catalog
        of_snapshot = source.kind == "snapshot"
        try:
            other = catalog.of_snapshot(source.source_id) if of_snapshot else catalog.of(source.source_id)
        except OfAnotherDriver as error:
            raise BadRequest("volume_content_source", str(source), str(error)) from error
        if other is not backend:
            if not other.multi_node:
                with contextlib.suppress(StoreAway):
                    (catalog.snapshot if of_snapshot else catalog.get)(source.source_id)  # VolumeNotFound
            why = f"is of the backend {other.name}, and {backend.name} cannot make a volume from it"
            raise BadRequest("volume_content_source", str(source), why)
        if backend.multi_node:
            return
        try:
            with contextlib.suppress(VolumeNotFound):  # what is made from it may be there already
                (catalog.snapshot if of_snapshot else catalog.get)(source.source_id)
        except StoreAway as error:
            raise self._elsewhere(source, parameters, error) from error

    def _elsewhere(self, source: ContentSource, parameters: Mapping[str, str], error: StoreAway) -> Exception:
        """The code has a provisioner ask the scheduler for a node again; which one it takes is told it here."""
        name, namespace = (parameters.get(f"{_OF_CLAIM}{part}", "") for part in ("name", "namespace"))
        found = self._sources.sent_there(namespace, name, source.source_id) if self._sources and name else None
        if found is not None and found.node == self._node_id:
            return error
        if found is None or not found.node:
            why = (
                f"is not on this node ({topology.KEY} = {self._node_id}), and a volume can be made from it only where "
                f"it is. Or its store is away: {error}"
            )
        else:
            why = f"is on {found.node}, not on {self._node_id}: a volume is made from it, and used, only there"
            why += f"; {found.node} is asked for it now" if found.told else ""
            why += f", and the cluster has no node {found.node}" if found.gone else ""
        return CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"volume_content_source {source} {why}")

    def _check_uses(self, uses: Sequence[Capability], backend: Backend) -> None:
        for use in uses:
            try:
                check_capability(use, backend)
                check_options(use.mount_flags)
            except Refused as error:
                raise BadRequest("volume_capabilities", str(use.mode), str(error)) from error
        if len({use.fstype for use in uses if not use.raw}) > 1:
            raise BadRequest("volume_capabilities", sorted({use.fstype for use in uses}), "ask for one filesystem only")

    def _check_topology(self, wanted: csi_pb2.TopologyRequirement) -> None:
        if not topology.here(wanted, self._node_id):
            raise CallError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"accessibility_requirements name no topology of this node ({topology.KEY} = {self._node_id}); the "
                "volume has to be made by the plugin on another node",
            )

    def DeleteVolume(self, request: csi_pb2.DeleteVolumeRequest, deadline: Deadline) -> csi_pb2.DeleteVolumeResponse:
        volume_id = checks.volume_id(request.volume_id)
        checks.bounded_map("secrets", request.secrets, secret=True)
        with contextlib.suppress(VolumeNotFound):
            backend = self._catalog.of(volume_id)
            with self._node.unused(volume_id, deadline):
                backend.delete(volume_id)
        return csi_pb2.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, _deadline: Deadline
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        volume_id = checks.volume_id(request.volume_id)
        if not request.volume_capabilities:
            raise BadRequest("volume_capabilities", None, "must be given")
        uses = [checks.capability("volume_capabilities", one) for one in request.volume_capabilities]
        self._catalog.get(volume_id)
        backend = self._catalog.of(volume_id)
        response = csi_pb2.ValidateVolumeCapabilitiesResponse()
        try:
            parameters.check(checks.bounded_map("parameters", request.parameters), default=self._catalog.default)
            parameters.check_delivered(
                parameters.check_context(checks.bounded_map("volume_context", request.volume_context))
            )
            for use in uses:
                check_capability(use, backend)
                check_options(use.mount_flags)
        except Exception as error:
            response.message = str(error)
            return response
        response.confirmed.volume_context.update(request.volume_context)
        response.confirmed.volume_capabilities.extend(request.volume_capabilities)
        response.confirmed.parameters.update(request.parameters)
        return response

    def ListVolumes(self, request: csi_pb2.ListVolumesRequest, _deadline: Deadline) -> csi_pb2.ListVolumesResponse:
        page, token = self._page(request.max_entries, request.starting_token)
        response = csi_pb2.ListVolumesResponse(next_token=token)
        for volume in page:
            with contextlib.suppress(VolumeNotFound):  # it was deleted in this moment
                condition = health.condition(self._node, volume.volume_id, volume)
                response.entries.add(volume=self._message(volume)).status.volume_condition.CopyFrom(condition)
        return response

    def _page(self, max_entries: int, starting_token: str) -> tuple[list[Volume], str]:
        def some(after: int, limit: int) -> Sequence[tuple[int, Volume]]:
            return self._catalog.list(after=after, limit=limit)

        return page(max_entries, starting_token, some)

    def ControllerGetVolume(
        self, request: csi_pb2.ControllerGetVolumeRequest, _deadline: Deadline
    ) -> csi_pb2.ControllerGetVolumeResponse:
        volume = self._catalog.get(checks.volume_id(request.volume_id))
        response = csi_pb2.ControllerGetVolumeResponse(volume=self._message(volume))
        response.status.volume_condition.CopyFrom(health.condition(self._node, volume.volume_id, volume))
        return response

    def GetCapacity(self, request: csi_pb2.GetCapacityRequest, _deadline: Deadline) -> csi_pb2.GetCapacityResponse:
        asked = checks.bounded_map("parameters", request.parameters)
        uses = [checks.capability("volume_capabilities", one) for one in request.volume_capabilities]
        try:
            backend = self._catalog.for_parameters(parameters.check(asked, default=self._catalog.default))
        except InvalidParameter:
            # Without an answer the scheduler tells the pod that no node has room, and nobody asks for the volume; the
            # creation says what is wrong.
            backend = self._catalog.for_parameters({})
        usable = all(use.refusal(backend.kind, multi_node=backend.multi_node) is None for use in uses)
        here = not request.HasField("accessible_topology") or topology.is_here(
            request.accessible_topology, self._node_id
        )
        free = backend.available_bytes() if usable and here else 0
        return csi_pb2.GetCapacityResponse(
            available_capacity=free, maximum_volume_size=Int64Value(value=min(free, LARGEST))
        )

    def ControllerExpandVolume(
        self, request: csi_pb2.ControllerExpandVolumeRequest, _deadline: Deadline
    ) -> csi_pb2.ControllerExpandVolumeResponse:
        """Keeps room for it; the node that has the volume does the work (resizing has no node-deployment mode).

        Where no node has anything of it, the controller does all of it. One that serves no node cannot look: the node
        refuses what it has no room for."""
        volume_id = checks.volume_id(request.volume_id)
        if not request.HasField("capacity_range"):
            raise BadRequest("capacity_range", None, "must be given")
        checks.bounded_map("secrets", request.secrets, secret=True)
        size = checks.size_range(request.capacity_range)
        try:
            backend = self._catalog.of(volume_id)
        except OfANode:
            if not size.required:
                why = "must be given where no node is asked: the volume's own size is known there alone"
                raise BadRequest("capacity_range.required_bytes", size.required, why) from None
            granted = sizes.grown(volume_id, 0, size)
            return csi_pb2.ControllerExpandVolumeResponse(capacity_bytes=granted, node_expansion_required=True)
        if request.HasField("volume_capability"):
            use = checks.capability("volume_capability", request.volume_capability)
            check_capability(use, backend)
        capacity = backend.promise(volume_id, size)
        return csi_pb2.ControllerExpandVolumeResponse(
            capacity_bytes=capacity, node_expansion_required=not backend.multi_node
        )

    def ControllerGetVolumeHealth(
        self, request: csi_pb2.ControllerGetVolumeHealthRequest, _deadline: Deadline
    ) -> csi_pb2.ControllerGetVolumeHealthResponse:
        volume_id = checks.volume_id(request.volume_id)
        return csi_pb2.ControllerGetVolumeHealthResponse(volume_health=health.health(self._node, volume_id))

    def ControllerListVolumeHealth(
        self, request: csi_pb2.ControllerListVolumeHealthRequest, _deadline: Deadline
    ) -> csi_pb2.ControllerListVolumeHealthResponse:
        page, token = self._page(request.max_entries, request.starting_token)
        response = csi_pb2.ControllerListVolumeHealthResponse(next_token=token)
        for volume in page:
            with contextlib.suppress(VolumeNotFound):
                state = health.health(self._node, volume.volume_id, volume)
                response.entries.extend([state] if state.health_statuses else [])
        return response

    def _message(self, volume: Volume) -> csi_pb2.Volume:
        one_node = not self._catalog.of(volume.volume_id).multi_node
        return csi_pb2.Volume(
            volume_id=volume.volume_id,
            capacity_bytes=volume.capacity_bytes,
            volume_context=parameters.context_of(volume.parameters),
            accessible_topology=[csi_pb2.Topology(segments=topology.segments(self._node_id))] if one_node else [],
        )


def _content_source(request: csi_pb2.CreateVolumeRequest) -> ContentSource | None:
    if not request.HasField("volume_content_source"):
        return None
    content = request.volume_content_source
    if content.HasField("snapshot"):
        snapshot_id = checks.required("volume_content_source.snapshot.snapshot_id", content.snapshot.snapshot_id)
        return ContentSource(kind="snapshot", source_id=snapshot_id)
    if content.HasField("volume"):
        volume_id = checks.required("volume_content_source.volume.volume_id", content.volume.volume_id)
        return ContentSource(kind="volume", source_id=volume_id)
    raise BadRequest("volume_content_source", None, "must name a snapshot or a volume")
