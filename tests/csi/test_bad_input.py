"""Every field of every request, wrong in every way: a precise code, a message with the field, nothing half-made."""

from __future__ import annotations


import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi.controller import Controller
from csi.node import NodeService
from csi.snapshots import GroupController
from runvol_proto import csi_pb2
from tests.csi.helpers import refused
from tests.driver import mount_capability

pytestmark = pytest.mark.kernel

# What a client may be told. INTERNAL and UNKNOWN would be a fault of ours.
CODES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
         "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNIMPLEMENTED"}  # fmt: skip
SERVED = [
    method
    for name in ("Controller", "GroupController", "Node")
    for method in csi_pb2.DESCRIPTOR.services_by_name[name].methods
    if any(hasattr(served, method.name) for served in (Controller, GroupController, NodeService))
]
SECRET = "s3cr3t-p4ssw0rd"

_strings = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["", "..", "../../etc/passwd", "/", "/etc", "a" * 129, "a" * 300, "/" + "x" * 5000, "loop-" + "0" * 32, "\0", "a\nb",
                     "--help", "$(reboot)", "`id`", "'; DROP TABLE volumes; --", "é" * 70, "\u202e", "{root}/x", "{root}/../../x", "{root}"]),
)  # fmt: skip
_numbers = st.sampled_from([0, 1, -1, 4096, 1 << 20, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63)])


def values(field: FieldDescriptor, depth: int = 0):
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return st.dictionaries(_strings, _strings, max_size=3)
        return messages(field.message_type, depth + 1)
    if field.enum_type is not None:
        return st.sampled_from([*(value.number for value in field.enum_type.values), 99, -1])
    kinds = {FieldDescriptor.CPPTYPE_STRING: _strings, FieldDescriptor.CPPTYPE_BOOL: st.booleans(), FieldDescriptor.CPPTYPE_INT64: _numbers,
             FieldDescriptor.CPPTYPE_INT32: st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)])}  # fmt: skip
    return kinds[field.cpp_type]


def messages(descriptor, depth: int = 0):
    def build(parts):
        message = GetMessageClass(descriptor)()
        for field, value in parts.items():
            target = descriptor.fields_by_name[field]
            if target.message_type is not None and target.message_type.GetOptions().map_entry:
                getattr(message, field).update(value)
            elif target.is_repeated:
                getattr(message, field).extend(value)
            elif target.message_type is not None:
                getattr(message, field).CopyFrom(value)
            else:
                setattr(message, field, value)
        return message

    fields = {}
    for field in descriptor.fields:
        one = values(field, depth)
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        fields[field.name] = st.lists(one, max_size=2) if field.is_repeated and not is_map else one
    return st.fixed_dictionaries({}, optional=fields).map(build)


def rooted(message, root):
    """`{root}` in strings becomes kubelet's directory of this run."""
    for field, value in message.ListFields():
        if isinstance(value, str):
            setattr(message, field.name, value.replace("{root}", root))
    return message


@pytest.mark.parametrize("method", SERVED, ids=lambda method: method.name)
def test_any_request_gets_a_considered_answer_and_leaves_nothing(shared_driver, method):
    answers = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(messages(method.input_type))
    def attempt(request):
        rooted(request, str(shared_driver.kubelet))
        try:
            answer = shared_driver.client.call(method.name, request)
            answers.add("OK")
            if method.name == "CreateVolume":
                shared_driver.client.DeleteVolume(volume_id=answer.volume.volume_id)
        except grpc.RpcError as error:
            answers.add(error.code().name)
            assert error.code().name in CODES, f"{request}: {error.details()}"
            assert len(error.details()) > 10
        assert shared_driver.mounts() == [] and shared_driver.loop_devices() == []

    attempt()
    assert answers
    left = shared_driver.left_over()
    assert not any(left.values()), left
    assert shared_driver.process.poll() is None and "Traceback" not in shared_driver.log.read_text()


@pytest.mark.parametrize(
    "method", [method for method in SERVED if method.input_type.fields], ids=lambda method: method.name
)
def test_bytes_that_are_no_request_are_an_invalid_argument(shared_driver, method):
    with refused("INVALID_ARGUMENT", "no valid", method.name):
        shared_driver.client.call(method.name, b"\x0a\xff\xff\xff\xff\x0f\x01")
    string = next(
        (
            field
            for field in method.input_type.fields
            if field.cpp_type == FieldDescriptor.CPPTYPE_STRING and not field.is_repeated
        ),
        None,
    )
    if string is not None:
        with refused("INVALID_ARGUMENT", "UTF-8"):
            shared_driver.client.call(method.name, bytes([string.number << 3 | 2, 2]) + b"\xff\xfe")


REQUIRED = {
    "CreateVolume": ["name", "volume_capabilities"],
    "DeleteVolume": ["volume_id"],
    "CreateSnapshot": ["name", "source_volume_id"],
    "DeleteSnapshot": ["snapshot_id"],
    "GetSnapshot": ["snapshot_id"],
    "CreateVolumeGroupSnapshot": ["name", "source_volume_ids"],
    "DeleteVolumeGroupSnapshot": ["group_snapshot_id"],
    "GetVolumeGroupSnapshot": ["group_snapshot_id"],
    "ValidateVolumeCapabilities": ["volume_id", "volume_capabilities"],
    "ControllerExpandVolume": ["volume_id", "capacity_range"],
    "ControllerGetVolume": ["volume_id"],
    "ControllerGetVolumeHealth": ["volume_id"],
    "NodeStageVolume": ["volume_id", "staging_target_path", "volume_capability"],
    "NodeUnstageVolume": ["volume_id", "staging_target_path"],
    "NodePublishVolume": ["volume_id", "staging_target_path", "target_path", "volume_capability"],
    "NodeUnpublishVolume": ["volume_id", "target_path"],
    "NodeGetVolumeStats": ["volume_id", "volume_path"],
    "NodeExpandVolume": ["volume_id", "volume_path"],
    "NodeGetVolumeHealth": ["volume_id"],
}


def whole(driver, method):
    root = str(driver.kubelet)
    every = {
        "name": "x", "source_volume_id": "loop-1", "source_volume_ids": ["loop-1"], "snapshot_id": "snap-1", "group_snapshot_id": "group-1", "volume_id": "loop-" + "0" * 32, "staging_target_path": f"{root}/s", "target_path": f"{root}/t", "volume_path": f"{root}/t",
        "volume_capability": mount_capability(), "volume_capabilities": [mount_capability()], "capacity_range": {"required_bytes": 8 << 20},
    }  # fmt: skip
    return {
        field: value
        for field, value in every.items()
        if field in csi_pb2.DESCRIPTOR.message_types_by_name[f"{method}Request"].fields_by_name
    }


@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method, fields in REQUIRED.items() for field in fields]
)
def test_a_missing_field_is_named(shared_driver, method, field):
    fields = whole(shared_driver, method)
    del fields[field]
    with refused("INVALID_ARGUMENT", field, "must be given"):
        getattr(shared_driver.client, method)(**fields)


@pytest.mark.parametrize("field", ["name", "volume_id"])
@pytest.mark.parametrize(
    ("value", "rule"),
    [("x" * 129, "longer than 128 bytes"), ("ü" * 65, "longer than 128 bytes"), ("a\x07b", "control character")],
)
def test_a_string_beyond_the_specifications_limits_is_named(shared_driver, field, value, rule):
    for method in [method for method, fields in REQUIRED.items() if field in fields]:
        with refused("INVALID_ARGUMENT", field, rule):
            getattr(shared_driver.client, method)(**(whole(shared_driver, method) | {field: value}))


@pytest.mark.parametrize("field", ["staging_target_path", "target_path"])
@pytest.mark.parametrize(
    "value",
    [
        "relative/path",
        "/etc/x",
        "{root}/../../etc/x",
        "{root}/a/",
        "{root}//a",
        "{root}",
        "{root}/a\nb",
        "/" + "x" * 5000,
    ],
)
def test_a_path_that_is_not_plain_and_ours_is_named(shared_driver, field, value):
    value = value.replace("{root}", str(shared_driver.kubelet))
    volume = shared_driver.create("paths", 8 << 20)
    for method in ("NodeStageVolume", "NodePublishVolume", "NodeUnstageVolume", "NodeUnpublishVolume"):
        fields = whole(shared_driver, method) | {"volume_id": volume.volume_id}
        if field in fields:
            with refused("INVALID_ARGUMENT", field):
                getattr(shared_driver.client, method)(**(fields | {field: value}))
    shared_driver.delete(volume)


def test_a_link_that_leads_out_of_the_root_is_refused(shared_driver, tmp_path):
    (tmp_path / "outside").mkdir()
    (shared_driver.kubelet / "link").symlink_to(tmp_path / "outside")
    volume = shared_driver.create("links", 8 << 20)
    shared_driver.stage(volume)
    with refused("INVALID_ARGUMENT", "target_path", "symbolic link"):
        shared_driver.client.NodePublishVolume(
            volume_id=volume.volume_id, staging_target_path=shared_driver.staging(volume.volume_id),
            target_path=str(shared_driver.kubelet / "link" / "mount"), volume_capability=mount_capability(), volume_context={"runtime": "runc"},
        )  # fmt: skip
    with refused("INVALID_ARGUMENT", "symbolic link"):
        shared_driver.client.NodeUnpublishVolume(
            volume_id=volume.volume_id, target_path=str(shared_driver.kubelet / "link" / "mount")
        )
    shared_driver.unstage(volume)
    shared_driver.delete(volume)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [({"colour": "red"}, ("'colour'", "not known", "backend")), ({"backend": "cephfs"}, ("'backend'", "'cephfs'", "loop")),
     ({"preallocate": "maybe"}, ("'preallocate'", "'maybe'", "true, false")), ({"csi.storage.k8s.io/fstype": "ntfs"}, ("ntfs", "ext4")),
     ({"k" * 3000: "v" * 3000}, ("parameters", "larger than 4096"))],
)  # fmt: skip
def test_a_parameter_that_is_unknown_or_wrong_is_named_with_what_it_takes(shared_driver, parameters, words):
    with refused("INVALID_ARGUMENT", *words):
        shared_driver.client.CreateVolume(name="p", volume_capabilities=[mount_capability()], parameters=parameters)


@pytest.mark.parametrize(
    ("required", "limit", "words"),
    [(-1, 0, ("required_bytes", "-1")), (0, -1, ("limit_bytes",)), (2 << 20, 1 << 20, ("required_bytes", "limit_bytes")),
     ((1 << 63) - 1, 0, ("required_bytes",)), (0, 1, ("limit_bytes", "at least"))],
)  # fmt: skip
def test_a_capacity_that_cannot_be_is_out_of_range(shared_driver, required, limit, words):
    with refused("OUT_OF_RANGE", *words):
        shared_driver.client.CreateVolume(
            name="c",
            volume_capabilities=[mount_capability()],
            capacity_range={"required_bytes": required, "limit_bytes": limit},
        )


@pytest.mark.parametrize(
    ("capability", "words"),
    [(csi_pb2.VolumeCapability(mount={}), ("access_mode",)), (csi_pb2.VolumeCapability(access_mode={"mode": 1}), ("access_type",)),
     (csi_pb2.VolumeCapability(mount={}, access_mode={"mode": 42}), ("access_mode", "42")), (mount_capability(fstype="btrfs"), ("btrfs", "ext4, xfs")),
     (mount_capability(group="nobody"), ("volume_mount_group",)), (mount_capability(group="0"), ("volume_mount_group",)),
     (mount_capability(group="4294967296"), ("volume_mount_group",)), (mount_capability(flags=("loop",)), ("mount_flags", "loop")),
     (mount_capability(flags=("a,,b",)), ("mount_flags",)),
     (mount_capability(flags=("noatime,loop",)), ("mount_flags", "loop")), (mount_capability(flags=("remount",)), ("mount_flags",)),
     (mount_capability(flags=("x" * 5000,)), ("mount_flags", "4096"))],
)  # fmt: skip
def test_a_capability_that_cannot_be_is_named(shared_driver, capability, words):
    with refused("INVALID_ARGUMENT", *words):
        shared_driver.client.CreateVolume(name="c", volume_capabilities=[capability])


def test_what_the_driver_cannot_make_is_named(shared_driver):
    common = {"name": "s", "volume_capabilities": [mount_capability()]}
    with refused("INVALID_ARGUMENT", "volume_content_source"):
        shared_driver.client.CreateVolume(**common, volume_content_source={})
    with refused("INVALID_ARGUMENT", "mutable_parameters"):
        shared_driver.client.CreateVolume(**common, mutable_parameters={"iops": "1"})


def test_no_secret_reaches_the_log_or_an_answer(shared_driver):
    """Every field with the option csi_secret, in every request, and mount options, which may hold passwords."""
    tried = 0
    for method in SERVED:
        secret_fields = [
            field.name for field in method.input_type.fields if field.GetOptions().Extensions[csi_pb2.csi_secret]
        ]
        request = GetMessageClass(method.input_type)(**whole(shared_driver, method.name))
        for field in secret_fields:
            getattr(request, field)["password"] = SECRET
            tried += 1
        if "volume_capability" in method.input_type.fields_by_name:
            request.volume_capability.mount.mount_flags.append(f"password={SECRET}")
        if "volume_context" in method.input_type.fields_by_name:
            request.volume_context["csi.storage.k8s.io/serviceAccount.tokens"] = SECRET
        try:
            answer = shared_driver.client.call(method.name, request)
            if method.name == "CreateVolume":
                shared_driver.client.DeleteVolume(volume_id=answer.volume.volume_id)
        except grpc.RpcError as error:
            assert SECRET not in error.details()
    assert tried >= 8
    assert SECRET not in shared_driver.log.read_text()


def test_an_oversized_secret_does_not_show_in_the_refusal(shared_driver):
    with refused("INVALID_ARGUMENT", "secrets", "larger than 4096") as _:
        shared_driver.client.CreateVolume(
            name="s", volume_capabilities=[mount_capability()], secrets={"k": SECRET * 500}
        )
    assert SECRET not in shared_driver.log.read_text()


def test_contexts_of_kubernetes_pass_and_unknown_keys_do_not(shared_driver):
    volume = shared_driver.create("ctx", 64 << 20)
    base = {
        "volume_id": volume.volume_id,
        "staging_target_path": shared_driver.staging(volume.volume_id),
        "volume_capability": mount_capability(),
    }
    with refused("INVALID_ARGUMENT", "'flavour'"):
        shared_driver.client.NodeStageVolume(**base, volume_context={"flavour": "x"})
    shared_driver.client.NodeStageVolume(
        **base, volume_context={"storage.kubernetes.io/csiProvisionerIdentity": "1-2-csi.runvol.io"}
    )
    shared_driver.unstage(volume)
    shared_driver.delete(volume)


def test_names_with_any_unicode_make_volumes_whose_ids_are_plain(shared_driver):
    for name in ("pvc-ü", "名前", "a b/../c", "--x", "'; rm -rf /", "ﷺ" * 20):
        volume = shared_driver.create(name, 8 << 20)
        assert volume.volume_id.isascii() and "/" not in volume.volume_id
        assert shared_driver.create(name, 8 << 20).volume_id == volume.volume_id
        shared_driver.delete(volume)


def test_a_source_of_another_backend_is_refused_by_name(driver):
    volume = driver.create("v", 16 << 20)
    taken = driver.client.CreateSnapshot(name="s", source_volume_id=volume.volume_id).snapshot
    sources = ({"snapshot": {"snapshot_id": taken.snapshot_id}}, {"volume": {"volume_id": volume.volume_id}})
    for backend in ({"backend": "directory", "quota": "none"}, {"backend": "nfs", "server": "127.0.0.1", "path": "/x"}):
        for source in sources:
            with refused("INVALID_ARGUMENT", "volume_content_source", "of the backend loop", backend["backend"]):
                driver.client.CreateVolume(name="w", volume_capabilities=[mount_capability()], parameters=backend,
                                           volume_content_source=source)  # fmt: skip
    with refused("NOT_FOUND", "snap-none"):
        driver.client.CreateVolume(name="w", volume_capabilities=[mount_capability()],
                                   volume_content_source={"snapshot": {"snapshot_id": "snap-none"}})  # fmt: skip
    driver.client.DeleteSnapshot(snapshot_id=taken.snapshot_id)
    driver.delete(volume)
