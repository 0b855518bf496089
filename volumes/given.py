"""Volumes that somebody else has made, described by a path: `directory` and `device`, where no provisioner is.

Their ids are made from the path, so that each place has one claim whoever names it, and the context says what they are.
A pod's author may write such a path, so only paths below what the operator allows are taken; nothing is made,
formatted or deleted here. Another pod may have a directory on the way to it, and put a link there at any moment: what
is looked at, bound and attached is therefore what was opened without following one (`blockdev.beneath`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence

from blockdev import Deadline, beneath, exclusivity, filesystems, loops, mounts
from volumes.errors import InvalidParameter, SizeNotAllowed, VolumeNotFound
from volumes.model import (
    BlockSource,
    Capability,
    ContentSource,
    DirectorySource,
    Need,
    Past,
    SizeRange,
    Source,
    Volume,
    VolumeKind,
)
from volumes.troubles import Trouble, Unfinished, log, logged

# Seconds.
_MOMENT = 5.0
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
        # Once, as the operator wrote them: what lies below another one could be a link that a pod has made since.
        plain = {"/" + os.path.normpath(one).lstrip("/") for one in allowed if self._is_absolute(one)}
        outermost = [one for one in plain if not any(other != one and _below(one, other) for other in plain)]
        self._roots = [os.path.realpath(root) for root in outermost]

    def _is_absolute(self, one: str) -> bool:
        """An empty or relative one would be taken from where the process happens to run."""
        if not one.startswith("/"):
            log.error("an allowed directory is no absolute path and allows nothing",
                      extra={"setting": self.setting, "value": one})  # fmt: skip
        return one.startswith("/")

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
        return any(_below(real, root) for root in self._roots)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """A descriptor (O_PATH) of what lies at a path of `_real`'s now, where that path says."""
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(beneath.opened(path))
            except OSError as error:
                linked = "has become a link; try again once it is none"
                why = linked if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
                raise InvalidParameter(self.key, path, why) from None
            yield fd

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

    def promise(self, volume_id: str, size: SizeRange) -> int:
        return self.check_expand(volume_id, size)

    def check_expand(self, volume_id: str, _size: SizeRange) -> int:
        raise SizeNotAllowed(f"volume {volume_id} {_NAMED}")

    def problems(self, _volume_id: str) -> Sequence[str]:
        return []

    def recover(self) -> Sequence[str]:
        return []

    def unknown_files(self) -> Sequence[str]:
        return []

    def check_store(self) -> None:
        """There is none."""

    def unfinished(self) -> Sequence[Unfinished]:
        return []

    def needs(self) -> Sequence[Need]:
        return []

    def let_go(self, volume_id: str) -> None:
        """Nothing of ours keeps the volume. For callers that know that it is in no use."""

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
        with self._opened(path) as fd:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                raise InvalidParameter(self.key, path, "is no directory")
        return DirectorySource(path=path)


class GivenDevice(_Given):
    """A block device or an image file that holds a filesystem already.

    An image gets a second name below `held`, where nobody else can change one: a bind mount of what was opened, from
    the first attachment until `let_go`. Every later step, also of another process, takes it by that name.
    """

    name, prefix, key, setting = "given-device", "given-dev-", "device", "flexvolume.devices"
    kind = VolumeKind.BLOCK

    def __init__(self, *, allowed: Sequence[str], held: str) -> None:
        super().__init__(allowed=allowed)
        self._held = held

    def refuses(self, _flag: str) -> str | None:
        return None

    def _is_allowed(self, path: str, real: str) -> bool:
        """Below an allowed directory, or named there by a link of udev's: nobody else makes links on /dev itself."""
        if super()._is_allowed(path, real):
            return True
        if not _below(real, "/dev"):
            return False
        try:
            place = os.path.realpath(os.path.dirname(path))
        except OSError:  # somebody changes links on the way, which is not /dev's then
            return False
        named = any(_below(f"{place}/x", root) and _below(root, "/dev") for root in self._roots)
        return named and _is_of_dev(place)

    def attach(self, volume_id: str, context: Mapping[str, str] | None = None) -> Source:
        path = self._path_in(volume_id, context)
        with self._opened(path) as fd:
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                source = self._hold(volume_id, path, fd)
            elif stat.S_ISBLK(mode) and _is_of_dev(os.path.dirname(path)):
                source = path
            elif stat.S_ISBLK(mode):
                # A container may make device nodes, of the node's own disks too.
                raise InvalidParameter(self.key, path, "is a device node outside of /dev; give its name in /dev")
            else:
                raise InvalidParameter(self.key, path, "is neither a block device nor an image file")
        found = filesystems.found_on(source, Deadline.after(20))
        if found not in filesystems.SUPPORTED:
            made = " or ".join(f"mkfs.{fstype}" for fstype in filesystems.SUPPORTED)
            raise InvalidParameter(self.key, path, f"holds {found or 'no filesystem'}; make one by {made} first")
        return BlockSource(path=source)

    def _hold(self, volume_id: str, path: str, fd: int) -> str:
        """Our own name of the image that `fd` stands for; refused if it is another's by now."""
        os.makedirs(self._held, mode=0o700, exist_ok=True)
        place = os.path.join(self._held, volume_id)
        if mounts.is_mount_point(place):
            with beneath.opened(place, root=self._held) as held:
                if not beneath.same(held, fd):
                    why = "is another file than the one that pods of this node have by this name; end them first"
                    raise InvalidParameter(self.key, path, why)
            return place
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        mounts.bind(path, place, read_only=False, opened=fd)
        return place

    def past(self, _volume_id: str) -> Past:
        """Nobody keeps a record of a device that others made: anybody may have written it."""
        return Past()

    def note(self, volume_id: str, *, foreign_written: bool | None = None, mount_group: str | None = None) -> None:
        """Not kept."""

    def let_go(self, volume_id: str) -> None:
        place = os.path.join(self._held, volume_id)
        for device in loops.find(place):
            if exclusivity.is_free(device):  # of a claim that was lost
                loops.detach(device, place, Deadline.after(_MOMENT))
        mounts.be_let_go(place)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)


def _is_of_dev(directory: str) -> bool:
    """Whether it belongs to /dev's own filesystem, where the kernel and udev make names, and not to /dev/shm."""
    try:
        return _below(f"{directory}/x", "/dev") and os.stat(directory).st_dev == os.stat("/dev").st_dev
    except FileNotFoundError:
        return False


def _below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip("/") + "/")
