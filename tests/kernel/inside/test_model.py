"""Any sequence of calls, kills and reboots: the snapshotter does what a model of dictionaries does."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from snapshotter.errors import AlreadyExists, BadRequest, NotFound, SnapshotterError, WrongState
from snapshotter.model import Kind
from tests.kernel.inside.lab import MIB, Lab

_KEYS = st.sampled_from(["a", "b", "c", "d"])
_NAMES = st.sampled_from(["L1", "L2", "L3"])
_MARK = 20 * MIB


class Model(RuleBasedStateMachine):
    """Content is a mark of 16 bytes in the middle of the device: every snapshot inherits its parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, tuple[Kind, str, bytes]] = {}
        self.writes = 0
        self.unsure: set[str] = set()

    @initialize()
    def open(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="model-"))
        self.lab = Lab(self.directory / "lab", data=128 * MIB)

    def teardown(self) -> None:
        if hasattr(self, "lab"):
            for key in sorted(self.rows, key=self._depth, reverse=True):
                self.lab.remove(key)
            leaks = self.lab.leaks()
            self.lab.destroy()
            shutil.rmtree(self.directory)
            assert not leaks

    def _depth(self, key: str) -> int:
        parent = self.rows[key][1]
        return 1 + (self._depth(parent) if parent else 0)

    def _expected(self, key: str, parent: str) -> type[Exception] | None:
        if parent and parent not in self.rows:
            return NotFound
        if parent and self.rows[parent][0] is not Kind.COMMITTED:
            return BadRequest
        return AlreadyExists if key in self.rows else None

    def _make(self, key: str, parent: str, kind: Kind) -> None:
        expected = self._expected(key, parent)
        call = self.lab.prepare if kind is Kind.ACTIVE else self.lab.view
        if expected is AlreadyExists and key in self.unsure and self.rows[key][:2] == (kind, parent):
            # A process that was killed at once may not have written that its caller was answered: the same call is
            # then answered again, with the same device.
            with contextlib.suppress(AlreadyExists):
                call(key, parent)
            return
        if expected:
            with pytest.raises(expected):
                call(key, parent)
            return
        (mount,) = call(key, parent)
        self.unsure.add(key)
        assert ("ro" in mount.options) == (kind is Kind.VIEW)
        self.rows[key] = kind, parent, self.rows[parent][2] if parent else bytes(16)

    @rule(key=_KEYS, parent=st.one_of(st.just(""), _NAMES, _KEYS))
    def prepare(self, key: str, parent: str) -> None:
        self._make(key, parent, Kind.ACTIVE)

    @rule(key=_KEYS, parent=st.one_of(st.just(""), _NAMES))
    def view(self, key: str, parent: str) -> None:
        self._make(key, parent, Kind.VIEW)

    @rule(key=_KEYS)
    def write(self, key: str) -> None:
        if key in self.rows and self.rows[key][0] is Kind.ACTIVE:
            self.writes += 1
            mark = b"%016d" % self.writes
            fd = os.open(self.lab.mounts(key)[0].source, os.O_WRONLY)
            os.pwrite(fd, mark, _MARK)
            os.fsync(fd)
            os.close(fd)
            self.rows[key] = *self.rows[key][:2], mark

    @rule(key=_KEYS, name=_NAMES)
    def commit(self, key: str, name: str) -> None:
        expected: type[Exception] | None = None
        if key not in self.rows:
            expected = NotFound
        elif self.rows[key][0] is not Kind.ACTIVE:
            expected = WrongState
        elif name in self.rows:
            expected = AlreadyExists
        if expected:
            with pytest.raises(expected):
                self.lab.commit(name, key)
            return
        self.lab.commit(name, key)
        _, parent, mark = self.rows.pop(key)
        self.rows[name] = Kind.COMMITTED, parent, mark

    @rule(key=st.one_of(_KEYS, _NAMES))
    def remove(self, key: str) -> None:
        expected: type[Exception] | None = None
        if key not in self.rows:
            expected = NotFound
        elif any(parent == key for _, parent, _ in self.rows.values()):
            expected = WrongState
        if expected:
            with pytest.raises(expected):
                self.lab.remove(key)
            return
        self.lab.remove(key)
        del self.rows[key]

    @rule()
    def reap(self) -> None:
        self.lab.reap()

    @rule()
    def kill(self) -> None:
        self.lab.restart()

    @rule()
    def reboot(self) -> None:
        self.lab.reboot()

    @rule(parent=st.one_of(st.just(""), _NAMES))
    def many_at_once(self, parent: str) -> None:
        """The same key from several sides: one wins, and all are removed again."""
        if parent and parent not in self.rows:
            return
        outcomes: list[str] = []

        def one(number: int) -> None:
            try:
                self.lab.prepare(f"at once {number % 2}", parent)
                outcomes.append("made")
            except SnapshotterError as error:
                outcomes.append(type(error).__name__)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["AlreadyExists", "AlreadyExists", "made", "made"]
        for number in range(2):
            self.lab.remove(f"at once {number}")

    @invariant()
    def rows_agree(self) -> None:
        if hasattr(self, "lab"):
            found = {row.key: (row.kind, row.parent) for page in self.lab.node.snapshots.list([]) for row in page}
            assert found == {key: (kind, parent) for key, (kind, parent, _) in self.rows.items()}

    @rule(key=_KEYS)
    def read(self, key: str) -> None:
        if key in self.rows:
            with open(self.lab.mounts(key)[0].source, "rb", buffering=0) as opened:
                assert os.pread(opened.fileno(), 16, _MARK) == self.rows[key][2]


def run(model: type[Model], examples: int, steps: int) -> None:
    """So many lives of so many steps each."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        model,
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks,
                          database=None, derandomize=True, phases=(Phase.explicit, Phase.generate)),
    )  # fmt: skip


@pytest.mark.short
def test_a_few_lives() -> None:
    run(Model, 2, 25)


def test_many_lives() -> None:
    run(Model, int(os.environ.get("RUNVOL_LIVES", "5")), 40)
