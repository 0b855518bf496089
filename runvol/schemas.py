"""What `--json` prints: one envelope, and what each kind of item has, by which docs/json.md is made.

An envelope is `{"apiVersion": "runvol.io/v1", "kind": "VolumeList", "items": [...]}`, whatever the command and however
many items there are. Within v1 keys are only added. Sizes are bytes, times RFC 3339 in UTC, what is not there is null.
"""

from __future__ import annotations

import datetime
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

VERSION = "runvol.io/v1"


def _said(words: str) -> msgspec.Meta:
    return msgspec.Meta(description=words)


def _word(*words: str, means: str) -> msgspec.Meta:
    """One of a few."""
    return msgspec.Meta(description=means, extra={"words": words})


class Item(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a list has. The first line of a class's docstring, and the descriptions of its keys, are documentation."""


class Owner(Item):
    """The kernel that has a volume."""

    kernel: Annotated[str, _word("host", "sandbox", "unknown", means="whose it is; unknown: its record was lost")]
    pod_namespace: Annotated[str | None, _said("namespace of the sandbox's pod")]
    pod_name: Annotated[str | None, _said("name of the sandbox's pod")]
    pod_uid: Annotated[str | None, _said("UID of the sandbox's pod")]
    handler: Annotated[str | None, _said("the sandbox's runtime handler")]


class Target(Item):
    """One path at which a pod has a volume."""

    path: Annotated[str, _said("the path that kubelet gave")]
    read_only: Annotated[bool, _said("whether this pod may not write")]
    pod_namespace: Annotated[str | None, _said("the pod's namespace")]
    pod_name: Annotated[str | None, _said("the pod's name")]
    pod_uid: Annotated[str | None, _said("the pod's UID")]


class Volume(Item):
    """A volume of this node (`volumes`, `volumes create`, `volumes adopt`)."""

    volume: Annotated[str, _said("the volume's id, a PersistentVolume's volumeHandle")]
    name: Annotated[str, _said("the name that it was asked for under")]
    backend: Annotated[str, _said("where its bytes live")]
    capacity_bytes: Annotated[int, _said("bytes that it promises")]
    allocated_bytes: Annotated[int, _said("bytes that it takes on the disk")]
    parameters: Annotated[dict[str, str], _said("StorageClass parameters that it was made with")]
    state: Annotated[
        str,
        _word("idle", "staged", "owned", "lingering",
              means="staged: no pod has it yet; owned: a kernel has it; lingering: its last pod is gone, and it is not "
              "proved that nobody uses it"),
    ]  # fmt: skip
    formatting: Annotated[bool, _said("whether its first formatting has begun and did not end")]
    source: Annotated[str | None, _said("id of the volume or volume snapshot that it was made of")]
    staging_path: Annotated[str | None, _said("where kubelet staged it")]
    owner: Annotated[Owner | None, _said("the kernel that has it")]
    targets: Annotated[list[Target], _said("where pods have it")]


class VolumeSnapshot(Item):
    """A volume as it was (`volumes snapshots`); VolumeSnapshots of the cluster, not containerd's snapshots."""

    snapshot: Annotated[str, _said("its id, a VolumeSnapshotContent's snapshotHandle")]
    volume: Annotated[str, _said("id of the volume that it was taken of")]
    size_bytes: Annotated[int, _said("bytes of the volume when it was taken")]
    created: Annotated[str, _said("when it was taken")]
    group: Annotated[str | None, _said("id of the group that it was taken with")]
    ready: Annotated[bool, _said("whether all of it is copied")]


class Work(Item):
    """What goes on behind calls (`volumes work`)."""

    work: Annotated[str, _said("what, for a person")]
    done_bytes: Annotated[int, _said("bytes that are done")]
    total_bytes: Annotated[int | None, _said("bytes that there are; null: not known")]
    percent: Annotated[int | None, _said("of them; null: not known")]
    seconds: Annotated[float, _said("since it began")]


class HandOff(Item):
    """What was handed to a sandbox (`handoffs`), by this driver or another one."""

    volume: Annotated[str | None, _said("the volume's id; null: no claim has it")]
    pod_namespace: Annotated[str | None, _said("the pod's namespace")]
    pod_name: Annotated[str | None, _said("the pod's name")]
    pod_uid: Annotated[str | None, _said("the pod's UID")]
    dialect: Annotated[str, _said("the form in which the runtime is told")]
    device: Annotated[str | None, _said("the device or file that it names")]
    fstype: Annotated[str | None, _said("the filesystem that the guest mounts")]
    options: Annotated[list[str], _said("the mount options in the guest")]
    target: Annotated[str, _said("the path that kubelet gave")]
    place: Annotated[str, _said("the file that the hand-off is")]
    closed: Annotated[bool, _said("whether no container can take it now, while the volume is worked on")]
    problem: Annotated[str | None, _said("what is wrong with it, for a person")]


class PodPlace(Item):
    """A part of a pod on this node (`where`): a root filesystem, what a container writes out, a volume."""

    what: Annotated[str, _word("root filesystem", "standard output", "volume", means="which part it is")]
    pod_namespace: Annotated[str | None, _said("the pod's namespace")]
    pod_name: Annotated[str | None, _said("the pod's name")]
    pod_uid: Annotated[str, _said("the pod's UID")]
    container: Annotated[str | None, _said("name of the container that has it")]
    volume: Annotated[str | None, _said("id of the volume")]
    seen_at: Annotated[str | None, _said("path at which the container has it")]
    path: Annotated[str | None, _said("where it is on the node")]
    readable: Annotated[bool, _said("whether its content can be read there")]
    why: Annotated[str | None, _said("why it cannot, for a person")]
    device: Annotated[str | None, _said("device, file or export that carries it")]
    kernel: Annotated[str | None, _word("host", "sandbox", "unknown", means="whose kernel has the volume")]
    handler: Annotated[str | None, _said("the runtime handler")]
    read_only: Annotated[bool, _said("whether the pod may not write")]


class Detection(Item):
    """Which runtime will run a pod (`detect`)."""

    pod_namespace: Annotated[str, _said("the pod's namespace")]
    pod_name: Annotated[str, _said("the pod's name")]
    kernel: Annotated[str, _word("host", "sandbox", means="on whose kernel its containers run")]
    handler: Annotated[str | None, _said("the runtime handler")]
    source: Annotated[str, _said("how that is known, for a person")]


class Diagnosis(Item):
    """What `doctor` found."""

    state: Annotated[
        str,
        _word("ok", "warning", "unknown", "broken", means="unknown: it could not be looked at; broken: it cannot work"),
    ]
    id: Annotated[str, _said("what was found, the same in every release (docs/doctor.md has them all)")]
    subject: Annotated[str, _said("what was looked at")]
    finding: Annotated[str, _said("what it is like, for a person")]
    fix: Annotated[str | None, _said("what to do; what is typed stands between backquotes")]


class LeftOver(Item):
    """What belongs to no volume and to no pod (`gc`)."""

    what: Annotated[str, _said("hand-off, placeholder, claim, loop device, volume, file, trouble")]
    place: Annotated[str | None, _said("path, device or id")]
    why: Annotated[str, _said("how that is known, for a person")]
    done: Annotated[bool, _said("whether it was taken back")]
    by_hand: Annotated[bool, _said("whether runvol never takes it back: a person has to")]


class Figure(Item):
    """What calls of the running driver cost (`bench`)."""

    call: Annotated[str, _said("the CSI call")]
    p50_ms: Annotated[float, _said("milliseconds; half of the calls took less")]
    p99_ms: Annotated[float, _said("milliseconds; 99 of 100 calls took less")]
    samples: Annotated[int, _said("how many calls")]


class Setting(Item):
    """A setting in force (`config`)."""

    key: Annotated[str, _said("SECTION.KEY of runvol.toml")]
    value: Annotated[str | int | list[str], _said("what holds")]
    default: Annotated[str | int | list[str], _said("what holds where nobody says anything")]
    source: Annotated[str, _word("default", "derived", "file", "variable", "flag", means="what said it")]
    said_by: Annotated[str | None, _said("the file's path, the variable, the flag, or the key that it follows")]
    variable: Annotated[str, _said("the variable that sets it")]
    meaning: Annotated[str, _said("what it is for")]


class Parameter(Item):
    """A StorageClass parameter (`parameters`)."""

    key: Annotated[str, _said("its name")]
    values: Annotated[str, _said("what it takes, for a person")]
    default: Annotated[str | None, _said("the value that holds without it; null: none does")]
    without_it: Annotated[str | None, _said("what holds without it where that is no value, for a person")]
    meaning: Annotated[str, _said("what it is for")]


class ContainerSnapshot(Item):
    """A container snapshot (`snapshots`), which containerd has: an image's layer or a container's root filesystem."""

    key: Annotated[str, _said("its key, namespace/number/name")]
    kind: Annotated[str, _word("active", "committed", "view", means="as containerd has it")]
    state: Annotated[str, _said("ready, or what it is in the middle of")]
    size_bytes: Annotated[int, _said("bytes of its device and filesystem")]
    fstype: Annotated[str, _said("its filesystem")]
    device: Annotated[int | None, _said("its id in the pool; null: a shared image")]
    image: Annotated[str | None, _said("chain id of the shared image below it")]
    parent: Annotated[str | None, _said("key of the snapshot that it was made of")]
    created: Annotated[str, _said("when it was made")]
    labels: Annotated[dict[str, str], _said("containerd's labels")]


class PoolFinding(Item):
    """What a pool's own state says."""

    state: Annotated[str, _word("ok", "warning", "broken", means="broken: nothing new can be made")]
    finding: Annotated[str, _said("what it is like, for a person")]


class Pool(Item):
    """The thin pool (`pool status`, `pool init`, `pool extend`)."""

    pool: Annotated[str, _said("its name")]
    state: Annotated[str, _word("ok", "warning", "broken", means="the worst of the findings")]
    assembled: Annotated[bool, _said("whether the kernel has it; if not, nothing below is known")]
    mode: Annotated[str | None, _said("the kernel's word for what it takes: rw, ro, out_of_data_space, fail")]
    data_used_bytes: Annotated[int | None, _said("bytes of data in use")]
    data_total_bytes: Annotated[int | None, _said("bytes of data that there are")]
    metadata_used_bytes: Annotated[int | None, _said("bytes of metadata in use")]
    metadata_total_bytes: Annotated[int | None, _said("bytes of metadata that there are")]
    generation: Annotated[str | None, _said("the metadata's transaction id, a number of up to 20 digits")]
    mapped_devices: Annotated[int | None, _said("how many of its devices are mapped")]
    quarantined_devices: Annotated[list[int], _said("ids of devices that no snapshot belongs to")]
    doomed_devices: Annotated[int, _said("how many wait for their deletion")]
    findings: Annotated[list[PoolFinding], _said("all that there is to say")]


class PoolDevice(Item):
    """A device of the pool that no snapshot belongs to (`pool quarantine`)."""

    device: Annotated[int, _said("its id in the pool")]
    exclusive_bytes: Annotated[int | None, _said("bytes that its deletion gives back")]
    shared_bytes: Annotated[int | None, _said("bytes that others have too")]


class RepairedSnapshot(Item):
    """A snapshot after `pool repair-store`."""

    key: Annotated[str, _said("its key, namespace/number/name")]
    state: Annotated[str, _word("restored", "lost", means="lost: its device is gone too")]


class Gauge(Item):
    """What the filesystem shows that is as full as the pool (`pool gauge`)."""

    path: Annotated[str, _said("where it is mounted")]
    size_bytes: Annotated[int, _said("bytes that it shows as its size")]
    available_bytes: Annotated[int, _said("bytes that it shows as free")]


class Image(Item):
    """An image on shared storage (`images`)."""

    chain: Annotated[str, _said("its chain id")]
    present: Annotated[bool, _said("whether it is on the share; false: only used here before")]
    size_bytes: Annotated[int | None, _said("bytes of its device")]
    used_bytes: Annotated[int | None, _said("bytes that it takes on the share")]
    fstype: Annotated[str | None, _said("its filesystem")]
    made: Annotated[str | None, _said("when it was made")]
    root: Annotated[str | None, _said("dm-verity's root hash, in hexadecimal")]
    trusted: Annotated[bool, _said("whether this node uses it")]
    trusted_by: Annotated[str | None, _said("what makes it trusted")]
    reason: Annotated[str | None, _said("a word for why it is not used")]
    why: Annotated[str | None, _said("why it is not used, for a person")]
    advice: Annotated[str | None, _said("what to do, for a person")]
    pinned: Annotated[bool, _said("whether this node has used it, and takes no other one of this chain")]
    containers_here: Annotated[int, _said("how many snapshots of this node stand on it")]


class Migration(Item):
    """What becomes of a FlexVolume PersistentVolume (`migrate flexvolume`)."""

    persistent_volume: Annotated[str, _said("its name")]
    becomes: Annotated[str | None, _said("name of the CSI PersistentVolume; null: it cannot be mapped")]
    volume: Annotated[str | None, _said("the volume's id, the new volumeHandle")]
    why_not: Annotated[str | None, _said("why it cannot be mapped, for a person")]
    file: Annotated[str | None, _said("the manifest that was written")]


class Outcome(Item):
    """What a command did to one thing (`volumes delete`, `flexvolume install`, `images make`, `pool check`, …)."""

    action: Annotated[str, _said("what was to be done, in a verb's past: deleted, made, checked, signed, …")]
    what: Annotated[str, _said("volume, pool, image, driver, device, gauge, key")]
    name: Annotated[str, _said("its id, name or path")]
    done: Annotated[bool, _said("whether it went well; for `checked`: whether it is sound")]
    message: Annotated[str, _said("the whole of it, for a person")]


def kinds() -> list[type[Item]]:
    """Every kind of item that a list may have, in the order of this file."""
    parts = {Owner, Target, PoolFinding}
    return [one for one in Item.__subclasses__() if one not in parts]


def written(kind: type[Item], items: Sequence[Item]) -> bytes:
    """The envelope."""
    document = {"apiVersion": VERSION, "kind": f"{kind.__name__}List", "items": items}
    try:
        encoded = msgspec.json.encode(document)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(_text(msgspec.to_builtins(document)))
    return msgspec.json.format(encoded, indent=2)


def _text(value: Any) -> Any:
    """The same, with an escape for each byte of a name that is no text."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, list):
        return [_text(one) for one in value]
    if isinstance(value, dict):
        return {_text(key): _text(one) for key, one in value.items()}
    return value


def read(document: Mapping[str, Any]) -> list[Item]:
    """The items of an envelope; msgspec.ValidationError, or ValueError, for what the schema does not allow."""
    if set(document) != {"apiVersion", "kind", "items"} or document["apiVersion"] != VERSION:
        raise ValueError(f"no envelope of {VERSION}: {sorted(document)}")
    known = {f"{one.__name__}List": one for one in kinds()}
    if document["kind"] not in known:
        raise ValueError(f"unknown kind {document['kind']!r}")
    items = [msgspec.convert(one, known[document["kind"]], strict=True) for one in document["items"]]
    for one in items:
        _check_words(one)
    return items


def _check_words(item: Item) -> None:
    for name, (_hint, meta) in _keys(type(item)):
        value = getattr(item, name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Item):
                _check_words(part)
        if (meta.extra or {}).get("words", (value,)).count(value) == 0 and value is not None:
            raise ValueError(f"{type(item).__name__}.{name} = {value!r}: takes {meta.extra}")


def _keys(kind: type[Item]) -> Iterator[tuple[str, tuple[Any, msgspec.Meta]]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        hint, meta = typing.get_args(hints[field.name])
        yield field.name, (hint, meta)


def time_of(seconds: float) -> str:
    """RFC 3339, in UTC, of seconds since 1970."""
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def document() -> str:
    """The part of docs/json.md that is made from the classes above."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    for kind in Item.__subclasses__():
        title = f"{kind.__name__}List" if kind in kinds() else kind.__name__
        yield from (f"### {title}", "", (kind.__doc__ or "").partition("\n")[0], "", "| key | type | meaning |",
                    "| --- | --- | --- |")  # fmt: skip
        encoded = {field.name: field.encode_name for field in msgspec.structs.fields(kind)}
        for name, (hint, meta) in _keys(kind):
            words = ", ".join(f"`{one}`" for one in (meta.extra or {}).get("words", ()))
            kind_of = _type(hint).replace("text", words) if words else _type(hint)
            yield f"| `{encoded[name]}` | {kind_of} | {meta.description} |"
        yield ""


_PLAIN = {str: "text", int: "number", float: "number", bool: "true or false", types.NoneType: "null"}


def _type(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if isinstance(hint, type) and issubclass(hint, Item):
        return hint.__name__
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"list of {_type(of[0])}"
    if origin is dict:
        return f"object of {_type(of[1])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in of)
    raise AssertionError(hint)
