"""doctor behind the calls: a node that has just started is soon asked again."""

from __future__ import annotations

import threading

import pytest

from runvol import doctor_watch
from runvol.diagnosis import Diagnosis, broken, good
from runvol.doctor_watch import DoctorWatch
from tests.until import until


def test_what_was_not_there_yet_is_no_trouble_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_watch, "_SECOND", 0.1)
    asked = threading.Event()

    def examine() -> list[Diagnosis]:
        if not asked.is_set():
            asked.set()
            return [broken("volumes.store-unreadable", "volumes", "x")]
        return [good("volumes.listed", "volumes", "x")]

    watch = DoctorWatch(examine, interval=3600.0, first=0.0)
    watch.start()
    try:
        until(lambda: watch._found.keys() == {("volumes.listed", "ok")})
        values = {one.name: one.samples[0].value for one in watch.collect()}
        assert values["runvol_doctor_interval_seconds"] == 3600
    finally:
        watch.stop()
