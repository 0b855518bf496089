"""The one place where errors become gRPC codes (CSI specification, "Error Scheme")."""

from __future__ import annotations

import grpc

import blockdev
import guestmount
import volumes
from blockdev import deadlines, nfs, worldly

# Most special first: the first class that matches decides.
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (guestmount.BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (guestmount.Conflict, grpc.StatusCode.ALREADY_EXISTS),
    (guestmount.Busy, grpc.StatusCode.ABORTED),
    (guestmount.RuntimeUnknown, grpc.StatusCode.UNAVAILABLE),
    (guestmount.Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (guestmount.NoPlace, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (guestmount.Unsupported, grpc.StatusCode.INVALID_ARGUMENT),
    (volumes.VolumeNotFound, grpc.StatusCode.NOT_FOUND),
    (volumes.VolumeConflict, grpc.StatusCode.ALREADY_EXISTS),
    (volumes.InvalidParameter, grpc.StatusCode.INVALID_ARGUMENT),
    (volumes.SizeNotAllowed, grpc.StatusCode.OUT_OF_RANGE),
    (volumes.NoSpace, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (volumes.VolumeUnfinished, grpc.StatusCode.ABORTED),
    (volumes.OfANode, grpc.StatusCode.FAILED_PRECONDITION),
    (volumes.OfAnotherDriver, grpc.StatusCode.FAILED_PRECONDITION),
    (volumes.StoreAway, grpc.StatusCode.FAILED_PRECONDITION),
    (volumes.StoreFailed, grpc.StatusCode.UNAVAILABLE),
    (nfs.ServerSilent, grpc.StatusCode.UNAVAILABLE),
    (deadlines.NoThread, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (blockdev.WaitExpired, grpc.StatusCode.DEADLINE_EXCEEDED),
    (blockdev.BlockdevError, grpc.StatusCode.FAILED_PRECONDITION),
)


_OF_TROUBLE = {
    worldly.Kind.SCARCE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    worldly.Kind.AWAY: grpc.StatusCode.UNAVAILABLE,
    worldly.Kind.REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
}


class CallError(Exception):
    """An answer that only this protocol has."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        super().__init__(message)


def code_of(error: BaseException) -> grpc.StatusCode:
    """INTERNAL for what nobody foresaw."""
    error = _named(error)
    if isinstance(error, CallError):
        return error.code
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    trouble = worldly.kind_of(error)
    return grpc.StatusCode.INTERNAL if trouble is None else _OF_TROUBLE[trouble]


def sentence_of(error: BaseException) -> str:
    """What people read: the same for the same trouble."""
    return worldly.in_words(error) or str(_named(error))


def _named(error: BaseException) -> BaseException:
    """CPython has no class of its own for this one, which may come from wherever a pool of threads is used."""
    if type(error) is RuntimeError and str(error) == "can't start new thread":
        return deadlines.NoThread("the call")
    return error
