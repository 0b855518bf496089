"""Kubernetes' own end-to-end tests of storage against runvol, on a cluster of the tests: `python -m tests.e2e [BACKEND...]`.

Backends on NFS are run in a user-mode kernel where this machine's kernel has no NFS client. The status is 0 if exactly
those tests passed that are recorded for the backend, none failed, and no volume is left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cluster import programs
from tests.e2e import definitions, in_kernel, prepared, report, suite


def main() -> int:
    asked = _arguments()
    if not programs.directory("e2e").exists():
        sys.exit("the suite is not built; run `make test-e2e`")
    with tempfile.TemporaryDirectory(prefix="runvol-e2e-") as directory:
        reports = (asked.reports or Path(directory) / "reports").resolve()
        reports.mkdir(parents=True, exist_ok=True)
        elsewhere = [] if asked.here else [one for one in asked.backends if in_kernel.is_needed(one)]
        left = 0
        if here := [one for one in asked.backends if one not in elsewhere]:
            left += _run(here, Path(directory) / "c", reports, asked)
        if elsewhere:
            left += in_kernel.run(elsewhere, reports, focus=asked.focus)
        outcomes = [suite.read(one, reports) for one in asked.backends]
    for one in outcomes:
        say(one)
    if asked.focus or asked.here:
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
    known = definitions.backends()
    parser = argparse.ArgumentParser(prog="python -m tests.e2e", description=__doc__)
    parser.add_argument("backends", nargs="*", metavar="BACKEND", default=known, help=f"of {', '.join(known)}")
    parser.add_argument(
        "--focus", action="append", default=[], help="only tests whose name matches; nothing is compared"
    )
    parser.add_argument("--procs", type=int, default=4, help="how many tests at once (4)")
    parser.add_argument("--reports", type=Path, help="where ginkgo's reports and logs go, instead of nowhere")
    parser.add_argument("--record", action="store_true", help="what passes is what has to pass from now on")
    parser.add_argument("--keep", action="store_true", help="the counts go to docs/measured/e2e.json and its page")
    parser.add_argument("--here", action="store_true", help="all in this kernel; nothing is compared")
    asked = parser.parse_args()
    if unknown := set(asked.backends) - set(known):
        parser.error(f"no driver file for {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return asked


def _run(backends: Sequence[str], directory: Path, reports: Path, asked: argparse.Namespace) -> int:
    """How many volumes are left afterwards: 0, or the suite's own words say of which test."""
    with prepared.cluster(directory, nfs=any(in_kernel.is_on_nfs(one) for one in backends)) as cluster:
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
