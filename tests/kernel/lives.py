"""`make bench-lives`: a container's life beside containerd's devmapper, what a slow disk, a pool that waits and Usages
cost others, and every call beside the same one of another checkout; tables, a plot, a JSON file.

A part that is measured again replaces what the file had of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.kernel import uml
from tests.kernel.__main__ import ROOT, compile_all, programs

CALLS = ("Prepare", "Mounts", "Usage", "Remove")
WHOLE = ("Prepare", "Mounts", "mount", "write", "unmount", "Usage", "Remove")
ROUNDS = {"lives": 25, "flushes": 5, "waiting": 5, "beside": 12, "before": 40}
BESIDE = ("empty calls", "Usages")


def in_user_mode_kernel(part: str, rounds: int, before: Path) -> dict[str, Any]:
    compile_all()
    scratch = Path(f"/dev/shm/runvol-bench-{os.getpid()}")
    scratch.mkdir()
    disks = [scratch / "a", scratch / "b"]
    try:
        for disk in disks:
            with open(disk, "wb") as opened:
                opened.truncate(17 << 30)
        words = [
            sys.executable,
            "-m",
            "tests.kernel.inside_lives",
            "/mnt/jobs/result.json",
            part,
            str(rounds),
            str(before),
        ]
        script = f"cd {shlex.quote(str(ROOT))} && exec env RUNVOL_PROGRAMS={programs()} {shlex.join(words)}"
        with uml.Machine(disks=disks, memory="4G") as machine:
            machine.run(script, limit=3600, show=True)
            result = json.loads((machine.jobs / "result.json").read_text())
            assert isinstance(result, dict)
            return result
    finally:
        shutil.rmtree(scratch)


# -- what the figures say ---------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Percentiles, and of how many."""
    return {"p10": percentile(values, 0.1), "p50": statistics.median(values),
            "quartiles": [percentile(values, 0.25), percentile(values, 0.75)], "p99": percentile(values, 0.99),
            "samples": len(values)}  # fmt: skip


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Of the medians, and between what nine in ten such samples have it (bootstrap); and of the tenth percentiles, which
    other work on the machine disturbs least."""
    chance = random.Random(1)
    drawn = sorted(
        statistics.median(chance.choices(above, k=len(above))) / statistics.median(chance.choices(below, k=len(below)))
        for _ in range(1000)
    )
    return {"ratio": statistics.median(above) / statistics.median(below), "90%": [drawn[50], drawn[950]],
            "of p10": percentile(above, 0.1) / percentile(below, 0.1)}  # fmt: skip


def beyond(times: dict[str, list[float]], call: str) -> list[float]:
    """By how many ms each call was longer than the mean of the empty ones before and after it."""
    return [whole - empty for whole, empty in zip(times[call], times[f"{call}, empty"], strict=True)]


def of_lives(found: dict[str, Any]) -> dict[str, Any]:
    """By clients: each call of each peer, whole and beyond the empty ones around it, and devmapper / runvol."""
    for peers in found.values():
        for times in peers.values():
            times["life"] = [sum(one) for one in zip(*(times[call] for call in WHOLE), strict=True)]
    return {
        clients: {
            "calls": {peer: {call: spread(times[call]) for call in (*WHOLE, "life")} for peer, times in peers.items()},
            "beyond": {peer: {call: spread(beyond(times, call)) for call in CALLS} for peer, times in peers.items()},
            "devmapper / runvol": {
                call: ratio(peers["devmapper"][call], peers["runvol"][call]) for call in (*WHOLE, "life")
            },
        }
        for clients, peers in found.items()
    }


def of_flushes(found: dict[str, Any]) -> dict[str, Any]:
    ratios = {what: ratio(found["slow"][what], found["free"][what]) for what in found["free"] if what.endswith("s)")}
    return {"turns": found, "medians": {disk: {what: statistics.median(values) for what, values in of.items()}
                                        for disk, of in found.items()}, "slow / free": ratios}  # fmt: skip


def of_waiting(found: dict[str, Any]) -> dict[str, Any]:
    return {when: {call: spread(times) for call, times in calls.items()} |
            {"p99 beyond": percentile(calls["Stat"], 0.99) - percentile(calls["empty"], 0.99)}
            for when, calls in found.items()}  # fmt: skip


def of_beside(found: dict[str, Any]) -> dict[str, Any]:
    times = found["times"]
    return {"Prepare": {name: spread(times[name]) for name in ("alone", *BESIDE)}, "calls a second": found["a second"],
            "ratio to alone": {name: ratio(times[name], times["alone"]) for name in BESIDE},
            "beside Usages / beside empty calls": ratio(times["Usages"], times["empty calls"])}  # fmt: skip


def of_before(found: dict[str, Any]) -> dict[str, Any]:
    calls = [call for call in found["now"] if f"{call}, empty" in found["now"]]
    rows = {}
    for call in calls:
        now, then, again = (found[name][call] for name in ("now", "before", "before-again"))
        rows[call] = {"now": spread(now), "before": spread(then + again), "ratio": ratio(now, then + again),
                      "before again / before": ratio(again, then)}  # fmt: skip
    return rows


OF = {"lives": of_lives, "flushes": of_flushes, "waiting": of_waiting, "beside": of_beside, "before": of_before}


# -- tables and a plot ------------------------------------------------------------------------------------------------


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, box=None, header_style="bold")
    for column in columns:
        made.add_column(column)
    return made


def _spread(one: dict[str, Any]) -> str:
    low, high = one["quartiles"]
    return f"{one['p50']:.2f} ({low:.2f} to {high:.2f})"


def _ratio(one: dict[str, Any]) -> str:
    low, high = one["90%"]
    return f"{one['ratio']:.2f} ({low:.2f} to {high:.2f}), {one['of p10']:.2f}"


def tables(result: dict[str, Any]) -> Iterator[Table]:
    for clients, one in result.get("lives", {}).items():
        shown = table(f"a container's life, {clients} at once, ms: median (quartiles)", "call", "runvol", "devmapper",
                      "devmapper / runvol (90%), of p10", "runvol beyond an empty call")  # fmt: skip
        for call in (*WHOLE, "life"):
            extra = one["beyond"]["runvol"].get(call)
            shown.add_row(call, *(_spread(one["calls"][peer][call]) for peer in ("runvol", "devmapper")),
                          _ratio(one["devmapper / runvol"][call]), _spread(extra) if extra else "")  # fmt: skip
        yield shown
    if "flushes" in result:
        one = result["flushes"]
        shown = table(
            "the store on a disk that flushes at once, and on a slow one, medians",
            "",
            "free",
            "slow",
            "slow / free (90%), of p10",
        )
        for what in one["medians"]["free"]:
            times = one["slow / free"].get(what)
            shown.add_row(what, *(f"{one['medians'][disk][what]:.3f}" for disk in ("free", "slow")),
                          _ratio(times) if times else "")  # fmt: skip
        yield shown
    if "waiting" in result:
        shown = table(
            "while 100 Prepares wait for the pool, ms", "", "Stat p50, p99", "empty call p50, p99", "p99 beyond"
        )
        for when, one in result["waiting"].items():
            shown.add_row(when, *(f"{one[call]['p50']:.2f}, {one[call]['p99']:.2f}" for call in ("Stat", "empty")),
                          f"{one['p99 beyond']:.2f}")  # fmt: skip
        yield shown
    if "beside" in result:
        one = result["beside"]
        shown = table("Prepare, ms", "beside", "median (quartiles)", "calls a second", "ratio to alone (90%), of p10")
        for name, taken in one["Prepare"].items():
            times = one["ratio to alone"].get(name)
            shown.add_row(
                name, _spread(taken), f"{one['calls a second'].get(name, 0):.0f}", _ratio(times) if times else ""
            )
        shown.add_row("Usages / empty calls", "", "", _ratio(one["beside Usages / beside empty calls"]))
        yield shown
    if "before" in result:
        shown = table(
            "every call, ms: median (quartiles)",
            "call",
            "now",
            "before",
            "now / before (90%), of p10",
            "noise: before again / before",
        )
        for call, one in result["before"].items():
            shown.add_row(call, _spread(one["now"]), _spread(one["before"]), _ratio(one["ratio"]),
                          _ratio(one["before again / before"]))  # fmt: skip
        yield shown


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axes, (clients, one) in zip(places, result["lives"].items(), strict=True):
        for number, peer in enumerate(("runvol", "devmapper")):
            values = [one["calls"][peer][call]["p50"] for call in WHOLE]
            axes.bar([at + 0.4 * number for at in range(len(WHOLE))], values, 0.38, label=peer)
        axes.set_yscale("log")
        axes.set_xticks([at + 0.2 for at in range(len(WHOLE))], WHOLE, rotation=20, ha="right")
        axes.set_title(f"a container's life, {clients} at once")
        axes.legend()
    places[0].set_ylabel("ms, p50 (log)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def load() -> str:
    return ", ".join(f"{one:.1f}" for one in os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="", help=f"of {','.join(ROUNDS)}; `before` needs --before")
    parser.add_argument("--before", type=Path, help="a checkout of the commit that this one is compared with")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds: 0.1 for a look, 3 to be sure")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results")
    asked = parser.parse_args()
    parts = asked.parts.split(",") if asked.parts else [part for part in ROUNDS if part != "before" or asked.before]
    for part in parts:
        if part not in ROUNDS:
            parser.error(f"--parts {part}: is none of {', '.join(ROUNDS)}")
    if "before" in parts and asked.before is None:
        parser.error("--parts before: needs --before DIR, a checkout of the other commit")
    checkout = (asked.before or ROOT).resolve()
    uml.KEPT = tuple(dict.fromkeys((*uml.KEPT, str(checkout))))
    asked.out.mkdir(exist_ok=True)
    file = asked.out / "lives.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for part in parts:
        rounds = max(2, round(ROUNDS[part] * asked.share))
        begun = load()
        measured = in_user_mode_kernel(part, rounds, checkout)
        result[part] = OF[part](measured["found"])
        result.setdefault("of", {})[part] = {
            "date": datetime.date.today().isoformat(), "commit": _commit(ROOT), "rounds": rounds,
            "command": f"python -m tests.kernel.lives --parts {part} --share {asked.share:g}"
            + (f" --before DIR ({_commit(checkout)})" if part == "before" else ""),
            "machine": f"user-mode Linux {measured['kernel']}, one processor of {os.cpu_count()}",
            "load average of the machine, before and after": [begun, load()],
        }  # fmt: skip
        file.write_text(json.dumps(result, indent=1) + "\n")
    if "lives" in result:
        plot(result, asked.out / "lives.png")
    console = Console(width=None if os.isatty(1) else 160)
    for one in tables(result):
        console.print(one)
    print(f"==> {file} and lives.png")


def _commit(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
