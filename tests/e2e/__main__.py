"""Kubernetes' own end-to-end tests of storage against runvol, on a cluster of the tests: `python -m tests.e2e [BACKEND...]`.

The status is 0 if exactly those tests passed that are recorded for the backend, none failed, and no volume is left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cluster import programs
from tests.e2e import definitions, prepared, report, suite


def main() -> int:
    asked = _arguments()
    if not programs.directory("e2e").exists():
        sys.exit("the suite is not built; run `make test-e2e`")
    with tempfile.TemporaryDirectory(prefix="runvol-e2e-") as directory:
        reports = (asked.reports or Path(directory) / "reports").resolve()
        reports.mkdir(parents=True, exist_ok=True)
        left = _run(asked.backends, Path(directory) / "c", reports, asked)
        outcomes = [suite.read(one, reports) for one in asked.backends]
    for one in outcomes:
        say(one)
    if asked.focus:
        return int(bool(left or any(one.failed for one in outcomes)))
    if asked.record:
        for one in outcomes:
            definitions.recorded_file(one.backend).write_text("".join(f"{name}\n" for name in sorted(one.passed)))
    if asked.keep:
        report.keep(outcomes, programs.directory("e2e").name.removeprefix("e2e-"))
    wrong = [words for one in outcomes for words in differences(one)]
    print(*wrong, sep="\n")
    return int(bool(wrong or left or any(one.failed for one in outcomes)))


def _arguments() -> argparse.Namespace:
    known = [one for one in definitions.backends() if one not in definitions.ELSEWHERE]
    parser = argparse.ArgumentParser(prog="python -m tests.e2e", description=__doc__)
    parser.add_argument("backends", nargs="*", metavar="BACKEND", default=known, help=f"of {', '.join(known)}")
    parser.add_argument(
        "--focus", action="append", default=[], help="only tests whose name matches; nothing is compared"
    )
    parser.add_argument("--procs", type=int, default=4, help="how many tests at once (4)")
    parser.add_argument("--reports", type=Path, help="where ginkgo's reports and logs go, instead of nowhere")
    parser.add_argument("--record", action="store_true", help="what passes is what has to pass from now on")
    parser.add_argument("--keep", action="store_true", help="the counts go to docs/measured/e2e.json and its page")
    asked = parser.parse_args()
    if unknown := set(asked.backends) - set(known):
        parser.error(f"{', '.join(sorted(unknown))} cannot be run here; there are {', '.join(known)}")
    return asked


def _run(backends: Sequence[str], directory: Path, reports: Path, asked: argparse.Namespace) -> int:
    """How many volumes are left afterwards: 0, or the suite's own words say of which test."""
    with prepared.cluster(directory) as cluster:
        for backend in backends:
            suite.run(backend, cluster.kubeconfig, reports, focus=asked.focus, processes=asked.procs)
        left = cluster.list("pv")
    for one in left:
        print(f"left: {one['metadata']['name']} of {one['spec'].get('claimRef', {}).get('namespace')}")
    return len(left)


def say(outcome: suite.Outcome) -> None:
    row = outcome.row()
    out = {kind: sum(counts.values()) for kind, counts in row["left_out"].items()}
    print(f"{outcome.backend}: {len(outcome.passed)} passed, {len(outcome.failed)} failed, "
          f"{out['environment']} left out for the machine, {out['design']} by design, "
          f"{len(outcome.unfit)} passed over by the suite, {row['seconds'] / 60:.0f} min")  # fmt: skip
    for name, message in sorted(outcome.failed.items()):
        print(f"  failed: {name}\n    {message[:2000]}")
    sys.stdout.flush()


def differences(outcome: suite.Outcome) -> list[str]:
    """What ran, beside what is recorded."""
    recorded = definitions.recorded(outcome.backend)
    return [
        *(f"{outcome.backend}: did not pass: {name}" for name in sorted(recorded - outcome.passed)),
        *(f"{outcome.backend}: is not recorded: {name}" for name in sorted(outcome.passed - recorded)),
    ]


if __name__ == "__main__":
    sys.exit(main())
