"""One row of the store that is damaged costs its own snapshot, and nothing else: not the start, not List, no copy."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from snapshotter import metrics
from snapshotter.errors import WrongState
from snapshotter.store import STORE
from tests.kernel.inside.lab import Lab, mounted, soon
from tests.kernel.inside.test_past import _follow, _lose, _repaired, _secret, _write

DAMAGED = {
    "its kind is none": "UPDATE snapshots SET kind = 9 WHERE key = 'b'",
    "its state is none": "UPDATE snapshots SET state = 9 WHERE key = 'b'",
    "its labels end early": "UPDATE snapshots SET labels = '{\"a' WHERE key = 'b'",
    "its labels are a list": "UPDATE snapshots SET labels = '[1]' WHERE key = 'b'",
    "its labels have no end": "UPDATE snapshots SET labels = replace(hex(zeroblob(20000)), '00', '[') WHERE key = 'b'",
    "its device is none": "UPDATE snapshots SET device = 99999999999 WHERE key = 'b'",
    "its size is none": "UPDATE snapshots SET size = -5 WHERE key = 'b'",
}
# What is nobody's may stay, as long as it stops nothing.
LEFT_OVER = (
    "UPDATE facts SET value = 'none' WHERE name LIKE 'empty %'",
    "INSERT OR REPLACE INTO facts VALUES ('empty none', '1 1')",
    "INSERT OR REPLACE INTO facts VALUES ('seal none', '1 1')",
    "UPDATE bases SET device = 88888888",
    "INSERT INTO doomed VALUES (-5, 1, -7), (99999999999, 1, 77)",
    "INSERT INTO quarantined VALUES (99999999999, 1)",
)


def _damage(lab: Lab, *statements: str) -> None:
    lab.stop()
    with contextlib.closing(sqlite3.connect(f"{lab.state}/{STORE}")) as store, store:
        for statement in statements:
            store.execute(statement)


@pytest.mark.parametrize("how", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_row_stops_its_own_snapshot_alone(lab: Lab, how: str, caplog: pytest.LogCaptureFixture) -> None:
    lab.layer("layer", files={"f": b"kept"})
    for key in "abc":
        with mounted(lab.prepare(key, "layer")) as root:
            (root / "mine").write_bytes(key.encode())
    device = lab.stat("b").device
    _damage(lab, how)
    lab.start()
    assert "a row of the store is passed over" in caplog.messages
    assert set(lab.names()) == {"a", "c", "layer"}
    with mounted(lab.mounts("a")) as root:
        assert (root / "mine").read_bytes() == b"a"
    for call in (lab.stat, lab.mounts, lab.prepare, lab.usage):
        with pytest.raises(WrongState, match="'b' is damaged .*remove the snapshot"):
            call("b")
    assert _gauges(lab)["runvol_store_rows_damaged"] == 1
    lab.prepare("d", "layer")
    lab.usage("d")
    lab.remove("c")
    assert (_gauges(lab)["runvol_devices_doomed"], len(lab.node.store.doomed())) == (1, 1)
    lab.reap()
    assert not lab.node.store.doomed()
    # What nobody can say to be its own is kept, and named.
    lab.remove("b")
    lab.reap()
    assert device in lab.ids()
    assert _gauges(lab)["runvol_store_rows_damaged"] == 0
    with mounted(lab.prepare("b", "layer")) as root:
        assert not (root / "mine").exists()
    lab.restart()
    assert device in lab.node.store.quarantined()
    assert _gauges(lab)["runvol_devices_quarantined"] == len(lab.node.store.quarantined())


def _gauges(lab: Lab) -> dict[str, float]:
    return {one.name: one.samples[0].value for one in metrics._Store(lab.node).collect() if one.samples}


def test_a_store_with_a_damaged_row_is_copied_without_it(lab: Lab) -> None:
    for key in "ab":
        _write(lab, key, f"of {key}")
    device = lab.stat("b").device
    _damage(lab, DAMAGED["its kind is none"])
    lab.start()
    # More often than the pool has places for a copy.
    for turn in range(5):
        lab.prepare(f"more {turn}")
        _follow(lab)
    _lose(lab)
    lab.start()
    report = _repaired(lab)
    assert {"a", "more 0", "more 4"} <= set(report.restored)
    assert "b" not in report.restored
    assert report.quarantined == [device]
    assert _secret(lab, "a") == "of a"


def test_what_stands_on_a_damaged_layer_goes_on(lab: Lab) -> None:
    lab.layer("low", files={"f": b"low"})
    lab.layer("high", "low", files={"g": b"high"})
    lab.prepare("a", "high")
    _damage(lab, DAMAGED["its kind is none"].replace("'b'", "'low'"))
    lab.start()
    with mounted(lab.mounts("a")) as root:
        assert ((root / "f").read_bytes(), (root / "g").read_bytes()) == (b"low", b"high")
    lab.usage("a")
    lab.usage("high")
    lab.prepare("larger", "high", size=str(64 << 20))
    lab.node.snapshots.counts.look(soon())
    with pytest.raises(WrongState, match="'low' is damaged"):
        lab.prepare("child", "low")
    with pytest.raises(WrongState, match="has children"):
        lab.remove("low")


def test_what_else_is_damaged_stops_nothing(lab: Lab) -> None:
    lab.prepare("a")
    lab.usage("a")
    _damage(lab, *LEFT_OVER)
    lab.start()
    assert lab.node.seals is None
    lab.prepare("b")
    lab.usage("b")
    lab.usage("a")
    lab.node.bases._looked = -1e9
    lab.node.bases.drop_unused(lambda _base: None)
    lab.remove("a")
    lab.reap()
    assert lab.node.store.doomed() == {}
