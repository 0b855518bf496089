"""RunD 3: `vol_attr.json` beside the target.

The open writer takes the version out of the options and has no key for it; here it stands among the options, where the
guest's mount(2) needs it. Block volumes are PCI functions bound to VFIO there: a file or a thin device is none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from guestmount.errors import Unsupported
from guestmount.handoff import beside
from guestmount.handoff.base import Delivered, Delivery, NfsDelivery

FILE = "vol_attr.json"


class Rund3Dialect:
    """Attribute files under kubelet's directories."""

    name = "rund3"
    needs_node = False

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots

    def check(self, delivery: Delivery) -> None:
        raise Unsupported(
            f"the dialect rund3 carries block volumes that are PCI functions of their own, and {delivery.device} is "
            "none; use Kata, or an NFS volume"
        )

    def check_nfs(self, delivery: NfsDelivery) -> None:
        beside.check_export(delivery, self.name)

    def deliver(self, delivery: Delivery) -> None:
        self.check(delivery)

    def deliver_nfs(self, delivery: NfsDelivery) -> None:
        self.check_nfs(delivery)
        content = {
            "Source": f"{delivery.server}:{delivery.path}",
            "DeviceType": "nfs",
            "MountOpts": [f"vers={delivery.version}", *beside.options(delivery)],
            "Extra": {},
            "FSType": "",
        }
        beside.replace(_place(delivery.target), beside.encoded(content), 0o600)

    def withdraw(self, target: str) -> None:
        path = _place(target)
        if _read(path).get("DeviceType") == "nfs":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def delivered(self) -> Sequence[Delivered]:
        return [one for path in beside.found(self._roots, FILE) if (one := self._look(path)) is not None]

    def at(self, target: str) -> Delivered | None:
        return self._look(_place(target))

    def _look(self, path: str) -> Delivered | None:
        content = _read(path)
        if content.get("DeviceType") != "nfs":
            return None
        options = content.get("MountOpts")
        return Delivered(
            dialect=self.name,
            target=os.path.join(os.path.dirname(path), "mount"),
            place=path,
            device=str(content.get("Source", "")),
            fstype="nfs",
            options=tuple(map(str, options)) if isinstance(options, list) else (),
        )

    def sweep(self) -> None:
        beside.sweep(self._roots, FILE)


def _place(target: str) -> str:
    return os.path.join(os.path.dirname(target), FILE)


def _read(path: str) -> dict[str, Any]:
    """What the file says, if root wrote it and nothing is mounted there: a workload could plant one otherwise."""
    try:
        return (beside.read(path) if os.lstat(path).st_uid == 0 else None) or {}
    except OSError:
        return {}
