"""Where the programs of the cluster are: `tests/prepare/cluster.sh` and `go.sh` build them into the cache."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

MODULES = Path(__file__).with_name("programs")
NOT_BUILT = "the programs of the cluster tier are not built; run `make test-cluster`"
# What each directory of the cache holds, and what Debian has.
BUILT = {
    "etcd": ("etcd",),
    "kubernetes": ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl"),
    "cni": ("bridge", "loopback", "host-local"),
    "csi-provisioner": ("csi-provisioner",),
    "csi-resizer": ("csi-resizer",),
    "csi-snapshotter": ("csi-snapshotter", "snapshot-controller", "crds"),
    "helm": ("helm",),
    "containerd": ("containerd", "containerd-shim-runc-v2", "ctr"),
}
INSTALLED = ("runc", "busybox", "openssl", "ip", "nsenter", "unshare")


def directory(name: str) -> Path:
    """The directory of one build in the cache, in the version that this tree asks for."""
    cache = Path(os.environ.get("RUNVOL_CACHE", Path.home() / ".cache" / "runvol"))
    if name == "containerd":
        asked = re.search(r"^containerd=(v\S+)$", (MODULES.parents[1] / "prepare" / "go.sh").read_text(), re.MULTILINE)
    else:
        asked = re.search(r"^require [^ (]+ (v\S+)$", (MODULES / name / "go.mod").read_text(), re.MULTILINE)
    assert asked, f"no version of {name}"
    return cache / "bin" / f"{name}-{asked[1]}"


def program(name: str) -> Path:
    """The path of a program that was built."""
    return next(directory(build) / name for build, names in BUILT.items() if name in names)


def missing() -> list[str]:
    """What is not there of all that a cluster needs."""
    built = [name for names in BUILT.values() for name in names if not program(name).exists()]
    return built + [name for name in INSTALLED if shutil.which(name) is None]
