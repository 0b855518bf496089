"""What a StorageClass parameter is, and those that every backend has."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from blockdev import filesystems

RESERVED = "csi.storage.k8s.io/"
FSTYPE = "csi.storage.k8s.io/fstype"
BACKEND = "backend"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One key: what it means, which values it takes, and whether the node needs it in the volume context.

    `refuses`: why a value is not accepted, where `values` does not say it. `aliases`: what other drivers' users call
    it. `of_controller`: it says how a volume is made or deleted, and nothing to a node.
    """

    key: str
    values: str
    default: str
    meaning: str
    accepts: Callable[[str], bool]
    refuses: Callable[[str], str] | None = None
    aliases: tuple[str, ...] = ()
    in_context: bool = False
    of_controller: bool = False


def one_of(*values: str) -> Callable[[str], bool]:
    """Accepts these values."""
    return lambda value: value in values


def is_handler(value: str) -> bool:
    """Whether it may be a RuntimeClass handler's name."""
    return re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", value) is not None


RUNTIME = Parameter(
    key="runtime",
    values="runc, sandbox, or the name of a RuntimeClass handler",
    default="(asked of the pod)",
    meaning="Which runtime the pods have, for callers whose pods nobody knows. Where the pod is known and "
    "contradicts it, publish is refused.",
    accepts=is_handler,
    in_context=True,
)
FILESYSTEM = Parameter(
    key=FSTYPE,
    values=", ".join(filesystems.SUPPORTED),
    default=filesystems.DEFAULT,
    meaning="Filesystem that the node makes on a blank volume.",
    accepts=one_of(*filesystems.SUPPORTED),
    in_context=True,
)
