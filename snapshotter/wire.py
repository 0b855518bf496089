"""Between the messages of containerd's service and this room's types."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from blockdev import errors as blockdev_errors
from runvol_proto import containerd_mount_pb2, containerd_snapshots_pb2
from snapshotter import errors
from snapshotter.model import Mount, Snapshot

_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.WrongState, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PoolRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PoolFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.TookTooLong, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.NotOffered, grpc.StatusCode.UNIMPLEMENTED),
    (blockdev_errors.WaitExpired, grpc.StatusCode.DEADLINE_EXCEEDED),
)


def code_of(error: Exception) -> grpc.StatusCode:
    """The gRPC code of an error; INTERNAL for what should not happen."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def mounts(found: Sequence[Mount]) -> list[containerd_mount_pb2.Mount]:
    return [containerd_mount_pb2.Mount(type=one.fstype, source=one.source, options=list(one.options)) for one in found]


def info(row: Snapshot) -> containerd_snapshots_pb2.Info:
    made = containerd_snapshots_pb2.Info(
        name=row.key,
        parent=row.parent,
        kind=containerd_snapshots_pb2.Kind.Name(row.kind),
        labels=dict(row.labels),
    )
    for stamp, nanoseconds in ((made.created_at, row.created), (made.updated_at, row.updated)):
        stamp.seconds, stamp.nanos = divmod(nanoseconds, 10**9)
    return made
