"""What is run and what is not: driver files, one a backend, and the tests that are left out, with the reason of each."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Why a test is left out: the machine lacks something, or the driver is not meant to do it.
KINDS = ("environment", "design")
# What cannot be run on the tests' cluster, and why; its file is for clusters that can.
ELSEWHERE = {"nfs": "the nodes share this machine's kernel, which need not have an NFS client"}
# Of a driver file that differs from another one in its class alone only what depends on that is run.
ONLY = {"loop-xfs": "volume-expand|should support expansion|larger size pvc"}


@dataclass(frozen=True)
class LeftOut:
    """Tests that match `tests` are not run for these backends; for all of them if none is named."""

    tests: str
    kind: str
    reason: str
    backends: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        return re.search(self.tests, name) is not None


def backends() -> list[str]:
    """Those with a driver file."""
    return sorted(path.stem for path in (HERE / "drivers").glob("*.yaml"))


def driver(backend: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(driver_file(backend).read_text())
    return found


def driver_file(backend: str) -> Path:
    return HERE / "drivers" / f"{backend}.yaml"


def left_out(backend: str = "") -> list[LeftOut]:
    """All, or a backend's, in the file's order: of two that match one test the first is its reason."""
    rows = tomllib.loads((HERE / "left_out.toml").read_text())["left_out"]
    found = [LeftOut(**{**row, "backends": tuple(row.get("backends", ()))}) for row in rows]
    return [one for one in found if not backend or not one.backends or backend in one.backends]


def recorded_file(backend: str) -> Path:
    return HERE / "recorded" / f"{backend}.txt"


def recorded(backend: str) -> set[str]:
    """The tests that have to pass."""
    path = recorded_file(backend)
    return set(path.read_text().splitlines()) if path.exists() else set()
