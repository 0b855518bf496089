"""nfs-ganesha, an NFS server that is a process: it can be killed and frozen, and runs where the kernel has no server.

It is unpacked, not installed, and sees an /etc, /run and /var/lib of its own, in a private mount namespace.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

PSEUDO = "/exp"
# Its own view of the machine, then a portmapper if version 3 is wanted, then the server in the shell's place.
_START = """
set -e
mount --make-rprivate /
mount -t tmpfs none /run
mkdir -p /run/etc /run/rpcbind /run/ganesha
{ grep -v '^_rpc:' /etc/passwd; echo '_rpc:x:0:0::/run/rpcbind:/bin/false'; } > /run/etc/passwd
mount -t overlay -o "lowerdir=/run/etc:$TREE/etc:/etc" none /etc
mount -t tmpfs none /var/lib
mkdir -p /var/lib/nfs/ganesha
if [ "$PROTOCOLS" != 4 ]; then
    rpcbind=$TREE/sbin/rpcbind
    [ -e "$rpcbind" ] || rpcbind=$TREE/usr/sbin/rpcbind
    "$rpcbind" -f &
    while [ ! -S /run/rpcbind.sock ]; do sleep 0.1; done
fi
exec "$TREE/usr/bin/ganesha.nfsd" "$@"
"""


class Ganesha:
    """One server of one directory, exported as PSEUDO (version 3: by its own path too). A context manager."""

    def __init__(
        self, directory: Path, root: Path, *, tree: Path, prefix: tuple[str, ...] = (), protocols: str = "4"
    ) -> None:
        self.directory, self.root, self._prefix = directory, root, prefix
        library = tree / "usr/lib/x86_64-linux-gnu"
        places = (library, tree / "lib/x86_64-linux-gnu", tree / "usr/lib/ganesha", library / "libnfsidmap")
        self._environment = {
            **os.environ, "LD_LIBRARY_PATH": ":".join(map(str, places)), "TREE": str(tree), "PROTOCOLS": protocols,
        }  # fmt: skip
        (directory / "idmapd.conf").write_text("[General]\nDomain=localdomain\n[Translation]\nMethod=static\n")
        (directory / "conf").write_text(f"""
NFS_CORE_PARAM {{ Plugins_Dir = {library}/ganesha; Protocols = {protocols}; Enable_NLM = false; Enable_RQUOTA = false; }}
NFSv4 {{ Lease_Lifetime = 10; Graceless = true; Minor_Versions = 0,1,2; RecoveryRoot = {directory};
  IdmapConf = {directory}/idmapd.conf; Only_Numeric_Owners = true; }}
EXPORT {{ Export_Id = 1; Path = {root}; Pseudo = {PSEUDO}; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
  FSAL {{ Name = VFS; }} }}
""")
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Ganesha:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        """It answers when this returns."""
        log = self.directory / "log"
        arguments = ["-F", "-f", self.directory / "conf", "-L", log, "-N", "EVENT", "-p", self.directory / "pid"]
        with open(self.directory / "start", "wb") as said:
            self.process = subprocess.Popen(
                [*self._prefix, "unshare", "--mount", "sh", "-c", _START, "ganesha", *arguments], env=self._environment,
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + 30
        while not (log.exists() and "NFS SERVER INITIALIZED" in log.read_text()):
            if time.monotonic() > until or self.process.poll() is not None:
                told = log.read_text() if log.exists() else ""
                raise RuntimeError(f"nfs-ganesha: {(self.directory / 'start').read_text()[-1000:]}{told[-2000:]}")
            time.sleep(0.1)
        log.rename(self.directory / "log.old")

    def signal(self, number: int) -> None:
        """To the server; a killed one has ended when this returns."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        """The server, and the portmapper beside it."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            self.process.wait()


def tree() -> Path:
    """Where the servers are unpacked; RuntimeError with what to run if they are not."""
    cache = Path(os.environ.get("RUNVOL_CACHE", Path.home() / ".cache" / "runvol"))
    found = sorted(cache.glob("nfs/*/.whole"))
    if not found:
        raise RuntimeError("the NFS servers are not unpacked; run tests/prepare/nfs.sh")
    return found[-1].parent
