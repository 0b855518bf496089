"""Pods that write all the time, and what they have written."""

from __future__ import annotations

from typing import Any

from tests.cluster.cluster import Cluster, pod


def writer(name: str) -> dict[str, Any]:
    """Writes a number each half second, on and on from where it was."""
    script = ("n=$(tail -n 1 /data/f 2>/dev/null || echo 0); while :; do n=$((n + 1)); echo $n >> /data/f || exit 1; "
              "sync /data/f; sleep 0.5; done & wait")  # fmt: skip
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": name}}]
    return pod(name, script, volumes=volumes, main={"volumeMounts": [{"name": "data", "mountPath": "/data"}]})


def written(cluster: Cluster, name: str) -> int:
    """How many numbers there are; each is one more than the one before."""
    # A kubelet that has just started knows its pods a moment later.
    text = cluster.wait(f"{name} tells", lambda: cluster.kubectl("exec", name, "--", "cat", "/data/f"), 20)
    lines = [int(one) for one in text.split()]
    assert lines == [*range(1, len(lines) + 1)]
    return len(lines)
