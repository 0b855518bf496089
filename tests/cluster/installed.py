"""runvol in the cluster, as its users install it: from its own image, by its Helm chart, with the Kubernetes sidecars."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cluster import images, programs
from tests.cluster.cluster import Cluster
from tests.cluster.machines import Broken
from tests.cluster.node import Node

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/runvol"
NAME, NAMESPACE = "runvol", "runvol-system"
_SIDECARS = {"provisioner": "csi-provisioner", "resizer": "csi-resizer", "snapshotter": "csi-snapshotter",
             "snapshotController": "snapshot-controller"}  # fmt: skip
_KEPT = 4
_REGISTRY = "localhost/sidecars"
# What goes into the image.
_SOURCES = ("blockdev", "volumes", "guestmount", "csi", "flexvolume", "snapshotter", "runvol", "proto", "deploy/image",
            "pyproject.toml", "setup.py")  # fmt: skip


def image(kept: Path | None = None) -> Path:
    """runvol's image as a tar, of this tree; built only if no earlier one was of the same."""
    cache = kept or Path(os.environ.get("RUNVOL_CACHE", Path.home() / ".cache/runvol")) / "images"
    path = cache / f"runvol-{_digest()}.tar"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        new = cache / f"runvol-{os.getpid()}.new.tar"
        build = [sys.executable, ROOT / "deploy/image/build.py", "--output", new, "--name", "localhost/runvol:tests"]
        subprocess.run([*build, "--cache", cache], check=True)
        new.rename(path)
        # Other trees beside this one have theirs.
        for old in sorted(cache.glob("runvol-*.tar"), key=lambda one: one.stat().st_mtime)[:-_KEPT]:
            old.unlink()
    return path


def _digest() -> str:
    found = hashlib.sha256()
    for source in _SOURCES:
        place = ROOT / source
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def import_images(cluster: Cluster, node: Node) -> None:
    """Everything that the chart's pods need on this node, from no registry."""
    node.import_image(image())
    for name in _SIDECARS.values():
        archive = cluster.directory / "images" / f"{name}.tar"
        if not archive.exists():
            content = images.layer({name: programs.program(name)})
            images.write_archive(archive, f"{_REGISTRY}/{name}:tests", [content], entrypoint=[f"/{name}"])
        node.import_image(archive)


def snapshot_crds(cluster: Cluster) -> None:
    """Those that a cluster without them is given."""
    cluster.apply(ROOT / "deploy/crds/volumesnapshots.yaml")
    cluster.wait("the API has VolumeSnapshots", lambda: "volumesnapshots" in cluster.kubectl("api-resources"))


def values(node: Node, **more: Any) -> dict[str, Any]:
    """What differs here from a usual cluster: images are local, and the node's directories are the tests'."""
    return {
        "image": {"repository": "localhost/runvol", "tag": "tests", "pullPolicy": "Never"},
        "sidecars": {"registry": _REGISTRY, "pullPolicy": "Never", **dict.fromkeys(_SIDECARS, "tests")},
        "kubeletDir": str(node.root),
        "snapshots": {"controller": True},
        # The kernel lets whoever has no CAP_SYS_RESOURCE grow a mounted XFS, and no ext4.
        "storageClasses": [
            {"name": name, "parameters": {"backend": "loop", "csi.storage.k8s.io/fstype": fstype}}
            for name, fstype in (("runvol", "ext4"), ("runvol-xfs", "xfs"))
        ],
        **more,
    }


def helm(cluster: Cluster, *words: str | Path, timeout: float = 300.0) -> str:
    """What helm prints."""
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig), "HELM_CACHE_HOME": f"{cluster.directory}/helm",
                   "HELM_CONFIG_HOME": f"{cluster.directory}/helm", "HELM_DATA_HOME": f"{cluster.directory}/helm"}  # fmt: skip
    done = subprocess.run([programs.program("helm"), *map(str, words)], capture_output=True, text=True, timeout=timeout,
                          env=environment, check=False)  # fmt: skip
    if done.returncode:
        raise Broken(f"helm {' '.join(map(str, words))}: {done.stdout}{done.stderr}")
    return done.stdout


def install(cluster: Cluster, given: dict[str, Any], *words: str, seconds: float = 180.0) -> None:
    """The chart's release, and all of its pods are ready; `words` are more of Helm's."""
    file = cluster.directory / "values.json"
    file.write_text(json.dumps(given))
    helm(cluster, "upgrade", "--install", NAME, CHART, "--namespace", NAMESPACE, "--create-namespace", "--values", file,
         *words)  # fmt: skip
    wait_ready(cluster, seconds)


def uninstall(cluster: Cluster) -> None:
    helm(cluster, "uninstall", NAME, "--namespace", NAMESPACE, "--wait")


def wait_ready(cluster: Cluster, seconds: float = 180.0) -> None:
    """All pods of the release are as wanted."""

    def ready() -> bool:
        return all(
            status.get("observedGeneration") == generation and wanted and have == wanted
            for status, generation, wanted, have in _states(cluster)
        )

    try:
        cluster.wait("runvol's pods are ready", ready, seconds)
    except Exception as problem:
        raise Broken(f"{problem}\n{_pods(cluster)}") from None


def _states(cluster: Cluster) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    for kind, wanted, have in (("daemonset", "desiredNumberScheduled", "numberReady"),
                               ("deployment", "replicas", "readyReplicas")):  # fmt: skip
        for one in cluster.list(kind, f"--namespace={NAMESPACE}"):
            status = one["status"]
            yield status, one["metadata"]["generation"], status.get(wanted, 0), status.get(have, 0)


def _pods(cluster: Cluster) -> str:
    found = []
    for one in cluster.list("pods", f"--namespace={NAMESPACE}"):
        found.append(cluster.explain("pod", one["metadata"]["name"], NAMESPACE).split("programs:")[0])
    return "\n".join(found)


def drivers(cluster: Cluster, node: str = "node1") -> set[str]:
    """Those that kubelet of a node has registered."""
    found = cluster.find("csinode", node) or {"spec": {}}
    return {one["name"] for one in found["spec"].get("drivers") or ()}


def doctor(cluster: Cluster, node: str = "node1") -> list[dict[str, str]]:
    """The lines of `runvol doctor` in a node's pod. Broken: there is none that runs, or two while one is replaced."""
    found = cluster.list("pods", f"--namespace={NAMESPACE}", "--selector=app.kubernetes.io/component=node",
                         f"--field-selector=spec.nodeName={node}")  # fmt: skip
    plugins = [one["metadata"]["name"] for one in found if "deletionTimestamp" not in one["metadata"]]
    if len(plugins) != 1:
        raise Broken(f"runvol's pods on {node} are {plugins}, and one was wanted")
    words = ("exec", plugins[0], f"--namespace={NAMESPACE}", "-c", "runvol", "--", "sh", "-c",
             "runvol doctor --json || true")  # fmt: skip
    lines: list[dict[str, str]] = json.loads(cluster.kubectl(*words))["items"]
    return lines
