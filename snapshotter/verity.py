"""dm-verity's hash tree: every block of an image hashed, the hashes hashed, up to one root.

Format 1 of the kernel's Documentation/admin-guide/device-mapper/verity.rst: blocks of 4096 bytes, SHA-256 of salt and
block, 128 digests a hash block, levels stored from the top down.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator

BLOCK = 4096
# The longest salt that the kernel takes, in bytes.
LONGEST_SALT = 256
_DIGEST = 32
_FAN = BLOCK // _DIGEST
_STEP = 1 << 20


def build(image: str, hashes: str, salt: bytes, progress: Callable[[int], object] | None = None) -> str:
    """Write the tree of the file or device `image` into the file `hashes`; the root, in hexadecimal."""
    levels, root = tree(image, salt, progress)
    with open(hashes, "wb") as out:
        for level in reversed(levels):
            out.write(level)
        out.flush()
        os.fsync(out.fileno())
    return root


def tree_bytes(size: int) -> int:
    """How long the tree of so many bytes is."""
    blocks, total = -(-size // BLOCK), 0
    while blocks > 1:
        blocks = -(-blocks // _FAN)
        total += blocks
    return total * BLOCK


def tree(image: str, salt: bytes, progress: Callable[[int], object] | None = None) -> tuple[list[bytes], str]:
    """The tree's levels, the lowest first, in whole blocks, and the root. Every byte of `image` is read."""
    level = b"".join(_digests(image, salt, progress))
    levels = []
    while len(level) > _DIGEST:
        blocks = [level[at : at + BLOCK].ljust(BLOCK, b"\0") for at in range(0, len(level), BLOCK)]
        levels.append(b"".join(blocks))
        level = b"".join(hashlib.sha256(salt + block).digest() for block in blocks)
    return levels, level.hex()


def _digests(image: str, salt: bytes, progress: Callable[[int], object] | None) -> Iterator[bytes]:
    zeros = bytes(BLOCK)
    of_zeros = hashlib.sha256(salt + zeros).digest()
    many = bytes(_STEP)
    with open(image, "rb", buffering=0) as read:
        done = 0
        while chunk := read.read(_STEP):
            if chunk == many:
                yield of_zeros * (_STEP // BLOCK)
            else:
                for at in range(0, len(chunk), BLOCK):
                    block = chunk[at : at + BLOCK].ljust(BLOCK, b"\0")
                    yield of_zeros if block == zeros else hashlib.sha256(salt + block).digest()
            done += len(chunk)
            if progress is not None:
                progress(done)
