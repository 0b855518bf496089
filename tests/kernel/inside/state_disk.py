"""A disk of its own under the state directory, that fails, lies, hangs, loses what the kernel held back, and comes back."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from blockdev import loops
from blockdev.devicemapper import Mapper, node
from blockdev.dm_targets import SECTOR, Error, Flakey, Linear, Target
from tests.kernel.inside.lab import MIB, soon

_NAME = "rv-state"


class StateDisk:
    """A filesystem on a device whose table is changed under it. A context manager; mounted at `place`."""

    def __init__(self, directory: Path, place: Path, *, fstype: str = "ext4", size: int = 32 * MIB) -> None:
        self.place, self.fstype, self._size = place, fstype, size
        self._file = directory / "state-disk"
        self._mapper = Mapper()

    def __enter__(self) -> StateDisk:
        self._file.touch()
        with open(self._file, "r+b") as opened:
            opened.truncate(self._size)
        self._device = loops.attach(str(self._file), deadline=soon())
        self._mapper.create(_NAME)
        self.well()
        quiet = ["-q", "-F"] if self.fstype == "ext4" else ["-q"]
        subprocess.run([f"mkfs.{self.fstype}", *quiet, node(_NAME)], check=True)
        self.place.mkdir()
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.well()
        subprocess.run(["umount", str(self.place)], check=True)
        self._mapper.remove(_NAME)
        loops.detach(self._device, str(self._file), soon())
        self._mapper.close()

    def _table(self, target: Target) -> None:
        """What is under way is let go by the old table; the filesystem is not asked to come to rest."""
        self._mapper.load(_NAME, [target])
        self._mapper.suspend(_NAME, flush=False, freeze=False)
        self._mapper.resume(_NAME)

    def _flakey(self, feature: str) -> None:
        self._table(Flakey(length=self._size // SECTOR, device=self._device, up=0, down=86400, features=(feature,)))

    def well(self) -> None:
        self._table(Linear(length=self._size // SECTOR, device=self._device, offset=0))

    def fails(self) -> None:
        """Reads and writes."""
        self._table(Error(length=self._size // SECTOR))

    def refuses_writes(self) -> None:
        self._flakey("error_writes")

    def loses_writes(self) -> None:
        """And says that they are kept, also of those that are to be flushed."""
        self._flakey("drop_writes")

    def gives_up(self) -> None:
        """The disk fails, and its filesystem has met that: it stays so when the disk is well again."""
        self.fails()
        with contextlib.suppress(OSError):
            (self.place / "touched").mkdir()
        subprocess.run(["sync", "-f", str(self.place)], check=False, capture_output=True)

    def hang(self) -> None:
        self._mapper.suspend(_NAME, flush=False, freeze=False)

    def go_on(self) -> None:
        self._mapper.resume(_NAME)

    def mount(self) -> None:
        subprocess.run(["mount", "-t", self.fstype, node(_NAME), str(self.place)], check=True)

    def remount(self) -> None:
        """As an operator has to, once a filesystem has given up. Nobody may use it."""
        subprocess.run(["umount", str(self.place)], check=True)
        self.mount()

    def cut(self) -> None:
        """The power of this disk alone: what the kernel holds back never comes to it. Nobody may use it."""
        self.fails()
        subprocess.run(["umount", str(self.place)], check=True)
        self.well()
        self.mount()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        self.hang()
        try:
            yield
        finally:
            self.go_on()
