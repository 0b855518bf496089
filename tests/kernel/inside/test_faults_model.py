"""The model of `test_model` with everything against it: a disk that fills or fails at any commit, stores that are lost or
come back from the past, second servers. No device is shared, no root changed or lost, nothing deleted without a proof."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from blockdev.devicemapper import Mapper
from snapshotter import flushes, keeper, repairing
from snapshotter.errors import PoolRefused, StoreFailed
from snapshotter.model import Kind
from snapshotter.node import STORE, Node
from tests.kernel.inside.lab import in_child, soon
from tests.kernel.inside.test_model import _KEYS, _MARK, _NAMES, Model, run

_FULL = sqlite3.OperationalError("database or disk is full")


class Faults(Model):
    """What was done without an answer is what the lab says; all else is as in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.copy: Path | None = None
        self.steps: Counter[str] = Counter()

    # -- the disk under the store -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _full(self, after: int) -> Iterator[None]:
        """Commits fail, but for the first few."""
        store, left = self.lab.node.store, [after]
        commit = store._commit

        def failing() -> None:
            left[0] -= 1
            if left[0] < 0:
                raise _FULL
            commit()

        with mock.patch.object(store, "_commit", failing):
            yield

    @contextlib.contextmanager
    def _failing(self, after: int) -> Iterator[None]:
        """Flushes fail, but for the first few: what was written may be seen, and the caller was told otherwise."""
        flush, left = os.fdatasync, [after]

        def failing(fd: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(5, "Input/output error")
            flush(fd)

        with mock.patch.object(flushes.os, "fdatasync", failing):
            yield

    def _try(self, work: Callable[[], object]) -> bool:
        """Whether the call ended well; the disk is the only thing that may fail."""
        try:
            work()
        except StoreFailed:
            return False
        return True

    @rule(full=st.booleans(), after=st.integers(0, 2), key=_KEYS, parent=st.one_of(st.just(""), _NAMES))
    def prepare_on_a_bad_disk(self, full: bool, after: int, key: str, parent: str) -> None:
        if self._expected(key, parent):
            return
        with self._full(after) if full else self._failing(after):
            done = self._try(lambda: self.lab.prepare(key, parent))
        if done:
            self.rows[key] = Kind.ACTIVE, parent, self.rows[parent][2] if parent else bytes(16)
            self.unsure.add(key)
        elif key in self.lab.names():
            self.lab.remove(key)
        self.steps["prepare"] += 1

    @rule(full=st.booleans(), after=st.integers(0, 2), key=_KEYS, name=_NAMES)
    def commit_on_a_bad_disk(self, full: bool, after: int, key: str, name: str) -> None:
        if key not in self.rows or self.rows[key][0] is not Kind.ACTIVE or name in self.rows:
            return
        with self._full(after) if full else self._failing(after):
            self._try(lambda: self.lab.commit(name, key))
        if name in self.lab.names():
            _, parent, mark = self.rows.pop(key)
            self.rows[name] = Kind.COMMITTED, parent, mark
        self.steps["commit"] += 1

    @rule(full=st.booleans(), after=st.integers(0, 1), key=st.one_of(_KEYS, _NAMES))
    def remove_on_a_bad_disk(self, full: bool, after: int, key: str) -> None:
        if key not in self.rows or any(parent == key for _, parent, _ in self.rows.values()):
            return
        with self._full(after) if full else self._failing(after):
            self._try(lambda: self.lab.remove(key))
        if key not in self.lab.names():
            del self.rows[key]
        self.steps["remove"] += 1

    # -- the past -----------------------------------------------------------------------------------------------------

    @rule()
    def keep_a_copy(self) -> None:
        self.copy = self.directory / "copy"
        with contextlib.closing(sqlite3.connect(self.lab.node.store.path)) as source:
            self.copy.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(self.copy)) as target:
                source.backup(target)

    @precondition(lambda self: self.copy is not None)
    @rule()
    def the_copy_comes_back(self) -> None:
        self._without_its_store(self.copy)

    @rule()
    def the_store_is_lost(self) -> None:
        self._without_its_store(None)

    def _without_its_store(self, instead: Path | None) -> None:
        """The pool's own copy was just made; what it knows comes back, and what is new is empty meanwhile."""
        self.lab.node._copy_at = 0.0
        self.lab.node.follow()
        self.lab.stop()
        for suffix in ("", "-wal", "-shm"):
            Path(self.lab.state, STORE + suffix).unlink(missing_ok=True)
        if instead is not None:
            shutil.copy(instead, os.path.join(self.lab.state, STORE))
        self.lab.start()
        self.steps["past"] += 1
        if not self.lab.node.store.past:
            return  # nothing was done since the copy, or the pool was never used
        (mount,) = self.lab.prepare("meanwhile")
        with open(mount.source, "rb", buffering=0) as opened:
            assert os.pread(opened.fileno(), 16, _MARK) == bytes(16), "another's data in a new root"
        self.lab.remove("meanwhile")
        self.lab.reap()
        self.lab.stop()
        with Mapper() as mapper:
            report = repairing.repair_store(mapper, self.lab.state, soon())
        self.lab.start()
        assert set(report.lost).isdisjoint(self.rows), report
        # What the copy knew and was removed since has gone with it; the keys that it had are no longer those of before.
        for key in sorted(set(self.lab.names()) - self.rows.keys()):
            raise AssertionError(f"{key} came back although it was removed: {report}")
        self.unsure |= self.rows.keys()

    @rule()
    def a_second_server(self) -> None:
        settings = self.lab.settings

        def serve() -> None:
            keeper._HELD.clear()
            try:
                Node(settings).open_pool()
            except PoolRefused:
                os._exit(7)

        assert os.waitstatus_to_exitcode(in_child(serve)) == 7
        self.steps["second server"] += 1

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def no_device_has_two(self) -> None:
        if hasattr(self, "lab"):
            devices = Counter(row.device for page in self.lab.node.store.pages() for row in page if row.device)
            devices.update(self.lab.bases())
            assert not [device for device, count in devices.items() if count > 1]

    @rule()
    def read_all(self) -> None:
        for key, (kind, _, mark) in self.rows.items():
            if kind is not Kind.COMMITTED:
                with open(self.lab.mounts(key)[0].source, "rb", buffering=0) as opened:
                    assert os.pread(opened.fileno(), 16, _MARK) == mark


@pytest.mark.short
def test_a_few_lives_with_faults() -> None:
    run(Faults, 2, 25)


def test_many_lives_with_faults() -> None:
    run(Faults, int(os.environ.get("RUNVOL_LIVES", "5")), 60)
