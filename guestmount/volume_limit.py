"""How many volumes this node may have, by the setting csi.max_volumes, and what Kubernetes is told of it.

Nothing of the node's own sets a limit: loop devices are made as they are needed (two to the twentieth of them), and a
guest's places for disks are each pod's own (`guestmount.ways.disk_slots`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from blockdev import Deadline
from guestmount.claims import Claim, Claims
from guestmount.errors import NoPlace


@contextlib.contextmanager
def placed(claims: Claims, new: Claim, most: int, deadline: Deadline) -> Iterator[None]:
    """The new volume counts until the block ends, by when it is recorded. NoPlace where as many volumes are staged, or
    about to be, as may be."""
    if not most or new.nfs is not None:
        yield
        return

    def judge(coming: frozenset[str]) -> None:
        if len(({one.volume for one in _staged(claims)} | coming) - {new.volume}) >= most:
            raise NoPlace(
                f"volume {new.volume} has no place on this node, which may have {most} volumes at a time "
                "(csi.max_volumes); delete a pod that has one, or let the pod run on another node"
            )

    with claims.placed("node", new.volume, judge, deadline):
        yield


def left_for_csi(claims: Claims, most: int, roots: Sequence[str]) -> int:
    """What NodeGetInfo says: how many volumes the scheduler may count for this node; 0 for any number.

    It counts those of CSI alone, so those of FlexVolume, which are staged in a place of the driver's own, are taken
    off. Never less than 1: no limit would be told then. `roots`: kubelet's directories.
    """
    if not most:
        return 0
    below = tuple(os.path.join(root, "") for root in roots)
    others = [one for one in _staged(claims) if not one.staging_path.startswith(below)]
    return max(1, most - len(others))


def _staged(claims: Claims) -> list[Claim]:
    return [one for one in claims.readable()[0] if one.staging_path and one.nfs is None]
