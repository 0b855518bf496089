"""The backend `loop`: one file a volume, in a directory of the node.

It needs no configuration and no kernel module that any Linux lacks. The file's path is the volume's one name:
a sandbox gets the file itself, a runc pod a loop device on it, which exists only while the pod does.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NoReturn

from blockdev import Deadline, blankness, durable, exclusivity, filesystems, flocks, ioctls, shared_blocks, superblocks
from blockdev.errors import NoFile, WrongFilesystem
from volumes import copies, marks, sizes
from volumes.backend import Keeper, Unkept
from volumes.busy import Busy, of_volume
from volumes.errors import (
    InvalidParameter,
    NoSpace,
    SizeNotAllowed,
    StoreFailed,
    VolumeConflict,
    VolumeNotFound,
    VolumeUnfinished,
)
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import (
    VOLUME_ID,
    BlockSource,
    Capability,
    ContentSource,
    Need,
    Past,
    SizeRange,
    Snapshot,
    SnapshotGroup,
    Volume,
    VolumeKind,
)
from volumes.parameter import FSTYPE, Parameter, one_of
from volumes.place import Place, Stored, is_file, nearest
from volumes.room import File, Room
from volumes.snapshots import GROUP_PREFIX, Snapshots, taking
from volumes.snapshots import PREFIX as SNAPSHOT_PREFIX
from volumes.store import Row, SnapshotRow, State, Store
from volumes.troubles import Recovery, Step, Trouble, Unfinished, logged, speaking_of, told_before, without_name

log = logging.getLogger("runvol.loop")

PREFIX = "loop-"
_SUFFIX, _NEW = ".img", ".new"

PARAMETERS = (
    Parameter(
        key="preallocate",
        values="true, false",
        default="false",
        meaning="Backend `loop`: take the whole size from the node's disk at once instead of as it is written.",
        accepts=one_of("true", "false"),
        of_controller=True,
    ),
)


class LoopBackend(Stored):
    """Files under `<state_dir>/volumes`, rows in `<state_dir>/volumes.db`."""

    name = "loop"
    prefix = PREFIX
    kind = VolumeKind.BLOCK
    multi_node = False

    def __init__(self, state_dir: str, *, capacity_limit: int = 0, reading: bool = False) -> None:
        """`capacity_limit` (bytes, 0 for none) bounds what all volumes together may promise; `reading`: the store is
        only looked at."""
        self._directory = os.path.join(os.path.realpath(state_dir), "volumes")
        self._limit, self._reading = capacity_limit, reading
        self._store = Store(os.path.join(state_dir, "volumes.db"), reading=reading)
        self._place = Place(self._directory, self._store, 0o700)
        self._busy = Busy(os.path.join(state_dir, "volumes.lock"))
        self.keeper: Keeper = Unkept()
        self._jobs = Jobs()
        self._room = Room()
        self._recovery = Recovery(self._store.path, self._busy, self._steps)
        self.image_snapshots = Snapshots(
            self._store, self._directory, self._jobs, busy=self._busy, left=self._left,
            forget=self._room.forget, keeper=lambda: self.keeper,
        )  # fmt: skip

    def close(self) -> None:
        self._store.close()

    @property
    def directory(self) -> str:
        """Where every file of this backend lies."""
        return self._directory

    def images(self) -> Sequence[tuple[str, str]]:
        """One whose file is gone is left out; its health says so."""
        rows = self._store.rows(state=State.READY)
        return [(row.volume_id, path) for row in rows if os.path.exists(path := self._path(row.volume_id))]

    def volume_at(self, path: str) -> str | None:
        directory, name = os.path.split(path)
        stem, suffix = os.path.splitext(name)
        return stem if directory == self._directory and suffix == _SUFFIX else None

    # -- the controller's verbs

    def create(
        self,
        name: str,
        size: SizeRange,
        parameters: Mapping[str, str],
        uses: Sequence[Capability],
        source: ContentSource | None = None,
    ) -> Volume:
        smallest = max((_smallest(use, parameters) for use in uses), default=filesystems.SMALLEST["ext4"])
        old, key = self._store.by_name(name), of_volume(name)
        filling = self._jobs.progress(key) is not None
        if old is not None and filling:
            _same(old, size, parameters, source, self._volume(old))  # VolumeConflict
        if source is None:
            return self._created(name, size, parameters, smallest, None, Progress(name))

        def work(progress: Progress) -> None:
            kept = [source.source_id] if source.kind == "volume" else []
            for one in kept:
                progress.ask = partial(self.keeper.make_way, one)
            with self.keeper.still(kept, Deadline.after(PATIENCE)):
                self._created(name, size, parameters, smallest, source, progress)

        if old is None or old.state is not State.READY:
            if not filling:
                self._content(source)  # what is wrong with it is told at once
            self._jobs.finished(key, f"volume {name} from {source}", work, PATIENCE)
            old = self._store.by_name(name)
        if old is None or old.state is not State.READY:
            raise VolumeUnfinished(f"volume {name} was deleted meanwhile; ask again")
        return _same(old, size, parameters, source, self._volume(old))

    def _created(
        self,
        name: str,
        size: SizeRange,
        parameters: Mapping[str, str],
        smallest: int,
        source: ContentSource | None,
        progress: Progress,
    ) -> Volume:
        with self._busy(of_volume(name)):
            old = self._store.by_name(name)
            if old is not None and old.state is State.READY:
                return _same(old, size, parameters, source, self._volume(old))
            content = self._content(source)
            if content:
                smallest = max(smallest, os.stat(content).st_size)
            capacity = sizes.choose(size, smallest=smallest)
            if old is not None:
                self._settle(old)
                settled = self._store.by_name(name)
                if settled is not None and settled.state is State.READY:
                    return _same(settled, size, parameters, source, self._volume(settled))
            volume_id = self._store.new_id(PREFIX)
            self._be_ours()
            with self._store.transaction():
                self._reserve(capacity)
                self._store.insert(
                    volume_id=volume_id,
                    name=name,
                    backend=self.name,
                    capacity=capacity,
                    parameters=parameters,
                    state=State.CREATING,
                    source=str(source or ""),
                    foreign_written=source is not None and self.past(source.source_id).foreign_written,
                )
            try:
                preallocate = parameters.get("preallocate") == "true"
                self._make_file(volume_id, capacity, source, progress, preallocate=preallocate)
            except OSError as error:
                with told_before(volume_id):
                    self._drop(volume_id)
                _raise_no_space(without_name(error, volume_id, self._directory), capacity)
            except BaseException:
                with told_before(volume_id):
                    self._drop(volume_id)
                raise
            if source is not None and self.past(source.source_id).foreign_written:
                self._store.note(volume_id, foreign_written=True)  # a guest may have come in the middle
            self._store.set_state(volume_id, State.READY)
        return self._known(volume_id)

    def past(self, volume_id: str) -> Past:
        """The file's own mark counts too: a store may be restored to what it was before a guest came."""
        written, group = self._store.past(volume_id)
        path = self.image_snapshots.path if volume_id.startswith(SNAPSHOT_PREFIX) else self._path
        return Past(written or marks.is_marked(path(volume_id), marks.FOREIGN), group)

    def note(self, volume_id: str, *, foreign_written: bool | None = None, mount_group: str | None = None) -> None:
        path = self._path(volume_id)
        if foreign_written:
            marks.be_marked(path, marks.FOREIGN)
        self._store.note(volume_id, foreign_written=foreign_written, mount_group=mount_group)
        if foreign_written is False:
            marks.be_unmarked(path, marks.FOREIGN)

    def _content(self, source: ContentSource | None) -> str:
        """The file that a new volume starts with; empty for none."""
        if source is None:
            return ""
        if source.kind == "snapshot":
            path = self.image_snapshots.path(self.image_snapshots.get(source.source_id).snapshot_id)
            if not is_file(path):
                raise NoFile(path)
            return path
        return self.attach(source.source_id).path

    def delete(self, volume_id: str) -> None:
        row = self._store.get(volume_id)
        if row is None:
            self._store.check_own(PREFIX, volume_id)
            if VOLUME_ID.match(volume_id) and os.path.exists(self._path(volume_id)):
                raise VolumeConflict(volume_id, f"has the file {self._path(volume_id)}, but the store does not know it "
                                     "(an older copy?); adopt the file or remove it")  # fmt: skip
            return
        if row.state is State.CREATING:
            self._jobs.cancel(of_volume(row.name), PATIENCE)
        with self._busy(of_volume(row.name)):
            row = self._store.get(volume_id)
            if row is None:
                return
            self._be_ours()
            path = self._path(volume_id)
            if row.state is State.READY and is_file(path):
                exclusivity.prove_free(path, past_known=False)
            self._store.set_state(volume_id, State.DELETING)
            self._drop(volume_id)

    def get(self, volume_id: str) -> Volume | None:
        row = self._store.get(volume_id) if VOLUME_ID.match(volume_id) else None
        if row is None:
            self._store.check_own(PREFIX, volume_id)
        return self._volume(row) if row is not None and row.state is State.READY else None

    def list(
        self, *, after: int = 0, limit: int = -1, trouble: Trouble = logged
    ) -> Sequence[tuple[int, Volume]]:  # fmt: skip
        del trouble  # a row is all that a list needs
        rows = self._store.rows(after=after, limit=limit, state=State.READY)
        return [(row.seq, self._volume(row)) for row in rows]

    def available_bytes(self) -> int:
        """Free bytes of the directory's filesystem, less what volumes were promised and have not got yet: what is
        sparse in them, and blocks that they share with a snapshot or a clone."""
        return max(0, self._left())

    def _left(self) -> int:
        """The same; less than nothing where more is promised than there is."""
        promised, files = 0, list[File]()
        for row, may_have in self._promised():
            promised += may_have
            source = row.source.partition(":")[2]
            files.append(File(one_id=row.volume_id, path=self._path(row.volume_id), promised=may_have, source=source))
        owed = self._room.owed([*files, *self.image_snapshots.files()]) + self.image_snapshots.owed()
        # After what is owed: what is written in between counts as owed, and not as free.
        facts = os.statvfs(nearest(self._directory))
        left = facts.f_bavail * facts.f_frsize - owed
        return min(left, self._limit - promised) if self._limit else left

    def expand(self, volume_id: str, size: SizeRange) -> Volume:
        with self._busy(of_volume(self._known(volume_id).name)):
            before = self._known(volume_id)
            with self._store.transaction():
                capacity = self.check_expand(volume_id, size)
                # The row first: a file that is smaller than its row is grown at the next start or attempt.
                self._store.set_capacity(volume_id, capacity)
            try:
                self._resize_file(self._known(volume_id))
            except NoSpace:
                self._store.set_capacity(volume_id, before.capacity_bytes)
                raise
        return self._known(volume_id)

    # -- the node's verbs

    def problems(self, _volume_id: str) -> Sequence[str]:
        return []

    def refuses(self, _flag: str) -> str | None:
        return None

    def attach(self, volume_id: str, _context: Mapping[str, str] | None = None) -> BlockSource:
        volume, path = self._known(volume_id), self._path(volume_id)
        try:
            facts = os.stat(path)
        except FileNotFoundError:
            self._be_ours()
            raise VolumeNotFound(f"{volume_id} (its file {path} is gone)") from None
        if not stat.S_ISREG(facts.st_mode):
            raise NoFile(path)
        if facts.st_size < volume.capacity_bytes and not self._reading:  # an expansion was killed in the middle
            try:
                with self._busy(of_volume(volume.name), seconds=0):  # or one is at work in this moment
                    self._resize_file(self._known(volume_id))
            except (NoSpace, VolumeUnfinished, StoreFailed, OSError) as error:  # it works as it is
                log.warning("a volume is smaller than it was promised", extra={"volume": volume_id, "why": str(error)})
        return BlockSource(path=path)

    def format(self, volume_id: str, fstype: str, deadline: Deadline) -> None:
        volume, path = self._known(volume_id), self._path(volume_id)
        if volume.formatting and not (marks.is_marked(path, marks.FORMATTED) or _is_used(path, fstype, deadline)):
            # A process was killed in the middle of mkfs. No pod has had the volume yet, so nothing can be lost.
            blankness.wipe(path, deadline)
            if volume.parameters.get("preallocate") == "true":  # what was wiped was given back to the disk
                with ioctls.opened(path, os.O_RDWR) as fd:
                    os.posix_fallocate(fd, 0, volume.capacity_bytes)
            self._make_filesystem(volume_id, fstype, deadline)
            return
        if volume.formatting:
            self._store.set_formatting(volume_id, False)  # the store is an older copy of itself
        found = filesystems.found_on(path, deadline)
        if found == fstype:
            if not marks.is_marked(path, marks.FORMATTED):  # an older release has made it
                marks.be_marked(path, marks.FORMATTED)
            return
        if found is not None:
            raise WrongFilesystem(path, found, fstype)
        blankness.prove_blank(path, deadline)
        marks.be_unmarked(path, marks.FORMATTED)  # of a filesystem that a pod has wiped
        self._store.set_formatting(volume_id, True)
        self._make_filesystem(volume_id, fstype, deadline)

    def _make_filesystem(self, volume_id: str, fstype: str, deadline: Deadline) -> None:
        path = self._path(volume_id)
        filesystems.make(path, fstype, deadline)
        marks.be_marked(path, marks.FORMATTED)
        self._store.set_formatting(volume_id, False)

    # -- snapshots

    snapshot_prefix = SNAPSHOT_PREFIX

    def take_snapshot(self, name: str, volume_id: str, deadline: Deadline) -> Snapshot:
        return self.image_snapshots.create(name, volume_id, self.attach(volume_id).path, deadline)

    def snapshot(self, snapshot_id: str) -> Snapshot:
        return self.image_snapshots.get(snapshot_id)

    def delete_snapshot(self, snapshot_id: str) -> None:
        self.image_snapshots.delete(snapshot_id)

    def snapshots(
        self, *, after: int = 0, limit: int = -1, source: str = "", trouble: Trouble = logged
    ) -> Sequence[tuple[int, Snapshot]]:  # fmt: skip
        del trouble
        return self.image_snapshots.list(after=after, limit=limit, source=source)

    def create_group(self, name: str, volume_ids: Sequence[str], deadline: Deadline) -> SnapshotGroup:
        sources = [(one, self.attach(one).path) for one in volume_ids]
        return self.image_snapshots.create_group(name, sources, deadline)

    def group(self, group_id: str) -> SnapshotGroup:
        return self.image_snapshots.group(group_id)

    def delete_group(self, group_id: str) -> None:
        self.image_snapshots.delete_group(group_id)

    # -- static volumes and repair

    def check_store(self) -> None:
        self._store.check()

    def needs(self) -> Sequence[Need]:
        if not os.path.isdir(self._directory):
            return []
        found, left = list[Need](), self._left()
        if left < 0:
            more = (f"volumes of {self._directory} were promised {-left} bytes more than there are: all keep what they "
                    "have, and none is made or grown")  # fmt: skip
            advice = ("`runvol volumes` lists them, `runvol volumes delete ID` deletes one; or give it a larger disk, "
                      "or raise `loop.capacity_bytes` where that is what bounds them")  # fmt: skip
            found.append(Need(met=False, what="over-promised", finding=more, fix=advice))
        if marks.are_kept(self._directory):
            return found
        finding = (f"the filesystem of {self._directory} takes no extended attributes (trusted.*): a store that is "
                   "restored from a backup knows less of its volumes")  # fmt: skip
        return [*found, Need(met=False, what="no-attributes", finding=finding)]

    def adopt(self, path: str, name: str) -> Volume:
        """Take over an existing image file, by rename into the directory, with its data and its filesystem."""
        facts = os.stat(path)
        self._be_ours()
        if facts.st_dev != os.stat(self._directory).st_dev:
            raise InvalidParameter("path", path, f"must lie on the same filesystem as {self._directory}; move it there")
        if facts.st_size == 0 or facts.st_size % 512:
            raise SizeNotAllowed(f"{path} has {facts.st_size} bytes, which is no whole number of 512-byte sectors")
        exclusivity.prove_free(path, past_known=False)
        with self._busy(of_volume(name)):
            volume_id = self._store.new_id(PREFIX)
            with self._store.transaction():
                if self._store.by_name(name) is not None:
                    raise VolumeConflict(name, "belongs to another volume")
                self._store.insert(volume_id=volume_id, name=name, backend=self.name, capacity=facts.st_size,
                                   parameters={}, state=State.ADOPTING)  # fmt: skip
            try:
                os.rename(path, self._path(volume_id))
            except OSError:
                self._store.remove(volume_id)
                raise
            durable.sync_directory(self._directory)
            self._store.set_state(volume_id, State.READY)
        return self._known(volume_id)

    def recover(self) -> Sequence[str]:
        return self._recovery.run()

    def unfinished(self) -> Sequence[Unfinished]:
        return self._recovery.unfinished()

    def _steps(self) -> Iterator[Step]:
        for row in self._store.rows():
            yield row.volume_id, of_volume(row.name), _left(row), partial(self._settle_now, row.volume_id)
        for snapshot in self._store.snapshots():
            one = snapshot.snapshot_id
            yield one, taking(snapshot), _left(snapshot), partial(self.image_snapshots.settle, one)

    def unknown_files(self) -> Sequence[str]:
        """Files in the directory that no row speaks of; never removed by runvol.

        A row is written before its file and removed after it, so whatever has none is somebody else's.
        """
        rows = {volume_id + suffix for volume_id in self._store.ids() for suffix in (_SUFFIX, _NEW)}
        known = rows | self.image_snapshots.known_files() | {"lost+found"}
        names = sorted(set(os.listdir(self._directory)) - known) if os.path.isdir(self._directory) else []
        return [os.path.join(self._directory, name) for name in names]

    # -- inside

    prefixes = (PREFIX, SNAPSHOT_PREFIX, GROUP_PREFIX)

    def _names(self) -> Iterator[str]:
        return (row.volume_id + _SUFFIX for row in self._store.rows(state=State.READY))

    def _settle_now(self, volume_id: str) -> str | None:
        row = self._store.get(volume_id)
        return self._settle(row) if row is not None else None

    def _settle(self, row: Row) -> str | None:
        path = self._path(row.volume_id)
        if row.state is State.ADOPTING:
            if is_file(path):
                self._store.set_state(row.volume_id, State.READY)
                return f"finished adopting volume {row.volume_id}"
            self._store.remove(row.volume_id)
            return f"forgot volume {row.volume_id}, whose file was never moved here"
        if row.state is State.CREATING and is_file(path):
            # Its file took its name in the last step but one. If the row is of an older store, pods have it by now.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._directory, row.volume_id + _NEW))
            if os.stat(path).st_size < row.capacity:
                self._resize_file(self._volume(row))
            self._store.set_state(row.volume_id, State.READY)
            return f"finished creating volume {row.volume_id}"
        if row.state is State.DELETING and is_file(path):
            exclusivity.prove_free(path, past_known=False)
        if row.state is State.CREATING:
            copies.check_not_made(os.path.join(self._directory, row.volume_id + _NEW))
        if row.state in (State.CREATING, State.DELETING):
            self._drop(row.volume_id)
            return f"removed volume {row.volume_id}, which was {row.state.value} when the process ended"
        if is_file(path) and os.stat(path).st_size < row.capacity:
            self._resize_file(self._volume(row))
            return f"finished growing volume {row.volume_id}"
        return None

    def _known(self, volume_id: str) -> Volume:
        row = self._store.get(volume_id) if VOLUME_ID.match(volume_id) else None
        if row is None:
            self._store.check_own(PREFIX, volume_id)
            raise VolumeNotFound(volume_id)
        if row.state is not State.READY:
            raise VolumeUnfinished(f"volume {volume_id} is {row.state.value}")
        return self._volume(row)

    def _volume(self, row: Row) -> Volume:
        return Volume(
            volume_id=row.volume_id,
            name=row.name,
            backend=row.backend,
            capacity_bytes=row.capacity,
            parameters=row.parameters,
            formatting=row.formatting,
            source=row.source,
            allocated_bytes=self._allocated(row.volume_id),
        )

    def _path(self, volume_id: str) -> str:
        return os.path.join(self._directory, volume_id + _SUFFIX)

    def _allocated(self, volume_id: str) -> int:
        try:
            return os.stat(self._path(volume_id)).st_blocks * 512
        except OSError:
            return 0  # its health says why

    def _reserve(self, more: int) -> None:
        available = self.available_bytes()
        if more > available:
            self._room.forget()
            available = self.available_bytes()
        if more > available:
            raise NoSpace(
                f"{more} bytes are asked for and {sizes.about(available)} can still be promised in {self._directory}; "
                "delete volumes, or give the directory a larger disk"
            )

    def _make_file(
        self, volume_id: str, capacity: int, source: ContentSource | None, progress: Progress, *, preallocate: bool
    ) -> None:
        new = os.path.join(self._directory, volume_id + _NEW)
        with copies.being_made(new) as fd:
            if source is not None:
                check = partial(self.keeper.check_copy, source.source_id) if source.kind == "volume" else None
                copies.copy(
                    self._content(source), fd, Deadline.after(copies.LIMIT), check=check, progress=progress
                )  # fmt: skip
            if preallocate:
                shared_blocks.unshare(fd, capacity)
            os.ftruncate(fd, capacity)
            os.fsync(fd)
            if self._store.get(volume_id) is None or not flocks.is_still(fd, new):
                raise VolumeUnfinished("the volume was taken back while it was made; ask again")
            os.rename(new, self._path(volume_id))
            durable.sync_directory(self._directory)

    def _resize_file(self, volume: Volume) -> None:
        """For callers that are alone at work on the volume: who has read another size would shrink it."""
        path = self._path(volume.volume_id)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        size = os.fstat(fd).st_size
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise NoFile(path)
            if size < volume.capacity_bytes:
                if volume.parameters.get("preallocate") == "true":
                    os.posix_fallocate(fd, 0, volume.capacity_bytes)
                os.ftruncate(fd, volume.capacity_bytes)
            os.fsync(fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)  # what a preallocation got before there was no more is everybody's again
            _raise_no_space(OSError(error.errno, error.strerror, path), volume.capacity_bytes)
        finally:
            os.close(fd)

    def _drop(self, volume_id: str) -> None:
        with speaking_of(self._path(volume_id)):
            for suffix in (_NEW, _SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._directory, volume_id + suffix))
            durable.sync_directory(self._directory)
        self._store.remove(volume_id)


def _is_used(path: str, fstype: str, deadline: Deadline) -> bool:
    """Whether a filesystem is there that no mkfs has left half-made; WrongFilesystem for what none of ours has made."""
    found = filesystems.found_on(path, deadline)
    if found not in (None, fstype):
        raise WrongFilesystem(path, found or "", fstype)
    block = superblocks.read(path)
    return block is not None and block.used


def _left(row: Row | SnapshotRow) -> str:
    return "" if row.state is State.READY else f"it was {row.state.value} when the process ended"


def _smallest(use: Capability, parameters: Mapping[str, str]) -> int:
    if use.raw:
        return 4096
    return filesystems.SMALLEST[use.fstype or parameters.get(FSTYPE) or filesystems.DEFAULT]


def _same(
    old: Row, size: SizeRange, parameters: Mapping[str, str], source: ContentSource | None, volume: Volume
) -> Volume:
    if old.source != str(source or ""):
        raise VolumeConflict(old.name, f"was made from {old.source or 'nothing'}, not from {source or 'nothing'}")
    sizes.check_fits(old.name, old.capacity, size)
    if dict(old.parameters) != dict(parameters):
        raise VolumeConflict(old.name, f"was made with the parameters {dict(old.parameters)}, not {dict(parameters)}")
    return volume


def _raise_no_space(error: OSError, capacity: int) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise NoSpace(f"the disk cannot take a volume of {capacity} bytes: {error.strerror}") from error
    raise error
