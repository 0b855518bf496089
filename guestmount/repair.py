"""What is left over on a node, and taking it back: at start, and for `runvol gc`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from blockdev import Deadline, loops, mountinfo, mounts
from blockdev.errors import of_system
from guestmount import file_witnesses, placeholder, ways, witnesses
from guestmount.claims import Claim
from guestmount.errors import TROUBLE, BadRequest, Busy, Refused
from guestmount.handoff import Delivered, Dialect
from guestmount.node import Node
from guestmount.ways import exclusion
from volumes import VolumeNotFound

log = logging.getLogger("runvol.repair")

_START = 60.0
# What a start spends on each volume that somebody may still have, in seconds.
_MOMENT = 0.3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that nobody needs. `done`: it was taken back; `by_hand`: it never is by runvol."""

    kind: str
    place: str
    why: str
    done: bool = False
    by_hand: bool = False


class _Look(Protocol):
    def __call__(self, node: Node, deadline: Deadline, /, *, dry_run: bool) -> list[Finding]: ...


def taken_back(node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    """What `runvol gc` says and does: a plan and its deed are the same steps. The claims that were lost are made again
    before the deed, which takes nothing away."""
    made = [] if dry_run else _made_again(node)
    looks = (_closed, _hand_offs, _unfinished, _placeholders, _claims, _loop_devices, _quotas)
    # One trouble keeps several from looking.
    return list(dict.fromkeys(made + _looked(looks, node, deadline, dry_run=dry_run)))


def _made_again(node: Node) -> list[Finding]:
    """What a start does first, each step by itself."""
    found: list[Finding] = []
    for step in _first(node):
        try:
            found += [Finding(kind="claim", place="", why=said, done=True) for said in step() or ()]
        except TROUBLE as error:
            found.append(_trouble(error))
    return found


def _trouble(error: Exception) -> Finding:
    return Finding(kind="trouble", place="", why=f"not all was looked at: {_words(error)}")


def _words(error: Exception) -> str:
    return of_system(error) if isinstance(error, OSError) else str(error)


def collect(node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    """Everything on the node that belongs to no volume or to no pod; removed unless `dry_run`. Volumes that were not
    finished are the catalog's to tell."""
    return _looked(
        (_closed, _hand_offs, _placeholders, _claims, _loop_devices, _quotas), node, deadline, dry_run=dry_run
    )


def _looked(looks: Sequence[_Look], node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    found: list[Finding] = []
    for look in looks:
        try:
            found += look(node, deadline, dry_run=dry_run)
        except TROUBLE as error:
            found.append(_trouble(error))
    found += [
        Finding(
            kind="file",
            place=path,
            why="no volume has it; `runvol volumes adopt` takes it, `rm` removes it",
            by_hand=True,
        )
        for path in node.catalog.unknown_files()
    ]
    return found


def _unfinished(node: Node, _deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    """Volumes that a process which ended was making or deleting; what it failed of stays, with the reason."""
    planned = {one.name: one.why for one in node.catalog.unfinished()}
    if dry_run:
        return [Finding(kind="volume", place=name, why=why) for name, why in planned.items()]
    said = node.catalog.recover()
    left = {one.name: one.why for one in node.catalog.unfinished()}
    found = [Finding(kind="volume", place=name, why=left.get(name, why), done=name not in left)
             for name, why in (planned | left).items()]  # fmt: skip
    # What the stores put right besides, of volumes that are whole.
    others = [one for one in said if not any(name in one for name in planned)]
    return found + [Finding(kind="volume", place="", why=one, done=True) for one in others]


@dataclass(frozen=True, kw_only=True)
class _Ours:
    """A hand-off of a volume of ours; `path` is the volume's file, on which its device may stand."""

    dialect: Dialect
    one: Delivered
    volume_id: str
    path: str


def _ours(node: Node) -> list[_Ours]:
    """By the device that they name, a file or a loop device on one; another driver's are never touched."""
    found, files = [], None
    for dialect in node.dialects:
        for one in dialect.delivered():
            volume_id, path = node.catalog.volume_at(one.device) or "", one.device
            if not volume_id and one.device.startswith("/dev/"):
                files = _by_inode(node.catalog.images()) if files is None else files
                volume_id, path = _on(one.device, files)
            if volume_id:
                found.append(_Ours(dialect=dialect, one=one, volume_id=volume_id, path=path))
    return found


def _on(device: str, files: Mapping[tuple[int, int], tuple[str, str]]) -> tuple[str, str]:
    """The volume, and its file, on which a loop device stands; empty for any other."""
    try:
        under = loops.backing(device)
    except OSError:
        return "", ""  # a node whose driver is away
    return files.get((under.device, under.inode), ("", "")) if under is not None else ("", "")


def _hand_offs(node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    """Those that no claim has and that nothing speaks for."""
    found = []
    for ours in _ours(node):
        one = ours.one
        if witnesses.pod_exists(one.target, node.roots) or witnesses.device_in_use(one.device, looking=dry_run):
            continue
        take_back = functools.partial(ours.dialect.withdraw, one.target) if not dry_run else None
        if _unless_claimed(node, ours.volume_id, deadline, functools.partial(_has_target, one.target), take_back):
            why = f"no claim has {one.target}"
            found.append(Finding(kind="hand-off", place=one.place, why=why, done=not dry_run))
    return found


def _closed(node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    """Those that a call has closed for the time of its work and left so: no container of their pod can start."""
    found = []
    for ours in _ours(node):
        one = ours.one
        if not one.closed:
            continue
        why, done = "closed by a call that did not end well", False
        try:
            if dry_run:
                claim = node.claims.unworked(ours.volume_id)
                if claim is not None and one.target in claim.targets:
                    found.append(Finding(kind="hand-off", place=one.place, why=why))
                continue
            with node.claims.locked(ours.volume_id, deadline) as cell:
                if cell.claim is None or one.target not in cell.claim.targets:
                    continue
                way, target = ways.way_at(cell.claim, one.target), cell.claim.targets[one.target]
                way.deliver(node.means, cell, cell.claim, one.target, target, deadline)
                done = True
        except Busy:
            continue  # it is at work
        except TROUBLE as error:
            why += f", and not opened: {_words(error)}"
        found.append(Finding(kind="hand-off", place=one.place, why=why, done=done))
    return found


def _unless_claimed(
    node: Node,
    volume_id: str,
    deadline: Deadline,
    in_use: Callable[[Claim], bool],
    take_back: Callable[[], None] | None,
) -> bool:
    """Whether `take_back` was called for something of the volume, while its claim was held still.

    `take_back` None: nobody is held still, and True if it would be called.

    A decision from a list of claims that was read earlier would take away what a publish has made since. A volume that
    somebody works on, or whose claim cannot be read, is left alone.
    """
    try:
        if take_back is None:
            claim = node.claims.unworked(volume_id)
            return claim is None or not in_use(claim)
        with node.claims.locked(volume_id, deadline) as cell:
            if cell.claim is not None and in_use(cell.claim):
                return False
            take_back()
            return True
    except (Busy, BadRequest, Refused):
        return False
    except TROUBLE as error:
        log.warning("not taken back", extra={"volume": volume_id, "why": str(error)})
        return False


def _has_target(target: str, claim: Claim) -> bool:
    return target in claim.targets


def _has_device(device: str, claim: Claim) -> bool:
    return claim.device == device


def _placeholders(node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    found: list[Finding] = []
    # In this order: a claim is written before its placeholder is mounted.
    mounted = mountinfo.table()
    claims, damaged = node.claims.readable()
    targets = {path for claim in claims for path in claim.targets}
    if damaged:
        return found  # one of them may have any of the placeholders
    for mount in mounted:
        if not placeholder.is_one(mount) or mount.target in targets:
            continue
        if not any(mount.target.startswith(f"{root}/") for root in node.roots):
            continue  # of another kubelet on this machine
        if witnesses.pod_exists(mount.target, node.roots):
            continue  # a container that starts without it would write to the host's disk
        if not os.path.exists(os.path.join(mount.target, placeholder.NOTE)):
            continue
        why, done = "no claim has it", not dry_run
        if not dry_run:
            try:
                mounts.be_absent(mount.target, deadline)
            except TROUBLE as error:
                why, done = f"{why}, but {_words(error)}", False
        found.append(Finding(kind="placeholder", place=mount.target, why=why, done=done))
    return found


def _claims(node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    claims, damaged = node.claims.readable()
    found = [Finding(kind="claim", place="", why=str(error)) for error in damaged]
    for claim in claims:
        try:
            gone = _volume_is_gone(node, claim)
        except TROUBLE as error:
            found.append(Finding(kind="claim", place=claim.volume, why=f"whether its volume is gone: {_words(error)}"))
            continue
        if not gone and not claim.lingers:
            continue
        why = "its volume is gone" if gone else "its pod is gone"
        if claim.targets:
            found.append(Finding(kind="claim", place=claim.volume, why=f"{why}, but pods have it: {_places(claim)}"))
            continue
        done = False
        if not dry_run:
            try:
                _forget(node, claim.volume, deadline, gone=gone)
                done = True
            except TROUBLE as error:
                why += f", but {_words(error)}"
        found.append(Finding(kind="claim", place=claim.volume, why=why, done=done))
    return found


def _places(claim: Claim) -> str:
    return ", ".join(sorted(claim.targets))


def _forget(node: Node, volume_id: str, deadline: Deadline, *, gone: bool) -> None:
    """The volume's last owner is forgotten, and the claim too if nothing stages it; DeviceBusy while it is in use."""
    with node.claims.locked(volume_id, deadline) as cell:
        exclusion.release(cell, deadline)
        if cell.claim is not None and not cell.claim.targets and (gone or not cell.claim.staging_path):
            cell.remove()


def _volume_is_gone(node: Node, claim: Claim) -> bool:
    """Only a volume of this node's own stores can be: what an export or a given path is, its claim alone says."""
    if not ways.of_claim(claim).stored:
        return False
    try:
        return node.catalog.of(claim.volume).get(claim.volume) is None
    except VolumeNotFound:
        return True


def _loop_devices(node: Node, deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    found = []
    files = _by_inode(node.catalog.images())
    # A guest's runtime opens what its hand-off names for each container, and in between nobody does.
    handed = {one.device for one in node.means.dialects.delivered().values()}
    for device in loops.bound():
        volume_id, path = _on(device, files)
        if (
            not path
            or device in handed
            or witnesses.device_in_use(device, looking=dry_run)
            or mountinfo.node_targets(device)
        ):
            continue
        take_back = functools.partial(loops.detach, device, path, deadline) if not dry_run else None
        if _unless_claimed(node, volume_id, deadline, functools.partial(_has_device, device), take_back):
            found.append(Finding(kind="loop device", place=device, why=f"nobody uses it on {path}", done=not dry_run))
    return found


def _quotas(node: Node, _deadline: Deadline, *, dry_run: bool) -> list[Finding]:
    found = []
    for backend, project in node.catalog.left_quotas():
        why, done = "no volume has its limit", not dry_run
        if not dry_run:
            try:
                backend.lift(project)
            except TROUBLE as error:
                why, done = f"{why}, but {error}", False
        found.append(Finding(kind="quota", place=f"project {project} of {backend.directory}", why=why, done=done))
    return found


def _by_inode(images: Sequence[tuple[str, str]]) -> dict[tuple[int, int], tuple[str, str]]:
    """Volumes and files by filesystem and inode, without those whose file has gone meanwhile."""
    found = {}
    for volume_id, path in images:
        with contextlib.suppress(FileNotFoundError):
            facts = os.stat(path)
            found[facts.st_dev, facts.st_ino] = volume_id, path
    return found


def before_serving(node: Node) -> list[str]:
    """What the first call must find: the claims, made again where they were lost. Looks only at what is in memory."""
    return _each(_first(node))


def _first(node: Node) -> list[Callable[[], Sequence[str] | None]]:
    sweeps = [dialect.sweep for dialect in node.dialects]
    reclaim = functools.partial(_reclaim, node, Deadline.after(_START))
    return [node.claims.sweep, *sweeps, reclaim, functools.partial(_note, node)]


def behind(node: Node) -> list[str]:
    """What a killed process left half-made, and what is known without it; never anything that a pod could be using.

    It takes as long as there is to remove, and goes on beside the calls: one about a volume puts that volume right
    itself, and each step here has to itself what it works on.
    """
    deadline = Deadline.after(_START)
    return _each(
        [
            functools.partial(_open, node, deadline),
            functools.partial(_withdraw, node, deadline),
            node.catalog.recover,
            functools.partial(_settle, node),
        ]
    )


def _each(steps: Sequence[Callable[[], Sequence[str] | None]]) -> list[str]:
    """A step that fails is told and stops no other: a plugin that does not start cannot even unpublish."""
    said: list[str] = []
    for step in steps:
        try:
            said += step() or ()
        except Exception as error:
            words = _words(error)
            log.error("a repair failed; it is tried again at the next start and by gc", extra={"why": words},
                      exc_info=not isinstance(error, TROUBLE))  # fmt: skip
            said.append(f"a repair failed: {words}")
    return said


def remade(node: Node, volume_id: str) -> Claim | None:
    """The claim of a volume as far as what stands tells, where its record is lost or cannot be read."""
    ours = []
    if node.claims.handed.may_be(volume_id):
        ours = [(one.volume_id, one.path, one.one) for one in _ours(node) if one.volume_id == volume_id]
    return witnesses.remade(node, volume_id, ours) or file_witnesses.remade(node, volume_id)


def _reclaim(node: Node, deadline: Deadline) -> list[str]:
    ours = [(one.volume_id, one.path, one.one) for one in _ours(node)]
    node.claims.handed.complete(volume_id for volume_id, _path, _one in ours)
    said = witnesses.reclaim(node, ours, deadline)
    files = _by_inode(node.catalog.images())
    attached = [(device, *_on(device, files)) for device in loops.bound()]
    return said + witnesses.reclaim_mounted(node, [one for one in attached if one[1]], deadline)


def _note(node: Node) -> None:
    """An older release noted nothing with the volumes that it handed out."""
    for claim in node.claims.readable()[0]:
        try:
            if not claim.handed_out and ways.by_others(claim):
                node.means.written.by_others(claim)
        except TROUBLE as error:
            log.warning("whether a guest had it is not noted", extra={"volume": claim.volume, "why": str(error)})


def _withdraw(node: Node, deadline: Deadline) -> list[str]:
    return [f"withdrew the hand-off {one.place}: {one.why}" for one in _hand_offs(node, deadline, dry_run=False)]


def _open(node: Node, deadline: Deadline) -> list[str]:
    return [f"the hand-off {one.place}: {one.why}{'; it is open again' if one.done else ''}"
            for one in _closed(node, deadline, dry_run=False)]  # fmt: skip


def _settle(node: Node) -> list[str]:
    """Volumes whose last user had not let go of them when their pod went: those that are free by now are given back."""
    said = []
    for claim in node.claims.readable()[0]:
        if not claim.lingers:
            continue
        try:
            _forget(node, claim.volume, Deadline.after(_MOMENT), gone=False)
            said.append(f"volume {claim.volume} was let go of by its last user")
        except TROUBLE as error:
            log.warning("the volume is still in use", extra={"volume": claim.volume, "reason": str(error)})
    return said
