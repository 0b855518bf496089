"""Kubernetes' suite for one backend: run by ginkgo in several processes, and read from its report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import programs
from tests.e2e import definitions

FOCUS = r"External.Storage"
# What ginkgo prints for each test that has run.
_ENDED = "•"
# Seconds between two lines that say how far it is.
_PROGRESS = 30.0
# Names that differ from run to run, in the suite's own words for what a driver does not have.
_DRIVER = re.compile(r'^Driver "?[\w.]+"? ')


@dataclass
class Outcome:
    """The names of tests by what became of them; `unfit` are those that the suite itself passes over, by its words."""

    backend: str
    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, definitions.LeftOut] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    not_asked: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """As docs/measured/e2e.json has it."""
        out: dict[str, Counter[str]] = {kind: Counter() for kind in definitions.KINDS}
        for one in self.left_out.values():
            out[one.kind][one.reason] += 1
        return {
            "passed": len(self.passed),
            "failed": sorted(self.failed),
            "left_out": {kind: dict(sorted(counts.items())) for kind, counts in out.items()},
            "unfit": dict(sorted(Counter(self.unfit.values()).items())),
            "seconds": round(self.seconds),
        }


def run(backend: str, kubeconfig: Path, reports: Path, *, focus: Sequence[str] = (), processes: int = 4,
        minutes: int = 120) -> None:  # fmt: skip
    """Every test of the suite that the backend's driver file asks for, or of those the ones that match `focus`; what
    became of them is in a report."""
    reports.mkdir(parents=True, exist_ok=True)
    report = reports / f"{backend}.json"
    report.unlink(missing_ok=True)
    bins = programs.directory("e2e")
    wanted = focus or ([definitions.ONLY[backend]] if backend in definitions.ONLY else [])
    argv = [
        bins / "ginkgo", f"--procs={processes}", "--no-color", "--keep-going", f"--timeout={minutes}m", "--silence-skips",
        f"--output-dir={reports}", f"--json-report={backend}.json", f"--junit-report={backend}.xml",
        f"--focus={FOCUS}{'.*(' + '|'.join(wanted) + ')' if wanted else ''}",
        *(f"--skip={one.tests}" for one in definitions.left_out(backend)), bins / "suite.test", "--", f"--kubeconfig={kubeconfig}",
        f"--repo-root={definitions.ROOT}", f"--storage.testdriver={definitions.driver_file(backend)}",
        "--provider=skeleton", "--delete-namespace-on-failure=true", f"--kubectl-path={programs.program('kubectl')}",
    ]  # fmt: skip
    with (reports / f"{backend}.log").open("w") as log:
        ran = subprocess.Popen([str(word) for word in argv], stdout=log, stderr=subprocess.STDOUT,
                               env={**os.environ, "HOME": str(reports)})  # fmt: skip
    _told(backend, ran, reports / f"{backend}.log", len(definitions.recorded(backend)))
    if not report.exists():
        log = (reports / f"{backend}.log").read_text(errors="replace")
        raise RuntimeError(f"ginkgo wrote no report; its log ends with {log[-4000:]}")


def _told(backend: str, ran: subprocess.Popen[bytes], log: Path, expected: int) -> None:
    """Returns when ginkgo has ended; until then, how far it is is printed, by the marks that its log has of each test."""
    began, shown = time.monotonic(), -1
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            ran.wait(_PROGRESS)
            return
        marks = log.read_text(errors="replace")
        if (done := marks.count(_ENDED)) != shown:
            shown = done
            minutes = (time.monotonic() - began) / 60
            print(
                f"==> {backend}: {done} tests have ended, {expected} have passed before; {minutes:.0f} min", flush=True
            )


def read(backend: str, reports: Path) -> Outcome:
    """What the backend's report says."""
    found, out = Outcome(backend), definitions.left_out(backend)
    for suite in json.loads((reports / f"{backend}.json").read_text()):
        found.seconds += suite["RunTime"] / 1e9
        for spec in suite["SpecReports"] or ():
            _add(found, spec, out)
        for reason in suite.get("SpecialSuiteFailureReasons") or ():
            found.failed[f"the suite: {reason}"] = reason
    return found


def _add(found: Outcome, spec: dict[str, Any], out: Sequence[definitions.LeftOut]) -> None:
    name = " ".join([*(spec["ContainerHierarchyTexts"] or ()), spec["LeafNodeText"]])
    message = spec.get("Failure", {}).get("Message", "")
    if spec["LeafNodeType"] != "It":
        if spec["State"] != "passed":
            found.failed[f"{spec['LeafNodeType']} {name}".strip()] = message
    elif not name.startswith("External Storage") or not re.search(definitions.ONLY.get(found.backend, ""), name):
        pass
    elif spec["State"] == "passed":
        found.passed.add(name)
    elif spec["State"] not in ("skipped", "pending"):
        found.failed[name] = message
    elif message:
        found.unfit[name] = _DRIVER.sub("Driver ", message.splitlines()[0])
    elif one := next((one for one in out if one.holds(name)), None):
        found.left_out[name] = one
    else:
        found.not_asked.add(name)
