"""StorageClass parameters: one typed table, from which checks and the documentation are made."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from blockdev import filesystems, nfs
from volumes.errors import InvalidParameter

RESERVED = "csi.storage.k8s.io/"
FSTYPE = "csi.storage.k8s.io/fstype"
# Written into the context by external-provisioner and by kubelet.
_FROM_KUBERNETES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One key: what it means, which values it takes, and whether the node needs it in the volume context.

    `backends`: those that it belongs to; none for all. `aliases`: what other drivers' users call it.
    """

    key: str
    values: str
    default: str
    meaning: str
    accepts: Callable[[str], bool]
    backends: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    in_context: bool = False


def _one_of(*values: str) -> Callable[[str], bool]:
    return lambda value: value in values


def _is_server(value: str) -> bool:
    """A DNS name, or an address as a number."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9.]{0,251}[A-Za-z0-9])?", value) is not None
    return True


def _is_path(value: str) -> bool:
    return value.startswith("/") and value.isprintable() and "," not in value and ".." not in value.split("/")


def _is_relative(value: str) -> bool:
    """Below the share, and nothing that is runvol's own there."""
    parts = value.split("/")
    return value.isprintable() and all(
        part and not part.startswith((".", "archived-")) and len(part.encode()) <= 200 for part in parts
    )


def _are_options(value: str) -> bool:
    words = value.split(",")
    return value.isprintable() and all(words) and nfs.check_options(words) is None


def _is_handler(value: str) -> bool:
    return re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", value) is not None


TABLE: tuple[Parameter, ...] = (
    Parameter(
        key="backend",
        values="loop, directory, nfs",
        default="loop",
        meaning="Where the volume's bytes live. `loop`: one file a volume in a directory of the node, a block device. "
        "`directory`: one directory a volume, shared into sandboxes by virtio-fs. `nfs`: a directory of an NFS export.",
        accepts=_one_of("loop", "directory", "nfs"),
        in_context=True,
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
        key="server",
        values="a name or an address",
        default="(none)",
        meaning="Backend `nfs`: the server; `name:/path` says the path as well. Required.",
        accepts=_is_server,
        backends=("nfs",),
        in_context=True,
    ),
    Parameter(
        key="path",
        values="an absolute path",
        default="(none)",
        meaning="Backend `nfs`: the exported directory (csi-driver-nfs calls it `share`). Required.",
        accepts=_is_path,
        backends=("nfs",),
        in_context=True,
        aliases=("share",),
    ),
    Parameter(
        key="subDir",
        values="a relative path",
        default="(the PersistentVolume's name)",
        meaning="Backend `nfs`: the volume's directory below `path`, of a static volume too. `${pvc.metadata.name}`, "
        "`${pvc.metadata.namespace}` and `${pv.metadata.name}` stand for what external-provisioner's "
        "`--extra-create-metadata` tells.",
        accepts=_is_relative,
        backends=("nfs",),
    ),
    Parameter(
        key="volumeAs",
        values="subpath, sharepath",
        default="subpath",
        meaning="Backend `nfs`: whether a volume is a directory of its own below `path`, or `path` itself. A static "
        "volume's `path`, with its `subDir`, is what is mounted either way.",
        accepts=_one_of("subpath", "sharepath"),
        backends=("nfs",),
    ),
    Parameter(
        key="vers",
        values=", ".join(nfs.VERSIONS),
        default=nfs.DEFAULT_VERSION,
        meaning="Backend `nfs`: the protocol's version.",
        accepts=_one_of(*nfs.VERSIONS),
        backends=("nfs",),
        in_context=True,
    ),
    Parameter(
        key="options",
        values="a comma list",
        default="(none)",
        meaning="Backend `nfs`: mount options besides those of the StorageClass's `mountOptions`.",
        accepts=_are_options,
        backends=("nfs",),
        in_context=True,
    ),
    Parameter(
        key="mode",
        values="three or four octal digits",
        default="0777",
        meaning="Backend `nfs`: permissions of a new volume's directory (csi-driver-nfs calls it `mountPermissions`). "
        "Of a static volume: set for its directory when it is staged; left as they are without it.",
        accepts=lambda value: re.fullmatch(r"0?[0-7]{3}", value) is not None,
        backends=("nfs",),
        aliases=("mountPermissions",),
    ),
    Parameter(
        key="modeType",
        values="non-recursive, recursive",
        default="non-recursive",
        meaning="Backend `nfs`: whether `mode` is set for what a static volume's directory holds, too (files: "
        "without the bits for execution).",
        accepts=_one_of("non-recursive", "recursive"),
        backends=("nfs",),
    ),
    Parameter(
        key="archiveOnDelete",
        values="true, false",
        default="true",
        meaning="Backend `nfs`: a deleted volume's directory is renamed to `archived-…` instead of being removed. A "
        "directory that was there before the volume is left as it is.",
        accepts=_one_of("true", "false"),
        backends=("nfs",),
    ),
    Parameter(
        key="inSandbox",
        values="guest, share",
        default="guest",
        meaning="Backend `nfs`: who mounts for a sandboxed pod: its guest, or the host, whose mount is shared.",
        accepts=_one_of("guest", "share"),
        backends=("nfs",),
        in_context=True,
    ),
    Parameter(
        key="probe",
        values="host, none",
        default="host",
        meaning="Backend `nfs`: whether the node asks the server before a guest mounts it. `none` where only the pods' "
        "network reaches the server.",
        accepts=_one_of("host", "none"),
        backends=("nfs",),
        in_context=True,
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
_OF_THE_CONTROLLER = frozenset({"archiveOnDelete", "preallocate", "quota"})
SUPPORTED_FSTYPES = filesystems.SUPPORTED
_BY_KEY = {parameter.key: parameter for parameter in TABLE}
_ALIASES = {alias: parameter for parameter in TABLE for alias in parameter.aliases}


def check(parameters: Mapping[str, str], *, default: str = "loop") -> dict[str, str]:
    """The parameters of a StorageClass that are ours; InvalidParameter names the first that is wrong.

    `default` is the backend of a class that names none.
    """
    mine: dict[str, str] = {}
    for key, value in _spelled_out(parameters):
        known = _BY_KEY.get(key) or _ALIASES.get(key)
        if known is None:
            if key.startswith(RESERVED):
                continue
            raise InvalidParameter(key, value, f"is not known; known are {', '.join(sorted(_BY_KEY))}")
        if not known.accepts(value):
            raise InvalidParameter(key, value, f"takes {known.values}")
        if mine.get(known.key, value) != value:
            raise InvalidParameter(key, value, f"contradicts {known.key} = {mine[known.key]!r}")
        mine[known.key] = value
    backend = mine.get("backend", default)
    for key, value in mine.items():
        if _BY_KEY[key].backends and backend not in _BY_KEY[key].backends:
            raise InvalidParameter(key, value, f"is not a parameter of the backend {backend}")
    return mine


# What a subDir may speak of, by the reserved parameter that tells it.
_TEMPLATES = {
    "${pvc.metadata.name}": f"{RESERVED}pvc/name",
    "${pvc.metadata.namespace}": f"{RESERVED}pvc/namespace",
    "${pv.metadata.name}": f"{RESERVED}pv/name",
}


def _spelled_out(parameters: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The parameters with what others' short forms stand for: a server with its path, names of the claim in subDir."""
    for key, value in parameters.items():
        if key == "server" and ":/" in value and not value.startswith("["):
            server, _, path = value.partition(":")
            yield "server", server
            yield "path", path.rstrip("/") or "/"
        elif key == "subDir":
            yield key, _filled_in(value, parameters)
        else:
            yield key, value


def _filled_in(value: str, parameters: Mapping[str, str]) -> str:
    for word, told in _TEMPLATES.items():
        if word in value and not parameters.get(told):
            raise InvalidParameter("subDir", value, f"needs {told}: give external-provisioner --extra-create-metadata")
        value = value.replace(word, parameters.get(told, ""))
    return value


def check_context(context: Mapping[str, str]) -> dict[str, str]:
    """The same for a volume context: ours, checked; Kubernetes' own keys are left out."""
    foreign = {key for key in context if key.startswith(_FROM_KUBERNETES) and key not in _BY_KEY}
    return check({key: value for key, value in context.items() if key not in foreign})


def check_delivered(context: Mapping[str, str]) -> None:
    """InvalidParameter for what a node could only ignore: how a volume is made and deleted, in its volume context.

    No volume context of runvol's own making has such a key.
    """
    for key, value in context.items():
        if key in _OF_THE_CONTROLLER:
            raise InvalidParameter(key, value, "says how a volume is made or deleted, and this one is only used; take "
                                   "it out of the volumeAttributes")  # fmt: skip


def is_known(key: str) -> bool:
    """Whether there is a parameter of this name."""
    return key in _BY_KEY


def context_of(parameters: Mapping[str, str]) -> dict[str, str]:
    """What the node needs to know of them, for the volume context.

    A local volume's backend is told by its id; an export's keys mean nothing without theirs.
    """
    found = {key: value for key, value in parameters.items() if _BY_KEY[key].in_context}
    if found.get("backend") != "nfs":
        found.pop("backend", None)
    return found
