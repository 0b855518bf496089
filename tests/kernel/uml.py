"""A user-mode Linux kernel (Debian's user-mode-linux) with the machine's own root, read-only, as its root.

It has what the machine's kernel may lack: device-mapper, LVM, NFS, quotas. It has one processor, and is kept on one of
the machine's: each of its system calls and page faults goes from one process to another and back, which takes three times
as long where the two are on different processors. Killing its processes is a power cut for its page cache. Jobs are shell scripts; their output comes back through a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "linux.uml"
INIT = Path(__file__).with_name("init.sh")
_BOOT_LIMIT = 120.0
_CACHE = os.environ.get("RUNVOL_CACHE") or str(Path.home() / ".cache/runvol")
# What a job reads: the checkout, the Python that runs it, and the programs that were built.
KEPT = tuple(dict.fromkeys(map(os.path.realpath, (INIT.parents[2], sys.prefix, sys.base_prefix, _CACHE))))
# Who begins one waits for who else does, so that they see each other.
_TURN = "/dev/shm/runvol-uml.turn"
_numbers = itertools.count(1)


class JobFailed(Exception):
    """A job ended with another status than 0, or not at all."""


@dataclass(frozen=True)
class Result:
    code: int
    output: str


class Machine:
    """A booted user-mode kernel; a context manager. `disks` become /dev/ubda, /dev/ubdb, … (files, sparse is fine)."""

    def __init__(
        self,
        *,
        memory: str = "3G",
        disks: Sequence[Path] = (),
        network: str = "",
        prefix: Sequence[str] = (),
    ) -> None:
        self._memory, self._disks, self._network = memory, list(disks), network
        # What the kernel is started by, for one in a network namespace.
        self._prefix = prefix
        self.directory = Path(tempfile.mkdtemp(prefix="runvol-uml-", dir="/dev/shm"))
        self.jobs = self.directory / "jobs"
        self.jobs.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        try:
            self._boot()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _boot(self) -> None:
        name = f"runvol{os.getpid()}x{next(_numbers)}"
        probe = Path(__file__).resolve().parents[2] / f".written-by-{name}"
        disks = [f"ubd{chr(ord('a') + number)}={path}" for number, path in enumerate(self._disks)]
        command = [
            "taskset", "-c", "", *self._prefix, PROGRAM, "rootfstype=hostfs", "rootflags=/", "rw", f"mem={self._memory}", f"umid={name}",
            f"uml_dir={self.directory}/", f"init={INIT}", "con=null", "con0=fd:0,fd:1", "quiet", "panic=-1",
            f"jobs={self.jobs}", f"probe={probe}", f"keep={':'.join(KEPT)}", *disks, *([self._network] if self._network else []),
        ]  # fmt: skip
        self._log = open(self.directory / "console", "wb")
        with open(_TURN, "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            command[2] = str(_processor())
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": "/dev/shm"},
                start_new_session=True,
            )
        self.wait((self.jobs / "ready").exists, _BOOT_LIMIT, "the boot")

    def console(self) -> str:
        return (self.directory / "console").read_text("utf-8", "replace")

    def check(self, what: str) -> None:
        """JobFailed, with the console, if the kernel has ended or refused during `what`."""
        refused = self.jobs / "refused"
        if refused.exists():
            raise JobFailed(refused.read_text())
        if self.process is None or self.process.poll() is not None:
            raise JobFailed(f"the user-mode kernel ended during {what}: {self.console()[-2000:]}")

    def wait(self, ready: Callable[[], bool], limit: float, what: str) -> None:
        """Return once `ready` says so; JobFailed after `limit` seconds, or if the kernel ends."""
        until = time.monotonic() + limit
        while not ready():
            self.check(what)
            if time.monotonic() > until:
                raise JobFailed(f"{what} did not end within {limit:.0f} s; the console: {self.console()[-2000:]}")
            time.sleep(0.02)

    def start(self, script: str) -> str:
        """Begin a job; its name."""
        assert self.process is not None and self.process.stdin is not None
        name = f"job{next(_numbers)}"
        (self.jobs / name).write_text(script)
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()
        return name

    def wait_for(self, name: str, word: str, *, limit: float) -> str:
        """The line of a running job's output that begins with `word`; JobFailed if the job ends without it."""
        output = self.jobs / f"{name}.out"
        found: list[str] = []

        def said() -> bool:
            lines = output.read_text("utf-8", "replace").split("\n")[:-1] if output.exists() else []
            found.extend(line for line in lines if line.startswith(word))
            return bool(found) or (self.jobs / f"{name}.rc").exists()

        self.wait(said, limit, f"`{word}` of job {name}")
        if not found:
            raise JobFailed(output.read_text("utf-8", "replace")[-4000:])
        return found[0]

    def finish(self, name: str, *, limit: float, show: bool = False) -> Result:
        """Wait for a job; with `show` its output goes to this process's own while it runs."""
        return finish_all([(self, name)], limit=limit, show=show)[0]

    def run(self, script: str, *, limit: float = 60, ok: Sequence[int] | None = (0,), show: bool = False) -> Result:
        """Run a job to its end; JobFailed for a status that is not in `ok` (None takes any)."""
        result = self.finish(self.start(script), limit=limit, show=show)
        if ok is not None and result.code not in ok:
            raise JobFailed(f"status {result.code}: {result.output[-4000:]}")
        return result

    def kill(self) -> None:
        """A power cut."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        """End the kernel and remove what it left."""
        if self.process is not None and self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.write(b"halt\n")
            self.process.stdin.flush()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        if hasattr(self, "_log"):
            self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _processor() -> int:
    """The one that has the fewest user-mode kernels, of those that this process may use."""
    kernels: dict[int, set[int]] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if PROGRAM.encode() in (place / "cmdline").read_bytes().split(b"\0"):
                kernels[os.getsid(int(place.name))] = os.sched_getaffinity(int(place.name))
    return min(sorted(os.sched_getaffinity(0)), key=lambda one: sum(taken == {one} for taken in kernels.values()))


def finish_all(jobs: Sequence[tuple[Machine, str]], *, limit: float, show: bool = False) -> list[Result]:
    """Wait for a job on each of several machines. With `show` their output goes to this process's own while they run,
    as it comes from one, and by lines with the machine's number in front from several."""
    shown = [0] * len(jobs)

    def pass_on(number: int, *, ended: bool) -> None:
        machine, name = jobs[number]
        output = machine.jobs / f"{name}.out"
        if not show or not output.exists():
            return
        with open(output, "rb") as opened:
            opened.seek(shown[number])
            more = opened.read()
        if len(jobs) > 1 and not ended:
            more = more[: more.rfind(b"\n") + 1]
        shown[number] += len(more)
        text = more.decode("utf-8", "replace")
        if len(jobs) > 1:
            text = "".join(f"{number + 1}| {line}\n" for line in text.splitlines())
        sys.stdout.write(text)
        sys.stdout.flush()

    def done() -> bool:
        ended = [(machine.jobs / f"{name}.rc").exists() for machine, name in jobs]
        for number, one in enumerate(ended):
            pass_on(number, ended=one)
        for (machine, name), one in zip(jobs, ended, strict=True):
            if not one:
                machine.check(f"job {name}")
        return all(ended)

    jobs[0][0].wait(done, limit, " and ".join(f"job {name}" for _, name in jobs))
    return [
        Result(
            int((machine.jobs / f"{name}.rc").read_text()), (machine.jobs / f"{name}.out").read_text("utf-8", "replace")
        )
        for machine, name in jobs
    ]
