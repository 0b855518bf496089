"""Exports of NFS servers: which ones this controller knows, and how what lies on one is named.

The name of a volume or snapshot holds its export's, so that any controller that knows the export finds it there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec

from blockdev import Deadline, durable, nfs
from volumes.errors import InvalidParameter
from volumes.model import Snapshot, Volume

_CALL = 60.0
T = TypeVar("T", Volume, Snapshot)


class Exports:
    """`<state_dir>/exports.json`: every export that a class has ever named here."""

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, "exports.json")

    def known(self) -> list[nfs.Export]:
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(), type=list[nfs.Export])
        except FileNotFoundError:
            return []

    def remember(self, export: nfs.Export) -> None:
        known = self.known()
        if export in known:
            return
        new = f"{self._path}.{os.getpid()}.new"
        durable.write(new, msgspec.json.encode([*known, export]))
        os.rename(new, self._path)

    def of(self, one_id: str, prefix: str) -> nfs.Export | None:
        """The export on which the volume or snapshot of this id lies, if it is a known one."""
        return next((export for export in self.known() if one_id.startswith(prefix + key(export))), None)


@contextlib.contextmanager
def opened(export: nfs.Export) -> Iterator[int]:
    """Its root, through a mount that hangs nowhere; ServerSilent, MountFailed."""
    with nfs.opened(export, Deadline.after(_CALL)) as root:
        yield root


def of_class(parameters: Mapping[str, str], flags: Sequence[str]) -> nfs.Export:
    """The export, in the version that the parameter `vers`, or else one of the mount options, names."""
    for name in ("server", "path"):
        if not parameters.get(name):
            raise InvalidParameter(name, "", "must be given with the backend nfs")
    asked, _ = nfs.version_among([*flags, *parameters.get("options", "").split(",")])
    named = parameters.get("vers", "")
    if asked and named and asked != named:
        raise InvalidParameter("vers", named, f"contradicts the mount option for version {asked}")
    return nfs.Export(
        server=parameters["server"],
        path=parameters["path"].rstrip("/") or "/",
        version=named or asked or nfs.DEFAULT_VERSION,
    )


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def key(export: nfs.Export) -> str:
    """What stands for the export in an id."""
    return digest(f"{export.server}\0{export.path}")[:12]


def id_of(export: nfs.Export, name: str, prefix: str) -> str:
    """The same for the same name on the same share, so that a creation may be repeated by another controller."""
    return f"{prefix}{key(export)}-{digest(name)[:20]}"


def place(one_id: str) -> int:
    """A stable place in the list of all volumes, or of all snapshots, of NFS; below 2^56."""
    return int(digest(one_id)[:13], 16) + 1


def part(numbered: list[tuple[int, T]], after: int, limit: int) -> Sequence[tuple[int, T]]:
    """Those after the place `after`, in order."""
    rest = sorted((pair for pair in numbered if pair[0] > after), key=lambda pair: pair[0])
    return rest if limit < 0 else rest[:limit]
