"""The kernel's own NFS server in the user-mode kernel, for versions 3, 4.0, 4.1 and 4.2; the tools are unpacked, not installed.

Its root is exported with fsid=0, and holds a link that makes the same path mean the same in version 3 and 4.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import syscalls
from tests import ganesha
from tests.driver import Driver

ROOT = Path("/srv/export")
VERSIONS = ("3", "4.0", "4.1", "4.2")


def in_user_mode_kernel() -> bool:
    return Path("/run/kernel/modprobe").exists()


class KernelNfs:
    """One server a kernel; `start` may be called again after `stop`."""

    def __init__(self, disk: Path, *, size: int = 256 << 20) -> None:
        if not in_user_mode_kernel():
            pytest.skip("the NFS server covers /etc and /var/lib, which only a kernel of the tests' own allows")
        self.tree = Path(os.environ["RUNVOL_NFS"])
        libraries = ":".join(str(self.tree / place / "x86_64-linux-gnu") for place in ("usr/lib", "lib"))
        self._environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        self._daemons: list[int] = []
        self._prepare(disk, size)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, check=False, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def _tool(self, name: str) -> str:
        return str(next(path for place in ("usr/sbin", "sbin") if (path := self.tree / place / name).exists()))

    def _prepare(self, disk: Path, size: int) -> None:
        self._disk = disk
        if not Path("/run/etc").exists():
            etc = Path("/run/etc")
            etc.mkdir()
            (etc / "passwd").write_text(f"{Path('/etc/passwd').read_text()}_rpc:x:0:0::/run/rpcbind:/bin/false\n")
            # Others write below /etc as well, LVM for one.
            upper, work = Path("/run/etc-upper"), Path("/run/etc-work")
            upper.mkdir()
            work.mkdir()
            options = f"lowerdir={etc}:{self.tree}/etc:/etc,upperdir={upper},workdir={work}"
            self._run("mount", "-t", "overlay", "-o", options, "none", "/etc")
            self._run("modprobe", "-d", "/run/kernel", "-a", "nfsd", "nfs", "nfsv3", "nfsv4")
            self._run("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        for place in ("/var/lib/nfs/v4recovery", "/var/lib/nfs/sm", "/run/rpcbind", str(ROOT)):
            os.makedirs(place, exist_ok=True)
        Path("/var/lib/nfs/etab").touch()
        with open(disk, "wb") as opened:
            opened.truncate(size)
        self._run("mkfs.ext4", "-q", str(disk))
        self._run("mount", "-o", "loop", str(disk), str(ROOT))
        (ROOT / "srv").mkdir()
        (ROOT / "srv/export").symlink_to("..")

    def start(self) -> None:
        """The server answers; nothing happens if it does."""
        if int(Path("/proc/fs/nfsd/threads").read_text()):
            return
        first = not self._daemons
        if first:
            before = _pids()
            self._run(self._tool("rpcbind"))
            until = time.monotonic() + 20
            while not Path("/run/rpcbind.sock").exists():
                assert time.monotonic() < until, "rpcbind does not listen"
                time.sleep(0.1)
            time.sleep(0.3)
            self._run(
                self._tool("exportfs"), "-i", "-o", "rw,no_root_squash,no_subtree_check,insecure,fsid=0", f"*:{ROOT}"
            )
            self._run(self._tool("rpc.mountd"))
            self._daemons = sorted(_pids() - before)
        for grace in ("nfsv4gracetime", "nfsv4leasetime"):
            path = Path(f"/proc/fs/nfsd/{grace}")
            if path.exists():
                path.write_text("10")
        # lockd's grace period, 50 seconds without this, holds up version 4 as well. Nobody has anything to reclaim at first.
        Path("/proc/sys/fs/nfs/nlm_grace_period").write_text("1" if first else "10")
        self._run(self._tool("rpc.nfsd"), "-V", "3", "4")
        if first:
            Path("/proc/fs/nfsd/v4_end_grace").write_text("Y")

    def stop(self) -> None:
        """The server is gone; its clients wait for it."""
        self._run(self._tool("rpc.nfsd"), "0")

    def mount(
        self, target: Path, path: str = str(ROOT), *, version: str = "4.2", options: str = "soft,timeo=10,retrans=1"
    ) -> None:
        target.mkdir(parents=True, exist_ok=True)
        more = "mountaddr=127.0.0.1,mountproto=tcp,proto=tcp,nolock" if version == "3" else "clientaddr=127.0.0.1"
        syscalls.mount(f"127.0.0.1:{path}", str(target), "nfs" if version == "3" else "nfs4", 0,
                       f"vers={version},addr=127.0.0.1,{more},{options}")  # fmt: skip

    def close(self) -> None:
        """Nobody waits for the server afterwards, whatever a failed test has left mounted."""
        self.start()
        with open("/proc/self/mounts") as mounts:
            left = [line.split()[1] for line in mounts if line.startswith("127.0.0.1:")]
        for place in left:
            subprocess.run(["umount", "-f", "-l", place], check=False, capture_output=True)
        self.stop()
        self._run(self._tool("exportfs"), "-ua")
        for pid in self._daemons:
            os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            if subprocess.run(["umount", str(ROOT)], check=False, capture_output=True).returncode == 0:
                self._disk.unlink()
                return
            time.sleep(0.2)
        raise RuntimeError(f"{ROOT} is still in use")


class Drivers:
    """One driver for the tests of a file, as its start takes seconds here; after a test that left something, another."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._running = directory, list[Driver]()
        self._count = 0

    def lent(self) -> Iterator[Driver]:
        """For one test, which fails if it leaves something mounted."""
        if not self._running:
            self._count += 1
            driver = Driver(self._directory / str(self._count))
            driver.start()
            self._running.append(driver)
        (driver,) = self._running
        yield driver
        mounted = driver.mounts()
        if mounted or driver.process is None or driver.process.poll() is not None or any(driver.left_over().values()):
            self.end()
        assert not mounted, "left mounted"

    def end(self) -> None:
        while self._running:
            driver = self._running.pop()
            driver.stop()
            driver.remove()


class Ganesha(ganesha.Ganesha):
    """nfs-ganesha over a disk of its own. NFS 4 only, on the usual port."""

    def __init__(self, directory: Path) -> None:
        if not in_user_mode_kernel():
            pytest.skip("the NFS client's modules are loaded here, which only a kernel of the tests' own allows")
        root = directory / "export"
        root.mkdir(parents=True)
        super().__init__(directory, root, tree=Path(os.environ["RUNVOL_NFS"]))
        with open(directory / "disk", "wb") as opened:
            opened.truncate(256 << 20)
        subprocess.run(["mkfs.ext4", "-q", directory / "disk"], check=True)
        subprocess.run(["mount", "-o", "loop", directory / "disk", root], check=True)
        subprocess.run(["modprobe", "-d", "/run/kernel", "-a", "nfs", "nfsv4"], check=True)

    def close(self) -> None:
        self.end()
        with open("/proc/self/mounts") as mounts:
            left = [line.split()[1] for line in mounts if line.startswith("127.0.0.1:")]
        for place in left:
            subprocess.run(["umount", "-f", "-l", place], check=False, capture_output=True)
        subprocess.run(["umount", "-l", self.root], check=False)


def _pids() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        # A process may end between the two looks.
        with contextlib.suppress(OSError):
            if path.read_text().strip() in ("rpcbind", "rpc.mountd"):
                found.add(int(path.parent.name))
    return found
