"""Volumes that somebody else has made, described by a path: `directory` and `device`, where no provisioner is.

Their ids are made from the path, so that each place has one claim whoever names it, and the context says what they are.
A pod's author may write such a path, so only paths below what the operator allows are taken; nothing is made,
formatted or deleted here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence

from blockdev import Deadline, filesystems
from volumes.errors import InvalidParameter, SizeNotAllowed, VolumeNotFound
from volumes.model import BlockSource, Capability, ContentSource, DirectorySource, SizeRange, Source, Volume, VolumeKind
from volumes.troubles import Trouble, logged

_NAMED = "is described by its path: it is not made, grown or deleted by runvol"


class _Given:
    """`allowed`: the directories below which its paths may lie, as the setting `setting` names them."""

    name = ""
    prefix = ""
    # What the path is called, in a façade's options and in the volume's context.
    key = ""
    setting = ""
    multi_node = False

    def __init__(self, *, allowed: Sequence[str]) -> None:
        self.allowed = allowed

    def id_of(self, path: str) -> str:
        """The volume's id; InvalidParameter for a path that is not allowed."""
        import hashlib

        real = self._real(path)
        return f"{self.prefix}{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}"

    def _real(self, path: str) -> str:
        """The path without links: what a link of a pod's points to is looked at, not believed."""
        if not path.startswith("/") or not path.isprintable() or os.path.normpath(path) != path:
            raise InvalidParameter(self.key, path, "must be an absolute, plain path")
        try:
            real = os.path.realpath(path, strict=True)
        except OSError as error:
            raise InvalidParameter(self.key, path, f"{os.strerror(error.errno or 0)}") from None
        if not self._is_allowed(path, real):
            where = f"must lie below {' or '.join(self.allowed)}" if self.allowed else "is not allowed on this node"
            leads = f" (it leads to {real})" if real != path else ""
            raise InvalidParameter(self.key, path, f"{where}{leads}; see the setting {self.setting}")
        return real

    def _is_allowed(self, _path: str, real: str) -> bool:
        return any(_below(real, os.path.realpath(root)) for root in self.allowed)

    def _path_in(self, volume_id: str, context: Mapping[str, str] | None) -> str:
        path = (context or {}).get(self.key, "")
        if not path or self.id_of(path) != volume_id:
            raise VolumeNotFound(volume_id)
        return self._real(path)

    def create(
        self, name: str, _size: SizeRange, _parameters: Mapping[str, str], _uses: Sequence[Capability],
        _source: ContentSource | None = None,
    ) -> Volume:  # fmt: skip
        raise InvalidParameter("backend", self.name, f"{name} {_NAMED}")

    def delete(self, volume_id: str) -> None:
        raise SizeNotAllowed(f"volume {volume_id} {_NAMED}")

    def get(self, volume_id: str) -> Volume | None:
        """It is there as far as anybody can know without its path."""
        return Volume(volume_id=volume_id, name="", backend=self.name, capacity_bytes=0)

    def list(
        self, *, after: int = 0, limit: int = -1, trouble: Trouble = logged
    ) -> Sequence[tuple[int, Volume]]:  # fmt: skip
        del after, limit, trouble
        return []

    def available_bytes(self) -> int:
        return 0

    def expand(self, volume_id: str, _size: SizeRange) -> Volume:
        raise SizeNotAllowed(f"volume {volume_id} {_NAMED}")

    def check_expand(self, volume_id: str, _size: SizeRange) -> int:
        raise SizeNotAllowed(f"volume {volume_id} {_NAMED}")

    def recover(self) -> Sequence[str]:
        return []

    def unknown_files(self) -> Sequence[str]:
        return []

    def close(self) -> None:
        """Nothing is held."""


class GivenDirectory(_Given):
    """A directory of this node, bound for runc and shared by virtio-fs with a sandbox."""

    name, prefix, key, setting = "given-directory", "given-dir-", "directory", "flexvolume.directories"
    kind = VolumeKind.FILES

    def refuses(self, flag: str) -> str | None:
        return None if flag in ("ro", "rw", "defaults") else "is no option of a directory, which is bound, not mounted"

    def attach(self, volume_id: str, context: Mapping[str, str] | None = None) -> Source:
        path = self._path_in(volume_id, context)
        if not os.path.isdir(path):
            raise InvalidParameter(self.key, path, "is no directory")
        return DirectorySource(path=path)


class GivenDevice(_Given):
    """A block device or an image file that holds a filesystem already."""

    name, prefix, key, setting = "given-device", "given-dev-", "device", "flexvolume.devices"
    kind = VolumeKind.BLOCK

    def refuses(self, _flag: str) -> str | None:
        return None

    def _is_allowed(self, path: str, real: str) -> bool:
        """Below an allowed directory, or named there by a link of udev's: nobody else makes links below /dev."""
        if super()._is_allowed(path, real):
            return True
        place = os.path.realpath(os.path.dirname(path))
        roots = [os.path.realpath(root) for root in self.allowed]
        return _below(real, "/dev") and any(_below(f"{place}/x", root) and _below(root, "/dev") for root in roots)

    def attach(self, volume_id: str, context: Mapping[str, str] | None = None) -> Source:
        path = self._path_in(volume_id, context)
        mode = os.stat(path).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
            raise InvalidParameter(self.key, path, "is neither a block device nor an image file")
        found = filesystems.found_on(path, Deadline.after(20))
        if found not in filesystems.SUPPORTED:
            made = " or ".join(f"mkfs.{fstype}" for fstype in filesystems.SUPPORTED)
            raise InvalidParameter(self.key, path, f"holds {found or 'no filesystem'}; make one by {made} first")
        return BlockSource(path=path)


def _below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip("/") + "/")
