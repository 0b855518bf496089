"""Small filesystems of tests' own, which may be filled to the last byte or the last inode."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

MIB = 1 << 20


@contextlib.contextmanager
def mounted(image: Path, place: Path, make: Sequence[str], *, size: int) -> Iterator[Path]:
    """`make` is the mkfs with its options, `size` in bytes."""
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*make, str(image)], check=True)
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill_bytes(place: Path) -> None:
    """Not one is left: one file for most, and small ones for what it cannot take."""
    with (place / "f").open("ab", buffering=0) as file:
        for size in (MIB, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    with contextlib.suppress(OSError):
        for number in range(10_000):
            (place / f"x{number}").write_bytes(b"y" * 4000)


def fill_inodes(place: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(10_000):
            (place / f"i{number}").touch()
