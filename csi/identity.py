"""CSI's Identity service."""

from __future__ import annotations

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from blockdev import Deadline
from csi.drivers import CsiDriver
from csi.errors import CallError
from runvol_proto import csi_pb2
from volumes import VolumeError


class Identity:
    """Who the plugin is, and whether it is well."""

    def __init__(self, version: str, driver: CsiDriver, *, with_controller: bool) -> None:
        self._version, self._driver, self._with_controller = version, driver, with_controller

    def GetPluginInfo(
        self, _request: csi_pb2.GetPluginInfoRequest, _deadline: Deadline
    ) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=self._driver.name, vendor_version=self._version)

    def GetPluginCapabilities(
        self, _request: csi_pb2.GetPluginCapabilitiesRequest, _deadline: Deadline
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        kinds = csi_pb2.PluginCapability.Service
        services = [kinds.VOLUME_ACCESSIBILITY_CONSTRAINTS] if self._driver.on_nodes else []
        if self._with_controller:
            services.append(kinds.CONTROLLER_SERVICE)
            if self._driver.catalog.takes_groups:
                services.append(kinds.GROUP_CONTROLLER_SERVICE)
        response = csi_pb2.GetPluginCapabilitiesResponse()
        for service in services:
            response.capabilities.add().service.type = service
        response.capabilities.add().volume_expansion.type = csi_pb2.PluginCapability.VolumeExpansion.ONLINE
        return response

    def Probe(self, _request: csi_pb2.ProbeRequest, _deadline: Deadline) -> csi_pb2.ProbeResponse:
        try:
            self._driver.catalog.check_stores()
        except VolumeError as error:
            raise CallError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        return csi_pb2.ProbeResponse(ready=BoolValue(value=True))
