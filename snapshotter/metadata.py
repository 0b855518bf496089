"""What stands in a pool's metadata, as the tools of device-mapper read them while the pool runs.

They read a snapshot of the metadata that the kernel holds for them. A pool has one: the server and the command line
take turns.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

from blockdev import Deadline, flocks
from blockdev.commands import run
from blockdev.devicemapper import Mapper
from blockdev.dm_targets import SECTOR
from snapshotter.messages import ToldPool
from snapshotter.watermarks import Limits

log = logging.getLogger("runvol.snapshotter")

# The id of the device that whoever serves the pool holds; see `keeper`. No snapshot ever has it.
KEEPER = 0
# Of the kernel: what it uses of a metadata device, in blocks of 4 KiB.
LARGEST_METADATA_BLOCKS = 255 << 14


class ReadPool(ToldPool):
    """A pool whose metadata lie on `metadata`."""

    def __init__(self, mapper: Mapper, name: str, metadata: str, limits: Limits | None = None) -> None:
        super().__init__(mapper, name, limits)
        self.metadata = metadata

    @contextlib.contextmanager
    def metadata_snapshot(self, deadline: Deadline) -> Iterator[None]:
        """The tools may read the live pool's metadata inside; a snapshot that a killed process left is dropped.

        A pool has one metadata snapshot: the server and the command line take turns, by a lock on the metadata device
        that goes with its process. WaitExpired at the deadline.
        """
        with self._metadata_turn(deadline):
            if self.status().held_root:
                self._send("release_metadata_snap")
            self._send("reserve_metadata_snap")
            try:
                yield
            finally:
                self._send("release_metadata_snap")

    @contextlib.contextmanager
    def _metadata_turn(self, deadline: Deadline) -> Iterator[None]:
        fd = os.open(self.metadata, os.O_RDONLY | os.O_CLOEXEC)
        try:
            deadline.poll(f"the metadata snapshot of pool {self.name}, which another call or process uses",
                          lambda: _locked(fd))  # fmt: skip
            yield
        finally:
            flocks.release(fd)

    def ids(self, deadline: Deadline) -> set[int]:
        """Every device that the pool has, but for the keeper."""
        with self.metadata_snapshot(deadline):
            _, output = run("thin_ls", "-m", "--no-headers", "-o", "DEV", self.metadata, deadline=deadline)
        return set(numbers(output)) - {KEEPER}

    def keeper_block(self, deadline: Deadline) -> int | None:
        """The data block in which the keeper begins."""
        with self.metadata_snapshot(deadline):
            return first_block(run("thin_dump", "-m", "--dev-id", str(KEEPER), self.metadata, deadline=deadline)[1])

    def check_live(self, deadline: Deadline) -> None:
        """thin_check on the pool as it runs; CommandFailed with its words."""
        with self.metadata_snapshot(deadline):
            run("thin_check", "-q", "-m", self.metadata, deadline=deadline)

    def added(self, device: int, origin: int, deadline: Deadline) -> int:
        """Bytes in blocks of `device` that are not those of `origin`; inside a `metadata_snapshot`."""
        _, output = run(
            "thin_delta", "-m", "--snap1", str(origin), "--snap2", str(device), self.metadata, deadline=deadline
        )
        xml = _document(output)
        return _added_blocks(xml) * int(_attribute(xml, "data_block_size")) * SECTOR

    def listed(self, deadline: Deadline) -> dict[int, tuple[int, int]]:
        """Id to (bytes that only it maps, bytes that it shares); inside a `metadata_snapshot`."""
        _, output = run("thin_ls", "-m", "--no-headers", "-o", "DEV,EXCLUSIVE_BYTES,SHARED_BYTES", self.metadata,
                        deadline=deadline)  # fmt: skip
        rows = (line.split() for line in output.splitlines())
        return {
            int(row[0]): (int(row[1]), int(row[2]))
            for row in rows
            if len(row) == 3 and all(map(str.isdecimal, row)) and int(row[0]) != KEEPER
        }

    def mapped_bytes(self, deadline: Deadline) -> dict[int, tuple[int, int]]:
        """Id to (bytes that only it maps, bytes that it shares)."""
        with self.metadata_snapshot(deadline):
            return self.listed(deadline)


def first_block(xml: str) -> int | None:
    """The data block that the first block of the device lies in, of what thin_dump says of it; None without one."""
    from xml.etree import ElementTree

    for element in ElementTree.fromstring(_document(xml)).iter():  # noqa: S314  (written by thin_dump, about numbers)
        if element.tag == "single_mapping" and element.attrib["origin_block"] == "0":
            return int(element.attrib["data_block"])
        if element.tag == "range_mapping" and element.attrib["origin_begin"] == "0":
            return int(element.attrib["data_begin"])
    return None


def numbers(output: str) -> Iterator[int]:
    """The lines that are a number. A tool's warning among them is told, and is no device."""
    for line in filter(None, map(str.strip, output.splitlines())):
        if line.isdecimal():
            yield int(line)
        else:
            log.warning("a line of thin_ls is no device", extra={"line": line[:200]})


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _attribute(xml: str, name: str) -> str:
    at = xml.index(f'{name}="') + len(name) + 2
    return xml[at : xml.index('"', at)]


def _document(output: str) -> str:
    """The XML without what the tool has warned of around it."""
    return "\n".join(line for line in output.splitlines() if line.lstrip().startswith("<"))


def _added_blocks(xml: str) -> int:
    from xml.etree import ElementTree

    total = 0
    for element in ElementTree.fromstring(xml).iter():  # noqa: S314  (written by thin_delta, about the pool's own blocks)
        if element.tag in ("different", "right_only"):
            total += int(element.attrib["length"])
    return total
