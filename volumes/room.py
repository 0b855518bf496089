"""How much of a disk its volumes may still take: all that they were promised, less what they have.

Files that were copied by sharing blocks (reflinks) have them together, and each may be written over by itself: a block
counts as had once among all of them. What cannot be told counts as shared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from blockdev import shared_blocks

# Seconds for which a look at the blocks of one family is believed: a guest writes all the time.
_GOOD = 30.0


@dataclass(frozen=True, kw_only=True)
class File:
    """A volume's, or a snapshot's. `promised`: bytes that it may come to have; `source`: the id of what it was made
    from, also of what is deleted by now."""

    one_id: str
    path: str
    promised: int
    source: str = ""


class Room:
    """What several files owe."""

    def __init__(self) -> None:
        self._had: dict[tuple[tuple[str, int], ...], tuple[float, int]] = {}

    def forget(self) -> None:
        """What was looked at a while ago; before something is refused."""
        self._had = {}

    def owed(self, files: Sequence[File]) -> int:
        """Bytes that are still to be written, so that nobody else may be promised them."""
        owed, seen = 0, dict[tuple[tuple[str, int], ...], tuple[float, int]]()
        for family in _families(files):
            if len(family) == 1:
                owed += max(0, family[0].promised - _allocated(family[0].path))
                continue
            key = tuple(sorted((one.path, _allocated(one.path)) for one in family))
            known = self._had.get(key)
            if known is None or time.monotonic() - known[0] > _GOOD:
                known = time.monotonic(), _had(key)
            seen[key] = known
            owed += max(0, sum(one.promised for one in family) - known[1])
        self._had = seen
        return owed


def _had(family: Sequence[tuple[str, int]]) -> int:
    """At least so many bytes of blocks they have, each block counted once."""
    own = most = 0
    for path, allocated in family:
        try:
            shared = min(allocated, shared_blocks.shared_bytes(path))
        except FileNotFoundError:
            continue
        own += allocated - shared
        most = max(most, shared)
    return own + most


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0  # its health says why


def _families(files: Sequence[File]) -> list[list[File]]:
    """Files that may share blocks: what was made from another one, and all that was made from the same."""
    root: dict[str, str] = {}

    def head(one: str) -> str:
        while root.setdefault(one, one) != one:
            root[one] = one = root[root[one]]
        return one

    for file in files:
        if file.source:
            root[head(file.one_id)] = head(file.source)
    found: dict[str, list[File]] = {}
    for file in files:
        found.setdefault(head(file.one_id), []).append(file)
    return list(found.values())
