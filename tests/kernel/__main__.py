"""`make test-kernel`: the tests that need device-mapper, in the machine's own kernel if it has that, else in a
user-mode one. Arguments go to pytest; `-m short` is the round that `make test` has.

A user-mode kernel has one processor, so a machine with several runs two of them."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from blockdev import devicemapper
from tests import ganesha
from tests.kernel.uml import Machine, finish_all

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "tests/kernel/inside"
# Where machines that share the tests see which files of tests were begun.
TAKEN = "/mnt/taken"
LIMIT = 7200.0
# How much of what is repeated; `make test-long` sets them.
PASSED_ON = ("RUNVOL_SUITES", "RUNVOL_MANY", "RUNVOL_LIVES", "RUNVOL_ROUNDS")
PROGRAMS = ("conformance", "serve", "measure", "containerd", "ctr", "containerd-shim-runc-v2")


def cache() -> Path:
    return Path(os.environ.get("RUNVOL_CACHE") or Path.home() / ".cache/runvol")


def programs() -> Path:
    """Where tests/prepare/go.sh has put containerd's programs."""
    found = cache() / "bin" / "containerd-v2.4.2"
    missing = [name for name in PROGRAMS if not (found / name).exists()]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not built yet: run tests/prepare/go.sh")
    return found


def command(arguments: list[str]) -> str:
    """The script that runs the tier; it is the same in both kernels."""
    chosen = [one for one in arguments if one.startswith(INSIDE)]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, *([] if chosen else [INSIDE])]
    variables = {"RUNVOL_KERNEL_TIER": "1", "RUNVOL_PROGRAMS": str(programs()),
                 "RUNVOL_NFS": str(ganesha.tree())}  # fmt: skip
    variables |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
    return f"cd {shlex.quote(str(ROOT))} && exec env {exports} {shlex.join(pytest)}"


def compile_all() -> None:
    """The user-mode kernel cannot write beside the sources, and Python starts slowly there without this."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-x", r"\.venv|\.git|build|node_modules", str(ROOT)],
                   check=False)  # fmt: skip


def run(arguments: list[str], *, show: bool = True) -> tuple[int, str]:
    """The tests' exit status and their output."""
    if devicemapper.available() and os.geteuid() == 0:
        print("==> this kernel has device-mapper: the tests run in it", flush=True)
        done = subprocess.run(["sh", "-c", command(arguments)], capture_output=not show, text=True, check=False)
        return done.returncode, done.stdout or ""
    if shutil.which("linux.uml") is None:
        raise SystemExit("user-mode-linux is not installed: run tests/prepare/debian.sh kernel")
    compile_all()
    count = _machines(arguments)
    if show:
        kernels = f"{count} user-mode kernels that share the tests" if count > 1 else "a user-mode kernel"
        print(f"==> no device-mapper here: booting {kernels} (about 6 s each)", flush=True)
    scratch = Path("/dev/shm") / f"runvol-disks-{os.getpid()}"
    scratch.mkdir()
    (scratch / "taken").mkdir()
    try:
        with contextlib.ExitStack() as stack:
            machines = []
            for number in range(count):
                disks = [scratch / f"{number}{name}" for name in ("a", "b")]
                for disk in disks:
                    with open(disk, "wb") as opened:
                        opened.truncate(8 << 30)
                # Half of it is what the tests' directories may hold; it is taken from the machine as it is used.
                machines.append(stack.enter_context(Machine(disks=disks, memory="6G")))
            script = command(arguments)
            jobs = [
                (machine, machine.start(_sharing(scratch / "taken", number, script) if count > 1 else script))
                for number, machine in enumerate(machines)
            ]
            results = finish_all(jobs, limit=LIMIT, show=show)
            return max(result.code for result in results), "\n".join(result.output for result in results)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _machines(arguments: list[str]) -> int:
    """How many kernels share the tests: each has one processor and takes up to 6 GiB."""
    chosen = [one for one in arguments if one.startswith(f"{INSIDE}/")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        return 1  # another worker has the other processor
    available = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable")) >> 20
    return 2 if not chosen and (os.cpu_count() or 1) > 1 and available >= 10 else 1


def _sharing(taken: Path, number: int, script: str) -> str:
    """The script for one of several machines: it runs the files of tests that no other one has begun."""
    mount = f"mkdir -p {TAKEN} && mount -t hostfs none {TAKEN} -o {shlex.quote(str(taken))}"
    return f"{mount} && export RUNVOL_TAKEN={TAKEN} RUNVOL_MACHINE={number} && {script}"


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:])[0])
