"""How full and how well a published volume is, on either side of the guest's border."""

from __future__ import annotations

from blockdev import Deadline
from guestmount import paths, ways
from guestmount.claims import Claim
from guestmount.errors import BadRequest, Refused
from guestmount.node import Node
from guestmount.ways import Problem, Usage
from volumes import Volume, VolumeNotFound


def published(node: Node, volume_id: str, path: str) -> Claim:
    """The claim of a volume that is at `path`; VolumeNotFound otherwise."""
    path = paths.published(path)
    claim = node.claims.peek(volume_id)
    if claim is None and node.claims.remake is not None:
        claim = node.claims.remake(volume_id)  # its record was lost
    if claim is None or ways.of_claim(claim).stored:
        node.catalog.get(volume_id)
    if claim is None or (path not in claim.targets and path != claim.staging_path):
        raise VolumeNotFound(f"{volume_id} (it is not at {path})")
    return claim


def measure(claim: Claim, path: str, deadline: Deadline) -> Usage:
    """As far as this side of a guest's border can see."""
    path = paths.published(path)
    if path in claim.targets:
        return ways.way_at(claim, path).usage(claim, path, deadline)
    return ways.of_claim(claim).usage(claim, path, deadline)


def problems(node: Node, volume_id: str, known: Volume | None = None) -> list[Problem]:
    """What is wrong with a volume on this node; nothing for a healthy one. VolumeNotFound for an unknown one.

    `known`: as it was listed in this moment; of one that lies elsewhere its server need not be asked again.
    """
    peeked = _peeked(node, volume_id)
    if peeked is not None and not ways.of_claim(peeked).stored:
        return _delivery_problems(node, peeked)
    backend = node.catalog.of(volume_id)
    if known is not None and backend.multi_node:
        return []  # of which this node has nothing
    volume = node.catalog.get(volume_id)
    try:
        source = backend.attach(volume_id)
    except VolumeNotFound as error:
        return [Problem(reason="BackingFileMissing", message=str(error), lost=True)]
    found = [Problem(reason="OutsideItsLimits", message=said) for said in backend.problems(volume_id)]
    found += ways.of_source(source, raw=False).problems(volume, source)
    try:
        claim = node.claims.peek(volume_id)
    except Refused as error:  # one damaged claim must not hide the other volumes of a list
        return [*found, Problem(reason="ClaimDamaged", message=str(error), unreachable=True)]
    return found + (_delivery_problems(node, claim) if claim is not None else [])


def _peeked(node: Node, volume_id: str) -> Claim | None:
    try:
        return node.claims.peek(volume_id)
    except (BadRequest, Refused):
        return None


def _delivery_problems(node: Node, claim: Claim) -> list[Problem]:
    handed = {path: found for path in claim.targets if (found := node.means.dialects.at(path)) is not None}
    return [problem for path in claim.targets for problem in ways.way_at(claim, path).problems(claim, path, handed)]
