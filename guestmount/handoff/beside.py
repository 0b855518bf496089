"""Hand-off files beside a target: what the three dialects of Alibaba Cloud's sandboxes share.

Their consumers are closed; the formats are those that the open writers were seen to write. A file lies in the target's
parent directory, which for CSI belongs to one volume alone and for FlexVolume to all of a pod.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blockdev import durable
from guestmount.errors import BadRequest, Unsupported
from guestmount.handoff.base import NfsDelivery

_CSI_NAME = "mount"


def check_place(target: str, dialect: str) -> None:
    """Unsupported for a target whose parent directory other volumes share."""
    if os.path.basename(target) != _CSI_NAME:
        raise Unsupported(
            f"the hand-off dialect {dialect} keeps one file in the target's parent directory, which several volumes of "
            f"a pod share at {target}; use CSI, or a runtime that speaks another dialect"
        )


def check_export(delivery: NfsDelivery, dialect: str) -> None:
    """What every such file needs of an export. Unsupported or BadRequest."""
    check_place(delivery.target, dialect)
    for field, value in (("server", delivery.server), ("path", delivery.path)):
        check_text(field, value)


def options(delivery: NfsDelivery) -> list[str]:
    """The export's mount options, with `ro` among them for a read-only one."""
    return [*delivery.options, *(["ro"] if delivery.read_only else [])]


def encoded(content: Mapping[str, object]) -> bytes:
    """JSON as the open writers put it: without blanks."""
    return json.dumps(content, separators=(",", ":")).encode()


def read(path: str) -> dict[str, Any] | None:
    """The file's object; None for one that is not there or is something else."""
    try:
        content = json.loads(durable.read(path, 65536))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def check_text(field: str, value: str) -> None:
    """BadRequest for what would mean something else in a comma list or a line."""
    if not value.isprintable() or "," in value:
        raise BadRequest(field, value, "holds a comma or a character that cannot be printed")


def replace(path: str, content: bytes, mode: int) -> None:
    """The file has this content, whole, or is as it was."""
    durable.replace(path, content, beside=f"{path}.runvol-", mode=mode)


def found(roots: Sequence[str], name: str) -> Iterator[str]:
    """The files of this name beside the targets of pods under kubelet's directories."""
    for root in roots:
        yield from sorted(glob.glob(f"{glob.escape(root)}/pods/*/volumes/kubernetes.io~csi/*/{name}"))


def sweep(roots: Sequence[str], name: str) -> None:
    """Remove what a killed process was writing."""
    for path in found(roots, f"{name}.runvol-*"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
