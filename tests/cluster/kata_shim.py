"""A containerd shim that runs a pod in a QEMU guest: the sandbox double behind containerd's runtime v2.

It is started as Kata's is, speaks the version of the protocol that Kata's shims do (task.v2, which containerd still asks
for where a shim prints nothing but an address), and reads Kata's configuration from ConfigPath or its usual places. The
root of a container is its image, shared by virtio-fs; its first process is pid 1 of the guest's namespaces.

The pod's network does not reach the guest; with `outward = true` in its table the guest reaches what the node does. There is neither a terminal nor a standard input. The pause container stands for the guest and is not run.
containerd's CRI plugin learns of an end by Wait alone, so no event is sent. When this process is killed the guest ends
with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = Path("/run/kata-containers/shared/sandboxes")


def directory(sandbox_id: str) -> Path:
    """Of a sandbox's sockets, whose paths have to be short."""
    return Path("/run/vc", sandbox_id[:16])


def main() -> None:
    kind, *words = sys.argv[1:]
    given = dict(zip(words[::2], words[1::2], strict=False))
    action = words[-1]
    if action == "start":
        start(kind, Path.cwd(), given["-id"])
    elif action == "delete":
        delete(Path(given["-bundle"]), given["-id"])
    else:
        sys.exit(f"{' '.join(words)}: nothing of this is known")


def start(kind: str, bundle: Path, container_id: str) -> None:
    """Prints the address of the pod's shim, which for the pod's first container is a new process."""
    notes = json.loads((bundle / "config.json").read_text()).get("annotations", {})
    if notes.get("io.kubernetes.cri.container-type") == "container":
        print((bundle.parent / notes["io.kubernetes.cri.sandbox-id"] / "address").read_text(), end="")
        return
    place = directory(container_id)
    place.mkdir(parents=True)
    path = place / "shim.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(16)
    (bundle / "address").write_text(f"unix://{path}")
    if os.fork():
        print(f"unix://{path}", end="")
        return
    os.setsid()
    os.chdir("/")
    with open(f"/var/log/kata-{container_id[:16]}.log", "ab") as log, open(os.devnull, "rb") as nothing:
        for fd, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(fd.fileno(), number)
    tempfile.tempdir = str(place)
    from tests.cluster import kata_task  # what takes its time, while containerd waits no more

    kata_task.serve(kind, listener, container_id)


def delete(bundle: Path, container_id: str) -> None:
    """What containerd calls for each container of a shim that is no more."""
    clean(bundle, container_id)
    # A DeleteResponse: its field 2 is the exit status.
    code = 128 + signal.SIGKILL
    sys.stdout.buffer.write(bytes([2 << 3, 0x80 | code & 0x7F, code >> 7]))


def clean(bundle: Path, container_id: str) -> None:
    """The mounts of a container or, if it is one, of a whole sandbox, and the sandbox's directory."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        at = Path(line.split()[4])
        if at == bundle / "rootfs" or at.is_relative_to(SHARED / container_id):
            subprocess.run(["umount", "-l", at], check=False)
    subprocess.run(["rm", "-rf", "--one-file-system", SHARED / container_id, directory(container_id)], check=False)


if __name__ == "__main__":
    main()
