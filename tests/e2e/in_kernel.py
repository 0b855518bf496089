"""The same run in a user-mode kernel, for what this machine's kernel lacks: an NFS client, and a server beside the cluster.

Whole Kubernetes runs in it, on its one processor.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import ganesha
from tests.e2e import definitions
from tests.kernel.__main__ import cache, compile_all
from tests.kernel.uml import Machine

# Bytes, sparse: what nodes and volumes write. Memory is taken as it is used.
_DISK, _MEMORY = 40 << 30, "8G"
_LIMIT = 3 * 3600.0
# A kernel of this kind does not tell kubelet of its processor what every other one does.
_PREPARE = """
set -e
mkfs.ext4 -q /dev/ubda
mkdir -p /mnt/e2e
mount /dev/ubda /mnt/e2e
{ sed '/^$/d' /proc/cpuinfo; printf 'cpu MHz\\t\\t: 1000.000\\n'; } > /run/cpuinfo
mount --bind /run/cpuinfo /proc/cpuinfo
for module in bridge veth overlay xfs; do /run/kernel/modprobe "$module"; done
export TMPDIR=/mnt/e2e
"""


def is_on_nfs(backend: str) -> bool:
    return str(definitions.driver(backend)["DriverInfo"]["Name"]).startswith("nfs.")


def is_needed(backend: str) -> bool:
    """Whether this machine's kernel cannot mount what the backend's volumes are."""
    return is_on_nfs(backend) and "nfs4" not in Path("/proc/filesystems").read_text()


def run(backends: Sequence[str], reports: Path, *, focus: Sequence[str] = ()) -> int:
    """The reports of these backends, into a directory; the status of the run in there: 1 if anything failed or is left."""
    compile_all()
    scratch = Path(tempfile.mkdtemp(prefix="runvol-e2e-disk-"))
    disk = scratch / "disk"
    with disk.open("wb") as file:
        file.truncate(_DISK)
    try:
        with Machine(memory=_MEMORY, disks=[disk]) as machine:
            words = [sys.executable, "-m", "tests.e2e", *backends, "--here", "--procs=2", "--reports=/mnt/jobs/reports"]
            words += [f"--focus={one}" for one in focus]
            variables = f"RUNVOL_NFS={shlex.quote(str(ganesha.tree()))} RUNVOL_CACHE={shlex.quote(str(cache()))}"
            script = f"{_PREPARE}cd {shlex.quote(str(definitions.ROOT))}\nexec env {variables} {shlex.join(words)}\n"
            status = machine.run(script, limit=_LIMIT, ok=None, show=True).code
            shutil.copytree(machine.jobs / "reports", reports, dirs_exist_ok=True)
            return status
    finally:
        shutil.rmtree(scratch)
