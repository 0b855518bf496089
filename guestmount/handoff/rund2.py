"""RunD 2: keys of its own in kubelet's `vol_data.json`, which must be there and hold nothing but texts.

kubelet tears the volume down by that file, so it is replaced whole, with everything that kubelet wrote, and only our
keys are ever taken out of it. A block volume would need an ordinary mount of the host beside the hand-off, two kernels
on one filesystem for a moment: refused.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from guestmount.errors import Refused, Unsupported
from guestmount.handoff import beside
from guestmount.handoff.base import Delivered, Delivery, NfsDelivery

FILE = "vol_data.json"
PREFIX = "csi.alibabacloud.com/"
_KEYS = ("version", "options", "server", "path")


class Rund2Dialect:
    """Keys in kubelet's own files."""

    name = "rund2"
    needs_node = False

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots

    def check(self, delivery: Delivery) -> None:
        raise Unsupported(
            "the dialect rund2 carries a block volume only beside a mount of the host, so that two kernels would have "
            f"volume {delivery.volume_id}; use Kata, or an NFS volume"
        )

    def check_nfs(self, delivery: NfsDelivery) -> None:
        beside.check_export(delivery, self.name)

    def deliver(self, delivery: Delivery) -> None:
        self.check(delivery)

    def deliver_nfs(self, delivery: NfsDelivery) -> None:
        self.check_nfs(delivery)
        path = _place(delivery.target)
        before = _read(path)
        if before is None:
            raise Refused(f"kubelet's {path} is missing or holds something else than texts; RunD 2 is told by it")
        ours = {
            "version": delivery.version,
            "options": ",".join(beside.options(delivery)),
            "server": delivery.server,
            "path": delivery.path,
        }
        after = _without_ours(before) | {PREFIX + key: ours[key] for key in _KEYS if ours[key]}
        if after != before:
            _replace(path, after)

    def withdraw(self, target: str) -> None:
        path = _place(target)
        before = _read(path)
        if before is not None and _without_ours(before) != before:
            _replace(path, _without_ours(before))

    def delivered(self) -> Sequence[Delivered]:
        return [one for path in beside.found(self._roots, FILE) if (one := self._look(path)) is not None]

    def at(self, target: str) -> Delivered | None:
        return self._look(_place(target))

    def _look(self, path: str) -> Delivered | None:
        content = _read(path) or {}
        server = content.get(f"{PREFIX}server")
        if server is None:
            return None
        return Delivered(
            dialect=self.name,
            target=os.path.join(os.path.dirname(path), "mount"),
            place=path,
            device=f"{server}:{content.get(f'{PREFIX}path', '')}",
            fstype="nfs",
            options=tuple(word for word in content.get(f"{PREFIX}options", "").split(",") if word),
        )

    def sweep(self) -> None:
        beside.sweep(self._roots, FILE)


def _place(target: str) -> str:
    return os.path.join(os.path.dirname(target), FILE)


def _without_ours(content: dict[str, str]) -> dict[str, str]:
    mine = {PREFIX + key for key in _KEYS}
    return {key: value for key, value in content.items() if key not in mine}


def _replace(path: str, content: dict[str, str]) -> None:
    beside.replace(path, beside.encoded(content), stat.S_IMODE(os.stat(path).st_mode))


def _read(path: str) -> dict[str, str] | None:
    """kubelet's file; None if it is not there or holds something else than texts."""
    content = beside.read(path)
    return content if content is not None and all(isinstance(value, str) for value in content.values()) else None
