"""`python -m tests.bench.after_guest`: seconds until a runc pod has a volume that a guest has had, beside one that none has.

A whole check of the filesystem comes first (`node.guest_filesystems = checked`), so what counts is how many files there
are. Each figure is the first publish of its kind, with calls repeated as kubelet repeats them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.demo.report import machine
from tests.driver import Driver, mount_capability

A = "11111111-2222-3333-4444-555555555551"
console = Console(width=None if os.isatty(1) else 110)


def filled(target: str, files: int) -> None:
    """Empty files, a thousand to a directory."""
    for number in track(range(-(-files // 1000)), description=f"  {files} files", console=console, transient=True):
        place = os.path.join(target, f"d{number}")
        os.mkdir(place)
        for one in range(min(1000, files - number * 1000)):
            os.close(os.open(f"{place}/f{one}", os.O_WRONLY | os.O_CREAT, 0o600))


def until_published(driver: Driver, volume: Any, capability: Any) -> tuple[float, int]:
    """Seconds and calls, with kubelet's pause of half a second between them."""
    started, calls = time.monotonic(), 0
    while True:
        calls += 1
        try:
            driver.publish(volume, A, runtime="runc", capability=capability, timeout=120)
            return round(time.monotonic() - started, 2), calls
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            time.sleep(0.5)


def measured(driver: Driver, fstype: str, gib: int, files: int) -> list[dict[str, Any]]:
    plain = mount_capability(fstype=fstype)
    path = driver.directory / f"{fstype}-{gib}.img"
    with path.open("wb") as file:
        file.truncate(gib << 30)
    driver.cli("volumes", "adopt", str(path), "--name", f"{fstype}-{gib}")
    volume = driver.create(f"{fstype}-{gib}", gib << 30, plain)
    driver.stage(volume, plain)
    filled(driver.publish(volume, A, runtime="runc", capability=plain), files)
    os.sync()
    driver.unpublish(volume, A)
    rows = []
    for guest in (False, True):
        for group in ("", "2000" if guest else "2001"):
            capability = mount_capability(fstype=fstype, group=group)
            if guest:
                driver.publish(volume, A, runtime="kata", capability=plain)
                driver.unpublish(volume, A)
            seconds, calls = until_published(driver, volume, capability)
            driver.unpublish(volume, A)
            rows.append({"fstype": fstype, "gib": gib, "files": files, "after_guest": guest, "group": bool(group),
                         "seconds": seconds, "calls": calls})  # fmt: skip
    driver.unstage(volume)
    driver.delete(volume)
    return rows


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.bench.after_guest")
    options.add_argument("--files", type=int, default=1_000_000, help="on the volume of 100 GiB")
    options.add_argument("--results", type=Path, default=Path("bench-results"))
    arguments = options.parse_args()
    found = []
    with Driver() as driver:
        # A 1 GiB ext4 has 65,536 inodes.
        for fstype in ("ext4", "xfs"):
            for gib, files in ((1, min(arguments.files, 60_000)), (100, arguments.files)):
                found += measured(driver, fstype, gib, files)
    table = Table(title="Seconds until a runc pod has the volume", title_justify="left")
    for column in ("filesystem", "GiB", "files", "a guest had it", "a new group", "seconds", "calls"):
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(row["fstype"], str(row["gib"]), f"{row['files']:,}", "yes" if row["after_guest"] else "no",
                      "yes" if row["group"] else "no", f"{row['seconds']:.2f}", str(row["calls"]))  # fmt: skip
    console.print(table)
    arguments.results.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "command": "python -m tests.bench.after_guest", "rows": found}
    (arguments.results / "after_guest.json").write_text(json.dumps(content, indent=2) + "\n")


main()
