"""CSI's snapshot calls, one volume at a time and in groups."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from blockdev import Deadline
from csi import checks
from csi.errors import CallError
from csi.pages import page
from csi.topology import here, segments
from guestmount import BadRequest, Node, notices
from runvol_proto import csi_pb2
from volumes import Catalog, InvalidParameter, Snapshot, SnapshotGroup, VolumeNotFound, parameters
from volumes.backend import GroupBackend, SnapshotBackend


class SnapshotCalls:
    """The part of the Controller service that is about snapshots."""

    def __init__(self, node: Node, node_id: str, catalog: Catalog) -> None:
        self._node, self._node_id, self._catalog = node, node_id, catalog

    def CreateSnapshot(
        self, request: csi_pb2.CreateSnapshotRequest, deadline: Deadline
    ) -> csi_pb2.CreateSnapshotResponse:
        name = checks.required("name", request.name)
        volume_id = checks.required("source_volume_id", request.source_volume_id)
        _check_parameters(request)
        self._catalog.get(volume_id)
        backend = _snapshot_backend(self._catalog, volume_id)
        if not backend.multi_node and not here(request.accessibility_requirements, self._node_id):
            raise CallError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"accessibility_requirements leave out node {self._node_id}, where a snapshot of {volume_id} has to be",
            )
        made = backend.take_snapshot(name, volume_id, deadline)
        notices.snapshot_taken(self._node, made.snapshot_id, volume_id)
        return csi_pb2.CreateSnapshotResponse(snapshot=self._snapshot(made))

    def _snapshot(self, snapshot: Snapshot) -> csi_pb2.Snapshot:
        one_node = not self._catalog.of_snapshot(snapshot.snapshot_id).multi_node
        return _message(snapshot, self._node_id if one_node else "")

    def DeleteSnapshot(
        self, request: csi_pb2.DeleteSnapshotRequest, _deadline: Deadline
    ) -> csi_pb2.DeleteSnapshotResponse:
        snapshot_id = checks.required("snapshot_id", request.snapshot_id)
        checks.bounded_map("secrets", request.secrets, secret=True)
        with contextlib.suppress(VolumeNotFound):
            backend = self._catalog.of_snapshot(snapshot_id)
            with contextlib.suppress(VolumeNotFound):
                group = backend.snapshot(snapshot_id).group
                if group:
                    raise BadRequest("snapshot_id", snapshot_id, f"belongs to the group {group}; delete the group")
            backend.delete_snapshot(snapshot_id)
        return csi_pb2.DeleteSnapshotResponse()

    def GetSnapshot(self, request: csi_pb2.GetSnapshotRequest, _deadline: Deadline) -> csi_pb2.GetSnapshotResponse:
        snapshot_id = checks.required("snapshot_id", request.snapshot_id)
        checks.bounded_map("secrets", request.secrets, secret=True)
        found = self._catalog.of_snapshot(snapshot_id).snapshot(snapshot_id)
        return csi_pb2.GetSnapshotResponse(snapshot=self._snapshot(found))

    def ListSnapshots(
        self, request: csi_pb2.ListSnapshotsRequest, _deadline: Deadline
    ) -> csi_pb2.ListSnapshotsResponse:
        checks.bounded_map("secrets", request.secrets, secret=True)
        if request.snapshot_id:
            response = csi_pb2.ListSnapshotsResponse()
            with contextlib.suppress(VolumeNotFound):
                found = self._catalog.of_snapshot(request.snapshot_id).snapshot(request.snapshot_id)
                if request.source_volume_id in ("", found.source):
                    response.entries.add(snapshot=self._snapshot(found))
            return response

        def some(after: int, limit: int) -> Any:
            return self._catalog.snapshots(after=after, limit=limit, source=request.source_volume_id)

        found_page, token = page(request.max_entries, request.starting_token, some)
        response = csi_pb2.ListSnapshotsResponse(next_token=token)
        for snapshot in found_page:
            response.entries.add(snapshot=self._snapshot(snapshot))
        return response


class GroupController:
    """CSI's GroupController service: snapshots of several volumes at one moment in which none of them is in use."""

    def __init__(self, groups: GroupBackend, node_id: str, catalog: Catalog) -> None:
        self._groups, self._node_id, self._catalog = groups, node_id, catalog

    def GroupControllerGetCapabilities(
        self, _request: csi_pb2.GroupControllerGetCapabilitiesRequest, _deadline: Deadline
    ) -> csi_pb2.GroupControllerGetCapabilitiesResponse:
        response = csi_pb2.GroupControllerGetCapabilitiesResponse()
        kinds = csi_pb2.GroupControllerServiceCapability.RPC
        response.capabilities.add().rpc.type = kinds.CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT
        return response

    def CreateVolumeGroupSnapshot(
        self, request: csi_pb2.CreateVolumeGroupSnapshotRequest, deadline: Deadline
    ) -> csi_pb2.CreateVolumeGroupSnapshotResponse:
        name = checks.required("name", request.name)
        volume_ids = sorted({checks.required("source_volume_ids", one) for one in request.source_volume_ids})
        if not volume_ids:
            raise BadRequest("source_volume_ids", None, "must be given")
        _check_parameters(request)
        for volume_id in volume_ids:
            self._catalog.get(volume_id)
            _check_can_be_grouped(self._groups, self._catalog, volume_id)
        made = self._groups.create_group(name, volume_ids, deadline)
        return csi_pb2.CreateVolumeGroupSnapshotResponse(group_snapshot=self._group(made))

    def DeleteVolumeGroupSnapshot(
        self, request: csi_pb2.DeleteVolumeGroupSnapshotRequest, _deadline: Deadline
    ) -> csi_pb2.DeleteVolumeGroupSnapshotResponse:
        group_id = checks.required("group_snapshot_id", request.group_snapshot_id)
        checks.bounded_map("secrets", request.secrets, secret=True)
        with contextlib.suppress(VolumeNotFound):
            _check_members(self._groups.group(group_id), request.snapshot_ids)
        self._groups.delete_group(group_id)
        return csi_pb2.DeleteVolumeGroupSnapshotResponse()

    def GetVolumeGroupSnapshot(
        self, request: csi_pb2.GetVolumeGroupSnapshotRequest, _deadline: Deadline
    ) -> csi_pb2.GetVolumeGroupSnapshotResponse:
        group_id = checks.required("group_snapshot_id", request.group_snapshot_id)
        checks.bounded_map("secrets", request.secrets, secret=True)
        found = self._groups.group(group_id)
        _check_members(found, request.snapshot_ids)
        return csi_pb2.GetVolumeGroupSnapshotResponse(group_snapshot=self._group(found))

    def _group(self, group: SnapshotGroup) -> csi_pb2.VolumeGroupSnapshot:
        return csi_pb2.VolumeGroupSnapshot(
            group_snapshot_id=group.group_id,
            snapshots=[_message(one, self._node_id) for one in group.snapshots],
            creation_time=_time(max(one.created for one in group.snapshots)),
            ready_to_use=True,
        )


def _snapshot_backend(catalog: Catalog, volume_id: str) -> SnapshotBackend:
    backend = catalog.of(volume_id)
    if not isinstance(backend, SnapshotBackend):
        raise BadRequest("source_volume_id", volume_id, f"the backend {backend.name} takes no snapshots")
    return backend


def _check_can_be_grouped(groups: GroupBackend, catalog: Catalog, volume_id: str) -> None:
    backend = catalog.of(volume_id)
    if backend is not groups:
        raise BadRequest("source_volume_ids", volume_id, f"the backend {backend.name} takes no snapshots of groups")


def _check_parameters(request: Any) -> None:
    checks.bounded_map("secrets", request.secrets, secret=True)
    for key, value in checks.bounded_map("parameters", request.parameters).items():
        if not key.startswith(parameters.RESERVED):
            raise InvalidParameter(key, value, "is not known; snapshots take no parameters")


def _check_members(group: SnapshotGroup, wanted: Any) -> None:
    members = {one.snapshot_id for one in group.snapshots}
    if wanted and set(wanted) != members:
        raise BadRequest("snapshot_ids", sorted(wanted), f"are not the snapshots of {group.group_id}")


def _message(snapshot: Snapshot, node_id: str) -> csi_pb2.Snapshot:
    """`node_id`: the only node that has it; empty if every node reaches it."""
    return csi_pb2.Snapshot(
        snapshot_id=snapshot.snapshot_id,
        source_volume_id=snapshot.source,
        size_bytes=snapshot.size_bytes,
        creation_time=_time(snapshot.created),
        ready_to_use=snapshot.ready,
        group_snapshot_id=snapshot.group,
        accessible_topology=[csi_pb2.Topology(segments=segments(node_id))] if node_id else [],
    )


def _time(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
