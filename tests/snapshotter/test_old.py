"""Stores of earlier releases are read, and go on."""

from __future__ import annotations

import json
from pathlib import Path

from snapshotter import backing
from snapshotter.model import Kind, State
from snapshotter.store import Store
from tests.snapshotter import old


def test_an_old_store_is_read_guarded_and_goes_on(tmp_path: Path) -> None:
    state = old.unpack(tmp_path)
    for _ in range(2):
        store = Store(str(state / "snapshots.db"))
        assert store.guard(1) == {}
        rows = {row.key: row for page in store.pages() for row in page}
        assert rows.keys() == {old.LOWER, old.UPPER, old.CONTAINER, old.VIEW, old.INTENT}
        assert (rows[old.UPPER].kind, rows[old.UPPER].parent) == (Kind.COMMITTED, old.LOWER)
        assert rows[old.INTENT].state is State.PREPARING
        assert list(store.doomed()) == [old.DOOMED]
        with store.transaction():
            assert store.new_device() > old.INTENDED
        store.close()
    described = backing.load(str(state))
    assert described is not None
    assert described.name == "oldpool"


def test_an_earlier_release_reads_what_describes_a_pool_that_it_could_have_made(tmp_path: Path) -> None:
    known = {"name", "identity", "kind", "data", "metadata", "metadata_bytes", "block", "group", "data_bytes"}
    it = backing.Description(name="p", identity="1" * 32, kind="device", data="/dev/a", metadata="/dev/b",
                             metadata_bytes=1 << 22, block=1 << 16, data_bytes=1 << 30)  # fmt: skip
    backing.save(str(tmp_path), it)
    assert set(json.loads((tmp_path / backing.FILE).read_bytes())) <= known
    assert backing.load(str(tmp_path)) == it
