"""The chart as plain manifests, for clusters without Helm: `python -m tests.cluster.manifests` writes deploy/manifests."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster import programs
from tests.cluster.installed import CHART, ROOT

PLACE = ROOT / "deploy/manifests"
# Which values make which file.
FILES = {
    "runvol.yaml": (),
    "runvol-with-snapshots.yaml": ("--set", "snapshots.enabled=true", "--set", "snapshots.controller=true"),
    "runvol-with-flexvolume.yaml": ("--set", "flexvolume.enabled=true"),
    "runvol-with-nri.yaml": ("--set", "nri.enabled=true"),
}
_HEAD = """# Made from deploy/helm/runvol by `python -m tests.cluster.manifests`; change that, not this.
apiVersion: v1
kind: Namespace
metadata:
  name: runvol-system
"""


def rendered(name: str) -> str:
    """One of the files."""
    objects = [one.strip("\n") for one in templated("--skip-tests", *FILES[name]).split("\n---\n")]
    return _HEAD + "".join(f"---\n{_placed(one)}\n" for one in objects if one.strip())


def templated(*words: str) -> str:
    """What Helm makes of the chart; `words` are more of its own."""
    argv = [programs.program("helm"), "template", "runvol", CHART, "--namespace", "runvol-system", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def _placed(text: str) -> str:
    """In its namespace: Helm says that beside what it renders."""
    lines = [line for line in text.removeprefix("---\n").splitlines() if not line.startswith("# Source:") and line]
    kind = next(line.removeprefix("kind: ") for line in lines if line.startswith("kind: "))
    if kind in ("ServiceAccount", "ConfigMap", "Role", "RoleBinding", "DaemonSet", "Deployment"):
        lines.insert(lines.index("metadata:") + 1, "  namespace: runvol-system")
    return "\n".join(lines)


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    for name in FILES:
        Path(PLACE / name).write_text(rendered(name))


if __name__ == "__main__":
    main()
