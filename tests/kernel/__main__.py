"""`make test-kernel`: the tests that need device-mapper, in the machine's own kernel if it has that, else in a
user-mode one. Arguments go to pytest; `-m short` is the round that `make test` has."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from blockdev import devicemapper
from tests import ganesha
from tests.kernel.uml import Machine

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "tests/kernel/inside"
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
    if show:
        print("==> no device-mapper here: booting a user-mode kernel (about 6 s)", flush=True)
    disks = []
    scratch = Path("/dev/shm") / f"runvol-disks-{os.getpid()}"
    scratch.mkdir()
    try:
        for name in ("a", "b"):
            disks.append(scratch / name)
            with open(disks[-1], "wb") as opened:
                opened.truncate(8 << 30)
        # Half of it is what the tests' directories may hold; it is taken from the machine as it is used.
        with Machine(disks=disks, memory="6G") as machine:
            result = machine.run(command(arguments), limit=LIMIT, ok=None, show=show)
            return result.code, result.output
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:])[0])
