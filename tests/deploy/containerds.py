"""Containerds of several versions, and what each makes of a configuration file (`containerd config dump`)."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.__main__ import cache

# As tests/prepare/go.sh and containerds.sh name them.
VERSIONS = ("v1.6.20", "v1.7.33", "v2.4.2")


def program(version: str) -> Path:
    found = cache() / "bin" / f"containerd-{version}" / "containerd"
    if not found.exists():
        pytest.skip(f"containerd {version} is not prepared: run tests/prepare/containerds.sh")
    return found


def dump(version: str, file: Path | None) -> subprocess.CompletedProcess[str]:
    """Of the file with all that it imports; None for what this containerd has without a file."""
    said = ["config", "default"] if file is None else ["-c", str(file), "config", "dump"]
    return subprocess.run([program(version), *said], capture_output=True, text=True, timeout=60, check=False)


def dumped(version: str, file: Path | None) -> dict[str, Any]:
    done = dump(version, file)
    assert done.returncode == 0, done.stderr
    return tomllib.loads(done.stdout)


def leaves(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value, with its whole name."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, found
