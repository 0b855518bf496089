"""How a volume on a share gets the content of another one, or of a snapshot: beside its place, then there at once."""

from __future__ import annotations

import errno
import os
from functools import partial

import msgspec

from volumes import nfs_share, share, share_lock
from volumes.errors import VolumeConflict, VolumeNotFound, VolumeUnfinished
from volumes.export_ids import short
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import ContentSource
from volumes.nfs_share import Share
from volumes.share import RECORDS, Record


class Filling:
    """`own` stands in the names of what this process makes, so that two controllers never write to the same."""

    def __init__(self, jobs: Jobs, own: str) -> None:
        self._jobs, self._own = jobs, own

    def finished(self, one: Share, record: Record, source: ContentSource) -> Record:
        """The record of the whole volume. VolumeUnfinished while its content is being copied; VolumeConflict where
        somebody else's things lie in its place by now."""
        what = f"volume {record.name} from {source}"
        filled, given_up = partial(self._filled, record, source), partial(_given_up, record)
        work = nfs_share.behind(one.place, f"volume {record.name}", filled, given_up)
        self._jobs.finished(record.volume_id, what, work, PATIENCE)
        # That work may have been an earlier volume's, or have ended before somebody deleted this one.
        now = share.read(one.records, record.volume_id, Record)
        if now is None or now.serial != record.serial or not now.ready or not share.is_there(one.root, now.directory):
            raise VolumeUnfinished(f"{what}: its content is gone; ask again")
        return now

    def _filled(self, record: Record, source: ContentSource, one: Share, progress: Progress) -> None:
        name = f"{nfs_share.new_name(record)}.{self._own}"
        new = f"{RECORDS}/{name}"
        with share.unless_whole(one.root, new):
            share.remove_tree(one.root, new)
            with share.place_of_records(one.root) as place:
                os.mkdir(name, 0o700, dir_fd=place)
            with share.opened(one.root, new) as target, share_lock.beating(target):
                _copied(one, source, target, progress)
            with share_lock.changing(one.records):
                _placed(one, record, new)
        share.tidy(one.root, nfs_share.new_name(record))  # this one, where another was faster, and what kills have left


def _copied(one: Share, source: ContentSource, target: int, progress: Progress) -> None:
    # Most processes never copy anything.
    from volumes import archives

    source_id = short(source.source_id)
    if source.kind == "snapshot":
        with open(share.archive(one.records, source_id), "rb") as archive:
            archives.unpack(archive, target, progress)
        return
    old = share.read(one.records, source_id, Record)
    if old is None or old.gone or old.deleting:
        raise VolumeNotFound(source.source_id)
    with share.opened(one.root, old.directory or ".") as directory:
        archives.copy(directory, target, progress, without=share.not_its_own(old))


def _placed(one: Share, record: Record, new: str) -> None:
    """The whole content is the volume's directory, unless another controller was faster."""
    now = nfs_share.check_still(one, record)
    if now.ready:
        return
    there, inode = nfs_share.inode_of(one, record.directory), nfs_share.inode_of(one, new)
    if there and there == now.inode:
        share.write(one.records, msgspec.structs.replace(now, ready=True))  # who was killed then had put it there
        return
    if there:
        raise _taken(record)
    now = msgspec.structs.replace(now, inode=inode, made=True)
    share.write(one.records, now)
    with share.parent(one.root, record.directory, made=True) as (fd, name):
        try:
            os.rename(new, name, src_dir_fd=one.root, dst_dir_fd=fd)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _taken(record) from None
            raise
        if "mode" in now.parameters:
            share.chmod(fd, name, int(now.parameters["mode"], 8))
    share.write(one.records, msgspec.structs.replace(now, ready=True))


def _taken(record: Record) -> VolumeConflict:
    return VolumeConflict(record.name, f"its directory {record.directory!r} was made by somebody else meanwhile")


def _given_up(record: Record, one: Share) -> None:
    now = share.read(one.records, record.volume_id, Record)
    if now is None or now.serial != record.serial or now.ready:
        return
    if now.inode and now.inode == nfs_share.inode_of(one, record.directory):
        return  # it stands in its place, and the next call says so
    share.remove(one.records, record.volume_id)
