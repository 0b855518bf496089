"""Who has a port of the loopback: any process may, once the one that it is meant for is down.

proc(5), /proc/net/tcp: each socket that listens, with its inode; /proc/<pid>/fd says whose that is. An inode is not
given again, so a socket that has listened before an exchange and after it has had all connections between.
"""

from __future__ import annotations

import array
import contextlib
import ipaddress
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_LISTENS = "0A"


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """What listens at a port of this network namespace's loopback at a moment."""

    inodes: frozenset[int]

    def all_of(self, is_meant: Callable[[int], bool]) -> bool:
        """Whether there are any, and each is held by a process (its id) of which that is so."""
        left = {f"socket:[{inode}]" for inode in self.inodes}
        if not left:
            return False
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            held = left.intersection(_links(pid))
            if held and is_meant(pid):
                left -= held
        return not left


def listeners(port: int) -> Listeners:
    """OSError where that is not to be seen."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{table}") as file:
            next(file, "")
            for line in file:
                _, local, _, state, *rest = line.split()
                address, _, number = local.partition(":")
                if state == _LISTENS and int(number, 16) == port and _takes(address):
                    found.add(int(rest[5]))
    return Listeners(inodes=frozenset(found))


def _takes(address: str) -> bool:
    """Whether a connection to the loopback may end there. The kernel writes it 32 bits at a time, each in the machine's
    own order."""
    words = array.array("I", bytes.fromhex(address))
    if sys.byteorder == "little":
        words.byteswap()
    found = ipaddress.ip_address(words.tobytes())
    plain = found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found
    return plain.is_loopback or plain.is_unspecified


def _links(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{fd}")
