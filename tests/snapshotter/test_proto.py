"""The wire format of containerd's snapshots service: names and numbers of the reference, and what a message weighs."""

from __future__ import annotations

import pytest

from runvol_proto import containerd_mount_pb2 as mount_pb
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter import wire
from snapshotter.model import Kind, Mount, Snapshot, State

FIELDS = {
    "PrepareSnapshotRequest": {"snapshotter": 1, "key": 2, "parent": 3, "labels": 4},
    "PrepareSnapshotResponse": {"mounts": 1},
    "ViewSnapshotRequest": {"snapshotter": 1, "key": 2, "parent": 3, "labels": 4},
    "ViewSnapshotResponse": {"mounts": 1},
    "MountsRequest": {"snapshotter": 1, "key": 2},
    "MountsResponse": {"mounts": 1},
    "CommitSnapshotRequest": {"snapshotter": 1, "name": 2, "key": 3, "labels": 4, "parent": 5},
    "RemoveSnapshotRequest": {"snapshotter": 1, "key": 2},
    "StatSnapshotRequest": {"snapshotter": 1, "key": 2},
    "StatSnapshotResponse": {"info": 1},
    "UpdateSnapshotRequest": {"snapshotter": 1, "info": 2, "update_mask": 3},
    "UpdateSnapshotResponse": {"info": 1},
    "ListSnapshotsRequest": {"snapshotter": 1, "filters": 2},
    "ListSnapshotsResponse": {"info": 1},
    "UsageRequest": {"snapshotter": 1, "key": 2},
    "UsageResponse": {"size": 1, "inodes": 2},
    "CleanupRequest": {"snapshotter": 1},
    "Info": {"name": 1, "parent": 2, "kind": 3, "created_at": 4, "updated_at": 5, "labels": 6},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_have_their_numbers(name: str) -> None:
    assert {field.name: field.number for field in getattr(pb, name).DESCRIPTOR.fields} == FIELDS[name]


def test_the_service_has_its_ten_calls() -> None:
    service = pb.DESCRIPTOR.services_by_name["Snapshots"]
    assert service.full_name == "containerd.services.snapshots.v1.Snapshots"
    assert {method.name for method in service.methods} == {
        "Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup",
    }  # fmt: skip
    assert {name: pb.Kind.Value(name) for name in pb.Kind.keys()} == {  # noqa: SIM118
        "UNKNOWN": 0, "VIEW": 1, "ACTIVE": 2, "COMMITTED": 3,
    }  # fmt: skip
    assert {field.name: field.number for field in mount_pb.Mount.DESCRIPTOR.fields} == {
        "type": 1, "source": 2, "target": 3, "options": 4,
    }  # fmt: skip


def test_times_keep_their_nanoseconds() -> None:
    row = Snapshot(key="k", parent="p", kind=Kind.VIEW, state=State.READY, device=1, size=1, fstype="xfs",
                   created=1_700_000_000_123_456_789, updated=5, labels={"a": "b"})  # fmt: skip
    info = wire.info(row)
    assert (info.created_at.seconds, info.created_at.nanos) == (1_700_000_000, 123_456_789)
    assert (info.kind, info.labels["a"]) == (pb.VIEW, "b")
    (mount,) = wire.mounts([Mount(fstype="xfs", source="/dev/mapper/x", options=("ro", "nouuid"))])
    assert (mount.type, mount.source, list(mount.options)) == ("xfs", "/dev/mapper/x", ["ro", "nouuid"])
