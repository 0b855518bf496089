"""Every example applied to the real cluster, and what became of it, as a table: `python -m tests.cluster.examples`."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster import images, installed
from tests.cluster.cluster import Cluster
from tests.cluster.installed import ROOT
from tests.cluster.machines import Broken
from tests.cluster.node import Settings
from tests.cluster.units import kata_configuration

_SANDBOXED = re.compile(r"# runtimeClassName: kata$", re.MULTILINE)
EXAMPLES = ROOT / "deploy/examples"
TABLE = ROOT / "docs/examples.md"
# In this order: what is made from block.yaml's claim needs it, without its pod where blocks are not shared.
ORDER = ("runtimeclass", "block", "raw-block", "directory", "ephemeral", "statefulset", "snapshot", "clone", "nfs")
_HEAD = """# Examples

Each file of `deploy/examples` as it was applied to a real Kubernetes 1.36 with one node (ext4, no NFS client in its kernel), and what became
of it: as it is, and with `runtimeClassName` uncommented, in QEMU guests without hardware virtualization, which take their time to boot.
The example for NFS names a server that there is not, until yours stands in it. Made by `python -m tests.cluster.examples`.

| example | what it shows | with runc | seconds until its pods run | in a sandbox | seconds |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Outcome:
    """`seconds` until all pods of the example were ready; None if they are not, and `said` tells why."""

    name: str
    shows: str
    seconds: float | None
    said: str


def outcomes(cluster: Cluster, seconds: float = 60.0, *, sandboxed: bool = False) -> list[Outcome]:
    """One after the other; everything is deleted again at the end. `sandboxed`: those that say so, in a sandbox."""
    found = []
    if sandboxed:
        cluster.apply(EXAMPLES / "runtimeclass.yaml")
    for name in ORDER:
        if name == "snapshot":
            cluster.delete("pod", "runvol-example")
        if sandboxed and not _SANDBOXED.search((EXAMPLES / f"{name}.yaml").read_text()):
            continue
        found.append(_outcome(cluster, name, seconds, sandboxed))
    for name in reversed(ORDER):
        cluster.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", EXAMPLES / f"{name}.yaml")
    cluster.kubectl("delete", "pvc", "--all", "--wait=false")
    cluster.wait("no volume is left", lambda: not cluster.list("pv"), 120)
    return found


def _outcome(cluster: Cluster, name: str, seconds: float, sandboxed: bool) -> Outcome:
    text = (EXAMPLES / f"{name}.yaml").read_text()
    if sandboxed:
        text = _SANDBOXED.sub("runtimeClassName: kata", text)
    shows = " ".join(line.lstrip("# ") for line in text.split("\napiVersion")[0].splitlines() if line.startswith("#"))
    # The one image that nodes have here.
    objects = text.replace("image: busybox:stable", f"image: {images.BUSYBOX}\n{{}}imagePullPolicy: Never")
    indented = objects.replace("{}", " " * 10 if name == "statefulset" else " " * 6)
    began = time.monotonic()
    cluster.apply(indented)
    pods = [f"statefulset-{number}" for number in range(2)] if name == "statefulset" else [
        one["metadata"]["name"] for one in yaml.safe_load_all(text) if one["kind"] == "Pod"
    ]  # fmt: skip
    try:
        for pod in pods:
            cluster.wait_ready(pod, seconds=seconds if name != "nfs" else 40)
        return Outcome(name, shows, time.monotonic() - began, "its pods run" if pods else "is taken")
    except Broken:
        return Outcome(name, shows, None, _why(cluster, [*pods, name]))


def _why(cluster: Cluster, names: list[str]) -> str:
    """What the events say at last of why pods do not run. That they wait for their claims is said meanwhile, and the
    claims' own event may take its time: a name that is not resolved has a minute."""

    def said() -> list[str]:
        return [event for name in names for event in cluster.events(name)
                if "Failed" in event and not event.startswith("FailedScheduling")]  # fmt: skip

    try:
        return cluster.wait(f"events say why {names[0]} does not run", said, 90)[-1][:300]
    except Broken:
        waiting = [event for name in names for event in cluster.events(name) if "Failed" in event]
        return waiting[-1][:300] if waiting else "its pods do not run"


def table(found: list[Outcome], sandboxed: list[Outcome]) -> str:
    beside = {one.name: one for one in sandboxed}
    rows = [
        f"| [{one.name}.yaml](../deploy/examples/{one.name}.yaml) | {one.shows} | {_cells(one)} | {_cells(beside.get(one.name))} |\n"
        for one in found
    ]
    return _HEAD + "".join(rows)


def _cells(one: Outcome | None) -> str:
    if one is None:
        return "|"
    return f"{one.said.replace('|', '/')} | {'' if one.seconds is None else f'{one.seconds:.0f}'}"


def main() -> None:
    settings = Settings(kata={"kata": kata_configuration()}, labels={"katacontainers.io/kata-runtime": "true"})
    with Cluster(Path(tempfile.mkdtemp(prefix="ex-")), [settings]) as cluster:
        installed.snapshot_crds(cluster)
        installed.import_images(cluster, cluster.nodes[0])
        installed.install(cluster, installed.values(cluster.nodes[0]))
        written = table(outcomes(cluster), outcomes(cluster, 180.0, sandboxed=True))
    TABLE.write_text(written)
    sys.stdout.write(written)


if __name__ == "__main__":
    main()
