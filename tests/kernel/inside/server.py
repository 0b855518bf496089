"""The real snapshotter process on a socket, over a small pool."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from click.testing import CliRunner

from blockdev import Deadline
from blockdev.devicemapper import Mapper
from runvol import cli, schemas
from snapshotter import assembly
from tests.kernel.inside.lab import in_child

MIB = 1 << 20
_numbers = itertools.count()


class Server:
    """`runvol snapshotter`; a context manager that makes a pool and takes it apart. `prefix`: words before it, of a
    program that becomes it. `below`: what the pool lies on, in words of `pool init`; two files without it."""

    def __init__(self, directory: Path, *, fstype: str = "ext4", size: int = 64 * MIB, data: int = 3 << 30,
                 prefix: Sequence[str] = (), below: Sequence[str] = (), **variables: str) -> None:  # fmt: skip
        self.directory = directory
        self.socket = Path(f"/run/runvol-{os.getpid()}-{directory.name[-20:]}/s.sock")
        self.state = directory / "state"
        # Another one each time: what a test that failed has left mapped is in nobody else's way.
        self.pool_name = f"srv{os.getpid()}-{next(_numbers)}"
        self.environment = {
            **os.environ,
            "RUNVOL_SNAPSHOTTER_STATE_DIR": str(self.state),
            "RUNVOL_SNAPSHOTTER_ENDPOINT": f"unix://{self.socket}",
            "RUNVOL_SNAPSHOTTER_FSTYPE": fstype,
            "RUNVOL_SNAPSHOTTER_SIZE_BYTES": str(size),
            "RUNVOL_POOL_AUTOEXTEND_PERCENT": "0",
            "RUNVOL_SNAPSHOTTER_GAUGE": "",
            **variables,
        }
        self._data, self._prefix = data, prefix
        self._below = below or ("--loop", str(directory / "pool"))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.runvol("pool", "init", "--pool", self.pool_name, *self._below, "--size", str(self._data))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        from blockdev import Deadline
        from blockdev.devicemapper import Mapper
        from snapshotter import assembly

        with Mapper() as mapper:
            pool, below = assembly.assemble(mapper, str(self.state), Deadline.after(60))
            assembly.disassemble(mapper, pool, below, Deadline.after(60))

    def runvol(self, *arguments: str, ok: tuple[int, ...] = (0,)) -> str:
        """The command line, as a person uses it."""
        done = subprocess.run([sys.executable, "-m", "runvol", *arguments], env=self.environment, capture_output=True,
                              text=True, check=False, timeout=120)  # fmt: skip
        assert done.returncode in ok, done.stderr
        if "--json" in arguments and done.stdout:
            schemas.read(json.loads(done.stdout))
        return done.stdout

    def start(self) -> float:
        """Start; seconds until the first call can be made."""
        started = time.monotonic()
        self.log = open(self.directory / "log", "ab")
        self.process = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "runvol", "snapshotter"],
            env=self.environment, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        while not self._answers():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() - started < 60, self.said()
            time.sleep(0.02)
        return time.monotonic() - started

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
            return True

    def said(self) -> str:
        return (self.directory / "log").read_text()[-16000:]

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(30) == 0, self.said()

    def lose_data(self) -> Path:
        """The pool is taken apart and its data are not there, until what is returned is renamed to `data_file`."""
        self.stop()
        with Mapper() as mapper:
            pool, below = assembly.assemble(mapper, str(self.state), Deadline.after(60))
            assembly.disassemble(mapper, pool, below, Deadline.after(60))
        return self.data_file.rename(self.data_file.with_suffix(".away"))

    @property
    def data_file(self) -> Path:
        return self.directory / "pool" / f"{self.pool_name}.data"

    def snapshots(self) -> list[dict[str, object]]:
        return self._told("snapshots")

    def pool(self) -> dict[str, object]:
        (one,) = self._told("pool", "status")
        return one

    def _told(self, *words: str) -> list[dict[str, object]]:
        """What a command lists, asked in a fork of this process: it is asked again and again, and Python starts slowly
        here."""
        told = self.directory / f"told-{next(_numbers)}"

        def ask() -> None:
            done = CliRunner().invoke(cli.main, [*words, "--json"], env=self.environment)
            assert done.exit_code == 0, (done.output, done.exception)
            told.write_text(done.stdout)

        assert in_child(ask) == 0, f"{words} failed; its words are above"
        found = json.loads(told.read_text())
        told.unlink()
        schemas.read(found)
        assert isinstance(found["items"], list)
        return found["items"]

    def settled(self, snapshots: int, *, within: float = 60) -> None:
        """Wait until there are this many snapshots, nothing is doomed, and only active ones are mapped."""
        until = time.monotonic() + within
        while True:
            rows = self.snapshots()
            active = [row for row in rows if row["kind"] != "committed"]
            pool = self.pool()
            if len(rows) == snapshots and pool["mappedDevices"] == len(active) and pool["doomedDevices"] == 0:
                return
            assert time.monotonic() < until, (rows, pool)
            time.sleep(0.5)

    def rss_mib(self) -> float:
        assert self.process is not None
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def program(name: str) -> str:
    """One of the Go programs that tests/prepare/go.sh builds."""
    return os.path.join(os.environ["RUNVOL_PROGRAMS"], name)
