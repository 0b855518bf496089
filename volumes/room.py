"""How much of a disk its volumes may still take: all that they were promised, less what they have to themselves.

Who writes over a block that another file has as well (reflinks) needs a new one, so such a block is nobody's to keep.
The one exception: of volumes that have a block among themselves each but the last needs a new one, so it counts as had
once. A block that a snapshot has as well counts for none of them, as the snapshot keeps it; and a snapshot, which is
never written, owes nothing itself. So less is owed when something is deleted, never more. What cannot be told counts as
shared.
"""

from __future__ import annotations

import os
import stat
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockdev import shared_blocks
from blockdev.shared_blocks import Shared

# Seconds after which a file's blocks are looked at again, and that new looks of one question may take together.
_GOOD, _LONGEST = 30.0, 2.0
# Pieces of all files together that are compared; of more, none counts as had.
_MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class File:
    """A volume's, or a snapshot's. `promised`: bytes that a volume may come to have; `source`: the id of what it was
    made from, also of what is deleted by now; `is_snapshot`: it is never written. A volume of which a snapshot is being
    taken is there a second time, as the snapshot's file."""

    one_id: str
    path: str
    promised: int
    source: str = ""
    is_snapshot: bool = False


@dataclass(frozen=True)
class _Look:
    """What a file shares, when it was seen, and the files that had been made from it by then.

    A file's blocks become shared only when another is made from it. Until then it shares no more than was seen, however
    long ago that was and whatever is written; so an old look may say too much, and never too little.
    """

    at: float
    made: frozenset[str]
    shared: Shared


class Room:
    """What several files owe."""

    def __init__(self) -> None:
        self._looks: dict[str, _Look] = {}
        self._since = 0.0

    def forget(self) -> None:
        """What was looked at until now is looked at again; before something is refused."""
        self._since = time.monotonic()

    def owed(self, files: Sequence[File]) -> int:
        """Bytes that are still to be written, so that nobody else may be promised them."""
        kept = {file.path: file for file in files if file.is_snapshot}
        eyes = _Eyes(self._looks, self._since, _made(files))
        sharing = _sharing(files)
        owed, shared = 0, list[Shared]()
        for one in files:
            if one.is_snapshot:
                continue
            look = eyes.look(one) if one.one_id in sharing and one.path not in kept else None
            # After the look: what is written in between counts as shared, not twice.
            has = _allocated(one.path)
            if look is not None:
                has = max(0, has - look.total)
                shared.append(look)
            elif one.one_id in sharing:
                has = 0
            owed += max(0, one.promised - has)
        if sum(bool(one.pieces) for one in shared) > 1:
            owed -= _once(shared, [eyes.look(one) for one in kept.values() if _allocated(one.path)])
        self._looks = eyes.seen
        return max(0, owed)


class _Eyes:
    """What is seen for one question: looks that were taken before, as long as they are good, and new ones."""

    def __init__(self, before: Mapping[str, _Look], since: float, made: Mapping[str, frozenset[str]]) -> None:
        self._before, self._since, self._made = before, since, made
        self._until = time.monotonic() + _LONGEST
        self.seen: dict[str, _Look] = {}

    def look(self, one: File) -> Shared | None:
        """None where it cannot be told, or not in time: the next question goes on from there."""
        now, made = time.monotonic(), self._made.get(one.one_id, frozenset())
        known = self._before.get(one.path)
        if known is None or known.made != made:
            known = None
        if (known is None or known.at < max(now - _GOOD, self._since)) and now < self._until:
            try:
                known = _Look(now, made, shared_blocks.look(one.path))
            except OSError:
                known = None  # its health says why
        if known is None:
            return None
        self.seen[one.path] = known
        return known.shared


def _once(volumes: Sequence[Shared], snapshots: Sequence[Shared | None]) -> int:
    """Bytes of blocks that several of the volumes have, and no snapshot has."""
    keepers = [one for one in snapshots if one is not None]
    if len(keepers) < len(snapshots) or sum(len(one.pieces) for one in (*volumes, *keepers)) > 2 * _MOST:
        return 0
    # Where pieces begin and end, with what that changes in how many volumes, and how many snapshots, have the block.
    edges = [(at, 1 - 2 * (number % 2), 0) for one in volumes for number, at in enumerate(one.pieces)]
    edges += [(at, 0, 1 - 2 * (number % 2)) for one in keepers for number, at in enumerate((*one.pieces, *one.rest))]
    once = having = keeping = last = 0
    for at, one_has, one_keeps in sorted(edges):
        if having > 1 and keeping == 0:
            once += at - last
        last, having, keeping = at, having + one_has, keeping + one_keeps
    return once


def _allocated(path: str) -> int:
    """Bytes that the file takes; none for what is no regular file."""
    try:
        facts = os.lstat(path)
    except OSError:
        return 0  # its health says why
    return facts.st_blocks * 512 if stat.S_ISREG(facts.st_mode) else 0


def _made(files: Sequence[File]) -> dict[str, frozenset[str]]:
    """By id, the files that were made from it and are there."""
    made = defaultdict[str, set[str]](set)
    for file in files:
        if file.source and os.path.lexists(file.path):
            made[file.source].add(file.path)
    return {one: frozenset(paths) for one, paths in made.items()}


def _sharing(files: Sequence[File]) -> set[str]:
    """The ids of files that may share blocks: what was made from another, and what another was made from. All, where
    something was made from what is deleted by now: whatever that was made from may be any of them."""
    known, sources = {file.one_id for file in files}, {file.source for file in files if file.source}
    if sources <= known:
        return sources | {file.one_id for file in files if file.source}
    return known
