"""Which export has the records of an export's volumes: one for all of them, whatever its classes say.

A class may name another export for them (`recordsPath`), for a share that pods have whole: nothing that lies there is
believed then. So nobody would see that a class without that, or with another export, works on the same directories; all
of them are told at their first volume. Both exports hold a mark: that of the records says whose are there, and is the
one that is believed; that of the directories tells classes which look there.
"""

from __future__ import annotations

import os

from blockdev import durable
from volumes import share, share_lock
from volumes.errors import InvalidParameter
from volumes.export_ids import digest
from volumes.nfs_parameters import RECORDS_PATH
from volumes.nfs_share import Share
from volumes.share import NFS_VOLUME, RECORDS, Record

_OF, _KEPT = "data-", "records-path"
_LONGEST = 4096


def check(one: Share) -> None:
    """InvalidParameter where volumes on this export have their records elsewhere than the class says. To be called
    while nobody else changes what lies with the records."""
    data, records = _path(one.place.data.path), _path(one.place.records.path)
    if data == records:
        kept = _kept(one.root)
        if kept and kept != records:
            raise InvalidParameter(RECORDS_PATH, "", _elsewhere(data, kept))
        if share.names(one.records, _OF):
            raise InvalidParameter("path", data, "is the `recordsPath` of other volumes, and for nothing else")
        return
    name = f"{_OF}{digest(data)[:20]}"
    if share.is_there(one.records, f"{RECORDS}/{name}"):
        return
    if any(not other.path for other in share.records(one.records, NFS_VOLUME, Record, share.passed_over)):
        raise InvalidParameter(RECORDS_PATH, records, "has volumes itself; records need an export for nothing else")
    with share_lock.changing(one.root):
        if share.names(one.root, NFS_VOLUME, share.A_RECORD):
            why = f"there are volumes on {data} whose records lie there; delete them first, or leave `recordsPath` out"
            raise InvalidParameter(RECORDS_PATH, records, why)
        kept = _kept(one.root)
        if kept and kept != records:
            raise InvalidParameter(RECORDS_PATH, records, _elsewhere(data, kept))
        _write(one.root, _KEPT, records)
    _write(one.records, name, data)


def _elsewhere(data: str, kept: str) -> str:
    return (f"the records of volumes on {data} are kept on {kept[:200]!r}, says {RECORDS}/{_KEPT} there; say the same, "
            "or remove that file where no volume is left")  # fmt: skip


def _path(path: str) -> str:
    """One spelling of an export's path."""
    return os.path.normpath(f"/{path.lstrip('/')}")


def _kept(root: int) -> str:
    """What the export of the directories says; empty where it says nothing."""
    raw = share.content(root, _KEPT)
    return "" if raw is None else raw[:_LONGEST].decode("utf-8", "replace").strip() or "?"


def _write(root: int, name: str, text: str) -> None:
    with share.place_of_records(root) as place:
        durable.replace(name, text.encode() + b"\n", beside=f".{name}.", dir_fd=place)
