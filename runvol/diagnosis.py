"""What `runvol doctor` says of one thing: how it is, under an id that stays, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runvol.doctor_table import TABLE
from runvol.troubles import FINE, FOUND, NOT_SEEN

OK, WARNING, BROKEN, UNKNOWN = "ok", "warning", "broken", "unknown"
# From the best on; what could not be looked at may be anything.
STATES = (OK, WARNING, UNKNOWN, BROKEN)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One finding. ValueError for an id that the table has not, or one that does not go with the state.

    `subject`: what it is about, the same for an id wherever things lie. `fix`: what is typed stands between backquotes;
    the table's where none is given, and empty for what is well.
    """

    state: str
    id: str
    subject: str
    finding: str
    fix: str = ""

    def __post_init__(self) -> None:
        known = TABLE.get(self.id)
        if known is None:
            raise ValueError(f"no finding has the id {self.id!r}")
        if self.state not in STATES or (self.state == OK) != known.is_good:
            raise ValueError(f"the id {self.id!r} is not for a finding that is {self.state!r}")
        if not self.fix:
            object.__setattr__(self, "fix", known.fix)


def good(known: str, subject: str, finding: str) -> Diagnosis:
    return Diagnosis(state=OK, id=known, subject=subject, finding=finding)


def warning(known: str, subject: str, finding: str, fix: str = "") -> Diagnosis:
    return Diagnosis(state=WARNING, id=known, subject=subject, finding=finding, fix=fix)


def broken(known: str, subject: str, finding: str, fix: str = "") -> Diagnosis:
    return Diagnosis(state=BROKEN, id=known, subject=subject, finding=finding, fix=fix)


def unknown(known: str, subject: str, finding: str, fix: str = "") -> Diagnosis:
    return Diagnosis(state=UNKNOWN, id=known, subject=subject, finding=finding, fix=fix)


def status(found: Iterable[Diagnosis]) -> int:
    """The exit code: 1 if something is broken, else 3 if something could not be looked at; warnings are none."""
    states = {one.state for one in found}
    return FOUND if BROKEN in states else NOT_SEEN if UNKNOWN in states else FINE
