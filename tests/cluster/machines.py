"""A machine is a set of namespaces: processes, mounts, network and host name of its own.

Its first process ends when the pipe from this one closes, and the kernel then ends every other process inside and drops
the machine's mounts and network with them. So nothing stays behind, not even after a SIGKILL of the tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Broken(Exception):
    """Something of the cluster does not do what it should; the text says what, with the ends of logs."""


def tail(log: Path, lines: int = 25) -> str:
    """The end of a log, under its name."""
    if not log.exists():
        return f"--- {log}: not there"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        kept = file.read().decode(errors="replace").splitlines()[-lines:]
    return "\n".join([f"--- the end of {log}:", *(line[:400] for line in kept)])


def _child(parent: int) -> int | None:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    return int(entry)
            except (FileNotFoundError, ProcessLookupError):
                continue
    return None


def child_of(process: subprocess.Popen[bytes]) -> int:
    """The pid, in this process's namespace, of the one process that another has started."""
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        if (found := _child(process.pid)) is not None:
            return found
        time.sleep(0.01)
    raise Broken(f"{process.args!r} started nothing (exit status {process.poll()})")


class Program:
    """A program in a machine, with its log; it can be stopped, killed and started again, with the same arguments.

    One that is kept is started again a second after its end, as kubelet does with a container, until it is stopped or
    its machine is switched off.
    """

    def __init__(
        self, machine: Machine, name: str, argv: Sequence[str | Path], log: Path, *, keep: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.machine, self.name, self.log, self.keep = machine, name, log, keep
        self.argv = [str(word) for word in argv]
        self.env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._unwanted = threading.Event()
        # Seconds since 1970, of the last start.
        self.started = 0.0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """As this process sees it."""
        if not self.running:
            raise Broken(f"{self.name} does not run\n{tail(self.log)}")
        return self._pid

    def start(self) -> None:
        if self.running:
            raise Broken(f"{self.name} runs already")
        self._unwanted = threading.Event()
        self._begin()
        if self.keep:
            threading.Thread(target=self._start_again, args=[self._unwanted], daemon=True).start()

    def _begin(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        with self.log.open("ab") as log:
            process = subprocess.Popen([*self.machine.prefix, *self.argv], stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=log, env=self.env, start_new_session=True)  # fmt: skip
        self._pid, self._process = child_of(process), process

    def _start_again(self, unwanted: threading.Event) -> None:
        while True:
            assert self._process is not None
            self._process.wait()
            if unwanted.wait(1.0):
                return
            try:
                self._begin()
            except Broken:  # it ends at once, or its machine is off
                if not self.machine.pid:
                    return

    def stop(self, seconds: float = 20.0) -> None:
        """SIGTERM, then SIGKILL if that takes too long; the machine's other processes go on."""
        self.forget()
        if self.running and not self._ends(signal.SIGTERM, seconds):
            self.kill()

    def forget(self) -> None:
        """It is not started again when it ends."""
        self._unwanted.set()

    def kill(self) -> None:
        """SIGKILL; a kept program comes back by itself."""
        if self.running and not self._ends(signal.SIGKILL, 20.0):
            raise Broken(f"{self.name} outlives a SIGKILL")

    def restart(self) -> None:
        self.stop()
        self.start()

    def _ends(self, number: signal.Signals, seconds: float) -> bool:
        process = self._process
        assert process is not None
        try:
            os.kill(self._pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            return False
        return True


class Machine:
    """`prefix` before a command runs it inside. `pid` is its first process, as the outside sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        # The namespaces of processes that it has had, by the kernel's name for them.
        self.namespaces: list[str] = []
        self._holder: subprocess.Popen[bytes] | None = None

    @property
    def prefix(self) -> tuple[str, ...]:
        if not self.pid:
            raise Broken(f"the machine {self.name} is off")
        return ("nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--uts", "--")

    def on(self) -> None:
        # The first process has its dead orphans buried by ignoring SIGCHLD, and echoes a line once all is set up.
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc",
             "env", "--ignore-signal=CHLD", "cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
        assert self._holder.stdin and self._holder.stdout
        self._holder.stdin.write(b"up\n")
        self._holder.stdin.flush()
        if self._holder.stdout.readline() != b"up\n":
            raise Broken(f"no namespaces for the machine {self.name}: {self._holder.communicate()[1].decode()}")
        self.pid = child_of(self._holder)
        self.namespaces.append(os.readlink(f"/proc/{self.pid}/ns/pid"))
        # What the machine mounts is seen by its own pods, and nowhere else; what it puts into /run is its own.
        self.run(["sh", "-ec", 'mount --make-rshared /; mount -t tmpfs -o mode=755 run /run; mkdir /run/lock; hostname "$1"', "-", self.name])  # fmt: skip
        self.run(["ip", "link", "set", "lo", "up"])

    def off(self) -> None:
        """As when the current fails: every process inside is killed, its mounts are gone."""
        if self._holder is None:
            return
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._holder.communicate(timeout=30)
        self._holder, self.pid = None, 0

    def processes(self) -> list[int]:
        """What runs inside, or still runs of what ran there before it was switched off."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/pid") in self.namespaces:
                    found.append(int(entry))
            except OSError:  # ended
                continue
        return found

    def run(self, argv: Sequence[str | Path], *, timeout: float = 60.0, check: bool = True) -> str:
        """What a command inside prints; its errors are this command's."""
        words = [str(word) for word in argv]
        done = subprocess.run([*self.prefix, *words], capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise Broken(f"{' '.join(words)} in {self.name} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout
