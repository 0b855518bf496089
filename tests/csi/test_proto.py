"""csi.proto against the specification's tables: services, numbers, options."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor

from runvol_proto import csi_pb2

MESSAGES = csi_pb2.DESCRIPTOR.message_types_by_name
SERVICES = csi_pb2.DESCRIPTOR.services_by_name

COUNTS = {"Identity": 3, "Controller": 17, "GroupController": 4, "SnapshotMetadata": 2, "Node": 10}
SECRETS = {
    "CreateVolumeRequest": 5, "DeleteVolumeRequest": 2, "ControllerPublishVolumeRequest": 5, "ControllerUnpublishVolumeRequest": 3,
    "ValidateVolumeCapabilitiesRequest": 5, "ControllerModifyVolumeRequest": 2, "CreateSnapshotRequest": 3, "DeleteSnapshotRequest": 2,
    "ListSnapshotsRequest": 5, "GetSnapshotRequest": 2, "ControllerExpandVolumeRequest": 3, "ControllerGetVolumeHealthRequest": 2,
    "ControllerListVolumeHealthRequest": 3, "CreateVolumeGroupSnapshotRequest": 3, "DeleteVolumeGroupSnapshotRequest": 3,
    "GetVolumeGroupSnapshotRequest": 3, "GetMetadataAllocatedRequest": 4, "GetMetadataDeltaRequest": 5, "NodeStageVolumeRequest": 5,
    "NodePublishVolumeRequest": 7, "NodeExpandVolumeRequest": 6, "NodeGetStorageHealthRequest": 1,
}  # fmt: skip
FIELDS = {
    "CreateVolumeRequest": "name capacity_range volume_capabilities parameters secrets volume_content_source accessibility_requirements mutable_parameters",
    "NodePublishVolumeRequest": "volume_id publish_context staging_target_path target_path volume_capability readonly secrets volume_context",
    "NodeStageVolumeRequest": "volume_id publish_context staging_target_path volume_capability secrets volume_context",
    "NodeExpandVolumeRequest": "volume_id volume_path capacity_range staging_target_path volume_capability secrets",
    "NodeGetVolumeStatsRequest": "volume_id volume_path staging_target_path",
    "NodeGetVolumeHealthRequest": "volume_id volume_publish_path staging_target_path",
    "Snapshot": "size_bytes snapshot_id source_volume_id creation_time ready_to_use group_snapshot_id accessible_topology",
    "Volume": "capacity_bytes volume_id volume_context content_source accessible_topology",
    "ValidateVolumeCapabilitiesRequest": "volume_id volume_context volume_capabilities parameters secrets mutable_parameters",
    "GetCapacityResponse": "available_capacity maximum_volume_size minimum_volume_size",
}


@pytest.mark.parametrize(("service", "count"), COUNTS.items())
def test_every_rpc_is_there_with_its_messages(service, count):
    methods = SERVICES[service].methods
    assert len(methods) == count
    for method in methods:
        assert method.input_type.name == f"{method.name}Request" and method.output_type.name == f"{method.name}Response"
        assert method.server_streaming == (service == "SnapshotMetadata")


def test_secrets_are_marked_and_nothing_else_is():
    for name, message in MESSAGES.items():
        marked = {field.number for field in message.fields if field.GetOptions().Extensions[csi_pb2.csi_secret]}
        assert marked == ({SECRETS[name]} if name in SECRETS else set()), name
    mount = MESSAGES["VolumeCapability"].nested_types_by_name["MountVolume"]
    assert mount.fields_by_name["mount_flags"].GetOptions().Extensions[csi_pb2.csi_secret]
    assert csi_pb2.csi_secret.number == 1059


@pytest.mark.parametrize(("message", "names"), FIELDS.items())
def test_fields_have_the_specifications_numbers(message, names):
    assert [
        MESSAGES[message].fields_by_number[number + 1].name for number in range(len(names.split()))
    ] == names.split()


@pytest.mark.parametrize(
    ("message", "number", "kind"),
    [("ListVolumesRequest", 1, FieldDescriptor.TYPE_INT32), ("CapacityRange", 2, FieldDescriptor.TYPE_INT64), ("NodeGetInfoResponse", 2, FieldDescriptor.TYPE_INT64),
     ("GetMetadataDeltaRequest", 4, FieldDescriptor.TYPE_INT32), ("Snapshot", 5, FieldDescriptor.TYPE_BOOL)],
)  # fmt: skip
def test_numbers_have_the_specifications_width(message, number, kind):
    assert MESSAGES[message].fields_by_number[number].type == kind


def test_what_1_13_removed_is_kept_for_older_callers_under_its_old_numbers():
    assert MESSAGES["NodeGetVolumeStatsResponse"].fields_by_number[2].name == "volume_condition"
    assert (
        MESSAGES["ListVolumesResponse"].nested_types_by_name["VolumeStatus"].fields_by_number[2].name
        == "volume_condition"
    )
    assert (
        MESSAGES["ControllerGetVolumeResponse"].nested_types_by_name["VolumeStatus"].fields_by_number[2].name
        == "volume_condition"
    )
    assert (
        csi_pb2.ControllerServiceCapability.RPC.VOLUME_CONDITION == 11
        and csi_pb2.NodeServiceCapability.RPC.VOLUME_CONDITION == 4
    )


def test_capabilities_have_their_numbers():
    controller, node = csi_pb2.ControllerServiceCapability.RPC, csi_pb2.NodeServiceCapability.RPC
    assert (
        controller.EXPAND_VOLUME,
        controller.SINGLE_NODE_MULTI_WRITER,
        controller.GET_VOLUME_HEALTH,
        controller.LIST_VOLUME_HEALTH,
    ) == (9, 13, 16, 17)
    assert (node.VOLUME_MOUNT_GROUP, node.GET_VOLUME_HEALTH, node.GET_STORAGE_HEALTH) == (6, 7, 8)
    assert csi_pb2.PluginCapability.Service.SNAPSHOT_ACCESSIBILITY_CONSTRAINTS == 5
    modes = csi_pb2.VolumeCapability.AccessMode.Mode
    assert (modes.Value("SINGLE_NODE_SINGLE_WRITER"), modes.Value("SINGLE_NODE_MULTI_WRITER")) == (6, 7)
