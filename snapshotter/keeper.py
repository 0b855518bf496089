"""A small thin device of runvol's own in the pool: who has it open alone serves the pool or changes it, and in it lies
a copy of the store.

Nobody but the kernel can hold it twice, whatever becomes of sockets, state directories and their copies. The copy is
written behind the calls, into one of four places in turn, each with its header last, so that a whole one is there
whatever is interrupted. A store that is new here, or came back from the past, does not write over the copy of the one
before until an operator has decided (`repairing`).

    0           the pool's identity and name
    4096 (n+1)  the header of place n
    (n+1) << 28 a store, as SQLite's file
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sqlite3
import struct
import time
import weakref
import zlib
from dataclasses import dataclass

from snapshotter import backing
from snapshotter.errors import PoolFull, PoolRefused, Unavailable
from snapshotter.pool import KEEPER, DeviceMissing, DeviceThere, Pool
from snapshotter.tables import LOG_FLAGS

_PLACES, _STEP, _PAGE, _CHUNK = 4, 1 << 28, 4096, 64 << 10
SIZE = _STEP * (_PLACES + 1)
# Bytes of what says whose the device is, and of all headers.
HEAD = _PAGE * (_PLACES + 1)
# Magic, version, number of the copy, stamp, nanoseconds since 1970, bytes, SHA-256 of them, lineage; then a checksum.
_HEADER = struct.Struct("<8sIQQQQ32s16s")
_MAGIC, _VERSION = b"runvolsc", 1
# Of this process, by the pool's identity.
_HELD: weakref.WeakValueDictionary[str, Keeper] = weakref.WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class Copy:
    """The header of a copy that is whole as far as that tells. `made` is nanoseconds since 1970."""

    place: int
    sequence: int
    stamp: int
    made: int
    length: int
    digest: bytes
    lineage: str


class Keeper:
    """The device, held from `open` to `close`. For one thread at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._fd = -1
        # Of what this process has written to each place, chunk by chunk: Python's own hash, of 64 bits and with a key
        # of this process. The SHA-256 in the header is of all, and is made once.
        self._written: dict[int, list[int]] = {}

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def open(self) -> None:
        """Hold the device; it is made where it is not there yet. May be repeated.

        PoolRefused if another process has it or it is not ours, Unavailable where it cannot be made or mapped now.
        """
        if self.held:
            return
        made = self._map()
        path = self._pool.path(KEEPER)
        before = _HELD.get(self._pool.identity)
        if before is not None:
            # A process is one server: what it left open without an end is not another's.
            before.close()
        try:
            fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise PoolRefused(
                    f"another process serves or changes pool {self._pool.name} (it has {path} open); stop that first"
                ) from None
            raise Unavailable(f"{path}: {error.strerror}") from None
        try:
            self._prove(fd, made=made)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _HELD[self._pool.identity] = self

    def _map(self) -> bool:
        """Whether the device was made just now."""
        try:
            self._pool.activate(KEEPER, SIZE)
        except DeviceMissing:
            # Two that begin at once may both make it: who has it open first has it.
            with contextlib.suppress(DeviceThere):
                self._pool.create_thin(KEEPER)
            self._pool.activate(KEEPER, SIZE)
            return True
        return False

    def _prove(self, fd: int, *, made: bool) -> None:
        """PoolRefused for somebody else's device; one that nobody ever wrote to is what a killed process left."""
        if backing.keeper_of(os.pread(fd, _PAGE, 0)) == self._pool.identity:
            return
        if not made and self._pool.mapped_sectors(KEEPER):
            raise PoolRefused(
                f"device {KEEPER} of pool {self._pool.name} is somebody else's, and that id is what runvol holds its "
                "pools by; whoever made it has to remove it"
            )
        self._room(_PAGE)
        _write(fd, backing.keeper_page(self._pool.name, self._pool.identity), 0)
        os.fsync(fd)

    def close(self) -> None:
        """Let go of the device, which stays mapped. May be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    # -- copies -------------------------------------------------------------------------------------------------------

    def copies(self) -> list[Copy]:
        """Those whose headers are whole, the newest first."""
        found = [self._header(place) for place in range(_PLACES)] if self.held else []
        return sorted((one for one in found if one is not None), key=lambda one: one.sequence, reverse=True)

    def _header(self, place: int) -> Copy | None:
        return parse(os.pread(self._fd, _HEADER.size + 4, _PAGE * (place + 1)), place)

    def read(self, copy: Copy) -> sqlite3.Connection | None:
        """The store as it was copied, in memory; None if the copy is damaged."""
        content = bytearray()
        while len(content) < copy.length:
            part = os.pread(self._fd, min(1 << 20, copy.length - len(content)),
                            _STEP * (copy.place + 1) + len(content))  # fmt: skip
            if not part:
                return None
            content += part
        if hashlib.sha256(content).digest() != copy.digest:
            return None
        content[LOG_FLAGS] = b"\1\1"
        found = sqlite3.connect(":memory:", isolation_level=None)
        found.deserialize(bytes(content))
        return found

    def write(self, content: bytes, stamp: int, lineage: str, before: str = "") -> None:
        """Put a copy beside the last one, and beside that of the lineage `before`, whatever came in between. Only what
        changed since the place was last written to is written.

        PoolFull where the pool has no room for it, Unavailable where it takes nothing.
        """
        if len(content) > _STEP:
            raise PoolFull(f"the store has {len(content)} bytes, and its copy in the pool {_STEP} at the most")
        self._room(len(content))
        copies = self.copies()
        place = _place(copies, lineage, before)
        chunks = [content[at : at + _CHUNK] for at in range(0, len(content), _CHUNK)]
        last = self._written.pop(place, [])
        marks = [hash(chunk) for chunk in chunks]
        for number, chunk in enumerate(chunks):
            if last[number : number + 1] != [marks[number]]:
                _write(self._fd, chunk, _STEP * (place + 1) + number * _CHUNK)
        os.fsync(self._fd)
        raw = _HEADER.pack(_MAGIC, _VERSION, copies[0].sequence + 1 if copies else 1, stamp, time.time_ns(),
                           len(content), hashlib.sha256(content).digest(), lineage.encode())  # fmt: skip
        _write(self._fd, (raw + struct.pack("<I", zlib.crc32(raw))).ljust(_PAGE, b"\0"), _PAGE * (place + 1))
        os.fsync(self._fd)
        self._written[place] = marks

    def _room(self, length: int) -> None:
        """A write to a pool without room would wait for a minute, and fail."""
        status = self._pool.status()
        if status.mode != "rw" or status.needs_check:
            raise Unavailable(f"pool {self._pool.name} takes no copy of the store: it is {status.mode}")
        if status.data_free < length // self._pool.block_bytes() + 2:
            raise PoolFull(f"pool {self._pool.name} has no room for a copy of the store")


def parse(raw: bytes, place: int) -> Copy | None:
    """The header that begins here; None if it is not whole."""
    magic, version, sequence, stamp, made, length, digest, lineage = _HEADER.unpack_from(raw)
    check = struct.unpack_from("<I", raw, _HEADER.size)[0]
    if magic != _MAGIC or version != _VERSION or check != zlib.crc32(raw[: _HEADER.size]) or length > _STEP:
        return None
    return Copy(place=place, sequence=sequence, stamp=stamp, made=made, length=length, digest=digest,
                lineage=lineage.decode("ascii", "replace"))  # fmt: skip


def stamps_in(pages: bytes) -> list[int]:
    """The stamps of the copies whose headers are in the first `HEAD` bytes of the device."""
    found = [parse(pages[_PAGE * (place + 1) : _PAGE * (place + 2)], place) for place in range(_PLACES)]
    return [one.stamp for one in found if one is not None]


def _place(copies: list[Copy], lineage: str, before: str = "") -> int:
    """Where the next copy goes: never over the newest of this lineage, nor over that of `before`, nor over that of the
    other that was written last."""
    free = set(range(_PLACES)) - {one.place for one in copies}
    if free:
        return min(free)
    kept: dict[str, int] = {}
    for one in copies:
        kept.setdefault(one.lineage, one.place)
    own = kept.pop(lineage, None)
    first = [kept.pop(before)] if before in kept else []
    others = [*first, *kept.values()][: _PLACES - 2]
    return next(one.place for one in reversed(copies) if one.place != own and one.place not in others)


def _write(fd: int, content: bytes, at: int) -> None:
    while content:
        done = os.pwrite(fd, content, at)
        content, at = content[done:], at + done


__all__ = ["HEAD", "SIZE", "Copy", "Keeper", "parse", "stamps_in"]
