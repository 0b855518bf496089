"""Which volume was mounted at a target: kubelet's unmount says nothing but the path.

One small file a target, named by the path, among the records of this boot: another one empties what they speak of.
"""

from __future__ import annotations

import contextlib
import json
import os

from blockdev import durable

# NAME_MAX, less what a new record's name has besides.
_LONGEST = 230


class Targets:
    """The records under one directory."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def remember(self, target: str, volume: str) -> None:
        """Written before anything is mounted; whole or not at all."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        path = self._path(target)
        durable.replace(path, json.dumps({"target": target, "volume": volume}).encode(), synced=False)

    def volume_at(self, target: str) -> str:
        """The volume's id; empty if nothing is known of the target."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(durable.read(self._path(target)))
            if isinstance(found, dict) and found.get("target") == target:
                return str(found.get("volume", ""))
        return ""

    def forget(self, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(target))

    def _path(self, target: str) -> str:
        name = target.replace("%", "%25").replace("/", "%2F")
        if len(os.fsencode(name)) > _LONGEST:
            import hashlib

            name = hashlib.sha256(os.fsencode(target)).hexdigest()
        return os.path.join(self._directory, name)
