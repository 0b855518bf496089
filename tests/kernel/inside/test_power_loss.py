"""A power cut that loses everything a disk was not told to keep (dm-log-writes): what was acknowledged is there.

Store and pool lie on one device that logs every write. The target holds writes back from its log until a flush
completes, so the log up to a mark is the worst that a disk may have kept at that moment.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from blockdev import loops
from blockdev.devicemapper import Mapper, node
from blockdev.dm_targets import SECTOR, Linear
from snapshotter import assembly
from snapshotter.assembly import Wish
from snapshotter.model import Kind
from snapshotter.node import Node, Settings
from tests.kernel.inside.lab import MIB, mounted, soon

_STORE, _POOL, _LOG = 96 * MIB, 320 * MIB, 900 * MIB
_LAYERS = 6
_FLAG_DISCARD, _FLAG_MARK = 4, 8
_MAGIC = 0x6A736677736872


@dataclass(frozen=True, kw_only=True)
class LogWrites:
    kind: ClassVar[str] = "log-writes"
    length: int
    device: str
    log: str

    def parameters(self) -> str:
        return f"{self.device} {self.log}"


def content(number: int) -> bytes:
    return b"layer %06d\n" % number * 30_000


@contextmanager
def loop(path: Path, size: int) -> Iterator[str]:
    with open(path, "ab") as opened:
        opened.truncate(size)
    device = loops.attach(str(path), deadline=soon())
    try:
        yield device
    finally:
        loops.detach(device, str(path), soon())


@contextmanager
def halves(mapper: Mapper, below: str) -> Iterator[tuple[str, str]]:
    """The part for the store's filesystem, and that for the pool."""
    for name, length, offset in (("rv-store", _STORE, 0), ("rv-whole", _POOL, _STORE)):
        mapper.create(name)
        mapper.load(name, [Linear(length=length // SECTOR, device=below, offset=offset // SECTOR)])
        mapper.resume(name)
    try:
        yield node("rv-store"), node("rv-whole")
    finally:
        mapper.remove("rv-store")
        mapper.remove("rv-whole")


@contextmanager
def running(mapper: Mapper, place: Path, whole: str) -> Iterator[Node]:
    """A snapshotter whose state is under `place`; afterwards its pool is not assembled any more."""
    state = str(place / "s")
    if not os.path.exists(os.path.join(state, "pool.made")):
        assembly.init(mapper, state, Wish(name="powerloss", device=whole), soon())
    node_ = Node(Settings(state_dir=state, size=32 * MIB))
    node_.open_pool()
    node_.recover()
    try:
        yield node_
    finally:
        node_.store.close()
        node_.mapper.close()
        pool, below = assembly.assemble(mapper, state, soon())
        assembly.disassemble(mapper, pool, below, soon())


@contextmanager
def filesystem(device: str, place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", device, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def _entries(log: str) -> Iterator[tuple[int, int, bytes]]:
    """(sector, flags, data) of each entry; a mark's data is its text."""
    with open(log, "rb") as opened:
        magic, version, count, size = struct.unpack_from("<QQQI", opened.read(4096))
        assert (magic, version) == (_MAGIC, 1)
        at = size
        for _ in range(count):
            opened.seek(at)
            head = opened.read(size)
            sector, sectors, flags, length = struct.unpack_from("<QQQQ", head)
            at += size
            if flags & _FLAG_MARK:
                yield sector, flags, head[32 : 32 + length]
            elif flags & _FLAG_DISCARD:
                yield sector, flags, struct.pack("<Q", sectors * size)
            else:
                yield sector * size, flags, opened.read(sectors * size)
                at += sectors * size


def _replay(log: str, mark: bytes, image: Path) -> None:
    """What the disk surely had when the mark was made."""
    with open(image, "wb") as opened:
        opened.truncate(_STORE + _POOL)
        for at, flags, data in _entries(log):
            if flags & _FLAG_MARK:
                if data.rstrip(b"\0\n") == mark:
                    return
            elif not flags & _FLAG_DISCARD:
                opened.seek(at)
                opened.write(data)
    raise AssertionError(f"the log has no mark {mark!r}")


@pytest.fixture
def log(mapper: Mapper, tmp_path: Path) -> Iterator[str]:
    """A life of some layers, each acknowledged by a mark, and its log."""
    with loop(tmp_path / "log", _LOG) as log, loop(tmp_path / "disk", _STORE + _POOL) as disk:
        mapper.create("rv-logged")
        mapper.load("rv-logged", [LogWrites(length=(_STORE + _POOL) // SECTOR, device=disk, log=log)])
        mapper.resume("rv-logged")
        with halves(mapper, node("rv-logged")) as (store, whole):
            subprocess.run(["mkfs.ext4", "-q", store], check=True)
            with filesystem(store, tmp_path / "place"), running(mapper, tmp_path / "place", whole) as one:
                for number in range(_LAYERS):
                    _one_layer(one, number)
                    mapper.message("rv-logged", f"mark committed-{number}")
                    one.snapshots.prepare(f"active {number}", f"layer {number}", {}, soon())
                    mapper.message("rv-logged", f"mark prepared-{number}")
        mapper.remove("rv-logged")
        yield log


def _one_layer(one: Node, number: int) -> None:
    parent = f"layer {number - 1}" if number % 3 else ""
    with mounted(one.snapshots.prepare(f"making {number}", parent, {}, soon())) as root:
        (root / f"f{number}").write_bytes(content(number))
    one.snapshots.commit(f"layer {number}", f"making {number}", {}, "", soon())


def test_what_was_acknowledged_was_on_the_disk(mapper: Mapper, log: str, tmp_path: Path) -> None:
    for number in range(_LAYERS):
        for moment in ("committed", "prepared"):
            image = tmp_path / "replayed"
            _replay(log, f"{moment}-{number}".encode(), image)
            with loop(image, _STORE + _POOL) as disk, halves(mapper, disk) as (store, whole):
                with filesystem(store, tmp_path / "again"), running(mapper, tmp_path / "again", whole) as one:
                    _verify(one, number, moment)
            image.unlink()


def _verify(one: Node, last: int, moment: str) -> None:
    for number in range(last + 1):
        with mounted(one.snapshots.prepare("v", f"layer {number}", {}, soon(), kind=Kind.VIEW)) as root:
            assert (root / f"f{number}").read_bytes() == content(number), f"layer {number} after {moment} {last}"
        one.snapshots.remove("v", soon())
    for number in range(last + (moment == "prepared")):
        with mounted(one.snapshots.mounts(f"active {number}", soon())) as root:
            assert (root / f"f{number}").read_bytes() == content(number)
    while one.reaper.round():
        pass
    rows = {row.device for page in one.store.pages() for row in page}
    assert one.pool.ids(soon()) == rows | {base.device for base in one.store.bases()}
