"""Ids that the pool turned out to have already, on the disk before the store can take them, also when it is full.

The store needs room for each change; a page that was written when there was some is changed in place. Without it a row
or a base whose id is somebody else's device would be taken for what an earlier life had made, at the next start, and
handed out or deleted.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterable

from blockdev import durable
from blockdev.dm_targets import MAX_THIN_ID

log = logging.getLogger("runvol.snapshotter")
SLOTS = 512
# An id and its checksum: what was damaged names no snapshot's device.
_ENTRY = struct.Struct("<II")
_SIZE = SLOTS * _ENTRY.size


class Refusals:
    """One page beside the store. For the server alone; its threads may use it beside each other.

    `trouble`: why nothing can be noted now, naming the file; empty where it can.
    """

    def __init__(self, path: str) -> None:
        self._path, self._lock = path, threading.Lock()
        self.trouble = f"{path} was not looked at yet"

    def prepare(self) -> set[int]:
        """What an earlier life has left in the page, which is there afterwards, or `trouble` says why it is not."""
        found: set[int] = set()
        with self._lock:
            try:
                durable.sweep(f"{self._path}.", abandoned=True)
                raw = self._read()
                found = self._known(raw)
                if len(raw) < _SIZE:
                    durable.replace(self._path, _page(found))
            except OSError as error:
                self.trouble = f"{self._path} cannot be read or made: {error.strerror}"
            else:
                self.trouble = ""
        return found

    def add(self, device: int) -> bool:
        """Whether the id is on the disk. What cannot be written is told: the caller has the id in memory only."""
        return self._change(0, device)

    def drop(self, device: int) -> None:
        """The store has it now."""
        self._change(device, 0)

    def clear(self) -> None:
        """The store has all of them."""
        with self._lock:
            self._write(0, _page(()))

    def _read(self) -> bytes:
        try:
            with open(self._path, "rb") as page:
                return page.read(_SIZE)
        except FileNotFoundError:
            return b""

    def _known(self, raw: bytes) -> set[int]:
        found = set()
        for device, check in _ENTRY.iter_unpack(raw[: len(raw) - len(raw) % _ENTRY.size]):
            if 0 < device <= MAX_THIN_ID and check == _check(device):
                found.add(device)
            elif device or check:
                log.error("a damaged note of a device that is not ours", extra={"file": self._path, "said": device})
        return found

    def _change(self, old: int, new: int) -> bool:
        with self._lock:
            try:
                raw = self._read()
            except OSError as error:
                self._told(new or old, error.strerror)
                return False
            entries = [raw[at : at + _ENTRY.size] for at in range(0, len(raw) - _ENTRY.size + 1, _ENTRY.size)]
            if _entry(old) not in entries:
                if new:
                    self._told(new, "no room is left in it" if entries else "it is not there")
                return new == 0
            return self._write(entries.index(_entry(old)) * _ENTRY.size, _entry(new), new or old)

    def _write(self, at: int, content: bytes, device: int = 0) -> bool:
        """In place: the page needs no room."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.pwrite(fd, content, at) != len(content):
                    raise OSError(5, "it was written in part")
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self._told(device, error.strerror)
            return False
        self.trouble = ""
        return True

    def _told(self, device: int, why: str | None) -> None:
        self.trouble = f"{self._path} cannot be written: {why}"
        log.error("a device that is not ours could not be noted", extra={"device": device, "why": self.trouble})


def _check(device: int) -> int:
    return zlib.crc32(b"not ours %d" % device)


def _entry(device: int) -> bytes:
    return _ENTRY.pack(device, _check(device)) if device else bytes(_ENTRY.size)


def _page(devices: Iterable[int]) -> bytes:
    return b"".join(map(_entry, sorted(devices))).ljust(_SIZE, b"\0")
