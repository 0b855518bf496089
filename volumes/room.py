"""How much of a disk its volumes may still take: all that they were promised, less what they have.

Files that were copied by sharing blocks (reflinks) have them together, and each volume may write over them by itself: a
block counts as had once among volumes. One that a snapshot has as well is no volume's to keep: who writes over it needs
another, and the snapshot keeps it. Snapshots are never written, so they owe nothing themselves. What cannot be told
counts as shared.
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
    """A volume's, or a snapshot's. `promised`: bytes that a volume may come to have; `source`: the id of what it was
    made from, also of what is deleted by now; `is_snapshot`: it is never written."""

    one_id: str
    path: str
    promised: int
    source: str = ""
    is_snapshot: bool = False


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
            volumes = [one for one in family if not one.is_snapshot]
            if not volumes:
                continue
            if len(family) == 1:
                owed += max(0, family[0].promised - _allocated(family[0].path))
                continue
            # That a snapshot is among them is a part of what was looked at.
            key = tuple(sorted((one.path, _allocated(one.path)) for one in family))
            known = self._had.get(key)
            if known is None or time.monotonic() - known[0] > _GOOD:
                alone = len(volumes) == len(family)
                known = time.monotonic(), _had([(one.path, _allocated(one.path)) for one in volumes], alone=alone)
            seen[key] = known
            owed += max(0, sum(one.promised for one in volumes) - known[1])
        self._had = seen
        return owed


def _had(family: Sequence[tuple[str, int]], *, alone: bool) -> int:
    """At least so many bytes of blocks they have to keep, each block counted once. `alone`: no snapshot has any."""
    own = most = 0
    for path, allocated in family:
        try:
            shared = min(allocated, shared_blocks.shared_bytes(path))
        except OSError:
            continue  # it has nothing that could be told; its health says why
        own += allocated - shared
        most = max(most, shared)
    return own + most if alone else own


def own_bytes(path: str) -> int:
    """Bytes of its blocks that no other file has. OSError."""
    allocated = _allocated(path)
    return allocated - min(allocated, shared_blocks.shared_bytes(path))


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
