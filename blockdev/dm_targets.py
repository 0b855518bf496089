"""Device-mapper's targets: what a table line says, and what a status line says, as types.

Lengths and offsets are in sectors of 512 bytes. Formats: the kernel's Documentation/admin-guide/device-mapper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

SECTOR = 512
# dm-thin keeps a device's id in 24 bits.
MAX_THIN_ID = (1 << 24) - 1
# A data block of a pool, in sectors: 64 KiB to 1 GiB in steps of 64 KiB.
SMALLEST_BLOCK, LARGEST_BLOCK, BLOCK_STEP = 128, 2097152, 128


class Target(Protocol):
    """One line of a table, without its start."""

    kind: ClassVar[str]

    @property
    def length(self) -> int: ...

    def parameters(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Linear:
    kind: ClassVar[str] = "linear"
    length: int
    device: str
    offset: int = 0

    def parameters(self) -> str:
        return f"{self.device} {self.offset}"


@dataclass(frozen=True, kw_only=True)
class Error:
    """Every read and write fails with EIO."""

    kind: ClassVar[str] = "error"
    length: int

    def parameters(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class Delay:
    kind: ClassVar[str] = "delay"
    length: int
    device: str
    milliseconds: int
    offset: int = 0

    def parameters(self) -> str:
        return f"{self.device} {self.offset} {self.milliseconds}"


@dataclass(frozen=True, kw_only=True)
class Flakey:
    """Works for `up` seconds, then misbehaves for `down` seconds as `features` say."""

    kind: ClassVar[str] = "flakey"
    length: int
    device: str
    up: int
    down: int
    features: tuple[str, ...] = ()
    offset: int = 0

    def parameters(self) -> str:
        return " ".join([f"{self.device} {self.offset} {self.up} {self.down} {len(self.features)}", *self.features])


@dataclass(frozen=True, kw_only=True)
class ThinPool:
    """`block` is the size of a data block, `low_water` the free blocks below which the kernel raises an event."""

    kind: ClassVar[str] = "thin-pool"
    length: int
    metadata: str
    data: str
    block: int
    low_water: int
    features: tuple[str, ...] = ()

    def parameters(self) -> str:
        first = f"{self.metadata} {self.data} {self.block} {self.low_water}"
        return " ".join([first, str(len(self.features)), *self.features]) if self.features else first


@dataclass(frozen=True, kw_only=True)
class Thin:
    """What is not mapped reads as zeros, or as `origin` (read-only) where there is one."""

    kind: ClassVar[str] = "thin"
    length: int
    pool: str
    thin_id: int
    origin: str = ""

    def parameters(self) -> str:
        return f"{self.pool} {self.thin_id} {self.origin}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Verity:
    """A read-only device whose every block is checked against a tree of SHA-256 hashes with this root.

    Data and hash blocks are 4096 bytes; `hash_start` is in hash blocks. A wrong block reads as EIO.
    """

    kind: ClassVar[str] = "verity"
    length: int
    data: str
    hashes: str
    data_blocks: int
    hash_start: int
    root: str
    salt: str

    def parameters(self) -> str:
        return (
            f"1 {self.data} {self.hashes} 4096 4096 {self.data_blocks} {self.hash_start} "
            f"sha256 {self.root} {self.salt or '-'}"
        )


@dataclass(frozen=True, kw_only=True)
class PoolStatus:
    """A thin-pool's status line. Counts are blocks: of 4 KiB for metadata, of the pool's size for data.

    `mode` is `rw`, `ro`, `out_of_data_space`, or, where the kernel gave no line, `fail` and `error`.
    """

    mode: str
    transaction: int = 0
    metadata_used: int = 0
    metadata_total: int = 0
    data_used: int = 0
    data_total: int = 0
    held_root: bool = False
    needs_check: bool = False
    queues: bool = True
    discard: str = ""

    @classmethod
    def parse(cls, line: str) -> PoolStatus:
        """ValueError for a line that is no thin-pool status."""
        words = line.split()
        if words in (["Fail"], ["Error"]):
            return cls(mode=words[0].lower())
        if len(words) < 8:
            raise ValueError(f"no status of a thin-pool: {line!r}")
        used, total = words[1].split("/")
        data_used, data_total = words[2].split("/")
        return cls(
            transaction=int(words[0]),
            metadata_used=int(used),
            metadata_total=int(total),
            data_used=int(data_used),
            data_total=int(data_total),
            held_root=words[3] != "-",
            mode=words[4],
            discard=words[5],
            queues=words[6] == "queue_if_no_space",
            needs_check=words[7] == "needs_check",
        )

    @property
    def data_free(self) -> int:
        return self.data_total - self.data_used

    @property
    def metadata_free(self) -> int:
        return self.metadata_total - self.metadata_used


@dataclass(frozen=True, kw_only=True)
class ThinStatus:
    """A thin device's status line. `mapped` counts sectors, those shared with other devices included."""

    mapped: int
    highest: int | None

    @classmethod
    def parse(cls, line: str) -> ThinStatus:
        """ValueError where the pool has failed."""
        words = line.split()
        if len(words) != 2:
            raise ValueError(f"no status of a thin device: {line!r}")
        return cls(mapped=int(words[0]), highest=None if words[1] == "-" else int(words[1]))
