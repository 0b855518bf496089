"""What the demo leaves: a table in the terminal, a plot, and the raw figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.demo import kata
from tests.demo.measure import Figure

NAMES = {
    "9p": "9p share (*)",
    "virtio-fs": "virtio-fs share (*)",
    "runvol": "runvol, hot-plugged device",
    "bare QEMU": "bare QEMU, cold-plugged",
    "runvol, same guest": "runvol, in that same guest",
    "host": "the host, loop device",
}


def table(figures: list[Figure], console: Console) -> None:
    """One row a path, one group of columns a job, with the ratio to 9p."""
    by = {(one.path, one.job): one for one in figures}
    shown = Table(
        title="4 KiB random I/O, queue depth 32 (16 a submission), direct I/O, host caches dropped before each run",
        title_justify="left",
    )
    shown.add_column("path", no_wrap=True)
    for job in ("randread", "randwrite"):
        for column in ("IOPS", "MiB/s", "p99 ms", "x 9p"):
            shown.add_column(f"{job}\n{column}" if column == "IOPS" else f"\n{column}", justify="right", no_wrap=True)
    for path, name in NAMES.items():
        if (path, "randread") not in by:
            continue
        cells = []
        for job in ("randread", "randwrite"):
            one = by[path, job]
            base = by.get(("9p", job))
            ratio = f"{one.iops / base.iops:.1f}" if base else "-"
            cells += [f"{one.iops:,.0f}", f"{one.mib_s:,.1f}", f"{one.lat_p99_ms:,.1f}", ratio]
        shown.add_row(name, *cells, style="bold" if path == "runvol" else "")
    console.print(shown)
    console.print(
        "(*) cached by the host during the run: their servers do not pass O_DIRECT on. The others bypass its cache."
    )


def setups(figures: list[Figure], console: Console) -> None:
    """What each shim makes of the same volume, with Kata's defaults and with what the documents recommend."""
    by = {(one.path, one.job): one for one in figures}
    shown = Table(title="The same volume in the same guest, by shim and settings", title_justify="left")
    shown.add_column("Kata", no_wrap=True)
    shown.add_column("what the shim plugs in", no_wrap=True)
    for job in ("randread", "randwrite"):
        for column in (f"{job}\nIOPS", "\np99 ms"):
            shown.add_column(column, justify="right", no_wrap=True)
    for setup in (*kata.MEASURED, kata.GO_SHIPPED):
        cells = []
        for job in ("randread", "randwrite"):
            one = by.get((setup.handler, job))
            cells += [f"{one.iops:,.0f}", f"{one.lat_p99_ms:,.1f}"] if one else ["-", "-"]
        shown.add_row(setup.name, setup.plugs, *cells, style="bold" if setup is kata.RECOMMENDED else "")
    console.print(shown)
    console.print(
        "With the host's cache a guest is faster while its data fits the host's memory, of which it takes as much again."
    )


def ratios(figures: list[Figure]) -> dict[str, float]:
    """runvol against each other path, by job."""
    by = {(one.path, one.job): one.iops for one in figures}
    return {
        f"runvol / {path}, {job}": round(by[_ours(path), job] / by[path, job], 2)
        for path in NAMES
        for job in ("randread", "randwrite")
        if not path.startswith("runvol") and (path, job) in by and by[path, job]
    }


def _ours(path: str) -> str:
    """Each path is compared with the run beside it."""
    return "runvol, same guest" if path == "bare QEMU" else "runvol"


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit or "unknown",
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
    }


def save(directory: Path, figures: list[Figure], facts: dict[str, Any]) -> None:
    """`figures.json` and `iops.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine() | facts, "figures": [one.as_json() for one in figures], "ratios": ratios(figures)}
    (directory / "figures.json").write_text(json.dumps(content, indent=2) + "\n")
    _plot(directory / "iops.png", figures)


def _plot(path: Path, figures: list[Figure]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = [name for name in NAMES if any(one.path == name for one in figures)]
    by = {(one.path, one.job): one.iops for one in figures}
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for offset, (job, colour) in enumerate((("randread", "#4477aa"), ("randwrite", "#ee7733"))):
        bars = axes.barh(
            [i + 0.4 * offset for i in range(len(paths))],
            [by[one, job] for one in paths],
            0.38,
            label=job,
            color=colour,
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set_yticks([i + 0.2 for i in range(len(paths))], [NAMES[one] for one in paths])
    axes.invert_yaxis()
    axes.set_xlabel("IOPS (4 KiB random, queue depth 32, direct)")
    axes.margins(x=0.15)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
