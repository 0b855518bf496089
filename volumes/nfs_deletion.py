"""How a volume on a share goes: its directory takes another name, its files go, and then its record.

The names change while no other controller changes any; the files, of which a pod may have made millions, are removed
after it, and then the record: a deletion that was killed, or had no more time, is finished by the next call. Nothing
needs room on the share.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

import msgspec

from blockdev import Deadline, trees
from volumes import nfs_share, share, share_lock
from volumes.errors import StoreFailed, VolumeUnfinished
from volumes.export_ids import short
from volumes.jobs import Jobs
from volumes.nfs_share import ARCHIVE, Share, gone_name, is_in, new_name, place_on_server
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
        copies, in_place = _renamed(one, record, jobs) if record is not None else ([], False)
        if record is None:
            share.remove(one.records, volume_id)  # what a kill has left of its first record
    _tidied(one, volume_id, record)
    for copy in copies:
        remove_gone(one, copy)
    if record is None:
        return
    if in_place:
        _removed_where_it_lies(one, record)
    with share_lock.changing(one.records):
        now = _now(one, record)
        waits = now is not None and (now.gone or not _forgotten(one, now))
    if waits:
        _without_tombs(one, record)


def _now(one: Share, record: Record) -> Record | None:
    """The volume's record as it stands; None where it is gone, or another volume's by now."""
    now = share.read(one.records, record.volume_id, Record)
    return now if now is not None and now.serial == record.serial else None


def remove_gone(one: Share, volume_id: str) -> None:
    """The files of the volume of this id that is being deleted are removed. NotRemoved, WaitExpired."""
    for name in share.names(one.root, f"gone-{volume_id}"):
        share.remove_tree(one.root, f"{RECORDS}/{name}")


def settle(one: Share, record: Record) -> Record | None:
    """A deleted volume whose directory waited for others: None where that is out of the way, as none of them is left.
    To be called while nobody else changes the share; the record stays for whoever removes the files."""
    living, tombs, damaged = _others(one, record)
    if record.deleting or damaged or any(is_in(one, other, record) for other in living):
        return record
    if not _is_its_own(one, record):
        return None  # what lies there by now is somebody's who does not know of it
    if not _taken_away(one, record, archived=_is_archived(one, record, tombs), sure=True):
        record = msgspec.structs.replace(record, deleting=True)
        _marked(one, record)
        return record
    return None


def _renamed(one: Share, record: Record, jobs: Jobs) -> tuple[list[str], bool]:
    """What of the volume has a name has another one. Half copies of it, whose files are to be removed, too; and whether
    its own have to be removed where they lie. The record stays until they are: it is what a repeated call goes by."""
    if record.gone:
        return [], False  # it waits for others, and goes with the last of them
    if record.deleting:
        return [], True
    living, tombs, damaged = _others(one, record)
    copies = _without_half_copies(one, record, living, jobs)
    if damaged and record.parameters.get("subDir"):
        raise VolumeUnfinished(f"{damaged[0]}; it may be of a volume in the same subDir as {record.volume_id}")
    if any(is_in(one, other, record) for other in living) and record.directory and record.made is not False:
        _marked(one, msgspec.structs.replace(record, ready=False, gone=True))
        return copies, False
    if not _taken_away(one, record, archived=_is_archived(one, record, tombs), sure=not damaged):
        # Nobody makes it anew meanwhile.
        _marked(one, msgspec.structs.replace(record, ready=False, deleting=True))
        return copies, True
    _marked(one, _without_directory(record))
    return copies, False


def _without_directory(record: Record) -> Record:
    """That of a volume which is being deleted, and whose directory is out of the way: whatever appears in its place is
    somebody else's, with the same inode or another one."""
    return msgspec.structs.replace(record, ready=False, deleting=True, made=False)


def _forgotten(one: Share, record: Record) -> bool:
    """No record of a volume that is gone. False where it stays, as one of them, since others waited for this one, until
    `_without_tombs` is done with all."""
    if any(tomb.gone and is_in(one, record, tomb) for tomb in nfs_share.all_records(one, share.passed_over)):
        _marked(one, msgspec.structs.replace(record, ready=False, gone=True, deleting=False))
        return False
    share.remove(one.records, record.volume_id)
    return True


def _removed_where_it_lies(one: Share, record: Record) -> None:
    """The files of a volume that could get no other name. What lies there by now, and is not what was made for it, is
    archived. VolumeUnfinished, NotRemoved, WaitExpired."""
    with contextlib.ExitStack() as stack:
        with share_lock.changing(one.records):
            if not _is_deleting(one, record) or _is_lived_in(one, record):
                return
            if not _is_its_own(one, record):
                _archive(one, record)
                return
            try:
                there = stack.enter_context(share.opened(one.root, record.directory))
            except FileNotFoundError:
                return
        # By the descriptor: another controller may be done with it before, and the volume be made anew.
        trees.remove_content(os.dup(there), record.directory, Deadline.after(share.REMOVAL))
        with share_lock.changing(one.records):
            if _is_deleting(one, record) and nfs_share.inode_of(one, record.directory) == os.fstat(there).st_ino:
                with share.parent(one.root, record.directory) as (fd, name):
                    _rmdir(fd, name, record)
                if not record.gone:
                    _marked(one, _without_directory(record))


def _is_deleting(one: Share, record: Record) -> bool:
    now = _now(one, record)
    return now is not None and now.deleting and now.made is not False


def _is_lived_in(one: Share, record: Record) -> bool:
    """Whether a volume has this one's place, or a part of it, that was made since."""
    others = nfs_share.all_records(one, share.passed_over)
    return any(is_in(one, other, record) and not (other.gone or other.deleting) for other in others)


def _rmdir(fd: int, name: str, record: Record) -> None:
    try:
        os.rmdir(name, dir_fd=fd)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            why = f"somebody still writes to volume {record.name}, which is being deleted; ask again"
            raise VolumeUnfinished(why) from None
        raise


def _without_tombs(one: Share, record: Record) -> None:
    """Volumes that were deleted, and whose directories waited for this one that lay in them, are gone where no other
    does. After everything else, when there is room again. VolumeUnfinished, NotRemoved, WaitExpired; BlockdevError of
    another export."""
    for tomb in _waiting(one, record):
        with nfs_share.at(one, tomb) as there:
            with share_lock.changing(one.records):
                now = _now(one, tomb)
                if now is None or not now.gone:
                    continue
                left = settle(there, now)
            if left is not None and not left.deleting:
                raise VolumeUnfinished(
                    f"volume {tomb.name}, which was deleted, waits around {record.volume_id} for a record on the share "
                    f"that cannot be read; see the controller's log, and {RECORDS}/*.json there"
                )
            remove_gone(there, tomb.volume_id)
            if left is not None:
                _removed_where_it_lies(there, left)
            with share_lock.changing(one.records):
                now = _now(one, tomb)
                if now is not None and now.gone:
                    share.remove(one.records, tomb.volume_id)


def _waiting(one: Share, record: Record) -> list[Record]:
    """The deleted volumes around this one in which nobody lives, those inside others first, and this one at the end: as
    long as it is there a repeated deletion goes on."""
    found = [*nfs_share.all_records(one, share.passed_over)]
    living = [other for other in found if not other.gone]
    around = [tomb for tomb in found if tomb.gone and is_in(one, record, tomb)]
    waiting = [tomb for tomb in around if not any(is_in(one, other, tomb) for other in living)]
    own = record.volume_id
    return sorted(waiting, key=lambda tomb: (tomb.volume_id == own, -len(place_on_server(one, tomb))))


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


def _taken_away(one: Share, record: Record, *, archived: bool, sure: bool) -> bool:
    """The directory of a deleted volume is archived, or out of everybody's sight; what was there before the volume
    stays. Where not all is known (`sure`), nothing is removed that might be somebody's. False where it is to be
    removed, and the share has no room for another name, or none on that filesystem."""
    if not record.directory or record.made is False:
        return True
    if record.serial and not record.inode:
        # Its creation ended before anything was made that is known to be ours.
        with contextlib.suppress(OSError), share.parent(one.root, record.directory) as (fd, name):
            os.rmdir(name, dir_fd=fd)
        return True
    if archived or not sure or not _is_its_own(one, record):
        _archive(one, record)
        return True
    with (
        contextlib.suppress(FileNotFoundError),
        share.parent(one.root, record.directory) as (fd, name),
        share.place_of_records(one.root) as records,
    ):
        try:
            os.rename(name, gone_name(record.volume_id), src_dir_fd=fd, dst_dir_fd=records)
        except OSError as error:
            if error.errno not in (*_FULL, errno.EXDEV):
                raise
            return False
    return True


def _is_its_own(one: Share, record: Record) -> bool:
    """Whether the directory is the one that was made for the volume; older records do not say."""
    return record.inode in (0, nfs_share.inode_of(one, record.directory))


def _archive(one: Share, record: Record) -> None:
    """The directory has another name, which tells what it was."""
    was = os.fsencode(record.directory.replace("/", "-"))[:200].decode("utf-8", "ignore")
    first = f"{ARCHIVE}{was}-{record.volume_id[-8:]}"
    with contextlib.suppress(FileNotFoundError), share.parent(one.root, record.directory) as (fd, name):
        # Beside it, where that is another filesystem of the server's than the share.
        target = fd if os.fstat(fd).st_dev != os.fstat(one.root).st_dev else one.root
        for number in range(1, _ARCHIVES + 1):
            archived = first if number == 1 else f"{first}-{number}"
            try:
                os.rename(name, archived, src_dir_fd=fd, dst_dir_fd=target)
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
    if record is not None and record.serial:
        share.tidy(one.root, new_name(record))
    else:
        share_lock.tidy_abandoned(one.records, one.root, f"new-{volume_id}.")
