"""StorageClass parameters: one typed table, from which checks and the documentation are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blockdev import filesystems
from volumes.errors import InvalidParameter

RESERVED = "csi.storage.k8s.io/"
FSTYPE = "csi.storage.k8s.io/fstype"
# Written into the context by external-provisioner and by kubelet.
_FROM_KUBERNETES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One key: what it means, which values it takes, and whether the node needs it in the volume context.

    `backends`: those that it belongs to; none for all.
    """

    key: str
    values: str
    default: str
    meaning: str
    accepts: Callable[[str], bool]
    backends: tuple[str, ...] = ()
    in_context: bool = False


def _one_of(*values: str) -> Callable[[str], bool]:
    return lambda value: value in values


def _is_handler(value: str) -> bool:
    return re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", value) is not None


TABLE: tuple[Parameter, ...] = (
    Parameter(
        key="backend",
        values="loop, directory",
        default="loop",
        meaning="Where the volume's bytes live. `loop`: one file a volume in a directory of the node, a block device. "
        "`directory`: one directory a volume, shared into sandboxes by virtio-fs.",
        accepts=_one_of("loop", "directory"),
    ),
    Parameter(
        key="runtime",
        values="runc, sandbox, or the name of a RuntimeClass handler",
        default="(asked of the pod)",
        meaning="Which runtime the pods have, for callers whose pods nobody knows. Where the pod is known and "
        "contradicts it, publish is refused.",
        accepts=_is_handler,
        in_context=True,
    ),
    Parameter(
        key="preallocate",
        values="true, false",
        default="false",
        meaning="Backend `loop`: take the whole size from the node's disk at once instead of as it is written.",
        accepts=_one_of("true", "false"),
        backends=("loop",),
    ),
    Parameter(
        key="quota",
        values="project, none",
        default="project",
        meaning="Backend `directory`: what enforces the size. `project`: a project quota of the filesystem; without "
        "one no volume is made. `none`: nothing does.",
        accepts=_one_of("project", "none"),
        backends=("directory",),
    ),
    Parameter(
        key=FSTYPE,
        values=", ".join(filesystems.SUPPORTED),
        default=filesystems.DEFAULT,
        meaning="Filesystem that the node makes on a blank volume.",
        accepts=_one_of(*filesystems.SUPPORTED),
        in_context=True,
    ),
)
SUPPORTED_FSTYPES = filesystems.SUPPORTED
_BY_KEY = {parameter.key: parameter for parameter in TABLE}


def check(parameters: Mapping[str, str], *, default: str = "loop") -> dict[str, str]:
    """The parameters of a StorageClass that are ours; InvalidParameter names the first that is wrong.

    `default` is the backend of a class that names none.
    """
    mine = {}
    for key, value in parameters.items():
        known = _BY_KEY.get(key)
        if known is None:
            if key.startswith(RESERVED):
                continue
            raise InvalidParameter(key, value, f"is not known; known are {', '.join(sorted(_BY_KEY))}")
        if not known.accepts(value):
            raise InvalidParameter(key, value, f"takes {known.values}")
        mine[key] = value
    backend = mine.get("backend", default)
    for key, value in mine.items():
        if _BY_KEY[key].backends and backend not in _BY_KEY[key].backends:
            raise InvalidParameter(key, value, f"is not a parameter of the backend {backend}")
    return mine


def check_context(context: Mapping[str, str]) -> dict[str, str]:
    """The same for a volume context: ours, checked; Kubernetes' own keys are left out."""
    foreign = {key for key in context if key.startswith(_FROM_KUBERNETES) and key not in _BY_KEY}
    return check({key: value for key, value in context.items() if key not in foreign})


def context_of(parameters: Mapping[str, str]) -> dict[str, str]:
    """What the node needs to know of them, for the volume context."""
    return {key: value for key, value in parameters.items() if _BY_KEY[key].in_context}
