"""Which export has the records of an export's volumes: one for all of them, whatever its classes say.

A class may name another export for them (`recordsPath`), for a share that pods have whole: nothing that lies there is
believed then. So nobody would see that a class without that, or with another export, works on the same directories; it
is told so at its first volume. Both exports hold a mark: that of the records says whose are there, and is the one that
is believed; that of the directories tells classes which look there.
"""

from __future__ import annotations

import contextlib
import os

from blockdev import BlockdevError, durable
from volumes import share, share_lock
from volumes.errors import InvalidParameter, VolumeError
from volumes.nfs_parameters import RECORDS_PATH
from volumes.nfs_share import DATA_MARK, Share, data_mark, is_marked, normal
from volumes.share import NFS_VOLUME, RECORDS, Record
from volumes.troubles import log

_KEPT = "records-path"
_LONGEST = 4096


def check(one: Share) -> None:
    """InvalidParameter where volumes on this export have their records elsewhere than the class says; else both marks
    are there. To be called while nobody else changes what lies with the records, and last before a volume's record."""
    data, records = normal(one.place.data.path), normal(one.place.records.path)
    if data == records:
        kept = _kept(one.root)
        if kept and kept != records:
            raise InvalidParameter(RECORDS_PATH, "", _elsewhere(data, kept))
        if share.names(one.records, DATA_MARK):
            raise InvalidParameter("path", data, "is the `recordsPath` of other volumes, and for nothing else")
        return
    kept = _kept(one.records)
    if kept:
        why = f"has volumes, whose records are kept on {kept[:200]!r}; records need an export for nothing else"
        raise InvalidParameter(RECORDS_PATH, records, why)
    if is_marked(one):
        _heal(one, records)
        return
    found = [*share.records(one.records, NFS_VOLUME, Record, share.passed_over)]
    if any(not other.path for other in found):
        raise InvalidParameter(RECORDS_PATH, records, "has volumes itself; records need an export for nothing else")
    if any(normal(other.path) == data for other in found):
        _heal(one, records)  # from before there were marks
    else:
        _check_new(one, data, records)
    _write(one.records, data_mark(data), data)


def _check_new(one: Share, data: str, records: str) -> None:
    """The export's first volume whose records lie elsewhere."""
    if _is_one_directory(one):
        raise InvalidParameter(RECORDS_PATH, records, f"leads to the same directory as {data}; leave it out")
    with share_lock.changing(one.root):
        if share.names(one.root, DATA_MARK):
            raise InvalidParameter("path", data, "is the `recordsPath` of other volumes, and for nothing else")
        if share.names(one.root, NFS_VOLUME, share.A_RECORD):
            why = f"there are volumes on {data} whose records lie there; delete them first, or leave `recordsPath` out"
            raise InvalidParameter(RECORDS_PATH, records, why)
        kept, known_as = _kept(one.root), _known_as(one.root)
        if kept and kept != records:
            raise InvalidParameter(RECORDS_PATH, records, _elsewhere(data, kept))
        if known_as and known_as != data:
            why = f"leads to the same directory as {known_as[:200]!r}, says {RECORDS}/{_KEPT} there; name it like that"
            raise InvalidParameter("path", data, why)
        _write(one.root, _KEPT, f"{records}\n{data}")


def _heal(one: Share, records: str) -> None:
    """The mark on the export of the directories is there again, as far as whoever has that export lets it be."""
    try:
        kept = _kept(one.root)
        if not kept:
            _write(one.root, _KEPT, f"{records}\n{normal(one.place.data.path)}")
        elif kept != records:
            log.warning("an export's mark says another place for its volumes' records", extra={"says": kept[:200]})
    except (OSError, VolumeError, BlockdevError) as error:
        log.warning("an export has no mark that tells where its volumes' records are", extra={"why": str(error)})


def _is_one_directory(one: Share) -> bool:
    """Whether what is put among the records appears with the directories: their paths may be two names of one place."""
    name = f"probe-{os.urandom(8).hex()}"
    with share.place_of_records(one.records) as place:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=place))
        try:
            return share.is_there(one.root, f"{RECORDS}/{name}")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=place)


def _elsewhere(data: str, kept: str) -> str:
    return (f"the records of volumes on {data} are kept on {kept[:200]!r}, says {RECORDS}/{_KEPT} there; say the same, "
            f"or, where no volume is left, remove that file and {RECORDS}/{data_mark(data)} there")  # fmt: skip


def _kept(root: int) -> str:
    """What the export of the directories says; empty where it says nothing."""
    lines = _lines(root)
    return "" if lines is None else (lines[0] if lines else "") or "?"


def _known_as(root: int) -> str:
    """The path by which it was first named; empty where that is not written down."""
    lines = _lines(root) or []
    return lines[1] if len(lines) > 1 else ""


def _lines(root: int) -> list[str] | None:
    raw = share.content(root, _KEPT)
    return None if raw is None else [line.strip() for line in raw[:_LONGEST].decode("utf-8", "replace").splitlines()]


def _write(root: int, name: str, text: str) -> None:
    with share.place_of_records(root) as place:
        durable.replace(name, text.encode() + b"\n", beside=f".{name}.", dir_fd=place)
