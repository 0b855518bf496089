"""What goes on behind calls is seen from other processes, with how far it is, and no longer than it lasts."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import urllib.request

import pytest

from tests.driver import Driver
from volumes import VolumeUnfinished, work
from volumes.jobs import Jobs, Progress


def until(call, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := call()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_work_is_seen_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_EVERY", 0.02)
    go, run_dir = threading.Event(), str(tmp_path)
    work.tell(run_dir)

    def copying(progress: Progress) -> None:
        progress.total = 400
        progress.add(100)
        go.wait(20)

    jobs = Jobs()
    with pytest.raises(VolumeUnfinished):
        jobs.finished("k", "snapshot s of v", copying, 0.1)
    (item,) = until(lambda: work.seen(run_dir))
    item = until(lambda: next((one for one in work.seen(run_dir) if one.done), None))
    assert (item.what, item.done, item.total, item.percent) == ("snapshot s of v", 100, 400, 25)
    go.set()
    until(lambda: not work.seen(run_dir))
    until(lambda: not os.listdir(tmp_path / "work"))


def test_a_dead_processs_work_is_nobodys(tmp_path):
    (tmp_path / "work").mkdir()
    written = {"pid": os.getpid(), "started": 1, "items": [{"what": "x"}]}
    for name, content in (("1.json", json.dumps(written)), ("2.json", "{"), ("3.json", "")):
        (tmp_path / "work" / name).write_text(content)
    assert work.seen(str(tmp_path)) == []
    assert not (tmp_path / "work/1.json").exists()
    assert work.seen("/nowhere") == []


def test_the_command_and_the_metrics_show_it(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Driver(tmp_path / "d", {"RUNVOL_CSI_METRICS": f"127.0.0.1:{port}"}) as driver:
        assert json.loads(driver.cli("volumes", "work", "--json").stdout) == []
        assert "nothing is under way" in driver.cli("volumes", "work").stdout
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        assert "runvol_work 0.0" in text
        place = driver.run / "work"
        place.mkdir(mode=0o700, exist_ok=True)
        mine = {"pid": os.getpid(), "started": work._started(os.getpid()),
                "items": [{"what": "snapshot s of v", "done": 1 << 20, "total": 4 << 20, "seconds": 2.5}]}  # fmt: skip
        (place / "other.json").write_text(json.dumps(mine))
        (row,) = json.loads(driver.cli("volumes", "work", "--json").stdout)
        assert (row["work"], row["done_bytes"], row["percent"]) == ("snapshot s of v", 1 << 20, 25)
        assert "snapshot s of v" in driver.cli("volumes").stdout
