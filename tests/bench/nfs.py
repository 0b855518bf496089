"""fio in a guest: an export that the guest's kernel mounts, against the exported directory shared by 9p and by virtio-fs.

`python -m tests.bench.nfs`; figures go to bench-results/nfs.json and nfs.png. One server, one guest, one file; the paths
take turns. The host's kernel has no NFS client everywhere, so the peers share the exported directory itself: they are
spared the hop to the server that a share of a host's mount has. 9p has Kata's cache mode (mmap) where the guest may cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.demo.measure import drop_caches
from tests.demo.report import machine
from tests.nas import Nas
from tests.sandbox.shim import volume_mount

ROOT = Path(__file__).resolve().parents[2]
PATHS = {"9p": "/mnt/9p", "virtio-fs": "/mnt/virtiofs", "NFS in the guest": "/mnt/data"}
CACHED = {"9p": "/mnt/9p-cached", "virtio-fs": "/mnt/virtiofs", "NFS in the guest": "/mnt/data"}
JOBS = ("randread", "randwrite", "read", "write")
console = Console(highlight=False, width=None if Console().is_terminal else 120)


def job(name: str, directory: str, seconds: int, size: str, *, direct: bool) -> list[str]:
    """4 KiB at queue depth 32 for random jobs, 1 MiB at depth 4 for the others. Through the cache: one request at a time,
    and writers ask for durability (fsync) after every 32."""
    block, depth = ("4k", 32) if name.startswith("rand") else ("1M", 4)
    engine = ["--ioengine=libaio", "--direct=1", f"--iodepth={depth}", "--iodepth_batch_submit=16",
              "--iodepth_batch_complete_min=1", "--iodepth_batch_complete_max=32"] if direct else [
        "--ioengine=psync", "--direct=0", *(["--fsync=32"] if name.endswith("write") else [])]  # fmt: skip
    return ["fio", f"--name={name}", f"--filename={directory}/fio.dat", f"--size={size}", f"--rw={name}", f"--bs={block}", *engine,
            "--time_based", f"--runtime={seconds}", "--ramp_time=1", "--norandommap", "--randrepeat=1", "--invalidate=0",
            "--output-format=json"]  # fmt: skip


def measured(nas: Nas, container: str, words: list[str], *, warm: str = "") -> dict[str, float]:
    """One run; `warm` names a file that is read once before. The host's caches are dropped otherwise."""
    if warm:
        assert nas.sandbox.run(container, "dd", f"if={warm}", "of=/dev/null", "bs=1M", timeout=300)[0] == 0
    else:
        drop_caches()
    code, output = nas.sandbox.run(container, *words, timeout=300)
    assert code == 0, output
    name = words[1].removeprefix("--name=")
    found = json.loads(output[output.index("{") :])["jobs"][0]["read" if name.endswith("read") else "write"]
    return {"iops": round(found["iops"], 1), "mib_s": round(found["bw_bytes"] / (1 << 20), 2),
            "p99_ms": round(found["clat_ns"]["percentile"]["99.000000"] / 1e6, 2)}  # fmt: skip


def run(nas: Nas, version: str, options: str, seconds: int, size: str, rounds: int) -> list[dict[str, Any]]:
    volume = nas.volume(version, options=options)
    target = nas.published(volume)
    shares = [
        {"destination": at, "type": "9p", "source": tag,
         "options": ["trans=virtio", "version=9p2000.L", "msize=512000", f"cache={cache}"]}
        for at, tag, cache in ((PATHS["9p"], "export", "none"), (CACHED["9p"], "cached", "mmap"))
    ]  # fmt: skip
    container = nas.container(volume_mount(target), *shares, volume_mount(str(nas.export), PATHS["virtio-fs"]))
    nas.sandbox.run(container, "fio", "--name=layout", "--filename=/mnt/data/fio.dat", f"--size={size}", "--rw=write", "--bs=1M",
                    "--direct=1", "--ioengine=libaio", "--iodepth=4", "--end_fsync=1", timeout=300)  # fmt: skip
    turns = [
        (turn, caching, name, path) for turn in range(rounds) for caching in (False, True) for name in JOBS
        for path in (PATHS if turn % 2 == 0 else reversed(PATHS))
    ]  # fmt: skip
    found: dict[tuple[bool, str, str], list[dict[str, float]]] = {}
    for _turn, caching, name, path in track(turns, description="fio in the guest", console=console, transient=True):
        place = (CACHED if caching else PATHS)[path]
        words = job(name, place, seconds, size, direct=not caching)
        figures = measured(nas, container, words, warm=f"{place}/fio.dat" if caching else "")
        found.setdefault((caching, name, path), []).append(figures)
    nas.sandbox.remove_container(container)
    nas.taken_back(volume)
    return [
        {"cached": caching, "job": name, "path": path, "rounds": len(figures),
         **sorted(figures, key=lambda one: one["iops"])[len(figures) // 2]}
        for (caching, name, path), figures in found.items()
    ]  # fmt: skip


def show(figures: list[dict[str, Any]]) -> dict[str, float]:
    by = {(one["cached"], one["job"], one["path"]): one for one in figures}
    ratios: dict[str, float] = {}
    for caching, title in (
        (False, "direct I/O: 4 KiB at depth 32, 1 MiB at depth 4"), (True, "through the guest's cache, which holds the file; writers fsync every 32 requests"),
    ):  # fmt: skip
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for column in (
            "path",
            *(f"{name} {unit}" for name in JOBS for unit in ("IOPS" if "rand" in name else "MiB/s", "x 9p")),
        ):
            table.add_column(column, justify="left" if column == "path" else "right")
        for path in PATHS:
            cells = []
            for name in JOBS:
                key = "iops" if "rand" in name else "mib_s"
                value, base = by[caching, name, path][key], by[caching, name, "9p"][key]
                ratio = value / base if base else 0.0
                ratios[f"{path} / 9p, {name}, {'cached' if caching else 'direct'}"] = round(ratio, 2)
                cells += [f"{value:,.0f}", f"{ratio:.1f}"]
            table.add_row(path, *cells, style="bold" if "NFS" in path else "")
        console.print(table)
    return ratios


def plot(path: Path, figures: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, caching in zip(axes, (False, True), strict=True):
        for offset, (name, colour) in enumerate((("randread", "#4477aa"), ("randwrite", "#ee7733"))):
            values = [next(one["iops"] for one in figures if (one["cached"], one["job"], one["path"]) == (caching, name, way))
                      for way in PATHS]  # fmt: skip
            bars = axis.barh([at + 0.4 * offset for at in range(len(PATHS))], values, 0.38, label=name, color=colour)
            axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axis.set_yticks([at + 0.2 for at in range(len(PATHS))], list(PATHS))
        axis.invert_yaxis()
        axis.set_xlabel("IOPS, 4 KiB random, " + ("through the guest's cache" if caching else "direct, queue depth 32"))
        axis.margins(x=0.2)
    axes[0].legend()
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="128M")
    parser.add_argument("--vers", default="4.2")
    parser.add_argument("--options", default="noresvport")
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="rv-nas-", dir="/var/tmp"))
    try:
        console.print("[bold]●[/] a server, a guest and the driver start …")
        with Nas(directory) as nas:
            figures = run(nas, given.vers, given.options, given.seconds, given.size, given.rounds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    ratios = show(figures)
    out = ROOT / "bench-results"
    out.mkdir(exist_ok=True)
    facts = machine() | {"command": "python -m tests.bench.nfs", "version": given.vers, "options": given.options}
    (out / "nfs.json").write_text(json.dumps({"machine": facts, "figures": figures, "ratios": ratios}, indent=1) + "\n")
    plot(out / "nfs.png", figures)
    console.print(f"figures: {out / 'nfs.json'}, {out / 'nfs.png'}")


if __name__ == "__main__":
    main()
