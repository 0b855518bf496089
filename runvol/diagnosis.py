"""One line of `runvol doctor`."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, BROKEN = "ok", "warning", "broken"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One line of the report."""

    state: str
    subject: str
    finding: str
