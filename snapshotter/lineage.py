"""Whose store it is: the name that its copies in the pool have, and whether its pool was last served with it.

What makes it another one is found in `past`; here it is written down, and taken back once an operator has decided
(`repairing`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from snapshotter.foreign import Foreign
from snapshotter.rows import Rows

_PAST, _NAME, _BEFORE = "past", "lineage", "before"


class Lineage:
    """That of one store."""

    def __init__(self, rows: Rows, foreign: Foreign) -> None:
        self._rows, self._foreign = rows, foreign
        # Why the store is not what its pool was last served with, as a sentence; empty if it is.
        self.past = ""

    @property
    def name(self) -> str:
        """By which the store's copies in the pool are known; empty as long as it was not compared with a pool."""
        return self._rows.read_fact(_NAME) or ""

    @property
    def before(self) -> str:
        """The name of the last store that was the pool's own, while this one is not; else empty."""
        return self._rows.read_fact(_BEFORE) or ""

    def load(self) -> None:
        """Whether an earlier life has entered the past."""
        self.past = self._rows.read_fact(_PAST) or ""

    def found(self) -> None:
        """The store has a name of its own."""
        if not self.name:
            with self._rows.transaction():
                self._rows.set_fact(_NAME, _new())

    def enter_past(self, why: str, unproven: Iterable[int], now: int, *, before: str = "") -> None:
        """The pool went on without this store. Devices of which nothing proves that they still are what the rows say
        are quarantined: not mapped, no parents, no bases, never deleted. It has another name from now on; `before` is
        that of the last store that was the pool's own."""
        devices = sorted(unproven)
        with self._rows.transaction():
            self._rows.set_fact(_PAST, why)
            self._rows.set_fact(_NAME, _new())
            self._rows.set_fact(_BEFORE, before)
            self._rows.set_aside(devices, now)
            # Whether a caller was ever answered is written down later than that, so it may have been.
            self._rows.fulfil(devices)
        self.past = why
        self._foreign.look()

    def leave_past(self) -> None:
        """An operator has decided. Inside a transaction."""
        self._rows.forget_facts([_PAST, _BEFORE])
        self.past = ""


def _new() -> str:
    """16 characters that no other store has."""
    return os.urandom(8).hex()
