"""Keys and labels of a request: what is taken, and what becomes of a snapshot's labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapshotter.errors import BadRequest
from snapshotter.model import LABEL_SIZE

# Bytes of one label, as in containerd, and of all of a snapshot's: a pod's annotations have 256 KiB at the most.
_LABEL_LIMIT, _LABELS_LIMIT = 4096, 1 << 20


def check_key(field: str, key: str) -> None:
    """BadRequest for what is no key."""
    if not key:
        raise BadRequest(field, key, "must not be empty")
    if len(key.encode()) > 4096 or "\0" in key:
        raise BadRequest(field, key[:80], "has at most 4096 bytes and no NUL")


def checked(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels without empty ones; BadRequest for too many bytes."""
    total = 0
    for name, value in labels.items():
        length = len(name.encode()) + len(value.encode())
        if length > _LABEL_LIMIT:
            raise BadRequest("labels", name[:80], f"key and value have at most {_LABEL_LIMIT} bytes together")
        total += length
    if total > _LABELS_LIMIT:
        raise BadRequest("labels", f"{len(labels)} labels", f"have at most {_LABELS_LIMIT} bytes together")
    return {name: value for name, value in labels.items() if value}


def check_paths(paths: Sequence[str]) -> None:
    """BadRequest for an update of anything but labels."""
    for path in paths:
        if path != "labels" and not (path.startswith("labels.") and len(path) > len("labels.")):
            raise BadRequest("update_mask", path, "takes labels and labels.<name>")


def updated(before: Mapping[str, str], labels: Mapping[str, str], paths: Sequence[str]) -> dict[str, str]:
    """All labels replaced, or with `paths` those; an absent value deletes. BadRequest as for `checked`."""
    changed = dict(labels) if not paths or "labels" in paths else dict(before)
    for path in paths:
        if path != "labels":
            name = path.removeprefix("labels.")
            changed[name] = labels.get(name, "")
    return checked(changed)


def size(labels: Mapping[str, str]) -> int | None:
    """The bytes that a filesystem shall have; None without that label. BadRequest for no number."""
    text = labels.get(LABEL_SIZE)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) == 0:
        raise BadRequest(LABEL_SIZE, text, "is a number of bytes, in decimal digits")
    return int(text)
