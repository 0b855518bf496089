"""fio, the same job everywhere: 4 KiB random I/O at queue depth 32, direct, with the host's caches dropped before.

Requests are submitted up to 16 at a time, as databases do; under emulation each system call costs so much that one
call a request would measure fio more than storage. 9p and virtio-fs go through the host's page cache by their nature
(their servers drop O_DIRECT); the block paths bypass it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Run = Callable[[list[str]], str]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One fio run. `lat_p99_ms`: the 99th percentile of completion latency."""

    path: str
    job: str
    iops: float
    mib_s: float
    lat_p99_ms: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def drop_caches() -> None:
    """Write back and forget what the host has cached, so that no run reads another one's memory."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def job(name: str, directory: str, seconds: int, size: str) -> list[str]:
    """The command line of one job."""
    return [
        "fio", f"--name={name}", f"--filename={directory}/fio.dat", f"--size={size}", f"--rw={name}", "--bs=4k", "--direct=1",
        "--ioengine=libaio", "--iodepth=32", "--time_based", f"--runtime={seconds}", "--ramp_time=1", "--norandommap",
        "--randrepeat=1", "--iodepth_batch_submit=16", "--iodepth_batch_complete_min=1", "--iodepth_batch_complete_max=32",
        "--output-format=json",
    ]  # fmt: skip


def lay_out(run: Run, directory: str, size: str) -> None:
    """Write the file once, so that no run measures allocation."""
    run(["fio", "--name=layout", f"--filename={directory}/fio.dat", f"--size={size}", "--rw=write", "--bs=1M", "--direct=1",
         "--ioengine=libaio", "--iodepth=8", "--end_fsync=1", "--output-format=json"])  # fmt: skip


ROUNDS = 3


def measure_beside(runs: dict[str, tuple[Run, str]], name: str, *, seconds: int, size: str) -> list[Figure]:
    """The same for several paths, by path its runner and directory: one round of each in turn, so that what changes
    with time changes for all."""
    rounds: dict[str, list[Figure]] = {path: [] for path in runs}
    for _ in range(ROUNDS):
        for path, (run, directory) in runs.items():
            rounds[path].append(_once(run, path, name, directory, seconds, size))
    return [sorted(found, key=lambda one: one.iops)[ROUNDS // 2] for found in rounds.values()]


def measure(run: Run, path: str, name: str, directory: str, *, seconds: int, size: str) -> Figure:
    """The round with the median IOPS; `run` executes an argument list where the volume is mounted."""
    rounds = [_once(run, path, name, directory, seconds, size) for _ in range(ROUNDS)]
    return sorted(rounds, key=lambda one: one.iops)[ROUNDS // 2]


def _once(run: Run, path: str, name: str, directory: str, seconds: int, size: str) -> Figure:
    """Drop the caches and run the job."""
    drop_caches()
    output = run(job(name, directory, seconds, size))
    result = json.loads(output[output.index("{") :])["jobs"][0]["read" if name == "randread" else "write"]
    return Figure(
        path=path,
        job=name,
        iops=round(result["iops"], 1),
        mib_s=round(result["bw_bytes"] / (1 << 20), 2),
        lat_p99_ms=round(result["clat_ns"]["percentile"]["99.000000"] / 1e6, 2),
    )


def on_host(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
