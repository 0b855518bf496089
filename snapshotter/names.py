"""How containerd's snapshots are called here: its `name` in a namespace is the key `namespace/number/name`, or that of
a layer which another namespace had unpacked (`layers`)."""

from __future__ import annotations

import re
import shlex

_KEY = re.compile(r"([^/]+)/[0-9]+/(.+)", re.DOTALL)
_LAYER = re.compile(r"runvol-layer/([^/]+)/([^/]+)/[0-9a-f]{16}")


def of_containerd(key: str) -> tuple[str, str] | None:
    """Namespace and name; None for a key that is not containerd's."""
    found = _LAYER.fullmatch(key) or _KEY.fullmatch(key)
    return (found[1], found[2]) if found else None


def forgetting(key: str) -> str:
    """The command by which containerd forgets the snapshot, as typed; empty for a key that is not containerd's."""
    known = of_containerd(key)
    if known is None:
        return ""
    return shlex.join(["ctr", "-n", known[0], "snapshots", "--snapshotter", "runvol", "rm", known[1]])


__all__ = ["forgetting", "of_containerd"]
