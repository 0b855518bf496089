"""How a volume on a share goes: its directory takes another name, its record goes, and then its files.

The names change while no other controller changes any; the files, of which a pod may have made millions, are removed
after it. Nothing is written first, so that a full share is no hindrance. A killed deletion is finished by the next
call: the record is there until all names are changed, and files without a record lie under a name that says whose.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

import msgspec

from volumes import nfs_share, share, share_lock
from volumes.errors import StoreFailed, VolumeUnfinished
from volumes.export_ids import short
from volumes.jobs import Jobs
from volumes.nfs_share import ARCHIVE, Share, gone_name, is_in, new_name
from volumes.share import NFS_SNAPSHOT, RECORDS, Record, SnapshotRecord
from volumes.troubles import log, logged

# How often a name may be archived.
_ARCHIVES = 1000
_FULL = (errno.ENOSPC, errno.EDQUOT)


def delete(one: Share, volume_id: str, jobs: Jobs) -> None:
    """No volume of this id is on the share. What was there before it is left as it is, a share itself among it.
    VolumeUnfinished, NotRemoved, WaitExpired: the next call goes on."""
    with share_lock.changing(one.records):
        record = share.read(one.records, volume_id, Record)
        waited, in_place = _renamed(one, record, jobs) if record is not None else ([], False)
        if record is None:
            share.remove(one.records, volume_id)  # what a kill has left of its first record
    _tidied(one, volume_id, record)
    for other in waited:
        remove_gone(one, other)
    if record is not None and in_place:
        share.remove_tree(one.root, record.directory)
        with share_lock.changing(one.records):
            now = share.read(one.records, volume_id, Record)
            if now is not None and now.serial == record.serial:
                share.remove(one.records, volume_id)


def remove_gone(one: Share, volume_id: str) -> None:
    """The files of volumes of this id that have no record any more are removed. NotRemoved, WaitExpired."""
    for name in share.names(one.root, f"gone-{volume_id}"):
        share.remove_tree(one.root, f"{RECORDS}/{name}")


def settle(one: Share, record: Record) -> Record | None:
    """A deleted volume whose directory waited for others: None once it is gone, as none of them is left. To be called
    while nobody else changes the share."""
    living, tombs, damaged = _others(one, record)
    if damaged or any(is_in(one, other, record) for other in living):
        return record
    _taken_away(one, record, archived=_is_archived(one, record, tombs), sure=True)
    share.remove(one.records, record.volume_id)
    return None


def _renamed(one: Share, record: Record, jobs: Jobs) -> tuple[list[str], bool]:
    """What of the volume has a name has another one, or none. Other volumes that only waited for it, whose files are to
    be removed, too; and whether its own have to be removed where they lie."""
    if record.deleting:
        return [], True
    waited: list[str] = []
    living, tombs, damaged = _others(one, record)
    if record.gone:
        settle(one, record)
        return [], False
    waited += _without_half_copies(one, record, living, jobs)
    if damaged and record.parameters.get("subDir"):
        raise VolumeUnfinished(f"{damaged[0]}; it may be of a volume in the same subDir as {record.volume_id}")
    if any(is_in(one, other, record) for other in living) and record.directory and record.made is not False:
        _marked(one, msgspec.structs.replace(record, ready=False, gone=True))
        return waited, False
    try:
        _taken_away(one, record, archived=_is_archived(one, record, tombs), sure=not damaged)
        # What was deleted before, and only waited for this one.
        for other in sorted(tombs, key=lambda tomb: len(tomb.directory), reverse=True):
            if is_in(one, record, other) and not any(is_in(one, third, other) for third in living):
                archived = _is_archived(one, other, [*tombs, record])
                _taken_away(one, other, archived=archived, sure=not damaged)
                nfs_share.forget(one, other)
                waited.append(other.volume_id)
    except OSError as error:
        if error.errno not in _FULL or record.directory == "" or _is_archived(one, record, tombs):
            raise
        # Not even for another name. Nobody makes it anew meanwhile.
        _marked(one, msgspec.structs.replace(record, ready=False, deleting=True))
        return waited, True
    share.remove(one.records, record.volume_id)
    return waited, False


def _others(one: Share, record: Record) -> tuple[list[Record], list[Record], list[str]]:
    """The volumes beside this one: those that live, those whose directories wait; and what could not be read."""
    damaged: list[str] = []
    found = [other for other in nfs_share.all_records(one, damaged.append) if other.volume_id != record.volume_id]
    return [other for other in found if not other.gone], [other for other in found if other.gone], damaged


def _is_archived(one: Share, record: Record, tombs: Sequence[Record]) -> bool:
    """Of volumes that had one directory together, one that wants it kept is enough."""
    had = [record, *(tomb for tomb in tombs if nfs_share.is_same(one, tomb, record))]
    return any(other.parameters.get("archiveOnDelete", "true") == "true" or other.made is None for other in had)


def _marked(one: Share, record: Record) -> None:
    try:
        share.write(one.records, record)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        share.write_over(one.records, record)


def _without_half_copies(one: Share, record: Record, living: Sequence[Record], jobs: Jobs) -> list[str]:
    """VolumeUnfinished while something is being made from this volume, or it from something. What nobody works on any
    more is half a copy that its caller has given up: it goes, and its files are to be removed."""
    if jobs.progress(record.volume_id) is not None:
        raise VolumeUnfinished(f"volume {record.volume_id} is being filled from {record.source}")
    copies = [other.volume_id for other in living
              if not other.ready and short(other.source) == f"volume:{record.volume_id}"]  # fmt: skip
    archives = [other.snapshot_id for other in share.records(one.records, NFS_SNAPSHOT, SnapshotRecord, logged)
                if not other.ready and short(other.source) == record.volume_id]  # fmt: skip
    for made in [*copies, *archives]:
        if jobs.progress(made) is not None or share_lock.is_worked_on(one.records, one.root, made):
            raise VolumeUnfinished(f"volume {record.volume_id} is being copied to {made}; wait, or delete that")
        log.warning("half a copy that nobody works on is taken away", extra={"copy": made, "of": record.volume_id})
        with share.place_of_records(one.root) as place:
            for name in share.names(one.root, f"new-{made}."):
                os.rename(name, gone_name(made), src_dir_fd=place, dst_dir_fd=place)
        share.tidy(one.records, f"{made}.", ".tar")
        share.remove(one.records, made)
    return [*copies, *archives]


def _taken_away(one: Share, record: Record, *, archived: bool, sure: bool) -> None:
    """The directory of a deleted volume is archived, or out of everybody's sight; what was there before the volume
    stays. Where not all is known (`sure`), nothing is removed that might be somebody's."""
    if not record.directory or record.made is False:
        return
    if record.serial and not record.inode:
        # Its creation ended before anything was made that is known to be ours.
        with contextlib.suppress(OSError), share.parent(one.root, record.directory) as (fd, name):
            os.rmdir(name, dir_fd=fd)
        return
    if archived or not sure or not _is_its_own(one, record):
        _archive(one, record)
        return
    with (
        contextlib.suppress(FileNotFoundError),
        share.parent(one.root, record.directory) as (fd, name),
        share.place_of_records(one.root) as records,
    ):
        os.rename(name, gone_name(record.volume_id), src_dir_fd=fd, dst_dir_fd=records)


def _is_its_own(one: Share, record: Record) -> bool:
    """Whether the directory is the one that was made for the volume; older records do not say."""
    return record.inode in (0, nfs_share.inode_of(one, record.directory))


def _archive(one: Share, record: Record) -> None:
    """The directory has another name, which tells what it was."""
    was = os.fsencode(record.directory.replace("/", "-"))[:200].decode("utf-8", "ignore")
    first = f"{ARCHIVE}{was}-{record.volume_id[-8:]}"
    with contextlib.suppress(FileNotFoundError), share.parent(one.root, record.directory) as (fd, name):
        for number in range(1, _ARCHIVES + 1):
            archived = first if number == 1 else f"{first}-{number}"
            try:
                os.rename(name, archived, src_dir_fd=fd, dst_dir_fd=one.root)
                return
            except OSError as error:
                # An earlier volume of this name was archived, too; or somebody has put something of this name there.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        raise StoreFailed(f"{first} and {_ARCHIVES - 1} more such names are taken on the share; remove some of them")


def _tidied(one: Share, volume_id: str, record: Record | None) -> None:
    """No files are left of volumes of this id that have no record any more, nor of this one that never got whole. What
    somebody makes for another one of that name in this moment is not touched."""
    remove_gone(one, volume_id)
    if record is not None:
        share.tidy(one.root, new_name(record))
    else:
        share_lock.tidy_abandoned(one.records, one.root, f"new-{volume_id}.")
