"""`make bench-kernel`: the snapshotter against containerd's devmapper and overlayfs; tables, a plot, a JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blockdev import devicemapper
from tests.kernel.__main__ import ROOT, compile_all, programs
from tests.kernel.uml import Machine

ORDER = ("empty call", "Prepare, no parent", "Prepare, committed parent", "View", "Mounts", "Stat", "Commit", "Remove")


def _in_user_mode_kernel(rounds: int, many: int, seconds: int) -> dict[str, Any]:
    compile_all()
    scratch = Path(f"/dev/shm/runvol-bench-{os.getpid()}")
    scratch.mkdir()
    disks = [scratch / "a", scratch / "b"]
    for disk in disks:
        with open(disk, "wb") as opened:
            opened.truncate(17 << 30)
    script = (
        f"cd {shlex.quote(str(ROOT))} && exec env RUNVOL_PROGRAMS={programs()} {sys.executable} "
        f"-m tests.kernel.inside_bench /mnt/jobs/result.json {rounds} {many} {seconds}"
    )
    try:
        with Machine(disks=disks, memory="4G") as machine:
            machine.run(script, limit=3600, show=True)
            result = json.loads((machine.jobs / "result.json").read_text())
            assert isinstance(result, dict)
            return result
    finally:
        for disk in disks:
            disk.unlink()
        scratch.rmdir()


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Minimum, p50, p90 and p99 in ms of each call of each peer, and what they mean."""
    if "calls" not in result or "fio" not in result:
        return result
    calls = {
        peer: {
            call: {"min": min(times), "p50": _percentile(times, 0.5), "p90": _percentile(times, 0.9),
                   "p99": _percentile(times, 0.99), "samples": len(times)}
            for call, times in found.items() if call != "(setup)"
        }
        for peer, found in result["calls"].items()
    }  # fmt: skip
    fio = {}
    for job, turns in result["fio"]["runvol"].items():
        theirs = result["fio"]["overlayfs"][job]
        ratios = sorted(turns[turn] / theirs[turn] for turn in turns)
        fio[job] = {"runvol": turns, "overlayfs": theirs, "ratio": statistics.median(ratios),
                    "quartiles": [_percentile(ratios, 0.25), _percentile(ratios, 0.75)]}  # fmt: skip
    beyond = {
        call: {"median": statistics.median(times), "quartiles": [_percentile(sorted(times), q) for q in (0.25, 0.75)],
               "pairs": times} for call, times in result["beyond"].items()
    }  # fmt: skip
    return {**result, "calls": calls, "fio": fio, "beyond": beyond}


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(title="whole calls, ms: minimum / p50 / p90 / p99", box=None, header_style="bold")
    for column in (
        "call",
        "runvol",
        "devmapper",
        "overlayfs",
        "devmapper / runvol (p50)",
        "beyond the empty call (min, p50)",
    ):
        table.add_column(column)
    empty = found["calls"]["runvol"]["empty call"]
    for call in (*ORDER, "100 empty calls at once", "100 Prepares at once"):
        rows = [found["calls"][peer][call] for peer in ("runvol", "devmapper", "overlayfs")]
        cells = [" / ".join(f"{row[which]:.1f}" for which in ("min", "p50", "p90", "p99")) for row in rows]
        beyond = f"{rows[0]['min'] - empty['min']:.1f}, {rows[0]['p50'] - empty['p50']:.1f}" if call in ORDER else ""
        table.add_row(call, *cells, f"{rows[1]['p50'] / rows[0]['p50']:.1f}", beyond)
    console.print(table)
    table = Table(title="beyond the empty calls around it, ms", box=None, header_style="bold")
    for column in ("call", "median", "quartiles"):
        table.add_column(column)
    for call, one in found["beyond"].items():
        low, high = one["quartiles"]
        table.add_row(call, f"{one['median']:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    table = Table(title="for each call: runvol (devmapper)", box=None, header_style="bold")
    for column in ("call", "execs", "mounts", "fsyncs", "system calls"):
        table.add_column(column)
    for call, mine in found["counts"]["runvol"].items():
        theirs = found["counts"]["devmapper"][call]
        table.add_row(call, *(f"{mine[what]:.1f} ({theirs[what]:.1f})" for what in ("execs", "mounts", "fsyncs",
                                                                                   "system calls")))  # fmt: skip
    console.print(table)
    table = Table(title="fio on a root filesystem: runvol / overlayfs on ext4", box=None, header_style="bold")
    for column in ("job", "ratio, median of the turns", "quartiles"):
        table.add_column(column)
    for job, one in found["fio"].items():
        low, high = one["quartiles"]
        table.add_row(job, f"{one['ratio']:.2f}" + (" (time)" if "first" in job else ""), f"{low:.2f} to {high:.2f}")
    console.print(table)
    for name, value in found.get("many", {}).items():
        console.print(f"{name}: {value:.1f}")
    console.print(f"resident memory: {found['resident (MiB)']:.1f} MiB")


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    names = list(ORDER)
    for number, peer in enumerate(("runvol", "devmapper", "overlayfs")):
        values = [found["calls"][peer][call]["p50"] for call in names]
        axes.bar([at + 0.27 * number for at in range(len(names))], values, 0.25, label=peer)
    axes.set_yscale("log")
    axes.set_ylabel("ms, p50 (log)")
    axes.set_xticks([at + 0.27 for at in range(len(names))], names, rotation=20, ha="right")
    axes.set_title("containerd's snapshots API, same client, same disk, one kernel")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of the latencies; 0 leaves them out")
    parser.add_argument("--many", type=int, default=1000, help="snapshots for the last part; 0 leaves it out")
    parser.add_argument("--seconds", type=int, default=2, help="of each turn of each fio job; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results")
    options = parser.parse_args()
    if devicemapper.available():
        sys.exit(
            "this kernel has device-mapper, but the benchmark wants disks of its own: it runs in a user-mode kernel"
        )
    found = summary(_in_user_mode_kernel(options.rounds, options.many, options.seconds))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found |= {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "command": f"make bench-kernel ARGS='--rounds {options.rounds} --many {options.many} --seconds {options.seconds}'",
        "machine": f"user-mode Linux {found['kernel']}, one processor of {os.cpu_count()}",
    }
    options.out.mkdir(exist_ok=True)
    (options.out / "snapshotter.json").write_text(json.dumps(found, indent=1) + "\n")
    if "calls" in found and "fio" in found:
        plot(found, options.out / "snapshotter.png")
        show(found, Console())
    else:
        print(json.dumps(found, indent=1))
    print(f"==> {options.out}/snapshotter.json and snapshotter.png")


if __name__ == "__main__":
    main()
