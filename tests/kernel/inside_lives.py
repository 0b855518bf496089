"""The parts of `tests.kernel.lives`, in the kernel that has device-mapper; a part's figures go to a file as JSON.

Each part has a boot of its own, and what it compares takes turns in it. Without its peers a runvol has slices of
/dev/ubda, so that several of one shape can stand beside each other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from blockdev.devicemapper import Mapper, node
from blockdev.dm_targets import SECTOR, Linear
from tests.kernel.inside.server import MIB, program
from tests.kernel.inside_bench import SIZE, WORK, Peers, partitions, say

ROOT = Path(__file__).resolve().parents[2]
DISK = "/dev/ubda"
SLICE, METADATA, STATE = 4 << 30, 32 * MIB, 512 * MIB
METRICS = "127.0.0.1:9464"
FLOOD, FLIGHT, LONE = 500, 64, 50
FLUSH_MS = 5
WAITING, LOOKS = 100, 400
USAGES, ROW = 50, 20


@dataclass(frozen=True, kw_only=True)
class SlowFlush:
    """dm-delay whose flushes alone take this long, to the kernel's tick; the delays of reads and of writes are 0."""

    kind: ClassVar[str] = "delay"
    length: int
    device: str
    milliseconds: int

    def parameters(self) -> str:
        return f"{self.device} 0 0 {self.device} 0 0 {self.device} 0 {self.milliseconds}"


def slices(mapper: Mapper, sizes: dict[str, int]) -> dict[str, str]:
    """The disk in parts, each behind a table that can be changed: name to node."""
    script = "label: gpt\n" + "".join(f"size={size // SECTOR}\n" for size in sizes.values())
    subprocess.run(["sfdisk", "-q", DISK], input=script, text=True, check=True)
    for number, (name, size) in enumerate(sizes.items(), 1):
        mapper.create(f"slice-{name}")
        mapper.load(f"slice-{name}", [Linear(length=size // SECTOR, device=f"{DISK}{number}")])
        mapper.resume(f"slice-{name}")
    return {name: node(f"slice-{name}") for name in sizes}


class Runvol:
    """The server of a checkout, on a pool of its own."""

    def __init__(self, name: str, checkout: Path, device: str, metadata: str, **variables: str) -> None:
        self.socket = str(WORK / f"{name}.sock")
        self._checkout, self._log = checkout, WORK / f"{name}.log"
        self._environment = {
            **os.environ, "PYTHONPATH": str(checkout), "RUNVOL_SNAPSHOTTER_STATE_DIR": str(WORK / name),
            "RUNVOL_SNAPSHOTTER_ENDPOINT": f"unix://{self.socket}", "RUNVOL_SNAPSHOTTER_SIZE_BYTES": str(SIZE),
            "RUNVOL_POOL_AUTOEXTEND_PERCENT": "0", **variables,
        }  # fmt: skip
        self._run("pool", "init", "--pool", name.replace(" ", "-"), "--device", device, "--metadata-device", metadata)
        self.process = self._start()

    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "runvol", *words]

    def _run(self, *words: str) -> None:
        subprocess.run(self._command(*words), check=True, env=self._environment, cwd=self._checkout,
                       stdout=subprocess.DEVNULL)  # fmt: skip

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                self._command("snapshotter"), env=self._environment, cwd=self._checkout, stdout=log, stderr=log
            )
        until = time.monotonic() + 60
        while not os.path.exists(self.socket):
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError(self._log.read_text()[-4000:])
            time.sleep(0.05)
        return process


def measured(*words: str) -> Any:
    """What a run of the client prints; its progress goes to this one's output."""
    done = subprocess.run([program("measure"), *words], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        logs = "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in WORK.glob("*.log"))
        raise RuntimeError(f"the client ended with status {done.returncode}\n{logs}")
    return json.loads(done.stdout)


class Client:
    """A run of the client that waits for its cues."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [program("measure"), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def said(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with status {self._process.wait()}")
        return line.strip()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        if self._process.wait(300):
            raise RuntimeError(f"the client ended with status {self._process.returncode}")


# -- the parts --------------------------------------------------------------------------------------------------------


def lives(mapper: Mapper, rounds: int, _before: Path) -> dict[str, Any]:
    """A container's life, ours and that of containerd's devmapper in turns; by one client, and by two at once."""
    peers = Peers(mapper, partitions(mapper))
    time.sleep(3)
    sockets = [f"{name}={peers.sockets[name]}" for name in ("runvol", "devmapper")]
    return {str(clients): measured("lives", str(rounds), str(clients), *sockets) for clients in (1, 2)}


def flushes(mapper: Mapper, rounds: int, _before: Path) -> dict[str, Any]:
    """Many Prepares with the store on a disk that flushes at once, and on one that does not."""
    places = slices(mapper, {"pool": SLICE, "meta": METADATA, "state": STATE})
    subprocess.run(["mkfs.ext4", "-q", places["state"]], check=True)
    state = WORK / "flushes"
    state.mkdir()
    subprocess.run(["mount", places["state"], state], check=True)
    server = Runvol("flushes", ROOT, places["pool"], places["meta"], RUNVOL_SNAPSHOTTER_METRICS=METRICS)
    found: dict[str, Any] = {}
    length, below = STATE // SECTOR, f"{DISK}3"
    tables = {"free": Linear(length=length, device=below),
              "slow": SlowFlush(length=length, device=below, milliseconds=FLUSH_MS)}  # fmt: skip
    _flooded(server, FLOOD, FLIGHT)
    for turn in range(rounds):
        for disk in ("free", "slow") if turn % 2 else ("slow", "free"):
            mapper.load("slice-state", [tables[disk]])
            mapper.suspend("slice-state")
            mapper.resume("slice-state")
            of = found.setdefault(disk, {})
            of.setdefault("a flush (ms)", []).append(_flush_costs(state))
            seconds, each = _flooded(server, FLOOD, FLIGHT)
            of.setdefault(f"{FLOOD} Prepares (s)", []).append(seconds)
            of.setdefault(f"flushes a Prepare, {FLIGHT} in flight", []).append(each)
            seconds, each = _flooded(server, LONE, 1)
            of.setdefault("a lone Prepare (ms)", []).append(seconds / LONE * 1000)
            of.setdefault("flushes of a lone Prepare", []).append(each)
        say(f"turn {turn + 1} of {rounds}")
    return found


def _flush_costs(directory: Path) -> float:
    """Milliseconds of the fdatasync after an append, the median."""
    times, path = [], directory / "probe"
    with open(path, "wb", buffering=0) as probe:
        for _ in range(30):
            probe.write(b"\0" * 4096)
            started = time.perf_counter()
            os.fdatasync(probe.fileno())
            times.append((time.perf_counter() - started) * 1000)
    path.unlink()
    return statistics.median(times)


def _flooded(server: Runvol, count: int, flight: int) -> tuple[float, float]:
    """Seconds of so many Prepares, and how often each of them flushed the store."""
    client = Client("flood", str(count), str(flight), server.socket)
    assert client.said() == "ready"
    before = _metric("store_flushes_total")
    client.go()
    seconds = float(client.said())
    each = (_metric("store_flushes_total") - before) / count
    client.go()
    client.end()
    # What is deleted behind takes flushes and time of its own.
    until = time.monotonic() + 120
    while _metric("devices_doomed") and time.monotonic() < until:
        time.sleep(0.5)
    return seconds, each


def _metric(name: str) -> float:
    with urllib.request.urlopen(f"http://{METRICS}/metrics") as page:
        lines = page.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"runvol_{name} "))


def waiting(mapper: Mapper, rounds: int, _before: Path) -> dict[str, Any]:
    """Stat beside Prepares that wait, as the disk of the pool's metadata does not answer."""
    places = slices(mapper, {"pool": SLICE, "meta": METADATA})
    server = Runvol("waiting", ROOT, places["pool"], places["meta"])
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        client = Client("waiting", str(WAITING), str(LOOKS), server.socket)
        assert client.said() == "ready"
        mapper.suspend("slice-meta")
        try:
            client.go()
            assert client.said() == "looked"
        finally:
            mapper.resume("slice-meta")
        for when, calls in json.loads(client.said()).items():
            for call, times in calls.items():
                found.setdefault(when, {}).setdefault(call, []).extend(times)
        client.end()
        say(f"turn {turn + 1} of {rounds}")
    return found


def beside(mapper: Mapper, rounds: int, _before: Path) -> dict[str, Any]:
    """Prepare beside Usages, beside as many calls that do nothing, and alone."""
    places = slices(mapper, {"pool": SLICE, "meta": METADATA})
    server = Runvol("beside", ROOT, places["pool"], places["meta"])
    found = measured("beside", str(USAGES), str(rounds), str(ROW), server.socket)
    assert isinstance(found, dict)
    return found


def before(mapper: Mapper, rounds: int, checkout: Path) -> dict[str, Any]:
    """Every call of this checkout's server, of the other one's, and of a second one of that: what differs between
    those two is noise."""
    trees = {"now": ROOT, "before": checkout, "before again": checkout}
    sizes = {f"{name}{part}": size for name in trees for part, size in (("", SLICE), ("-meta", METADATA))}
    places = slices(mapper, {name.replace(" ", "-"): size for name, size in sizes.items()})
    sockets = []
    for name, tree in trees.items():
        name = name.replace(" ", "-")
        server = Runvol(name, tree, places[name], places[f"{name}-meta"])
        sockets.append(f"{name}={server.socket}")
    time.sleep(3)
    found = measured("pairs", str(rounds), *sockets)
    assert isinstance(found, dict)
    return found


PARTS = {one.__name__: one for one in (lives, flushes, waiting, beside, before)}


def main(arguments: Sequence[str]) -> None:
    out, part, rounds, checkout = arguments
    WORK.mkdir(parents=True)
    say(PARTS[part].__doc__ or part)
    with Mapper() as mapper:
        found = PARTS[part](mapper, int(rounds), Path(checkout))
        Path(out).write_text(json.dumps({"kernel": os.uname().release, "found": found}))
        # The servers go with this kernel.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
