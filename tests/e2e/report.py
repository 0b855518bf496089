"""The counts of a run: docs/measured/e2e.json, and the tables in docs/conformance.md that are made from it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

from tests.e2e import definitions
from tests.e2e.suite import Outcome

MEASURED = definitions.ROOT / "docs/measured/e2e.json"
PAGE = definitions.ROOT / "docs/conformance.md"
BEGIN, END = "<!-- made from docs/measured/e2e.json; a test compares -->\n", "<!-- until here -->\n"


def keep(outcomes: list[Outcome], kubernetes: str, machine: str = "") -> None:
    """Into the file of figures, in place of what it had of these backends, and the page's tables after it."""
    found: dict[str, Any] = json.loads(MEASURED.read_text()) if MEASURED.exists() else {"backends": {}}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=definitions.ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "kubernetes": kubernetes,
        "machine": machine or f"{os.cpu_count()} cores, {memory} GiB, Linux {platform.release().partition('-')[0]}",
    }
    for one in outcomes:
        found["backends"][one.backend] = {**about, **one.row()}
    found["backends"] = dict(sorted(found["backends"].items()))
    MEASURED.write_text(json.dumps(found, indent=1) + "\n")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + tables(found) + END + rest.partition(END)[2])


def tables(found: dict[str, Any]) -> str:
    """Counts by backend, then what was left out and what the suite passed over, by reason."""
    rows = found["backends"]
    lines = ["| driver file | passed | failed | left out: machine | left out: design | passed over | minutes | run |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for name, row in rows.items():
        out = {kind: sum(counts.values()) for kind, counts in row["left_out"].items()}
        numbers = (row["passed"], len(row["failed"]), out["environment"], out["design"], sum(row["unfit"].values()),
                   round(row["seconds"] / 60))  # fmt: skip
        run = f"{row['date']}, {row['commit']}, {row['kubernetes']}, {row['machine']}"
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {run} |")
    lines += _reasons(rows, "Left out", lambda row: {f"{reason} ({kind})": count
                      for kind, counts in row["left_out"].items() for reason, count in counts.items()})  # fmt: skip
    lines += _reasons(rows, "Passed over by the suite itself, in its words", lambda row: row["unfit"])
    return "\n".join(lines) + "\n"


def _reasons(rows: dict[str, Any], title: str, counts: Any) -> list[str]:
    reasons = sorted({reason for row in rows.values() for reason in counts(row)})
    head = ["", f"| {title} | {' | '.join(rows)} |", f"| --- |{' ---: |' * len(rows)}"]
    return head + [
        f"| {reason} | {' | '.join(str(counts(row).get(reason, 0)) for row in rows.values())} |" for reason in reasons
    ]
