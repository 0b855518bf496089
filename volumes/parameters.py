"""StorageClass parameters: one typed table, from which checks and the documentation are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blockdev import filesystems
from volumes import nfs_parameters, registry
from volumes.errors import InvalidParameter
from volumes.parameter import BACKEND, FILESYSTEM, FSTYPE, RESERVED, RUNTIME, Parameter, one_of

__all__ = ["BACKEND", "FSTYPE", "RESERVED", "SUPPORTED_FSTYPES", "TABLE", "Parameter", "check", "check_context",
           "check_delivered", "context_of"]  # fmt: skip

# Written into the context by external-provisioner and by kubelet.
_FROM_KUBERNETES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")
_CLASSES = tuple(entry for entry in registry.REGISTRY if entry.meaning)
_BACKEND = Parameter(
    key=BACKEND,
    values=", ".join(registry.NAMES),
    default=registry.NAMES[0],
    meaning=" ".join(
        [
            "Where the volume's bytes live.",
            *(f"`{one.name}`: {one.meaning}" for one in _CLASSES),
            "A class that names none has the first of the setting `volumes.backends`.",
        ]
    ),
    accepts=one_of(*registry.NAMES),
    in_context=True,
)
TABLE: tuple[Parameter, ...] = (
    _BACKEND, RUNTIME, *(parameter for entry in _CLASSES for parameter in entry.parameters), FILESYSTEM,
)  # fmt: skip
_OWNERS = {
    parameter.key: {entry.name for entry in _CLASSES if parameter in entry.parameters}
    for entry in _CLASSES
    for parameter in entry.parameters
}
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
            raise InvalidParameter(key, value, known.refuses(value) if known.refuses else f"takes {known.values}")
        if mine.get(known.key, value) != value:
            raise InvalidParameter(key, value, f"contradicts {known.key} = {mine[known.key]!r}")
        mine[known.key] = value
    backend = mine.get("backend", default)
    for key, value in mine.items():
        if key in _OWNERS and backend not in _OWNERS[key]:
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
        if key == "server" and (named := nfs_parameters.split(value)) is not None:
            yield from zip(("server", "path"), named, strict=True)
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


def check_context(context: Mapping[str, str], *, default: str = "loop") -> dict[str, str]:
    """The same for a volume context: ours, checked; Kubernetes' own keys are left out."""
    foreign = {key for key in context if key.startswith(_FROM_KUBERNETES) and key not in _BY_KEY}
    return check({key: value for key, value in context.items() if key not in foreign}, default=default)


def check_delivered(context: Mapping[str, str]) -> None:
    """InvalidParameter for what a node could only ignore: how a volume is made and deleted, in its volume context.

    No volume context of runvol's own making has such a key.
    """
    for key, value in context.items():
        if key in _BY_KEY and _BY_KEY[key].of_controller:
            raise InvalidParameter(key, value, "says how a volume is made or deleted, and this one is only used; take "
                                   "it out of the volumeAttributes")  # fmt: skip


def context_of(parameters: Mapping[str, str]) -> dict[str, str]:
    """What the node needs to know of them, for the volume context.

    A backend is told by its volumes' ids; only keys that describe a volume mean nothing without it.
    """
    found = {key: value for key, value in parameters.items() if _BY_KEY[key].in_context}
    if found.get(BACKEND) not in registry.DESCRIBING:
        found.pop(BACKEND, None)
    return found
