"""A root filesystem of the snapshotter's, hot-plugged into a guest that runs a process on it.

The thin device exists in the user-mode kernel, the guest is QEMU's; between them is NBD, in a network namespace.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kernel.__main__ import ROOT, compile_all
from tests.kernel.uml import Machine
from tests.namespaces import GUEST, TAP, Network, network
from tests.sandbox.shim import GO, RUST, Sandbox, Settings, write_bundle
from tests.sandbox.vm import VM


@pytest.mark.kernel
@pytest.mark.guest
def test_a_guest_runs_a_process_on_a_thin_device(tmp_path: Path) -> None:
    with network() as joined:
        _run(joined, tmp_path)


def _run(joined: Network, tmp_path: Path) -> None:
    compile_all()
    disks = [tmp_path / "a", tmp_path / "b"]
    for disk in disks:
        with open(disk, "wb") as opened:
            opened.truncate(1 << 30)
    link = f"vec0:transport=tap,ifname={TAP},depth=128,gro=1"
    python = f"cd {ROOT} && exec {sys.executable} -m tests.kernel.inside_hotplug"
    with Machine(disks=disks, network=link, prefix=joined.prefix) as machine:
        machine.run(f"ip addr add {GUEST}/24 dev vec0 && ip link set vec0 up")
        told = machine.wait_for(machine.start(f"{python} serve {GUEST}"), "ready", limit=120).split()
        mount = {
            "type": told[1],
            "source": f"nbd://{GUEST}:10809",
            "options": told[2].split(",") if len(told) > 2 else [],
        }
        left = []
        with VM(prefix=joined.prefix) as vm:
            for number, shim in enumerate((GO, RUST)):
                sandbox = Sandbox(vm=vm, settings=Settings(shim=shim, direct_volumes=tmp_path / "none"))
                if number == 0:
                    sandbox.start()
                name = f"c{number}"
                sandbox.create_container(write_bundle(tmp_path / name, []), name, [mount])
                assert sandbox.run(name, "/bin/cat", "/etc/hello") == (0, "from the image\n")
                code, said = sandbox.run(name, "/bin/sh", "-c", f"echo {shim} >> /etc/left && sync && cat /etc/left")
                assert code == 0, said
                left.append(shim)
                assert said.split() == left
                sandbox.remove_container(name)
        machine.run("kill $(pidof qemu-nbd); while pidof qemu-nbd; do sleep 0.1; done", ok=None)
        seen = machine.run(f"{python} look", limit=120).output
    assert seen.split() == [GO, RUST, "['hello']", GO, RUST]
