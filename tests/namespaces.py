"""A network namespace with a tap device of its own: guests, user-mode kernels and servers meet there, and nowhere else."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HOST = "10.77.0.1"
GUEST = "10.77.0.2"
TAP = "rvtap"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Network:
    """`prefix` starts a program inside, in the machine's own mount namespace."""

    name: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/run/netns/{self.name}")


@contextmanager
def network() -> Iterator[Network]:
    """The machine's side is HOST, on the tap device TAP; whatever still runs inside is ended afterwards."""
    made = Network(f"runvol{os.getpid()}x{next(_numbers)}")
    subprocess.run(["ip", "netns", "add", made.name], check=True)
    try:
        for command in (["tuntap", "add", "dev", TAP, "mode", "tap"], ["addr", "add", f"{HOST}/24", "dev", TAP],
                        ["link", "set", TAP, "up"], ["link", "set", "lo", "up"]):  # fmt: skip
            subprocess.run([*made.prefix, "ip", *command], check=True)
        yield made
    finally:
        listed = subprocess.run(["ip", "netns", "pids", made.name], check=True, capture_output=True, text=True).stdout
        for pid in map(int, listed.split()):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", made.name], check=True)
