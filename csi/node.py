"""CSI's Node service: requests into a node's verbs."""

from __future__ import annotations

import os
from collections.abc import Mapping

from blockdev import Deadline
from csi import checks, health
from csi.drivers import CsiDriver
from csi.topology import segments
from guestmount import BadRequest, Node, PublishRequest, StageRequest, usage, volume_limit
from guestmount.requests import check_capability
from runvol_proto import csi_pb2
from volumes import VolumeError, parameters
from volumes.parameter import BACKEND

_RPC = csi_pb2.NodeServiceCapability.RPC
_CAPABILITIES = (
    _RPC.STAGE_UNSTAGE_VOLUME,
    _RPC.GET_VOLUME_STATS,
    _RPC.EXPAND_VOLUME,
    _RPC.VOLUME_CONDITION,
    _RPC.SINGLE_NODE_MULTI_WRITER,
    _RPC.VOLUME_MOUNT_GROUP,
    _RPC.GET_VOLUME_HEALTH,
    _RPC.GET_STORAGE_HEALTH,
)


class NodeService:
    """What kubelet calls."""

    def __init__(self, node: Node, node_id: str, driver: CsiDriver) -> None:
        self._node, self._node_id, self._driver = node, node_id, driver

    def NodeGetCapabilities(
        self, _request: csi_pb2.NodeGetCapabilitiesRequest, _deadline: Deadline
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        response = csi_pb2.NodeGetCapabilitiesResponse()
        for capability in _CAPABILITIES:
            response.capabilities.add().rpc.type = capability
        return response

    def NodeGetInfo(self, _request: csi_pb2.NodeGetInfoRequest, _deadline: Deadline) -> csi_pb2.NodeGetInfoResponse:
        response = csi_pb2.NodeGetInfoResponse(node_id=self._node_id)
        if self._driver.on_nodes:
            response.accessible_topology.segments.update(segments(self._node_id))
            node = self._node
            response.max_volumes_per_node = volume_limit.left_for_csi(node.claims, node.max_volumes, node.roots)
        return response

    def _described(self, volume_id: str, context: Mapping[str, str]) -> dict[str, str]:
        """The volume's context, checked, for a volume of this driver's; VolumeNotFound, OfAnotherDriver."""
        catalog = self._driver.catalog
        mine = parameters.check_context(context, default=catalog.default)
        if not self._driver.on_nodes:
            mine = {BACKEND: catalog.default, **mine}
            catalog.for_parameters(mine)
            catalog.of(volume_id, mine)
        return mine

    def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, deadline: Deadline
    ) -> csi_pb2.NodeStageVolumeResponse:
        volume_id = checks.volume_id(request.volume_id)
        if not request.staging_target_path:
            raise BadRequest("staging_target_path", "", "must be given")
        capability = checks.capability(
            "volume_capability", request.volume_capability, given=request.HasField("volume_capability")
        )
        checks.bounded_map("secrets", request.secrets, secret=True)
        context = checks.bounded_map("volume_context", request.volume_context)
        self._node.stage(
            StageRequest(
                volume_id=volume_id,
                staging_path=request.staging_target_path,
                capability=capability,
                context=self._described(volume_id, context),
            ),
            deadline,
        )
        return csi_pb2.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi_pb2.NodeUnstageVolumeRequest, deadline: Deadline
    ) -> csi_pb2.NodeUnstageVolumeResponse:
        volume_id = checks.volume_id(request.volume_id)
        if not request.staging_target_path:
            raise BadRequest("staging_target_path", "", "must be given")
        self._node.unstage(volume_id, request.staging_target_path, deadline)
        return csi_pb2.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, deadline: Deadline
    ) -> csi_pb2.NodePublishVolumeResponse:
        volume_id = checks.volume_id(request.volume_id)
        if not request.target_path:
            raise BadRequest("target_path", "", "must be given")
        capability = checks.capability(
            "volume_capability", request.volume_capability, given=request.HasField("volume_capability")
        )
        checks.bounded_map("secrets", request.secrets, secret=True)
        context = checks.bounded_map("volume_context", request.volume_context)
        if not request.staging_target_path:
            raise BadRequest("staging_target_path", "", "must be given: this driver advertises STAGE_UNSTAGE_VOLUME")
        self._node.publish(
            PublishRequest(
                volume_id=volume_id,
                staging_path=request.staging_target_path,
                target=request.target_path,
                capability=capability,
                read_only=request.readonly,
                pod=checks.pod_of(context, request.target_path),
                context=self._described(volume_id, context),
            ),
            deadline,
        )
        return csi_pb2.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, deadline: Deadline
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        volume_id = checks.volume_id(request.volume_id)
        if not request.target_path:
            raise BadRequest("target_path", "", "must be given")
        self._node.unpublish(volume_id, request.target_path, deadline)
        return csi_pb2.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, deadline: Deadline
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        volume_id = checks.volume_id(request.volume_id)
        if not request.volume_path:
            raise BadRequest("volume_path", "", "must be given")
        claim = usage.published(self._node, volume_id, request.volume_path)
        measured = usage.measure(claim, request.volume_path, deadline)
        response = csi_pb2.NodeGetVolumeStatsResponse(volume_condition=health.condition(self._node, volume_id))
        response.usage.add(
            total=measured.total_bytes,
            used=measured.used_bytes,
            available=measured.available_bytes,
            unit=csi_pb2.VolumeUsage.BYTES,
        )
        if measured.inodes:
            response.usage.add(
                total=measured.inodes,
                used=measured.used_inodes,
                available=measured.free_inodes,
                unit=csi_pb2.VolumeUsage.INODES,
            )
        return response

    def NodeExpandVolume(
        self, request: csi_pb2.NodeExpandVolumeRequest, deadline: Deadline
    ) -> csi_pb2.NodeExpandVolumeResponse:
        volume_id = checks.volume_id(request.volume_id)
        if not request.volume_path:
            raise BadRequest("volume_path", "", "must be given")
        checks.bounded_map("secrets", request.secrets, secret=True)
        if request.HasField("volume_capability"):
            backend = self._node.catalog.of(volume_id)
            use = checks.capability("volume_capability", request.volume_capability)
            check_capability(use, backend)
        size = checks.size_range(request.capacity_range)
        capacity = self._node.expand(volume_id, request.volume_path, size, deadline)
        return csi_pb2.NodeExpandVolumeResponse(capacity_bytes=capacity)

    def NodeGetVolumeHealth(
        self, request: csi_pb2.NodeGetVolumeHealthRequest, _deadline: Deadline
    ) -> csi_pb2.NodeGetVolumeHealthResponse:
        volume_id = checks.volume_id(request.volume_id)
        if request.volume_publish_path:
            usage.published(self._node, volume_id, request.volume_publish_path)
        return csi_pb2.NodeGetVolumeHealthResponse(volume_health=health.health(self._node, volume_id))

    def NodeGetStorageHealth(
        self, _request: csi_pb2.NodeGetStorageHealthRequest, _deadline: Deadline
    ) -> csi_pb2.NodeGetStorageHealthResponse:
        response = csi_pb2.NodeGetStorageHealthResponse()
        doubt = self._node.reach.doubt() if self._node.reach is not None else None
        if doubt is not None:
            response.backend_health.add(
                status=csi_pb2.STORAGE_UNREACHABLE if doubt.certain else csi_pb2.STORAGE_DEGRADED,
                reason="MountsNotSeen", message=f"what is mounted here may not reach kubelet: {doubt.why}",
            )  # fmt: skip
        for backend in self._driver.catalog.backends:
            try:
                if not backend.available_bytes():
                    response.backend_health.add(
                        status=csi_pb2.STORAGE_DEGRADED, reason="Full",
                        message=f"the backend {backend.name} can promise no more bytes",
                    )  # fmt: skip
            except (VolumeError, OSError) as error:
                reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
                response.backend_health.add(status=csi_pb2.STORAGE_UNREACHABLE, reason="StoreFailed", message=reason)
        return response
