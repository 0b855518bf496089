"""The JSON that kubelet gives with a call: which of it is whose, and what it asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from guestmount import BadRequest, PodRef
from volumes.registry import REGISTRY

_OWN = "kubernetes.io/"
_SECRET = "kubernetes.io/secret/"  # noqa: S105 - the prefix of the keys, not a secret
_GROUP_KEYS = ("kubernetes.io/mounterArgs.FsGroup", "kubernetes.io/fsGroup")
# kubelet's limit for one argument is the kernel's (128 KiB).
_LARGEST = 128 << 10
# What describes a volume that nobody has to make, by the backend whose options they are.
DESCRIBED: Mapping[str, tuple[str, ...]] = {entry.name: entry.described_by for entry in REGISTRY if entry.described_by}
COMMON = ("runtime", "mountOptions")
# Mount options of ext4 and XFS that name another device, which no setting has allowed.
_OTHER_DEVICES = frozenset({"journal_path", "journal_dev", "logdev", "rtdev"})
KNOWN = ("volume", *COMMON, *(key for keys in DESCRIBED.values() for key in keys))


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The options under another driver's name: which are known, what they are called here, what holds without them."""

    known: tuple[str, ...] = KNOWN
    renamed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)


# Drivers that ours takes the place of, by the name that it is installed under.
COMPATIBLE: Mapping[str, Dialect] = {
    "disk": Dialect(known=("volume", *COMMON), renamed={"volumeId": "volume", "volumeID": "volume"}),
    "nas": Dialect(known=(*COMMON, *DESCRIBED["nfs"]), defaults={"vers": "3", "makePath": "true"}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call asks for. `volume` is an id that `runvol volumes create` or `adopt` gave; without one, `described`
    holds a backend's name and its options."""

    volume: str = ""
    described: Mapping[str, str] = field(default_factory=dict)
    runtime: str = ""
    fstype: str = ""
    read_only: bool = False
    group: str = ""
    mount_flags: tuple[str, ...] = ()
    pod: PodRef = field(default_factory=PodRef)


def parse(text: str, *, driver: str = "runvol") -> Options:
    """BadRequest names the first option that is wrong. Secrets are dropped here and are nowhere afterwards."""
    given = _strings(text)
    mine = translated({key: value for key, value in given.items() if not key.startswith(_OWN)}, driver)
    read_write = given.get("kubernetes.io/readwrite", "rw")
    if read_write not in ("ro", "rw"):
        raise BadRequest("kubernetes.io/readwrite", read_write, "takes ro and rw")
    return Options(
        volume=mine.get("volume", ""),
        described=_described(mine),
        runtime=mine.get("runtime", ""),
        fstype=given.get("kubernetes.io/fsType", ""),
        read_only=read_write == "ro",
        group=next((given[key] for key in _GROUP_KEYS if given.get(key)), ""),
        mount_flags=_mount_flags(mine.get("mountOptions", "")),
        pod=PodRef(
            namespace=given.get("kubernetes.io/pod.namespace", ""),
            name=given.get("kubernetes.io/pod.name", ""),
            uid=given.get("kubernetes.io/pod.uid", ""),
        ),
    )


def translated(options: Mapping[str, str], driver: str) -> dict[str, str]:
    """A person's options under our names, with what holds without them; BadRequest for one that is not known."""
    dialect = COMPATIBLE.get(driver, Dialect())
    mine: dict[str, str] = {}
    for key, value in options.items():
        name = dialect.renamed.get(key, key)
        if name not in dialect.known:
            raise BadRequest(f"option {key[:80]!r}", value[:80], f"is not known; known are {', '.join(dialect.known)}")
        if name in mine:
            raise BadRequest(f"option {key!r}", value[:80], f"says again what {name!r} says")
        mine[name] = value
    return {**dialect.defaults, **mine}


def _described(mine: Mapping[str, str]) -> dict[str, str]:
    """Backend and options of a volume that is named by none; BadRequest unless it is exactly one volume."""
    found = {backend: {key: mine[key] for key in keys if mine.get(key)} for backend, keys in DESCRIBED.items()}
    found = {backend: options for backend, options in found.items() if options}
    ways = (["volume"] if mine.get("volume") else []) + [next(iter(options)) for options in found.values()]
    if not ways:
        raise BadRequest(
            "option 'volume'", "", "must name a volume (`runvol volumes` lists them), or the options must describe "
            f"one: by {', '.join(keys[0] for keys in DESCRIBED.values())}"
        )  # fmt: skip
    if len(ways) > 1:
        raise BadRequest(f"option {ways[1]!r}", "", f"describes another volume than {ways[0]!r}; give one of them")
    return next(({"backend": backend, **options} for backend, options in found.items()), {})


def _mount_flags(text: str) -> tuple[str, ...]:
    flags = tuple(word for word in text.split(",") if word)
    for flag in flags:
        if flag.partition("=")[0].strip() in _OTHER_DEVICES:
            raise BadRequest("option 'mountOptions'", flag, "names a device besides the volume's, which no pod may")
    return flags


def _strings(text: str) -> dict[str, str]:
    if len(text) > _LARGEST:
        raise BadRequest("the options", f"{len(text)} characters", f"are longer than {_LARGEST}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        # The text may hold secrets, so it is not repeated.
        raise BadRequest("the options", "JSON", f"cannot be read: {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise BadRequest("the options", type(found).__name__, "must be a JSON object")
    for key, value in found.items():
        if key.startswith(_SECRET):
            continue
        if not isinstance(value, str) or "\0" in value:
            raise BadRequest(f"option {key[:80]!r}", type(value).__name__, "must be a string without NUL")
    return {key: value for key, value in found.items() if not key.startswith(_SECRET)}
