"""Paths from requests: absolute, plain, and under the directories that this node gave us."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from blockdev import syscalls
from guestmount.errors import BadRequest

_LONGEST = 4095
_CONTROL = re.compile(r"[\x00-\x1f]")
_DEVICE_LINK = re.compile(r"(?P<place>.*/volumeDevices)/(?P<volume>[^/]+)/dev/(?P<pod>[^/]+)")


def check(field: str, path: str, roots: Sequence[str]) -> str:
    """The path as it came, byte for byte (Kata looks volumes up by it); BadRequest says what is wrong with it."""
    if not path:
        raise BadRequest(field, path, "must be given")
    if len(os.fsencode(path)) > _LONGEST:
        raise BadRequest(field, path, f"is longer than {_LONGEST} bytes")
    if _CONTROL.search(path):
        raise BadRequest(field, path, "holds a control character")
    if not path.startswith("/"):
        raise BadRequest(field, path, "must be absolute")
    if os.path.normpath(path) != path or path.startswith("//"):
        raise BadRequest(field, path, "must be plain: no '..', no '.', no doubled or trailing slash")
    if not any(path.startswith(root.rstrip("/") + "/") for root in roots):
        raise BadRequest(field, path, f"must lie under {' or '.join(roots)} (setting node.roots)")
    _check_links(field, path, roots)
    return path


def _is_link(path: str) -> bool:
    """Asks no server: what is mounted at the path may be dead."""
    try:
        return syscalls.statx(path).is_link
    except OSError:
        return False


def _check_links(field: str, path: str, roots: Sequence[str]) -> None:
    """A link planted below a root must not lead out of all of them."""
    parent = os.path.realpath(os.path.dirname(path))
    if _is_link(path):
        raise BadRequest(field, path, "is a symbolic link; runvol makes and removes the path itself")
    if _is_below(parent, roots):
        return
    if not _is_below(parent, [os.path.realpath(root) for root in roots]):
        raise BadRequest(field, path, f"leads through a symbolic link to {parent}, outside of {' and '.join(roots)}")


def published(path: str) -> str:
    """Where the volume at `path` was published: kubelet asks after a raw one at a link to it.

    `<kubelet>/plugins/kubernetes.io/csi/volumeDevices/<PersistentVolume>/dev/<pod uid>`, beside
    `…/volumeDevices/publish/<PersistentVolume>/<pod uid>` (pkg/volume/csi/csi_block.go).
    """
    found = _DEVICE_LINK.fullmatch(path)
    return f"{found['place']}/publish/{found['volume']}/{found['pod']}" if found else path


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
