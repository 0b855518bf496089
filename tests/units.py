"""The units of deploy/systemd, and a process with no more rights than one of them leaves."""

from __future__ import annotations

import configparser
import subprocess

from tests.kernel.__main__ import ROOT

PROGRAM = "/usr/local/bin/runvol"


def unit(name: str) -> configparser.ConfigParser:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read(ROOT / "deploy/systemd" / name)
    return read


def confined(name: str) -> tuple[str, ...]:
    """Words before a program: it has the unit's capabilities, as far as this machine has them, and gets no more."""
    names = unit(name)["Service"]["CapabilityBoundingSet"].lower().replace("cap_", "").split()
    with open("/proc/self/status") as status:
        had = next(int(line.split()[1], 16) for line in status if line.startswith("CapBnd"))
    known = subprocess.run(["setpriv", "--list-caps"], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) <= {*known}
    mine = [one for one in names if had >> known.index(one) & 1]
    return ("setpriv", "--bounding-set", ",".join(["-all", *(f"+{one}" for one in mine)]), "--no-new-privs")
