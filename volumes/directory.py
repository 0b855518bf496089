"""The backend `directory`: one directory a volume on the node's own disk, for edge nodes that have nothing else.

Its size is a project quota of the filesystem below, which the kernel enforces and shows as the directory's size.
Without project quotas a class has to say `quota: none`: a size that nothing enforces is refused otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from blockdev import Deadline, durable, quotas, trees
from blockdev.quotas import QuotaUnavailable
from volumes import sizes
from volumes.busy import Busy, of_volume
from volumes.errors import (
    InvalidParameter,
    NoSpace,
    VolumeConflict,
    VolumeNotFound,
    VolumeUnfinished,
)
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import (
    VOLUME_ID,
    Capability,
    ContentSource,
    DirectorySource,
    Need,
    SizeRange,
    Source,
    Volume,
    VolumeKind,
)
from volumes.parameter import Parameter, one_of
from volumes.place import Place, Stored, is_directory, nearest
from volumes.quota_watch import QuotaWatch
from volumes.store import Row, State, Store
from volumes.troubles import Recovery, Step, Trouble, Unfinished, logged, speaking_of, told_before, without_name

PREFIX = "dir-"
QUOTA = "quota"
_NEW, _OLD = ".new-", ".old-"
_SMALLEST = 4096
# Seconds that the removal of what a pod has left may go on behind a call, and that a start waits for one volume's; the
# next goes on.
_REMOVAL, _REMOVAL_AT_START = 86400.0, 10.0
_BIND = frozenset({"ro", "rw", "defaults"})
# Projects are numbers that a whole filesystem shares; others count from 1 (projid files, container runtimes).
FIRST_PROJECT = 1 << 30
# Looked at for limits that were left.
_MOST_PROJECTS = 100_000
# So many of them that somebody else has taken are passed over by one call; and so many while others wait for it.
_MOST_FOREIGN, _FEW_FOREIGN = 10_000, 100

PARAMETERS = (
    Parameter(
        key="quota",
        values="project, none",
        default="project",
        meaning="Backend `directory`: what enforces the size. `project`: a project quota of the filesystem; without "
        "one no volume is made. `none`: nothing does.",
        accepts=one_of("project", "none"),
        of_controller=True,
    ),
)


class DirectoryBackend(Stored):
    """Directories under `directory`, rows in `<state_dir>/directories.db`."""

    name = "directory"
    prefix = PREFIX
    kind = VolumeKind.FILES
    multi_node = False

    def __init__(self, state_dir: str, *, directory: str = "", capacity_limit: int = 0, reading: bool = False) -> None:
        """`directory` defaults to `<state_dir>/directories`; `capacity_limit` (bytes, 0: none) bounds the promises."""
        self._directory = os.path.realpath(directory or os.path.join(state_dir, "directories"))
        self._limit = capacity_limit
        self._store = Store(os.path.join(state_dir, "directories.db"), reading=reading)
        self._place = Place(self._directory, self._store, 0o711)
        self._busy = Busy(os.path.join(state_dir, "directories.lock"))
        self._jobs = Jobs()
        self._recovery = Recovery(self._store.path, self._busy, self._steps)
        self._watch = QuotaWatch()

    def close(self) -> None:
        self._store.close()

    @property
    def directory(self) -> str:
        """Where every volume of this backend lies."""
        return self._directory

    def check_store(self) -> None:
        self._store.check()

    def needs(self) -> Sequence[Need]:
        try:
            quotas.read(nearest(self._directory), FIRST_PROJECT)
        except QuotaUnavailable as error:
            return [Need(met=False, what="no-quotas", finding=str(error), fix=f"mount {self._directory} with "
                         "prjquota; until then classes need `quota: none`")]  # fmt: skip
        return [Need(met=True, what="no-quotas", finding=f"project quotas are kept on {self._directory}")]

    def create(
        self,
        name: str,
        size: SizeRange,
        parameters: Mapping[str, str],
        _uses: Sequence[Capability],
        source: ContentSource | None = None,
    ) -> Volume:
        """QuotaUnavailable where the size could not be enforced and the class does not say that it need not be."""
        with self._busy(of_volume(name)):
            old = self._store.by_name(name)
            if old is not None and old.state is State.READY:
                return self._same(old, size, parameters, source)
            if source is not None:
                why = "the backend directory makes empty volumes only; use backend loop"
                raise InvalidParameter("volume_content_source", str(source), why)
            capacity = sizes.choose(size, smallest=_SMALLEST)
            if old is not None:
                self._settle(old)
                settled = self._store.by_name(name)
                if settled is not None and settled.state is State.READY:
                    return self._same(settled, size, parameters, source)
            volume_id = self._store.new_id(PREFIX)
            self._be_ours()
            self._check_projects(name, _MOST_FOREIGN)
            with self._store.transaction():
                self._reserve(capacity)
                self._check_projects(name, _FEW_FOREIGN)
                self._store.insert(volume_id=volume_id, name=name, backend=self.name, capacity=capacity,
                                   parameters=parameters, state=State.CREATING)  # fmt: skip
            row = self._row(volume_id)
            try:
                self._make(row)
            except OSError as error:
                with told_before(volume_id):
                    self._drop(row)
                raise without_name(error, volume_id, self._directory) from error
            except BaseException:
                with told_before(volume_id):
                    self._drop(row)
                raise
            self._store.set_state(volume_id, State.READY)
        return self._known(volume_id)

    def _check_projects(self, name: str, most: int) -> None:
        """VolumeUnfinished where so many numbers are somebody else's that the next call has to go on."""
        if not self._pass_over_foreign_projects(most):
            raise VolumeUnfinished(
                f"volume {name}: very many projects have files on the filesystem of {self._directory}, which are no "
                "volume's; they are passed over, ask again"
            )

    def _pass_over_foreign_projects(self, most: int) -> bool:
        """A store that was lost began to count anew, and its directories still count for the projects that they had.
        False where there are more than `most`; the next goes on."""
        numbers = [_project_of(path) - FIRST_PROJECT for path in self.unknown_files() if _is_directory(path)]
        highest = max((number for number in numbers if 0 < number < FIRST_PROJECT), default=0)
        if highest:
            self._store.number_above(highest)
        # What counts for a number that comes next was put there by somebody who may choose projects.
        number = first = self._store.next_number()
        while self._counts(FIRST_PROJECT + number):
            number += 1
            if number - first > most:
                break
        if number > first:
            self._store.number_above(number - 1)
        return number - first <= most

    def _counts(self, project: int) -> bool:
        """Whether the filesystem has files, or a limit, for that project."""
        try:
            found = quotas.read(self._directory, project)
        except QuotaUnavailable:
            return False
        return bool(found.files or found.used or found.limit)

    def problems(self, volume_id: str) -> Sequence[str]:
        row = self._store.get(volume_id) if VOLUME_ID.match(volume_id) else None
        if row is None or row.state is not State.READY or not _limited(row):
            return []
        left = self._watch.left(volume_id, self._path(volume_id), _project(row))
        return [] if left is None else [str(left)]

    def _same(self, old: Row, size: SizeRange, parameters: Mapping[str, str], source: ContentSource | None) -> Volume:
        if source is not None:
            raise VolumeConflict(old.name, f"was made empty, not from {source}")
        sizes.check_fits(old.name, old.capacity, size)
        if dict(old.parameters) != dict(parameters):
            raise VolumeConflict(old.name, f"was made with the parameters {dict(old.parameters)}")
        return self._volume(old)

    def _make(self, row: Row) -> None:
        new = os.path.join(self._directory, _NEW + row.volume_id)
        os.mkdir(new, 0o700)
        if _limited(row):
            try:
                quotas.assign(new, _project(row))
                quotas.limit(new, _project(row), row.capacity)
                quotas.prove_enforced(new, row.capacity)
            except QuotaUnavailable as error:
                # The same words at each try, though the directory's name is another one.
                raise QuotaUnavailable(
                    self._directory, error.why, instead=", or let the class say quota: none"
                ) from None
        # Pods of any user write here, as in a volume that was just formatted.
        os.chmod(new, 0o777)  # noqa: S103
        os.rename(new, self._path(row.volume_id))
        durable.sync_directory(self._directory)

    def delete(self, volume_id: str) -> None:
        row = self._store.get(volume_id)
        if row is None:
            self._store.check_own(PREFIX, volume_id)
            return
        if self._jobs.progress(volume_id) is None:
            with self._busy(of_volume(row.name)):
                self._be_ours()
                self._store.set_state(volume_id, State.DELETING)

        def work(_progress: Progress) -> None:
            with self._busy(of_volume(row.name)):
                if self._store.get(volume_id) is not None:
                    self._drop(row, _REMOVAL)

        # As many names as a pod has made are removed behind the call.
        self._jobs.finished(volume_id, f"removing the files of volume {volume_id}", work, PATIENCE)

    def _drop(self, row: Row, seconds: float = _REMOVAL_AT_START) -> None:
        """Nothing of the volume is left, however far it had come. Links in it are removed, not followed.

        NotRemoved; WaitExpired after so many seconds, and the next call goes on.
        """
        deadline, gone = Deadline.after(seconds), _OLD + row.volume_id
        with speaking_of(self._path(row.volume_id)):
            for name in (_NEW + row.volume_id, row.volume_id):
                path, old = os.path.join(self._directory, name), os.path.join(self._directory, gone)
                try:
                    os.rename(path, old)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        # Not even for another name; where it lies it can be removed as well.
                        trees.remove(self._directory, name, deadline)
                        continue
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    trees.remove(self._directory, gone, deadline)
                    os.rename(path, old)
            trees.remove(self._directory, gone, deadline)
            if _limited(row):
                # Where there are no quotas there was never a limit.
                with contextlib.suppress(QuotaUnavailable):
                    quotas.limit(self._directory, _project(row), 0)
            durable.sync_directory(self._directory)
        self._store.remove(row.volume_id)
        self._watch.forget(row.volume_id)

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
        """Free bytes of the filesystem, less what was promised and has not been used yet."""
        facts = os.statvfs(nearest(self._directory))
        free = facts.f_bavail * facts.f_frsize
        promised = owed = 0
        for row, may_have in self._promised():
            promised += may_have
            owed += max(0, may_have - self._used(row))
        available = free - owed
        if self._limit:
            available = min(available, self._limit - promised)
        return max(0, available)

    def expand(self, volume_id: str, size: SizeRange) -> Volume:
        with self._busy(of_volume(self._row(volume_id, ready=True).name)):
            with self._store.transaction():
                # The row first: a limit that is smaller than its row is raised at the next start or attempt.
                self._store.set_capacity(volume_id, self.check_expand(volume_id, size))
            row = self._row(volume_id)
            if _limited(row):
                quotas.limit(self._path(volume_id), _project(row), row.capacity)
        return self._volume(row)

    def refuses(self, flag: str) -> str | None:
        """A directory is bound as it lies."""
        return None if flag in _BIND else f"cannot be given to a directory; it takes {', '.join(sorted(_BIND))}"

    def attach(self, volume_id: str, _context: Mapping[str, str] | None = None) -> Source:
        self._known(volume_id)
        path = self._path(volume_id)
        if not is_directory(path):
            self._be_ours()
            raise VolumeNotFound(f"{volume_id} (its directory {path} is gone)")
        return DirectorySource(path=path)

    def recover(self) -> Sequence[str]:
        return self._recovery.run()

    def unfinished(self) -> Sequence[Unfinished]:
        return self._recovery.unfinished()

    def _steps(self) -> Iterator[Step]:
        for row in self._store.rows():
            left = "" if row.state is State.READY else f"it was {row.state.value} when the process ended"
            yield row.volume_id, of_volume(row.name), left, partial(self._settle_now, row.volume_id)

    def _settle_now(self, volume_id: str) -> str | None:
        row = self._store.get(volume_id)
        return self._settle(row) if row is not None else None

    def _settle(self, row: Row) -> str | None:
        if row.state is State.CREATING and is_directory(self._path(row.volume_id)):
            # It took its name in the last step but one. If the row is of an older store, pods have it by now.
            self._store.set_state(row.volume_id, State.READY)
            return f"finished creating volume {row.volume_id}"
        if row.state is not State.READY:
            self._drop(row, _REMOVAL_AT_START)
            return f"removed volume {row.volume_id}, which was {row.state.value} when the process ended"
        if _limited(row) and is_directory(self._path(row.volume_id)):
            quotas.limit(self._path(row.volume_id), _project(row), row.capacity)
        return None

    def unknown_files(self) -> Sequence[str]:
        """Entries of the directory that no row speaks of; never removed by runvol."""
        rows = self._store.ids()
        names = sorted(set(os.listdir(self._directory)) - rows) if os.path.isdir(self._directory) else []
        return [os.path.join(self._directory, name) for name in names
                if name.removeprefix(_NEW).removeprefix(_OLD) not in rows and name != "lost+found"]  # fmt: skip

    def left_quotas(self) -> Sequence[int]:
        """Projects of ours that have a limit although no row and no directory has them, and nothing counts for them."""
        if not os.path.isdir(self._directory):
            return []
        # Before the rows: what is begun meanwhile has a higher number.
        highest = min(self._store.next_number(), _MOST_PROJECTS)
        known = {_project(row) for row in self._store.rows()}
        known |= {_project_of(path) for path in self.unknown_files() if _is_directory(path)}
        found = []
        try:
            for project in range(FIRST_PROJECT + 1, FIRST_PROJECT + highest):
                if project not in known:
                    quota = quotas.read(self._directory, project)
                    if quota.limit and not quota.used and not quota.files:
                        found.append(project)
        except QuotaUnavailable:
            return []
        return found

    def lift(self, project: int) -> None:
        """The limit of such a project goes."""
        quotas.limit(self._directory, project, 0)

    prefixes = (PREFIX,)

    def _names(self) -> Iterator[str]:
        return (row.volume_id for row in self._store.rows(state=State.READY))

    def _known(self, volume_id: str) -> Volume:
        return self._volume(self._row(volume_id, ready=True))

    def _row(self, volume_id: str, *, ready: bool = False) -> Row:
        row = self._store.get(volume_id) if VOLUME_ID.match(volume_id) else None
        if row is None:
            self._store.check_own(PREFIX, volume_id)
            raise VolumeNotFound(volume_id)
        if ready and row.state is not State.READY:
            raise VolumeUnfinished(f"volume {volume_id} is {row.state.value}")
        return row

    def _volume(self, row: Row) -> Volume:
        return Volume(
            volume_id=row.volume_id,
            name=row.name,
            backend=row.backend,
            capacity_bytes=row.capacity,
            parameters=row.parameters,
            allocated_bytes=self._used(row),
        )

    def _used(self, row: Row) -> int:
        """What the volume's files hold, as its quota counts them; nothing where nobody counts."""
        if not _limited(row) or not os.path.isdir(self._path(row.volume_id)):
            return 0
        try:
            return quotas.read(self._path(row.volume_id), _project(row)).used
        except (QuotaUnavailable, OSError):
            return 0  # as if it were still owed everything

    def _path(self, volume_id: str) -> str:
        return os.path.join(self._directory, volume_id)

    def _reserve(self, more: int) -> None:
        available = self.available_bytes()
        if more > available:
            raise NoSpace(
                f"{more} bytes are asked for and {sizes.about(available)} can still be promised in {self._directory}; "
                "delete volumes, or give the directory a larger disk"
            )


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _project_of(path: str) -> int:
    """0 where it cannot be told; what counts for a number is asked besides."""
    try:
        return quotas.project_of(path)
    except OSError:
        return 0


def _limited(row: Row) -> bool:
    return row.parameters.get(QUOTA, "project") == "project"


def _project(row: Row) -> int:
    """Never given twice: the store never reuses a sequence number."""
    return FIRST_PROJECT + row.seq
