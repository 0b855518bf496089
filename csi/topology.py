"""Where volumes of this node can be."""

from __future__ import annotations

from runvol_proto import csi_pb2

KEY = "topology.csi.runvol.io/node"


def segments(node_id: str) -> dict[str, str]:
    return {KEY: node_id}


def is_here(topology: csi_pb2.Topology, node_id: str) -> bool:
    """Whether a topology leaves this node in."""
    return all(key == KEY and value == node_id for key, value in topology.segments.items())


def here(wanted: csi_pb2.TopologyRequirement, node_id: str) -> bool:
    """Whether a requirement, if any, can be met here; `requisite` may come without `preferred` and the reverse."""
    candidates = list(wanted.requisite) or list(wanted.preferred)
    return not candidates or any(is_here(one, node_id) for one in candidates)
