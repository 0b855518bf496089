"""The JSON that kubelet gives with a call: which of it is whose, and what it asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from guestmount import BadRequest, PodRef

_OWN = "kubernetes.io/"
_SECRET = "kubernetes.io/secret/"  # noqa: S105 - the prefix of the keys, not a secret
_GROUP_KEYS = ("kubernetes.io/mounterArgs.FsGroup", "kubernetes.io/fsGroup")
# kubelet's limit for one argument is the kernel's (128 KiB).
_LARGEST = 128 << 10
KNOWN = ("volume", "runtime", "mountOptions")
# Options of the drivers that ours takes the place of, by the name that it is installed under.
COMPATIBLE: Mapping[str, Mapping[str, str]] = {"disk": {"volumeId": "volume", "volumeID": "volume"}}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call asks for. `volume` is an id that `runvol volumes create` or `adopt` gave."""

    volume: str
    runtime: str = ""
    fstype: str = ""
    read_only: bool = False
    group: str = ""
    mount_flags: tuple[str, ...] = ()
    pod: PodRef = field(default_factory=PodRef)


def parse(text: str, *, driver: str = "runvol") -> Options:
    """BadRequest names the first option that is wrong. Secrets are dropped here and are nowhere afterwards."""
    given = _strings(text)
    mine = {}
    renamed = COMPATIBLE.get(driver, {})
    for key, value in given.items():
        if key.startswith(_OWN):
            continue
        name = renamed.get(key, key)
        if name not in KNOWN:
            raise BadRequest(f"option {key[:80]!r}", value[:80], f"is not known; known are {', '.join(KNOWN)}")
        if name in mine:
            raise BadRequest(f"option {key!r}", value[:80], f"says again what {name!r} says")
        mine[name] = value
    if not mine.get("volume"):
        raise BadRequest("option 'volume'", "", "must name a volume; `runvol volumes` lists them")
    read_write = given.get("kubernetes.io/readwrite", "rw")
    if read_write not in ("ro", "rw"):
        raise BadRequest("kubernetes.io/readwrite", read_write, "takes ro and rw")
    return Options(
        volume=mine["volume"],
        runtime=mine.get("runtime", ""),
        fstype=given.get("kubernetes.io/fsType", ""),
        read_only=read_write == "ro",
        group=next((given[key] for key in _GROUP_KEYS if given.get(key)), ""),
        mount_flags=tuple(word for word in mine.get("mountOptions", "").split(",") if word),
        pod=PodRef(
            namespace=given.get("kubernetes.io/pod.namespace", ""),
            name=given.get("kubernetes.io/pod.name", ""),
            uid=given.get("kubernetes.io/pod.uid", ""),
        ),
    )


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
