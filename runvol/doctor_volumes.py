"""`runvol doctor` for volumes: what their backends need, what is wrong with each, what is left over."""

from __future__ import annotations

from collections.abc import Iterator

from blockdev import Deadline
from guestmount import Node, repair
from guestmount.errors import TROUBLE
from guestmount.usage import problems
from guestmount.ways import Problem
from runvol.diagnosis import BROKEN, WARNING, Diagnosis, broken, good, unknown, warning
from volumes import VolumeError

# What a problem of a volume is called (`ways.Problem.reason`, which CSI's conditions have too).
REASONS = {
    "BackingFileMissing": "volumes.file-missing",
    "BackingFileTooSmall": "volumes.file-missing",
    "ClaimDamaged": "volumes.claim-damaged",
    "FilesystemDamaged": "volumes.filesystem-damaged",
    "FilesystemErrors": "volumes.filesystem-damaged",
    "Full": "volumes.full",
    "HandOffClosed": "volumes.hand-off-damaged",
    "HandOffDamaged": "volumes.hand-off-damaged",
    "MountMissing": "volumes.mount-missing",
    "MountsNotSeen": "volumes.mount-missing",
    "NotLookedAt": "volumes.unlooked",
    "OutsideItsLimits": "volumes.full",
    "PlaceholderMissing": "volumes.mount-missing",
    "ServerSilent": "volumes.server-silent",
    "Stale": "volumes.server-silent",
}
_OTHERWISE = "volumes.problem"
# Kinds of `repair.Finding`.
LEFT = {
    "claim": "left.claim",
    "file": "left.file",
    "hand-off": "left.hand-off",
    "loop device": "left.loop-device",
    "placeholder": "left.placeholder",
    "quota": "left.quota",
}
# Seconds.
_COLLECTING = 20.0


def backends(node: Node) -> Iterator[Diagnosis]:
    """What they need of this node's kernel and disk."""
    for backend in node.catalog.backends:
        for need in backend.needs():
            subject = f"backend {backend.name}"
            if need.met:
                yield good("volumes.backend", subject, need.finding)
            else:
                yield warning(f"volumes.{need.what}", subject, need.finding, need.fix)


def examine(node: Node) -> Iterator[Diagnosis]:
    left_out: list[str] = []
    try:
        listed = node.catalog.list(trouble=left_out.append)
        yield good("volumes.listed", "volumes", f"{len(listed)} on this node")
    except VolumeError as error:
        yield broken("volumes.store-unreadable", "volumes", str(error))
        listed = []
    for sentence in left_out:
        yield warning("volumes.not-listed", "volumes", f"not listed: {sentence}")
    files = dict(node.catalog.images())
    for _seq, volume in listed:
        yield from _problems(node, volume.volume_id, files.get(volume.volume_id, ""))


def _problems(node: Node, volume_id: str, file: str) -> Iterator[Diagnosis]:
    try:
        for problem in problems(node, volume_id):
            yield _of(volume_id, problem, file)
    except TROUBLE as error:
        yield unknown("volumes.unlooked", f"volume {volume_id}", f"cannot be looked at: {error}")


def _of(volume_id: str, problem: Problem, file: str) -> Diagnosis:
    known, fix = REASONS.get(problem.reason, _OTHERWISE), ""
    if known == "volumes.filesystem-damaged" and file:
        fix = f"end its pods, then `e2fsck -fy {file}` (XFS: xfs_repair)"
    elif known == "volumes.file-missing" and file:
        fix = f"bring {file} back from a backup, or delete the claim"
    return Diagnosis(state=BROKEN if problem.lost else WARNING, id=known, subject=f"volume {volume_id}",
                     finding=problem.message, fix=fix)  # fmt: skip


def left_over(node: Node, silent: str) -> Iterator[Diagnosis]:
    """`silent`: a directory of kubelet's that gives no answer, below which all would be looked for."""
    found = False
    for one in node.catalog.unfinished():
        found = True
        yield warning("left.volume", f"volume {one.name}", one.why)
    if silent:
        yield unknown("left.unlooked", "left over", f"cannot be looked for: {silent} gives no answer")
        return
    try:
        for finding in repair.collect(node, Deadline.after(_COLLECTING), dry_run=True):
            found = True
            yield _finding(finding)
    except TROUBLE as error:
        yield unknown("left.unlooked", "left over", f"cannot be looked for: {error}")
        return
    if not found:
        yield good("left.nothing", "left over", "nothing")


def _finding(finding: repair.Finding) -> Diagnosis:
    known = LEFT.get(finding.kind)
    if known is None:
        return unknown("left.unlooked", "left over", finding.why)
    fix, why = "", finding.why
    if finding.kind == "file":
        why = why.partition("; ")[0]
        fix = f"`runvol volumes adopt {finding.place} --name NAME` takes it, `rm {finding.place}` removes it"
    return warning(known, finding.kind, f"{finding.place}: {why}" if finding.place else why, fix)
