"""Runs in the user-mode kernel: makes a root filesystem on a thin device and serves it over NBD; later looks at it.

serve ADDRESS     prints `ready FSTYPE OPTIONS` once a guest may take the device
look              prints what the guest has left, after the device was given back
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.kernel.inside_power import MIB, Mapper, Node, Settings, Wish, assembly, mounted, soon

SETTINGS = Settings(state_dir="/run/hotplug/state", size=128 * MIB)


def opened() -> Node:
    if not Path("/run/hotplug/state/pool.made").exists():
        with Mapper() as mapper:
            assembly.init(mapper, SETTINGS.state_dir, Wish(name="hotplug", device="/dev/ubdb"), soon())
    node = Node(SETTINGS)
    node.open_pool()
    node.recover()
    return node


def serve(address: str) -> None:
    node = opened()
    with mounted(node.snapshots.prepare("making", "", {}, soon())) as root:
        for directory in ("bin", "etc", "proc", "sys", "dev", "tmp", "run"):
            (root / directory).mkdir()
        shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
        for name in ("sh", "cat", "sync", "ls", "sleep"):
            (root / "bin" / name).symlink_to("busybox")
        (root / "etc/hello").write_text("from the image\n")
    node.snapshots.commit("image", "making", {}, "", soon())
    (mount,) = node.snapshots.prepare("container", "image", {}, soon())
    subprocess.Popen(["qemu-nbd", "-f", "raw", "-b", address, "-p", "10809", "-t", "--cache=none", mount.source])
    time.sleep(1)
    print("ready", mount.fstype, ",".join(mount.options), flush=True)


def look() -> None:
    node = opened()
    with mounted(node.snapshots.mounts("container", soon())) as root:
        print((root / "etc/left").read_text())
    with mounted(node.snapshots.prepare("second", "image", {}, soon())) as root:
        print(sorted(path.name for path in (root / "etc").iterdir()))
    node.snapshots.commit("changed", "container", {}, "", soon())
    with mounted(node.snapshots.prepare("third", "changed", {}, soon())) as root:
        print((root / "etc/left").read_text())


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else look()
