"""A hundred pods with a claim each at once, beside the same pods with an emptyDir: `python -m tests.cluster.many`.

Two rounds of each in turns, on one node; the figures go to bench-results/many_pods.json.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.demo.report import machine
from tests.cluster import installed
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.node import Settings

PODS, ROUNDS = int(os.environ.get("RUNVOL_PODS", "100")), 2
RESULTS = installed.ROOT / "bench-results/many_pods.json"
_CALL = re.compile(r'rpc="(?P<rpc>\w+)".* code="(?P<code>\w+)" ms=(?P<ms>[\d.]+)')


def _pod(name: str, volume: dict[str, Any]) -> dict[str, Any]:
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    return pod(name, "date > /data/f; sleep 1000000 & wait", volumes=[{"name": "data", **volume}], main=mounts)


def _round(cluster: Cluster, prefix: str, *, claims: bool) -> float:
    """Seconds from the first object until the last pod is Ready; all are gone afterwards."""
    names = [f"{prefix}-{number}" for number in range(PODS)]
    objects: list[dict[str, Any]] = []
    for name in names:
        objects += [claim(name, storageClassName="runvol")] if claims else []
        objects.append(_pod(name, {"persistentVolumeClaim": {"claimName": name}} if claims else {"emptyDir": {}}))
    began = time.monotonic()
    cluster.apply({"apiVersion": "v1", "kind": "List", "items": objects})

    def ready() -> bool:
        text = cluster.kubectl(
            "get", "pods", "-o", "jsonpath={range .items[*]}{.status.containerStatuses[0].ready} {end}"
        )
        return text.split().count("true") == PODS

    cluster.wait("all pods are Ready", ready, 900)
    seconds = time.monotonic() - began
    cluster.kubectl("delete", "pods", "--all", "--wait=false")
    cluster.wait("all pods are gone", lambda: not cluster.list("pods"), 600)
    cluster.kubectl("delete", "pvc", "--all", "--wait=false")
    cluster.wait("all volumes are gone", lambda: not cluster.list("pv"), 600)
    return seconds


def _calls(cluster: Cluster) -> dict[str, dict[str, float]]:
    words = ("logs", f"daemonset/{installed.NAME}-node", "-n", installed.NAMESPACE, "-c", "runvol", "--tail=-1")
    found: dict[str, list[float]] = {}
    for line in cluster.kubectl(*words, timeout=120).splitlines():
        match = _CALL.search(line)
        if match and match["code"] == "OK":
            found.setdefault(match["rpc"], []).append(float(match["ms"]))
    return {
        rpc: {
            "calls": len(ms),
            "p50_ms": round(statistics.median(ms), 1),
            "p99_ms": round(sorted(ms)[len(ms) * 99 // 100], 1),
        }
        for rpc, ms in sorted(found.items())
        if len(ms) >= PODS
    }


def _resident(cluster: Cluster) -> int:
    """MiB of the plugin's process."""
    words = ("exec", f"daemonset/{installed.NAME}-node", "-n", installed.NAMESPACE, "-c", "runvol", "--", "sh", "-c",
             "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline | grep -q '^/usr/bin/python3 .*runvol csi' "
             "&& grep VmRSS $p/status; done; true")  # fmt: skip
    return max(int(line.split()[1]) for line in cluster.kubectl(*words).splitlines() if "VmRSS" in line) // 1024


def main() -> None:
    settings = Settings(kubelet={"maxPods": 250, "registryPullQPS": 0, "kubeAPIQPS": 200, "kubeAPIBurst": 400})
    with Cluster(Path(tempfile.mkdtemp(prefix="m-")), [settings]) as cluster:
        installed.import_images(cluster, cluster.nodes[0])
        values = installed.values(cluster.nodes[0], snapshots={"enabled": False})
        installed.install(cluster, values)
        with_claims, without = [], []
        for number in range(ROUNDS):
            without.append(_round(cluster, f"e{number}", claims=False))
            with_claims.append(_round(cluster, f"c{number}", claims=True))
            print(
                f"round {number + 1}: {with_claims[-1]:.0f} s with claims, {without[-1]:.0f} s with emptyDir",
                flush=True,
            )
        figures = {
            "machine": machine(), "pods": PODS, "seconds_with_claims": with_claims, "seconds_with_empty_dir": without,
            "ratio": round(statistics.median(with_claims) / statistics.median(without), 2),
            "resident_mib": _resident(cluster), "calls": _calls(cluster),
        }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    json.dump(figures, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
