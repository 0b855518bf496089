"""Each call of this checkout's plugin beside the same call of another one's, in turns, in one run.

`python -m tests.bench.calls --before DIR`; DIR is a checkout of the commit that it is compared with. `--kernel` runs it in
the user-mode kernel, where NFS is; without, the backends of this node alone. Figures go to bench-results/calls.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.demo.report import machine
from tests.driver import POD, Driver, mount_capability

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
console = Console(width=None if os.isatty(1) else 110)


class Now(Driver):
    """This checkout's, as it is configured by default: under one name."""

    def start(self, **more: Any) -> None:
        super().start(**{**more, "names": ("nodes",)})


class Other(Driver):
    """The plugin of another checkout."""

    def __init__(self, directory: Path, checkout: Path) -> None:
        super().__init__(directory, {"PYTHONPATH": str(checkout)})
        self.checkout = checkout

    def start(self, **_more: Any) -> None:
        """It knows no other name than the one."""
        import subprocess

        with self.log.open("ab") as log:
            words = [sys.executable, "-m", "runvol", "csi", "--endpoint", f"unix://{self.socket}"]
            self.process = subprocess.Popen(
                words, env={**os.environ, **self.environment}, stdout=log, stderr=log, cwd=self.checkout
            )
        until = time.monotonic() + 60
        while self._repairs() < 1:
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-2000:])
            time.sleep(0.05)
        from tests.driver import Client

        self.client = Client(str(self.socket))


def timed(taken: dict[str, list[float]], what: str, call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    answer = call()
    taken.setdefault(what, []).append((time.perf_counter() - started) * 1000)
    return answer


def life(driver: Driver, name: str, parameters: dict[str, str], taken: dict[str, list[float]]) -> None:
    """All calls of one volume."""
    nfs = parameters["backend"] == "nfs"
    use = RWX if nfs else mount_capability()
    kind = parameters["backend"]
    volume = timed(taken, f"{kind} create", lambda: driver.create(name, 8 * MIB, use, **parameters))
    timed(taken, f"{kind} create again", lambda: driver.create(name, 8 * MIB, use, **parameters))
    timed(taken, f"{kind} get", lambda: driver.client.ControllerGetVolume(volume_id=volume.volume_id))
    timed(taken, f"{kind} list", driver.client.ListVolumes)
    timed(taken, f"{kind} stage", lambda: driver.stage(volume, use))
    target = timed(
        taken, f"{kind} publish", lambda: driver.publish(volume, POD.format(1), runtime="runc", capability=use)
    )
    timed(taken, f"{kind} statistics", lambda: driver.client.NodeGetVolumeStats(
        volume_id=volume.volume_id, volume_path=target))  # fmt: skip
    timed(taken, f"{kind} unpublish", lambda: driver.unpublish(volume, POD.format(1)))
    timed(taken, f"{kind} unstage", lambda: driver.unstage(volume))
    timed(taken, f"{kind} expand", lambda: driver.client.ControllerExpandVolume(
        volume_id=volume.volume_id, capacity_range={"required_bytes": 16 * MIB}))  # fmt: skip
    if kind != "directory":
        snapshot = timed(taken, f"{kind} snapshot", lambda: driver.client.CreateSnapshot(
            name=f"s-{name}", source_volume_id=volume.volume_id).snapshot)  # fmt: skip
        timed(taken, f"{kind} delete snapshot", lambda: driver.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id))
    timed(taken, f"{kind} delete", lambda: driver.delete(volume))


def measured(before: Path, rounds: int, classes: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Medians in milliseconds, and the ratio; the two take turns, and so does who is first."""
    place = Path(tempfile.mkdtemp(prefix="rvb-", dir="/var/tmp" if os.access("/var/tmp", os.W_OK) else "/tmp"))
    taken: dict[str, dict[str, list[float]]] = {"now": {}, "before": {}}
    with Now(place / "now") as now, Other(place / "before", before) as then:
        drivers = {"now": now, "before": then}
        for parameters in classes:
            for one, driver in drivers.items():  # what is only paid once
                life(driver, f"warm-{one}-{parameters['backend']}", parameters, {})
        for number in track(range(rounds), description="rounds", console=console, transient=True):
            for one in ("now", "before") if number % 2 else ("before", "now"):
                for parameters in classes:
                    life(drivers[one], f"{one}-{parameters['backend']}-{number}", parameters, taken[one])
    rows = []
    for what, values in taken["now"].items():
        mine, other = median(values), median(taken["before"][what])
        rows.append({"call": what, "ms": round(mine, 2), "before_ms": round(other, 2), "ratio": round(mine / other, 2)})
    return rows


def inside(before: Path, rounds: int) -> list[dict[str, Any]]:
    """In the user-mode kernel, beside its own NFS server."""
    from tests.kernel.inside.nfs import ROOT as EXPORT
    from tests.kernel.inside.nfs import KernelNfs

    server = KernelNfs(Path(tempfile.mkdtemp()) / "exported")
    server.start()
    (EXPORT / "share").mkdir(mode=0o777)
    try:
        path = str(EXPORT / "share")
        classes = [{"backend": "nfs", "server": "127.0.0.1", "path": path, "archiveOnDelete": "false", "vers": version}
                   for version in ("4.1",)]  # fmt: skip
        return measured(before, rounds, classes)
    finally:
        server.close()


def in_kernel(before: Path, rounds: int) -> list[dict[str, Any]]:
    from tests import ganesha
    from tests.kernel import uml

    uml.KEPT = tuple(dict.fromkeys((*uml.KEPT, str(before))))
    with uml.Machine(memory="4G") as kernel:
        environment = f"PYTHONPATH={ROOT} RUNVOL_NFS={ganesha.tree()} RUNVOL_TEST_DIR=/var/lib RUNVOL_KERNEL_TIER=1"
        words = shlex.join([sys.executable, "-m", "tests.bench.calls", "--inside", "--before", str(before), "--rounds",
                            str(rounds)])  # fmt: skip
        done = kernel.run(f"cd {ROOT} && {environment} {words}", limit=1800)
    found: list[dict[str, Any]] = json.loads(done.output[done.output.index("FIGURES ") + 8 :].splitlines()[0])
    return found


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("call", "ms", "before", "ratio"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for one in rows:
        style = "bold red" if one["ratio"] > 1.1 else ""
        table.add_row(one["call"], f"{one['ms']:.2f}", f"{one['before_ms']:.2f}", f"{one['ratio']:.2f}", style=style)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kernel", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=ROOT / "bench-results")
    asked = parser.parse_args()
    before = asked.before.resolve()
    if asked.inside:
        print("FIGURES " + json.dumps(inside(before, asked.rounds)))
        return
    local = [{"backend": "loop"}, {"backend": "directory", "quota": "none"}]
    rows = in_kernel(before, asked.rounds) if asked.kernel else measured(before, asked.rounds, local)
    show(rows)
    asked.results.mkdir(parents=True, exist_ok=True)
    file = asked.results / ("calls-nfs.json" if asked.kernel else "calls.json")
    file.write_text(json.dumps({"machine": machine(), "rounds": asked.rounds, "calls": rows}, indent=1))
    console.print(f"figures: {file}")


if __name__ == "__main__":
    main()
