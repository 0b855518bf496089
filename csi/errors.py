"""The one place where errors become gRPC codes (CSI specification, "Error Scheme")."""

from __future__ import annotations

import errno
import os

import grpc

import blockdev
import guestmount
import volumes

# Most special first: the first class that matches decides.
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (guestmount.BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (guestmount.Conflict, grpc.StatusCode.ALREADY_EXISTS),
    (guestmount.Busy, grpc.StatusCode.ABORTED),
    (guestmount.RuntimeUnknown, grpc.StatusCode.UNAVAILABLE),
    (guestmount.Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (guestmount.Unsupported, grpc.StatusCode.INVALID_ARGUMENT),
    (volumes.VolumeNotFound, grpc.StatusCode.NOT_FOUND),
    (volumes.VolumeConflict, grpc.StatusCode.ALREADY_EXISTS),
    (volumes.InvalidParameter, grpc.StatusCode.INVALID_ARGUMENT),
    (volumes.SizeNotAllowed, grpc.StatusCode.OUT_OF_RANGE),
    (volumes.NoSpace, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (volumes.VolumeUnfinished, grpc.StatusCode.ABORTED),
    (volumes.OfAnotherDriver, grpc.StatusCode.FAILED_PRECONDITION),
    (volumes.StoreAway, grpc.StatusCode.FAILED_PRECONDITION),
    (volumes.StoreFailed, grpc.StatusCode.UNAVAILABLE),
    (blockdev.WaitExpired, grpc.StatusCode.DEADLINE_EXCEEDED),
    (blockdev.BlockdevError, grpc.StatusCode.FAILED_PRECONDITION),
)


# What the node has no more of, and what its disks do not do.
_SCARCE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_AWAY = frozenset({errno.EROFS, errno.EIO})


class CallError(Exception):
    """An answer that only this protocol has."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        super().__init__(message)


def code_of(error: BaseException) -> grpc.StatusCode:
    """INTERNAL for what nobody foresaw."""
    if isinstance(error, CallError):
        return error.code
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError) and error.errno in _SCARCE:
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, OSError) and error.errno in _AWAY:
        return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INTERNAL


def sentence_of(error: BaseException) -> str:
    """What people read: the same for the same trouble."""
    if isinstance(error, OSError) and error.errno in _SCARCE | _AWAY:
        return (
            f"{error.filename or 'the node'}: {os.strerror(error.errno or 0)}; the call can be repeated once that ends"
        )
    return str(error)
