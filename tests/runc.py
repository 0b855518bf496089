"""A container by the real runc, as containerd's CRI plugin asks for it when kubelet has mounted a volume."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from blockdev import syscalls

# Where a pod with a user namespace has its users, of which kubelet gives each pod as many.
USERS, COUNT = 65536, 65536
_MODULE = Path(__file__).with_name("prepare") / "runc" / "go.mod"


def program() -> Path:
    """The one that `tests/prepare/go.sh` builds: Debian's makes no idmapped mounts."""
    version = re.search(r"opencontainers/runc (v\S+)", _MODULE.read_text())
    assert version
    cache = Path(os.environ.get("RUNVOL_CACHE", Path.home() / ".cache" / "runvol"))
    found = cache / "bin" / f"runc-{version[1]}"
    if not found.exists():
        pytest.skip("runc is not prepared: run tests/prepare/go.sh")
    return found


def run(
    volume: str, script: str, *, host_users: bool = True, mapped: bool = True, options: tuple[str, ...] = ("rw",)
) -> subprocess.CompletedProcess[str]:
    """What a container says whose shell runs `script` as root, with the volume at /data.

    `host_users`: its users are the node's. `mapped`: the volume's owners are its users, where it has some of its own.
    `options`: as CRI has them beside `rbind` and `rprivate`: rw, ro or rro.
    """
    runc = program()
    # Whoever the container's root is on the node has to get there.
    root = Path(tempfile.mkdtemp(prefix="rv-runc-", dir="/var/tmp"))
    try:
        root.chmod(0o755)
        _fill(root / "rootfs", owner=0 if host_users else USERS)
        (root / "config.json").write_text(json.dumps(_spec(volume, script, host_users, mapped, options)))
        words = [str(runc), "--root", str(root / "state"), "run", "--bundle", str(root), root.name]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    finally:
        shutil.rmtree(root)


def _fill(rootfs: Path, *, owner: int) -> None:
    for place in ("bin", "data", "proc"):
        (rootfs / place).mkdir(parents=True)
    shutil.copy("/bin/busybox", rootfs / "bin/busybox")
    for name in ("sh", "stat", "touch", "cat", "ls"):
        (rootfs / "bin" / name).symlink_to("busybox")
    for path in (rootfs, *rootfs.rglob("*")):
        os.chown(path, owner, owner, follow_symlinks=False)


def _spec(volume: str, script: str, host_users: bool, mapped: bool, options: tuple[str, ...]) -> dict[str, object]:
    mapping = [{"containerID": 0, "hostID": USERS, "size": COUNT}]
    users = {} if host_users else {"uidMappings": mapping, "gidMappings": mapping}
    kinds = ["pid", "mount", "ipc", "uts", *(() if host_users else ("user",))]
    data = {"destination": "/data", "type": "bind", "source": volume, "options": ["rbind", "rprivate", *options]}
    return {
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {**data, **(users if mapped else {})},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds], **users},
    }


def mounted(source: str, target: Path, fstype: str, data: str = "") -> None:
    """mount(2), for a test's own."""
    target.mkdir(parents=True, exist_ok=True)
    syscalls.mount(source, str(target), fstype, 0, data)
