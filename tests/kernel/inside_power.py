"""Runs in the user-mode kernel around a power cut: `write` commits layers for ever, `verify` reads them afterwards.

The state lies on /dev/ubda (ext4), the pool on /dev/ubdb. What was acknowledged is printed, a number a line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from blockdev import Deadline
from blockdev.devicemapper import Mapper
from snapshotter import assembly
from snapshotter.assembly import Wish
from snapshotter.model import Kind
from snapshotter.node import Node, Settings
from tests.kernel.inside.lab import MIB, mounted

STATE = Path("/mnt/state")


def soon() -> Deadline:
    return Deadline.after(60)


def content(number: int) -> bytes:
    return b"%08d\n" % number * 20_000


def opened() -> Node:
    STATE.mkdir(exist_ok=True)
    subprocess.run(["mount", "/dev/ubda", str(STATE)], check=True)
    settings = Settings(state_dir=str(STATE / "s"), size=64 * MIB)
    if not (STATE / "s" / "pool.made").exists():
        with Mapper() as mapper:
            assembly.init(mapper, settings.state_dir, Wish(name="power", device="/dev/ubdb"), soon())
    node = Node(settings)
    node.open_pool()
    node.recover()
    return node


def write() -> None:
    subprocess.run(["mkfs.ext4", "-q", "/dev/ubda"], check=True)
    node = opened()
    parent = ""
    for number in range(10_000):
        with mounted(node.snapshots.prepare(f"making {number}", parent, {}, soon())) as root:
            (root / f"f{number % 8}").write_bytes(content(number))
        node.snapshots.commit(f"layer {number}", f"making {number}", {}, "", soon())
        print(number, flush=True)
        if number % 5 == 4:
            with contextlib.suppress(Exception):
                node.snapshots.prepare(f"to go {number}", parent, {}, soon())
                node.snapshots.remove(f"to go {number}", soon())
                node.reaper.round()
        parent = f"layer {number}" if number % 10 != 9 else ""


def verify(acknowledged: int) -> None:
    node = opened()
    while node.reaper.round():
        pass
    for number in range(acknowledged + 1):
        with mounted(node.snapshots.prepare("v", f"layer {number}", {}, soon(), kind=Kind.VIEW)) as root:
            assert (root / f"f{number % 8}").read_bytes() == content(number), f"layer {number}"
        node.snapshots.remove("v", soon())
    while node.reaper.round():
        pass
    rows = {row.device for page in node.store.pages() for row in page}
    bases = {base.device for base in node.store.bases()}
    ids = node.pool.ids(soon())
    assert rows <= ids, f"lost: {rows - ids}"
    assert ids == rows | bases, f"leaked: {ids - rows - bases}"
    assert node.store.quarantined() == []
    print(f"{acknowledged + 1} layers are as they were, {len(ids)} devices, nothing leaked", flush=True)


if __name__ == "__main__":
    write() if sys.argv[1] == "write" else verify(int(sys.argv[2]))
    os._exit(0)
