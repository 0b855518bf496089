"""A release of before, out of the history: its tree with its stubs, kept in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.installed import ROOT

# The first one whose volumes somebody has.
FIRST = "0a42ffb"


def has(commit: str) -> bool:
    """Whether the history goes back so far; a shallow clone's does not."""
    return (
        subprocess.run(["git", "-C", ROOT, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True).returncode
        == 0
    )


def tree(commit: str) -> Path:
    """The directory in which `python -m runvol` is that release."""
    place = Path(os.environ.get("RUNVOL_CACHE", Path.home() / ".cache/runvol")) / "releases" / commit
    if not place.exists():
        new = place.with_name(f"{commit}.{os.getpid()}.new")
        new.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", new], input=archive, check=True)
        subprocess.run([sys.executable, "setup.py", "-q", "build_py"], cwd=new, check=True, capture_output=True)
        new.rename(place)
    return place
