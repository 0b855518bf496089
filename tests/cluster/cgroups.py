"""A cgroup of the cluster's own, in every hierarchy that the machine has, with one below it for each node's pods."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from tests.cluster.machines import Broken

_MOUNT = Path("/sys/fs/cgroup")
_PREFIX = "runvol-cluster-"
_numbers = itertools.count(1)


def new_name() -> str:
    """A name that tells which process of the tests it belongs to."""
    return f"{_PREFIX}{os.getpid()}-{next(_numbers)}"


def is_v1() -> bool:
    return not (_MOUNT / "cgroup.controllers").exists()


def _hierarchies() -> list[Path]:
    return [path for path in _MOUNT.iterdir() if path.is_dir() and not path.is_symlink()] if is_v1() else [_MOUNT]


def make(name: str) -> None:
    """The cgroup `name`, such as `a/b`, with the processors and the controllers of those above it."""
    for hierarchy in _hierarchies():
        at = hierarchy
        for part in Path(name).parts:
            if (at / "cgroup.subtree_control").exists():
                given = (at / "cgroup.controllers").read_text().split()
                (at / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in given))
            above, at = at, at / part
            at.mkdir(exist_ok=True)
            for setting in ("cpuset.cpus", "cpuset.mems"):
                if is_v1() and (at / setting).exists():
                    (at / setting).write_text((above / setting).read_text())


def left(name: str) -> list[Path]:
    """What there is of a cgroup, in which hierarchies."""
    return [hierarchy / name for hierarchy in _hierarchies() if (hierarchy / name).exists()]


def remove_abandoned() -> None:
    """What clusters left whose tests were killed."""
    for hierarchy in _hierarchies():
        for path in hierarchy.glob(f"{_PREFIX}*"):
            if not Path("/proc", path.name.removeprefix(_PREFIX).partition("-")[0]).exists():
                remove(path.name)


def remove(name: str, seconds: float = 20.0) -> None:
    """The cgroup and all below it, once their processes are gone."""
    end = time.monotonic() + seconds
    while found := left(name):
        for top in found:
            for directory, _, _ in os.walk(top, topdown=False):
                try:
                    os.rmdir(directory)
                except OSError:  # a process is still ending
                    pass
        if left(name):
            if time.monotonic() > end:
                raise Broken(f"cgroups with processes in them: {left(name)}")
            time.sleep(0.05)
