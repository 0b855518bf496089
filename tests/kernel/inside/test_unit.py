"""The snapshotter with what its unit leaves it: capabilities, system calls, devices; and nodes that are the host's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from runvol_proto import containerd_snapshots_pb2 as pb
from tests.kernel.inside.server import Server
from tests.kernel.inside.test_service import Client
from tests.units import confined, unit

UNIT = "runvol-snapshotter.service"
MIB = 1 << 20
GROUP = "unitvg"
# Allowed, with some arguments.
LOOKED_AT = {"openat", "socket", "mmap", "mprotect", "clone", "clone3", "fsopen"}
# What each process of a unit may open with DevicePolicy=closed.
PSEUDO = {"null", "zero", "full", "random", "urandom", "tty", "ptmx"}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    """A volume group on a file."""
    file = tmp_path / "disk"
    with open(file, "wb") as opened:
        opened.truncate(1 << 30)
    found = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True, check=True)
    device = found.stdout.strip()
    subprocess.run(["vgcreate", "-q", GROUP, device], check=True, capture_output=True)
    yield GROUP
    subprocess.run(["vgremove", "-q", "-f", GROUP], check=True, capture_output=True)
    subprocess.run(["losetup", "-d", device], check=True)


def day(server: Server) -> None:
    """Most of what it does: layers, a container that grows, views, usage, removals, a pool that is extended."""
    client = Client(server)
    mount = client.prepare("extract").mounts[0]
    # On the host, outside of the service.
    assert os.path.exists(mount.source)
    place = server.directory / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-t", mount.type, mount.source, place], check=True)
    (place / "f").write_text("layer")
    (place / "big").write_bytes(os.urandom(30 * MIB))
    subprocess.run(["umount", place], check=True)
    client.commit("layer", "extract")
    labels = {"containerd.io/snapshot/max-size": str(400 * MIB)}
    larger = client.call("Prepare", pb.PrepareSnapshotRequest(key="c", parent="layer", labels=labels),
                         pb.PrepareSnapshotResponse)  # fmt: skip
    subprocess.run(["mount", "-t", mount.type, larger.mounts[0].source, place], check=True)
    assert (place / "f").read_text() == "layer"
    assert os.statvfs(place).f_blocks * 4096 > 300 * MIB
    client.call("Usage", pb.UsageRequest(key="c"), pb.UsageResponse)
    client.remove("c")  # while it is open
    subprocess.run(["umount", place], check=True)
    client.call("View", pb.ViewSnapshotRequest(key="v", parent="layer"), pb.ViewSnapshotResponse)
    client.remove("v")
    client.remove("layer")
    server.settled(0)
    until = time.monotonic() + 60
    while "extended the data" not in server.said():
        assert time.monotonic() < until, server.said()
        try:
            mount = client.prepare("filler").mounts[0]
            subprocess.run(["dd", "if=/dev/urandom", f"of={mount.source}", "bs=1M", "count=80", "oflag=direct"],
                           capture_output=True, check=True)  # fmt: skip
        except grpc.RpcError:
            pass
        time.sleep(0.2)
    assert server.pool()["mode"] == "rw"


def settings(prefix: Sequence[str], group: str, directory: Path) -> Server:
    return Server(directory, data=128 * MIB, size=200 * MIB, prefix=prefix, below=("--vg", group),
                  RUNVOL_POOL_AUTOEXTEND_PERCENT="50", RUNVOL_POOL_AUTOEXTEND_THRESHOLD="50",
                  RUNVOL_SNAPSHOTTER_VERITY="1", RUNVOL_SNAPSHOTTER_GAUGE="auto")  # fmt: skip


def test_what_the_unit_leaves_it_is_enough(group: str, tmp_path: Path) -> None:
    """With its capabilities alone; and what a filter of the unit would refuse is seen here before an operator sees it."""
    allowed, trace = calls(unit(UNIT)["Service"]["SystemCallFilter"].split()), tmp_path / "trace"
    assert len(allowed) > 200
    # What is allowed whatever its arguments are is not stopped at.
    passed = ",".join(sorted(f"?{one}" for one in allowed - LOOKED_AT))
    watched = ("strace", "-D", "-f", "-qq", "-s", "128", "--seccomp-bpf", "-e", f"trace=!{passed}", "-o", str(trace))
    with settings((*watched, *confined(UNIT)), group, tmp_path) as server:
        assert server.process is not None
        with open(f"/proc/{server.process.pid}/status") as status:
            effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
        assert effective.bit_count() <= 5
        day(server)
        until = time.monotonic() + 30
        # It grows with the pool.
        while (shown := json.loads(server.runvol("pool", "gauge", "--json"))["items"][0])["sizeBytes"] < 150 * MIB:
            assert time.monotonic() < until, (shown, server.said())
            time.sleep(0.2)
        server.stop()
        server.runvol("pool", "gauge", "--remove")
        assert "the gauge" not in server.said()
        assert "ermitted" not in server.said()
        assert "ermission denied" not in server.said()
    lines = trace.read_text(errors="replace").splitlines()
    used = {
        found[1] for line in lines if (found := re.match(r"[0-9]+ +(?:<\.\.\. )?([a-z0-9_]+)(?:\(| resumed)", line))
    }
    assert {"openat", "mmap", "socket", "fsopen"} <= used
    assert used - allowed == set()
    # MemoryDenyWriteExecute.
    assert [line for line in lines if re.search(r" mmap\(.*PROT_WRITE\|PROT_EXEC| mprotect\(.*PROT_EXEC", line)] == []
    # RestrictNamespaces, RestrictAddressFamilies.
    assert [line for line in lines if re.search(r" (unshare|setns)\(|CLONE_NEW", line)] == []
    families = unit(UNIT)["Service"]["RestrictAddressFamilies"].split()
    asked = {found[1] for line in lines if (found := re.search(r" socket\((AF_\w+)", line))}
    assert "AF_UNIX" in asked
    assert asked <= {*families}
    # DevicePolicy and DeviceAllow.
    opened = {found[1] for line in lines if (found := re.search(r' openat\(\w+, "(/dev/[^"]+)".* = [0-9]+$', line))}
    characters = {one for one in opened if os.path.exists(one) and Path(one).is_char_device()}
    assert "/dev/mapper/control" in characters
    assert characters <= {*(f"/dev/{one}" for one in PSEUDO), "/dev/mapper/control", "/dev/loop-control"}


def calls(words: Sequence[str]) -> set[str]:
    """The system calls of a SystemCallFilter=, whose sets systemd knows."""
    found: set[str] = set()
    pending = list(words)
    while pending:
        one = pending.pop()
        if not one.startswith("@"):
            found.add(one)
            continue
        said = subprocess.run(["systemd-analyze", "syscall-filter", "--no-pager", one], capture_output=True, text=True,
                              check=True)  # fmt: skip
        pending += [line.strip() for line in said.stdout.splitlines()[1:] if line.strip() and "#" not in line]
    return found
