"""A volume's health in the words of CSI 1.13, and of the older VolumeCondition."""

from __future__ import annotations

from guestmount import Node
from guestmount.usage import Problem, problems
from runvol_proto import csi_pb2


def health(node: Node, volume_id: str) -> csi_pb2.VolumeHealth:
    """VolumeNotFound for an unknown volume."""
    answer = csi_pb2.VolumeHealth(volume_id=volume_id)
    for problem in problems(node, volume_id):
        answer.health_statuses.add(status=_status(problem), reason=problem.reason, message=problem.message)
    return answer


def _status(problem: Problem) -> csi_pb2.VolumeHealthErrorType:
    if problem.lost:
        return csi_pb2.DATA_LOSS
    return csi_pb2.INACCESSIBLE if problem.unreachable else csi_pb2.DEGRADED


def condition(node: Node, volume_id: str) -> csi_pb2.VolumeCondition:
    """For callers that speak a CSI older than 1.13."""
    found = problems(node, volume_id)
    return csi_pb2.VolumeCondition(
        abnormal=bool(found), message="; ".join(problem.message for problem in found) or "the volume is well"
    )
