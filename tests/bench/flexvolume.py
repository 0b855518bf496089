"""What a FlexVolume call costs: CPU and wall time of 200 mounts and unmounts in a row, and of 20 at once.

`python -m tests.bench.flexvolume`; figures go to bench-results/flexvolume.json. A sandboxed block volume, by the executable
alone and by the node plugin over its socket, whose own CPU time is counted in; the peer is the start of the same Python
with nothing to do.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.driver import Driver
from tests.flexvolume.test_driver import Flex

ROOT = Path(__file__).resolve().parents[2]
SEQUENTIAL, PARALLEL = 200, 20


def plugin_ms(driver: Driver) -> float:
    """CPU time of the node plugin until now; 0 where none runs."""
    if driver.process is None:
        return 0.0
    text = Path(f"/proc/{driver.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(text[11]) + int(text[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def cost(words: list[str], environment: dict[str, str], driver: Driver) -> tuple[float, float]:
    """CPU and wall time of one program in ms, with what the plugin did meanwhile; it has to succeed."""
    plugin = plugin_ms(driver)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True)
    took, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.stdout:
        assert json.loads(done.stdout)["status"] == "Success", done.stdout
    own = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000
    return own + max(0.0, plugin_ms(driver) - plugin), took * 1000


def measure(flex: Flex) -> dict[str, object]:
    volume = flex.create("sequential")
    options, program = flex.options(volume, runtime="kata"), str(flex.program)
    found: dict[str, list[tuple[float, float]]] = {"python, nothing to do": [], "init": [], "mount": [], "unmount": []}
    for number in range(SEQUENTIAL):
        target = flex.target(volume)
        found["mount"].append(cost([program, "mount", target, options], flex.environment, flex.driver))
        found["unmount"].append(cost([program, "unmount", target], flex.environment, flex.driver))
        if number % 4 == 0:
            found["init"].append(cost([program, "init"], flex.environment, flex.driver))
            found["python, nothing to do"].append(cost([sys.executable, "-I", "-c", ""], flex.environment, flex.driver))
    volumes = [flex.create(f"parallel-{number}") for number in range(PARALLEL)]
    started = time.monotonic()
    with futures.ThreadPoolExecutor(PARALLEL) as callers:
        targets = list(
            callers.map(lambda pair: flex.mount(pair[1], pod=10 + pair[0], runtime="kata"), enumerate(volumes))
        )
    at_once = time.monotonic() - started
    handed = json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"]
    wrong = PARALLEL - len({one["target"] for one in handed} & set(targets))
    for target in targets:
        flex.ok("unmount", target)
    return {
        "calls": {
            call: {"calls": len(costs), "cpu ms": _spread([one for one, _ in costs]), "wall ms": _spread([one for _, one in costs])}
            for call, costs in found.items()
        },
        f"{PARALLEL} mounts at once, s": at_once,
        "wrong": wrong,
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"min": ordered[0], "p50": statistics.median(ordered), "p99": ordered[int(len(ordered) * 0.99)]}


def show(title: str, found: dict[str, object], console: Console) -> None:
    table = Table(title=f"FlexVolume calls, {title}, ms: minimum / p50 / p99", box=None, header_style="bold")
    for column in ("call", "CPU", "wall"):
        table.add_column(column)
    calls = found["calls"]
    assert isinstance(calls, dict)
    for call, one in calls.items():
        table.add_row(
            call,
            *(" / ".join(f"{one[what][key]:.0f}" for key in ("min", "p50", "p99")) for what in ("cpu ms", "wall ms")),
        )
    console.print(table)
    at_once = found[f"{PARALLEL} mounts at once, s"]
    console.print(f"{PARALLEL} mounts at once: {at_once:.2f} s; wrong: {found['wrong']}")


def main() -> None:
    console, found = Console(), {}
    for title, with_plugin in (("alone", False), ("over the node plugin's socket", True)):
        driver = Driver()
        try:
            if with_plugin:
                driver.start()
            found[title] = measure(Flex(driver))
        finally:
            driver.stop()
            driver.remove()
        show(title, found[title], console)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {"date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "processors": os.cpu_count(),
             "command": "python -m tests.bench.flexvolume"}  # fmt: skip
    out = ROOT / "bench-results"
    out.mkdir(exist_ok=True)
    (out / "flexvolume.json").write_text(json.dumps(found | facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
