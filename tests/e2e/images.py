"""The images that pods of Kubernetes' tests have, made here under the names by which the suite asks for them.

The suite's own are pulled from a registry, which there is none of: these have Debian's static busybox for their tools, and
agnhost is built from the same module as the suite. What they are missing of the real ones (curl, dig, iperf) no test of
storage calls.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from tests.cluster import images, programs


def names() -> dict[str, str]:
    """The image of each kind that the suite was built with."""
    argv = [programs.directory("e2e") / "suite.test", "-images"]
    found: dict[str, str] = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return found


def archives(directory: Path) -> list[Path]:
    """OCI archives of them all."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = {f"bin/{name}": "busybox" for name in applets if name != "busybox"}
    accounts = {"etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n", "etc/group": b"root:x:0:\n"}
    tools = images.layer({"bin/busybox": busybox, **accounts}, links)
    agnhost = images.layer({"agnhost": programs.directory("e2e") / "agnhost"})
    # A dd that knows `oflag=nocache`, which busybox has not, and a shell that does not take its own before it.
    of_glibc = {"usr/bin/dd": Path("/bin/dd"), "bin/sh": Path("/bin/dash").resolve()}
    glibc = images.layer({**of_glibc, **_libraries("/bin/dd"), **_libraries("/bin/dash")})
    layers = {"busybox": [tools], "nginx": [tools], "glibc": [tools, glibc]}
    found = []
    for kind, reference in names().items():
        path = directory / f"e2e-{kind}.tar"
        if kind in layers:
            images.write_archive(path, reference, layers[kind], command=["sh"])
        else:
            images.write_archive(path, reference, [tools, agnhost], entrypoint=["/agnhost"], command=["pause"])
        found.append(path)
    return found


def _libraries(program: str) -> dict[str, Path]:
    """What a program of this machine is linked with, by the paths that it is looked for at."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return {path.lstrip("/"): Path(path) for path in re.findall(r"(/\S+) \(0x", said)}
