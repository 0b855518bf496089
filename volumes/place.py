"""The directory in which a store's volumes lie: it says whose it is, so that an empty one is not taken for it.

A disk that is not mounted leaves an empty directory. What would be made there would lie on another disk, and what is
deleted there would stay on its own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator

from blockdev import durable
from volumes import sizes
from volumes.errors import StoreAway
from volumes.model import SizeRange, Volume
from volumes.store import Row, Store

# An extended attribute of the directory: the identity of the store.
_MARK = "trusted.runvol.store"
_NONE = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT, errno.ENOTDIR, errno.EPERM)


class Place:
    """`directory` of the volumes in `store`; `mode` is what it is made with."""

    def __init__(self, directory: str, store: Store, mode: int) -> None:
        self._directory, self._store, self._mode = directory, store, mode

    def be_ours(self, names: Iterable[str]) -> None:
        """The directory is there, and the store's. StoreAway if volumes should be in it (`names`) and none is.

        For calls that are about to make or remove something. On a filesystem without extended attributes what lies
        there decides alone.
        """
        if self._is_marked():
            return
        expected = list(names)
        if expected and not any(os.path.lexists(os.path.join(self._directory, name)) for name in expected):
            raise StoreAway(
                f"none of the {len(expected)} volumes of {self._store.path} lies in {self._directory}: its filesystem "
                "may not be mounted; mount it and try again"
            )
        durable.make_directories(self._directory, self._mode)
        try:
            os.setxattr(self._directory, _MARK, self._store.identity.encode())
        except OSError as error:
            if error.errno not in _NONE:
                raise

    def _is_marked(self) -> bool:
        try:
            return os.getxattr(self._directory, _MARK) == self._store.identity.encode()
        except OSError as error:
            if error.errno not in _NONE:
                raise
            return False


class Stored:
    """What a backend with a store, and a directory for what is in it, answers about the two."""

    _store: Store
    _place: Place

    def _names(self) -> Iterable[str]:
        """What has to lie in the directory, by the store."""
        raise NotImplementedError

    def _be_ours(self) -> None:
        """The directory is this store's. StoreAway."""
        self._place.be_ours(self._names())

    def prepare(self) -> None:
        self._be_ours()

    def _known(self, volume_id: str) -> Volume:
        """VolumeNotFound, VolumeUnfinished."""
        raise NotImplementedError

    def _reserve(self, more: int) -> None:
        """NoSpace where so many bytes cannot be promised besides."""
        raise NotImplementedError

    def _promised(self) -> Iterator[tuple[Row, int]]:
        """Every row, with the bytes that its volume may come to have."""
        promises = self._store.promises()
        for row in self._store.rows():
            yield row, max(row.capacity, promises.get(row.volume_id, 0))

    def check_expand(self, volume_id: str, size: SizeRange) -> int:
        volume = self._known(volume_id)
        capacity = sizes.grown(volume_id, volume.capacity_bytes, size)
        has = max(volume.capacity_bytes, self._store.promises().get(volume_id, 0))
        if capacity > has:
            self._reserve(capacity - has)
        return capacity

    def promise(self, volume_id: str, size: SizeRange) -> int:
        with self._store.transaction():
            capacity = self.check_expand(volume_id, size)
            if capacity > self._known(volume_id).capacity_bytes:
                self._store.set_promised(volume_id, capacity)
        return capacity

    def has_name(self, name: str) -> bool:
        return self._store.has_name(name)

    def holds(self, one_id: str) -> bool:
        return self._store.holds(one_id)

    def forget(self, one_id: str) -> None:
        self._store.forget(one_id)


def nearest(path: str) -> str:
    """The directory, or the one above it that there is."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return path


def is_file(path: str) -> bool:
    """Whether a regular file, or a link to one, is there. OSError where it cannot be told: what is not seen on a disk
    that gives errors is not gone."""
    facts = _facts(path)
    return facts is not None and stat.S_ISREG(facts.st_mode)


def is_directory(path: str) -> bool:
    """The same for a directory."""
    facts = _facts(path)
    return facts is not None and stat.S_ISDIR(facts.st_mode)


def _facts(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
