"""What earlier releases have left on disks, kept as they left it."""

from __future__ import annotations

import subprocess
from pathlib import Path

LOWER, UPPER = f"k8s.io/1/sha256:{'aa' * 32}", f"k8s.io/2/sha256:{'bb' * 32}"
CONTAINER, VIEW, INTENT = "k8s.io/3/container", "k8s.io/4/view", "k8s.io/6/intent"
# Of the removed snapshot, and of the intent.
DOOMED, INTENDED = 6, 7
_THEN = b"/var/lib/old/"


def unpack(directory: Path) -> Path:
    """A pool of two files and the state of its snapshotter; the state's directory."""
    archive = Path(__file__).with_name("pool.tar.xz")
    subprocess.run(["tar", "-C", str(directory), "-xJf", str(archive)], check=True)
    described = directory / "state" / "pool.json"
    described.write_bytes(described.read_bytes().replace(_THEN, f"{directory}/".encode()))
    return directory / "state"
