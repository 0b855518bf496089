"""A power cut: the whole kernel is killed while layers are committed; what was acknowledged is there afterwards."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from tests.kernel.__main__ import ROOT, compile_all
from tests.kernel.uml import Machine

ROUNDS = int(os.environ.get("RUNVOL_POWER_CUTS", "1"))


@pytest.mark.kernel
@pytest.mark.parametrize("number", range(ROUNDS))
def test_what_was_acknowledged_survives_a_power_cut(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    compile_all()
    scratch = Path(f"/dev/shm/runvol-power-{os.getpid()}")
    scratch.mkdir()
    disks = [scratch / "a", scratch / "b"]
    for disk in disks:
        with open(disk, "wb") as opened:
            opened.truncate(2 << 30)
    python = f"cd {ROOT} && exec {sys.executable} -m tests.kernel.inside_power"
    chance = random.Random(number)
    try:
        with Machine(disks=disks) as machine:
            job = machine.start(f"{python} write")
            output = machine.jobs / f"{job}.out"
            _until(lambda: len(_numbers(output)) >= 5, machine, output)
            time.sleep(chance.uniform(0, 4))
            machine.kill()
            acknowledged = _numbers(output)[-1]
        with Machine(disks=disks) as machine:
            said = machine.run(f"{python} verify {acknowledged}", limit=300).output
        with capsys.disabled():
            print(f"\n  power cut after {acknowledged + 1} commits: {said.strip().splitlines()[-1]} ", end="")
    finally:
        for disk in disks:
            disk.unlink()
        scratch.rmdir()


def _numbers(output: Path) -> list[int]:
    if not output.exists():
        return []
    # The last line may be half written.
    return [int(line) for line in output.read_text().split("\n")[:-1] if line.isdecimal()]


def _until(ready: object, machine: Machine, output: Path) -> None:
    until = time.monotonic() + 120
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < until, output.read_text()[-3000:] + machine.console()[-1000:]
        assert not output.with_suffix(".rc").exists(), output.read_text()[-3000:]
        time.sleep(0.05)
