"""`runvol bench publish`: what a publish to a sandbox costs on this node, asked of the running driver over its socket.

The empty call of the same server, in the same run, is the floor that the figures are compared with.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from runvol_proto import csi_pb2

_SIZE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Milliseconds of one call, over all samples."""

    call: str
    p50: float
    p99: float
    samples: int


def publish(socket: str, root: str, samples: int) -> list[Figure]:
    """Make a volume of 8 MiB, publish and unpublish it `samples` times, delete it. Raises grpc.RpcError."""
    place = os.path.join(root, f"runvol-bench-{uuid.uuid4().hex[:8]}")
    staging, target = os.path.join(place, "staging"), os.path.join(place, "target")
    capability = csi_pb2.VolumeCapability(mount={}, access_mode={"mode": 1})
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.default_authority", "localhost")]) as channel:
        call = _caller(channel)
        volume = call(
            "Controller",
            "CreateVolume",
            name=os.path.basename(place),
            volume_capabilities=[capability],
            capacity_range={"required_bytes": _SIZE},
            parameters={"runtime": "sandbox"},
        ).volume
        common = {"volume_id": volume.volume_id}
        try:
            os.makedirs(staging)
            call(
                "Node",
                "NodeStageVolume",
                **common,
                staging_target_path=staging,
                volume_capability=capability,
                volume_context=volume.volume_context,
            )
            times: dict[str, list[float]] = {
                "NodeGetInfo (empty)": [],
                "NodePublishVolume": [],
                "NodeUnpublishVolume": [],
            }
            for _ in range(samples):
                times["NodeGetInfo (empty)"].append(_timed(lambda: call("Node", "NodeGetInfo")))
                times["NodePublishVolume"].append(
                    _timed(
                        lambda: call(
                            "Node",
                            "NodePublishVolume",
                            **common,
                            staging_target_path=staging,
                            target_path=target,
                            volume_capability=capability,
                            volume_context=volume.volume_context,
                        )
                    )
                )
                times["NodeUnpublishVolume"].append(
                    _timed(lambda: call("Node", "NodeUnpublishVolume", **common, target_path=target))
                )
        finally:
            call("Node", "NodeUnpublishVolume", **common, target_path=target)
            call("Node", "NodeUnstageVolume", **common, staging_target_path=staging)
            call("Controller", "DeleteVolume", **common)
            shutil.rmtree(place, ignore_errors=True)
    return [_figure(name, taken) for name, taken in times.items()]


def _caller(channel: grpc.Channel) -> Callable[..., Any]:
    def call(service: str, method: str, **fields: Any) -> Any:
        request, response = getattr(csi_pb2, f"{method}Request"), getattr(csi_pb2, f"{method}Response")
        ask = channel.unary_unary(
            f"/csi.v1.{service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return ask(request(**fields), timeout=60.0)

    return call


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def _figure(name: str, taken: list[float]) -> Figure:
    ordered = sorted(taken)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Figure(call=name, p50=round(ordered[len(ordered) // 2], 2), p99=round(p99, 2), samples=len(ordered))
