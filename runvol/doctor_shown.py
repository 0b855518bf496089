"""What `runvol doctor` has found, for a person (80 columns and whole words, worst first) or as JSON for a program."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from blockdev.printable import printable
from runvol import schemas, tables
from runvol.diagnosis import OK, STATES, Diagnosis

_NARROWEST, _WIDEST = 40, 100
_INDENT = "         "


def show(found: Sequence[Diagnosis], *, as_json: bool) -> None:
    if as_json:
        tables.print_json(schemas.Diagnosis, items(found))
        return
    # A pipe has no width: a line there is one finding's, fix or all.
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else None
    for line in lines(found, width):
        tables.line(line)


def items(found: Sequence[Diagnosis]) -> list[schemas.Diagnosis]:
    return [
        schemas.Diagnosis(state=one.state, id=one.id, subject=one.subject, finding=one.finding, fix=one.fix or None)
        for one in found
    ]


def lines(found: Sequence[Diagnosis], width: int | None) -> Iterator[str]:
    """What is well first, in a line each, then the rest in blocks, the worst last, which is what a terminal shows."""
    for one in found:
        if one.state == OK:
            yield from _wrapped(f"{OK:9}{one.subject}: {one.finding}", width)
    for state in STATES[1:]:
        for one in found:
            if one.state == state:
                yield ""
                yield f"{state:9}{one.id}"
                yield from _wrapped(f"{_INDENT}{one.subject}: {one.finding}", width)
                yield from _wrapped(f"{_INDENT}fix: {one.fix}", width)
    yield ""
    counts = ((state, sum(one.state == state for one in found)) for state in reversed(STATES))
    yield ", ".join(f"{count} {state}" for state, count in counts if count)


def _wrapped(line: str, width: int | None) -> list[str]:
    """What stands between backquotes stays in one line, however long, so that it can be copied."""
    line = printable(line.replace("\n", " "))
    if width is None:
        return [line]
    kept = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", "\0"), line)
    wrapped = textwrap.wrap(kept, width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False)
    return [one.replace("\0", " ") for one in wrapped]
