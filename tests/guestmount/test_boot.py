"""The records of this boot: another one's are forgotten, an older release's are taken over, and who looks makes nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

from blockdev import flocks
from guestmount import Claims, boot


def test_another_boots_records_are_forgotten_and_this_ones_kept(tmp_path: Path) -> None:
    own = Path(boot.directory(str(tmp_path)))
    assert boot.forget_others(str(tmp_path)) == []
    for place in (own / "claims", own.parent / "0000-another" / "claims"):
        place.mkdir(parents=True)
        (place / "loop-1.json").write_text("{}")
    (said,) = boot.forget_others(str(tmp_path))
    assert "1 boot" in said and os.listdir(own.parent) == [own.name]
    assert boot.forget_others(str(tmp_path)) == []


def test_what_an_older_release_left_in_the_run_directory_is_taken_over(tmp_path: Path) -> None:
    run, records = tmp_path / "run", tmp_path / "records"
    (run / "claims").mkdir(parents=True)
    (run / "flexvolume/targets").mkdir(parents=True)
    (run / "claims/loop-1.json").write_text("old")
    (run / "claims/loop-2.json").write_text("old")
    (run / "flexvolume/targets/%2Fa").write_text("{}")
    (records / "claims").mkdir(parents=True)
    (records / "claims/loop-2.json").write_text("newer")
    os.utime(run / "claims/loop-2.json", (1, 1))
    for _ in range(2):
        boot.take_over(str(run), str(records))
        assert (records / "claims/loop-1.json").read_text() == "old"
        assert (records / "claims/loop-2.json").read_text() == "newer"
        assert (records / "flexvolume/targets/%2Fa").exists()
        assert not [name for _, _, files in os.walk(run) for name in files]


def test_what_an_older_release_did_after_a_downgrade_counts(tmp_path: Path) -> None:
    run, records = tmp_path / "run", tmp_path / "records"
    for place, text in ((records, "before"), (run, "after")):
        (place / "claims").mkdir(parents=True)
        (place / "claims/loop-1.json").write_text(text)
    os.utime(records / "claims/loop-1.json", (1, 1))
    boot.take_over(str(run), str(records))
    assert (records / "claims/loop-1.json").read_text() == "after"


def test_a_claim_that_an_older_release_works_on_is_left_to_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(boot, "_PATIENCE", 0.1)
    run, records = tmp_path / "run", tmp_path / "records"
    (run / "claims").mkdir(parents=True)
    (run / "locks").mkdir()
    (run / "claims/loop-1.json").write_text("old")
    held = flocks.take(str(run / "locks/loop-1"), 1)
    boot.take_over(str(run), str(records))
    assert (run / "claims/loop-1.json").exists() and not records.exists()
    flocks.release(held)
    boot.take_over(str(run), str(records))
    assert (records / "claims/loop-1.json").exists()


def test_who_only_looks_makes_nothing(tmp_path: Path) -> None:
    claims = Claims(str(tmp_path / "run"), boot.directory(str(tmp_path / "state")))
    assert claims.all() == [] and claims.peek("loop-1") is None
    claims.sweep()
    assert os.listdir(tmp_path) == []


def test_the_plugin_registers_anew_where_the_run_directory_was_emptied(tmp_path: Path) -> None:
    from guestmount import registration

    run = str(tmp_path / "run")
    with registration.opened(run) as alive:
        registration.begun(alive)
        assert registration.stands(alive, run) and registration.is_alive(run)
        os.unlink(os.path.join(run, os.listdir(run)[0]))
        assert not registration.stands(alive, run)
    started = time.monotonic()
    with registration.opened(run) as alive:
        registration.begun(alive)
        assert registration.is_alive(run)
    assert time.monotonic() - started < 5
