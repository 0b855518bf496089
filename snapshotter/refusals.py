"""Ids that the pool turned out to have already, on the disk before the store can take them, also when it is full.

The store needs room for each change; a page that was written when there was some is changed in place. Without it a row
or a base whose id is somebody else's device would be taken for what an earlier life had made, at the next start, and
handed out or deleted.
"""

from __future__ import annotations

import logging
import os
import struct

from blockdev import durable

log = logging.getLogger("runvol.snapshotter")
_SLOTS = 512
_ENTRY = struct.Struct("<Q")


class Refusals:
    """One page beside the store. For the server alone."""

    def __init__(self, path: str) -> None:
        self._path = path

    def prepare(self) -> set[int]:
        """The page is there, and what an earlier life has left in it. OSError where it cannot be made or read."""
        try:
            with open(self._path, "rb") as page:
                raw = page.read(_SLOTS * _ENTRY.size)
        except FileNotFoundError:
            raw = b""
        size = len(raw)
        raw = raw[: size - size % _ENTRY.size]
        if size < _SLOTS * _ENTRY.size:
            durable.replace(self._path, raw.ljust(_SLOTS * _ENTRY.size, b"\0"))
        return {one for (one,) in _ENTRY.iter_unpack(raw) if one}

    def add(self, device: int) -> bool:
        """Whether the id is on the disk. What cannot be written is told: the caller has the id in memory only."""
        return self._change(0, device)

    def drop(self, device: int) -> None:
        """The store has it now."""
        self._change(device, 0)

    def clear(self) -> None:
        """The store has all of them."""
        durable.replace(self._path, bytes(_SLOTS * _ENTRY.size))

    def _change(self, old: int, new: int) -> bool:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                raw = os.pread(fd, _SLOTS * _ENTRY.size, 0)
                slots = [one for (one,) in _ENTRY.iter_unpack(raw[: len(raw) - len(raw) % _ENTRY.size])]
                if old not in slots:
                    return new == 0
                os.pwrite(fd, _ENTRY.pack(new), slots.index(old) * _ENTRY.size)
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            log.error("a device that is not ours could not be noted", extra={"device": new or old, "why": str(error)})
            return False
        return True
