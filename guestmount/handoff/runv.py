"""ACK's sandboxed containers (runv): a JSON flag file beside the target, all of whose values are texts.

The open reader decodes it after lower-casing all of it, paths included, and compares the result with a path that it has
not lower-cased. So nothing with a capital letter is handed over: it would be corrupted, or not be recognised.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from guestmount.errors import Unsupported
from guestmount.handoff import beside
from guestmount.handoff.base import Delivered, Delivery, NfsDelivery

FILE = "alibabacloudcsiplugin.json"


class RunvDialect:
    """Flag files under kubelet's directories."""

    name = "runv"
    needs_node = True

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots

    def check(self, delivery: Delivery) -> None:
        self._check_target(delivery.target)
        lost = [option for option in delivery.options if option not in ("rw", "defaults")]
        if delivery.read_only or lost:
            named = ", ".join([*(["ro"] if delivery.read_only else []), *lost])
            raise Unsupported(f"the dialect runv carries no mount options of a block volume: {named}")
        if delivery.fstype != "ext4":
            raise Unsupported(f"the dialect runv carries no filesystem type: {delivery.fstype}; it has to be ext4")

    def check_nfs(self, delivery: NfsDelivery) -> None:
        self._check_target(delivery.target)
        for field, value in (("server", delivery.server), ("path", delivery.path)):
            beside.check_text(field, value)
            if value != value.lower():
                raise Unsupported(f"the dialect runv does not carry capital letters: {field} = {value!r}")

    def _check_target(self, target: str) -> None:
        beside.check_place(target, self.name)
        if target != target.lower():
            raise Unsupported(f"the dialect runv does not carry capital letters: the target {target}")

    def deliver(self, delivery: Delivery) -> None:
        self.check(delivery)
        self._write(
            delivery.target,
            {
                "device": delivery.device,
                "volumeType": "block",
                "identity": delivery.target,
                "mountfile": _place(delivery.target),
                "runtime": self.name,
            },
        )

    def deliver_nfs(self, delivery: NfsDelivery) -> None:
        self.check_nfs(delivery)
        self._write(
            delivery.target,
            {
                "server": delivery.server,
                "path": delivery.path,
                "vers": delivery.version,
                "mode": "",
                "modeType": "",
                "options": ",".join(beside.options(delivery)),
                "runtime": self.name,
                "mountfile": _place(delivery.target),
                "volumeType": "nfs",
            },
        )

    def _write(self, target: str, content: dict[str, str]) -> None:
        beside.replace(_place(target), beside.encoded(content), 0o644)

    def withdraw(self, target: str) -> None:
        path = _place(target)
        content = _read(path)
        if content.get("runtime") == self.name and content.get("mountfile") == path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def delivered(self) -> Sequence[Delivered]:
        return [one for path in beside.found(self._roots, FILE) if (one := self._look(path)) is not None]

    def at(self, target: str) -> Delivered | None:
        return self._look(_place(target))

    def _look(self, path: str) -> Delivered | None:
        content = _read(path)
        if content.get("runtime") != self.name:
            return None
        is_block = content.get("volumeType") == "block"
        device = content.get("device", "") if is_block else f"{content.get('server', '')}:{content.get('path', '')}"
        return Delivered(
            dialect=self.name,
            target=os.path.join(os.path.dirname(path), "mount"),
            place=path,
            device=device,
            fstype="ext4" if is_block else "nfs",
            options=tuple(word for word in content.get("options", "").split(",") if word),
        )

    def sweep(self) -> None:
        beside.sweep(self._roots, FILE)


def _place(target: str) -> str:
    return os.path.join(os.path.dirname(target), FILE)


def _read(path: str) -> dict[str, str]:
    """The file's texts; nothing for one that is not there or not ours to understand."""
    return {key: value for key, value in (beside.read(path) or {}).items() if isinstance(value, str)}
