"""A volume's health in the words of CSI 1.13, and of the older VolumeCondition."""

from __future__ import annotations

from guestmount import Node
from guestmount.errors import TROUBLE
from guestmount.usage import problems
from guestmount.ways import Problem
from runvol_proto import csi_pb2
from volumes import Volume, VolumeNotFound


def _problems(node: Node, volume_id: str, known: Volume | None) -> list[Problem]:
    """What cannot be looked at is a problem of this volume, and stops no list of others. VolumeNotFound."""
    try:
        return problems(node, volume_id, known)
    except VolumeNotFound:
        raise
    except TROUBLE as error:
        return [Problem(reason="NotLookedAt", message=f"it cannot be looked at: {error}", unreachable=True)]


def health(node: Node, volume_id: str, known: Volume | None = None) -> csi_pb2.VolumeHealth:
    """VolumeNotFound for an unknown volume. `known`: as it has just been listed."""
    answer = csi_pb2.VolumeHealth(volume_id=volume_id)
    for problem in _problems(node, volume_id, known):
        answer.health_statuses.add(status=_status(problem), reason=problem.reason, message=problem.message)
    return answer


def _status(problem: Problem) -> csi_pb2.VolumeHealthErrorType:
    if problem.lost:
        return csi_pb2.DATA_LOSS
    return csi_pb2.INACCESSIBLE if problem.unreachable else csi_pb2.DEGRADED


def condition(node: Node, volume_id: str, known: Volume | None = None) -> csi_pb2.VolumeCondition:
    """For callers that speak a CSI older than 1.13."""
    found = _problems(node, volume_id, known)
    return csi_pb2.VolumeCondition(
        abnormal=bool(found), message="; ".join(problem.message for problem in found) or "the volume is well"
    )
