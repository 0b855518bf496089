"""Thousands of snapshots: nothing gets slower, and a start is not kept waiting."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.inside.lab import MIB, Lab
from tests.kernel.inside.server import Server, program


def _fill(lab: Lab, count: int, parent: str) -> list[float]:
    took = []
    for number in range(count):
        started = time.perf_counter()
        lab.prepare(f"many {number}", parent)
        took.append(time.perf_counter() - started)
    return took


@pytest.mark.short
def test_an_id_is_found_as_fast_among_thousands(make_lab: Callable[..., Lab]) -> None:
    """Counted, not timed: the store looks at a row or two, whatever there is besides."""
    lab = make_lab(metadata=16 * MIB)
    lab.layer("layer", files={"f": b"x"})
    counts = []
    for size in (0, 400):
        for number in range(size):
            with lab.node.store.transaction():
                lab.node.store.insert(lab.stat("layer").__class__(
                    **{**_fields(lab.stat("layer")), "key": f"filler {number}", "device": 1_000_000 + number}))  # fmt: skip
        steps = [0]

        def step(steps: list[int] = steps) -> int:
            steps[0] += 1
            return 0

        lab.node.store._db.set_progress_handler(step, 10)
        lab.prepare(f"measured {size}", "layer")
        lab.node.store._db.set_progress_handler(None, 0)
        counts.append(steps[0])
    assert counts[1] <= counts[0] + 5
    with lab.node.store.transaction():
        lab.node.store._db.execute("DELETE FROM snapshots WHERE key LIKE 'filler%'")


def _fields(row: object) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}  # type: ignore[attr-defined]


def test_ten_thousand_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole calls to the real process, as a client sees them; the figures are printed."""
    count = int(os.environ.get("RUNVOL_MANY", "1000"))
    with Server(tmp_path, data=4 << 30) as server:
        measure = program("measure")
        times = []
        for _ in range(2):
            started = time.monotonic()
            subprocess.run([measure, "prepare", str(server.socket), "", "50"], check=True)
            times.append((time.monotonic() - started) / 50)
            if len(times) == 1:
                subprocess.run([measure, "prepare", str(server.socket), "", str(count - 100)], check=True)
        rows = len(server.snapshots())
        assert rows == count
        server.kill()
        ready = server.start()
        started = time.monotonic()
        subprocess.run([measure, "empty", str(server.socket), "1"], check=True)
        subprocess.run([measure, "prepare", str(server.socket), "", "1"], check=True)
        first = time.monotonic() - started
        with capsys.disabled():
            print(f"\n  {count} snapshots: Prepare {times[0] * 1000:.1f} ms with none, {times[1] * 1000:.1f} ms with all; "
                  f"listening {ready:.2f} s after a start, first Prepare {first:.2f} s later; "
                  f"{server.rss_mib():.1f} MiB resident ", end="")  # fmt: skip
        assert server.rss_mib() < 60
        _take_apart(server)


def _take_apart(server: Server) -> None:
    """Thousands of devices are unmapped at once, not one by one through the service."""
    server.kill()
    from blockdev.devicemapper import Mapper

    with Mapper() as mapper:
        for entry in mapper.devices():
            if entry.name.startswith("runvol-"):
                mapper.remove(entry.name)
