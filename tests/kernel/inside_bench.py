"""The benchmark of the snapshotter, in the kernel that has device-mapper; figures go to a file as JSON.

One disk, in partitions of the same size: our pool, a pool of the same shape for containerd's devmapper plugin, and an
ext4 for its overlayfs. All are called by the same client over the same API, in turns.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from blockdev import Deadline
from blockdev.devicemapper import Mapper, node
from blockdev.dm_targets import Delay, Linear, ThinPool
from snapshotter import assembly
from tests.kernel.inside.server import MIB, program

DISK = "/dev/ubdb"
SLICE, METADATA = 5 << 30, 32 * MIB
WORK = Path("/run/bench")
SIZE = 512 * MIB
# What our thin devices are called.
THIN = r"runvol-\w{8}-\d+"
CALLS = ("empty", "Prepare, no parent", "Prepare, committed parent", "Commit", "Remove", "Mounts", "Stat")
TURNS = 9
# What a request to the second disk takes: 32 at a time are 3,200 a second, as a small cloud disk has.
SERVICE_MS = 10
# Of calls, each between two empty ones: the difference is small beside how much single calls differ.
PAIRS, PAIRS_OF_CHEAP = 60, 300
CHEAP = ("Mounts", "Stat")
# Seconds after which the many devices are idle; a node's default is 600.
IDLE = 20
FIO = (("randread", "4k", 32), ("randwrite", "4k", 32), ("read", "1M", 8), ("write", "1M", 8))


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def partitions(mapper: Mapper) -> dict[str, str]:
    """One disk, each peer on a slice of it, whose table can be changed for one with a service time."""
    sizes = {"ours": SLICE, "peer-meta": METADATA, "peer-data": SLICE, "overlay": SLICE, "ours-meta": METADATA}
    script = "label: gpt\n" + "".join(f"size={size // 512}\n" for size in sizes.values())
    subprocess.run(["sfdisk", "-q", DISK], input=script, text=True, check=True)
    for number, (name, size) in enumerate(sizes.items(), 1):
        mapper.create(f"disk-{name}")
        mapper.load(f"disk-{name}", [Linear(length=size // 512, device=f"{DISK}{number}")])
        mapper.resume(f"disk-{name}")
    return {name: node(f"disk-{name}") for name in sizes}


def slow_down(mapper: Mapper, milliseconds: int) -> None:
    """Every request to the slices that fio uses takes this long from now on (the kernel's clock ticks each 10 ms)."""
    for number, name in ((1, "ours"), (4, "overlay")):
        mapper.load(f"disk-{name}", [Delay(length=SLICE // 512, device=f"{DISK}{number}", milliseconds=milliseconds)])
        mapper.suspend(f"disk-{name}")
        mapper.resume(f"disk-{name}")


class Peers:
    """The three servers."""

    def __init__(self, mapper: Mapper, parts: dict[str, str]) -> None:
        self.sockets: dict[str, str] = {}
        self.commands: dict[str, list[str]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ, "RUNVOL_SNAPSHOTTER_STATE_DIR": str(WORK / "ours"),
            "RUNVOL_SNAPSHOTTER_ENDPOINT": f"unix://{WORK}/ours.sock", "RUNVOL_SNAPSHOTTER_SIZE_BYTES": str(SIZE),
            "RUNVOL_POOL_AUTOEXTEND_PERCENT": "0",
        }  # fmt: skip
        subprocess.run([sys.executable, "-m", "runvol", "pool", "init", "--device", parts["ours"],
                        "--metadata-device", parts["ours-meta"], *os.environ.get("RUNVOL_BENCH_POOL", "").split()], check=True,
                       env=self.environment, stdout=subprocess.DEVNULL)  # fmt: skip
        self.start("runvol", [sys.executable, "-m", "runvol", "snapshotter"], f"{WORK}/ours.sock")
        mapper.create("bench-peer")
        mapper.load("bench-peer", [ThinPool(length=SLICE // 512, metadata=parts["peer-meta"],
                                            data=parts["peer-data"], block=128, low_water=1000)])  # fmt: skip
        mapper.resume("bench-peer")
        for name in ("devmapper", "overlayfs"):
            (WORK / name).mkdir()
        subprocess.run(["mkfs.ext4", "-q", parts["overlay"]], check=True)
        subprocess.run(["mount", parts["overlay"], WORK / "overlayfs"], check=True)
        serve = program("serve")
        self.start("devmapper", [serve, f"{WORK}/dm.sock", str(WORK / "devmapper"), "devmapper", "bench-peer",
                                 f"{SIZE // MIB}MB", "ext4"], f"{WORK}/dm.sock")  # fmt: skip
        self.start("overlayfs", [serve, f"{WORK}/ov.sock", str(WORK / "overlayfs"), "overlayfs"], f"{WORK}/ov.sock")

    def start(self, name: str, command: list[str], socket: str) -> None:
        self.commands[name] = command
        log = open(WORK / f"{name}.log", "ab")
        self.processes[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.sockets[name] = socket
        until = time.monotonic() + 60
        while not os.path.exists(socket):
            assert time.monotonic() < until, (WORK / f"{name}.log").read_text()
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()
        os.unlink(self.sockets[name])

    def again(self, name: str) -> float:
        """Start what was killed; the time at which it was started."""
        started = time.monotonic()
        self.start(name, self.commands[name], self.sockets[name])
        return started

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
            process.wait(30)


def latency(peers: Peers, rounds: int) -> dict[str, dict[str, list[float]]]:
    say(f"latency: {rounds} rounds of each, in turns, and 100 Prepares at once")
    done = subprocess.run([program("measure"), str(rounds), "100", *(f"{n}={s}" for n, s in peers.sockets.items())],
                          check=True, capture_output=True, text=True)  # fmt: skip
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def beyond(peers: Peers, call: str) -> list[float]:
    """By how many ms each of a row of calls was longer than the mean of the empty ones before and after it."""
    done = subprocess.run([program("measure"), "beyond", call, peers.sockets["runvol"],
                           str(PAIRS_OF_CHEAP if call in CHEAP else PAIRS)], check=True, capture_output=True, text=True)  # fmt: skip
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def counts(peers: Peers, name: str, call: str, number: int) -> dict[str, float]:
    """System calls of the server and of all that it starts, for each call."""
    out = WORK / "strace"
    client = subprocess.Popen([program("measure"), "only", call, peers.sockets[name], str(number)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert client.stdin is not None
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    # What was left behind by the preparation is done before the counting begins.
    time.sleep(4)
    tracer = subprocess.Popen(["strace", "-f", "-c", "-S", "calls", "-U", "calls,name", "-o", str(out), "-p",
                               str(peers.processes[name].pid)], stderr=subprocess.DEVNULL)  # fmt: skip
    time.sleep(1)
    client.stdin.write("\n")
    client.stdin.flush()
    assert client.stdout.readline() == "done\n"
    tracer.send_signal(signal.SIGINT)
    tracer.wait(30)
    client.wait(30)
    rows = {match[2]: int(match[1]) for match in re.finditer(r"^\s*(\d+)\s+(\w+)$", out.read_text(), re.MULTILINE)}
    total = rows.pop("total", 0)
    several = {
        "execs": ("execve", "execveat"),
        "mounts": ("mount", "fsmount"),
        "fsyncs": ("fsync", "fdatasync", "msync"),
    }
    return {"system calls": total / number} | {
        what: sum(rows.get(one, 0) for one in names) / number for what, names in several.items()
    }


def root_filesystems(peers: Peers, mapper: Mapper, seconds: int) -> dict[str, dict[str, dict[str, float]]]:
    """fio on a container's root filesystem, ours and overlayfs on ext4, in turns."""
    places = {}
    for name in ("runvol", "overlayfs"):
        subprocess.run([program("measure"), "prepare", peers.sockets[name], "", "1"], check=True)
        places[name] = WORK / f"root-{name}"
        places[name].mkdir()
    newest = max((entry.name for entry in mapper.devices() if re.fullmatch(THIN, entry.name)),
                 key=lambda one: int(one.rsplit("-", 1)[1]))  # fmt: skip
    subprocess.run(["mount", node(newest), places["runvol"]], check=True)
    upper = WORK / "overlayfs" / "by-hand"
    for part in ("lower", "upper", "work"):
        (upper / part).mkdir(parents=True)
    options = f"lowerdir={upper}/lower,upperdir={upper}/upper,workdir={upper}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, places["overlayfs"]], check=True)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in places}
    for name, place in places.items():
        started = time.monotonic()
        _fio(place, "write", "1M", 8, 0)
        found[name]["first write of 256 MiB"] = {"seconds": time.monotonic() - started}
    for disk, turns in (("memory", TURNS), (f"{SERVICE_MS} ms", 3)):
        if disk != "memory":
            slow_down(mapper, SERVICE_MS)
        # Many short turns, since what this kernel's one processor does besides differs from second to second.
        for turn in range(turns):
            for pattern, block, depth in FIO:
                for name in places if turn % 2 == 0 else reversed(places):
                    figures = _fio(places[name], pattern, block, depth, seconds)
                    found[name].setdefault(f"{pattern} {block} QD{depth}, disk: {disk}", {})[f"turn {turn}"] = figures
            say(f"fio, disk: {disk}, turn {turn + 1} of {turns}")
    # What comes next is not about a slow disk.
    slow_down(mapper, 0)
    for place in places.values():
        subprocess.run(["umount", place], check=True)
    return found


def _fio(place: Path, pattern: str, block: str, depth: int, seconds: int) -> float:
    limits = ["--time_based", f"--runtime={seconds}"] if seconds else []
    done = subprocess.run(
        ["fio", "--name=x", f"--filename={place}/file", "--size=256M", f"--rw={pattern}", f"--bs={block}", "--direct=1",
         "--ioengine=libaio", f"--iodepth={depth}", "--output-format=json", "--fallocate=none", *limits],
        check=True, capture_output=True, text=True)  # fmt: skip
    job = json.loads(done.stdout)["jobs"][0]
    return float(job["read" if "read" in pattern else "write"]["iops"])


def many(peers: Peers, mapper: Mapper, count: int) -> dict[str, float]:
    """Prepare among few and among many, and a start with many."""
    say(f"{count} snapshots")
    socket, measure = peers.sockets["runvol"], program("measure")
    peers.environment["RUNVOL_SNAPSHOTTER_UNMAP_IDLE_SECONDS"] = str(IDLE)
    peers.kill("runvol")
    peers.again("runvol")
    time.sleep(5)

    def fifty() -> float:
        done = subprocess.run([measure, "prepare", socket, "", "50"], check=True, capture_output=True)
        assert done.returncode == 0
        return 0.0

    def timed() -> float:
        started = time.monotonic()
        fifty()
        return (time.monotonic() - started) / 50 * 1000

    found = {"Prepare among few (ms)": min(timed() for _ in range(3))}
    subprocess.run([measure, "prepare", socket, "", str(count - 300)], check=True)
    found["Prepare among many, mapped (ms)"] = min(timed() for _ in range(3))
    found["mapped then"] = _mapped(mapper)
    say(f"until nothing was used for {IDLE} s")
    until = time.monotonic() + 600
    while _mapped(mapper) > count / 100 and time.monotonic() < until:
        time.sleep(2)
    time.sleep(5)
    found["mapped after the wait"] = _mapped(mapper)
    found["Prepare among many, unmapped (ms)"] = min(timed() for _ in range(3))
    # The kernel keeps an entry for each device that was ever mapped, in a list that each Prepare walks, until the pool
    # is assembled anew.
    peers.kill("runvol")
    _take_apart(mapper)
    peers.again("runvol")
    time.sleep(10)
    found["Prepare among many, after a reboot (ms)"] = min(timed() for _ in range(3))
    found["resident (MiB)"] = _resident(peers)
    # Three times, as what an import costs in this kernel varies most.
    for turn in range(1, 4):
        peers.kill("runvol")
        started = peers.again("runvol")
        subprocess.run([measure, "empty", socket, "1"], check=True)
        found[f"start {turn} to the first answer (s)"] = time.monotonic() - started
        subprocess.run([measure, "prepare", socket, "", "1"], check=True)
        found[f"start {turn} to the first Prepare (s)"] = time.monotonic() - started
        time.sleep(5)
    found["snapshots"] = count
    return found


def _mapped(mapper: Mapper) -> int:
    return sum(re.fullmatch(THIN, entry.name) is not None for entry in mapper.devices())


def _take_apart(mapper: Mapper) -> None:
    """The pool and all on it, as a reboot does."""
    state = str(WORK / "ours")
    pool, below = assembly.assemble(mapper, state, Deadline.after(60))
    assembly.disassemble(mapper, pool, below, Deadline.after(60))


def _resident(peers: Peers) -> float:
    with open(f"/proc/{peers.processes['runvol'].pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def main(out: str, rounds: int, count: int, seconds: int) -> None:
    WORK.mkdir(parents=True)
    with Mapper() as mapper:
        peers = Peers(mapper, partitions(mapper))
        time.sleep(3)
        result: dict[str, object] = {"kernel": os.uname().release}
        if rounds:
            result["calls"] = latency(peers, rounds)
            result["resident (MiB)"] = _resident(peers)
            say(f"each call beside an empty one, {PAIRS} times ({PAIRS_OF_CHEAP} those that only look)")
            result["beyond"] = {call: beyond(peers, call) for call in CALLS if call != "empty"}
            say("system calls, counted with strace")
            result["counts"] = {
                name: {call: counts(peers, name, call, 10) for call in CALLS} for name in ("runvol", "devmapper")
            }
            Path(out).write_text(json.dumps(result))
        if seconds:
            result["fio"] = root_filesystems(peers, mapper, seconds)
            Path(out).write_text(json.dumps(result))
        if count:
            result["many"] = many(peers, mapper, count)
        Path(out).write_text(json.dumps(result))
        peers.processes["runvol"].kill()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
