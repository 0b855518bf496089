"""What goes on behind calls is seen from other processes, with how far it is, and no longer than it lasts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import flocks
from tests.driver import Driver
from tests.until import until
from volumes import VolumeUnfinished, work
from volumes.jobs import Jobs, Progress


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


@contextlib.contextmanager
def held(place: Path, stem: str, items: list[dict[str, object]]) -> Iterator[Path]:
    """As a process that lives has it."""
    lock = flocks.take(str(place / f"{stem}.lock"), 1)
    assert lock is not None
    try:
        (place / f"{stem}.json").write_text(json.dumps({"items": items}))
        yield place / f"{stem}.json"
    finally:
        flocks.release(lock)


def test_a_dead_processs_work_is_nobodys(tmp_path):
    """A kill leaves the lock's file and what was being written, too; an older release has no lock."""
    (tmp_path / "work").mkdir()
    for name, content in (
        ("1.json", json.dumps({"pid": os.getpid(), "started": 1, "items": [{"what": "x"}]})),
        ("2.json", "{"),
        ("3.json", ""),
        ("4.json", json.dumps({"items": [{"what": "y"}]})),
        ("4.lock", ""),
        ("4.json.17-0a0a0a0a.new", "{"),
        ("5.lock", ""),
    ):
        (tmp_path / "work" / name).write_text(content)
    assert work.seen(str(tmp_path)) == []
    assert os.listdir(tmp_path / "work") == []
    assert work.seen("/nowhere") == []


def test_what_is_held_is_believed_and_left_whoever_holds_it(tmp_path):
    (tmp_path / "work").mkdir()
    with held(tmp_path / "work", "a", [{"what": "one"}]), held(tmp_path / "work", "b", [{"what": "two"}]) as damaged:
        (tmp_path / "work/a.json.17-0a0a0a0a.new").write_text("{")
        assert [item.what for item in work.seen(str(tmp_path))] == ["one", "two"]
        damaged.write_text("{")
        assert [item.what for item in work.seen(str(tmp_path))] == ["one"], "one bad file is one bad file"
        assert len(os.listdir(tmp_path / "work")) == 5
    assert work.seen(str(tmp_path)) == []
    assert os.listdir(tmp_path / "work") == []


_CONTAINER = """
import sys, time
from volumes import work
class Told: what, total, done = sys.argv[2], 10, 3
work.running.add(1, Told())
work.tell(sys.argv[1])
time.sleep(60)
"""


@pytest.mark.kernel
def test_processes_of_containers_see_each_others_work_and_not_their_numbers(tmp_path):
    """Each is process 1 of its own."""
    unshared = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", _CONTAINER]
    living = [subprocess.Popen([*unshared, str(tmp_path), name]) for name in ("one", "two")]
    try:
        for _look in range(2):
            until(lambda: {item.what for item in work.seen(str(tmp_path))} == {"one", "two"}, 20)
            assert len([name for name in os.listdir(tmp_path / "work") if name.endswith(".json")]) == 2
    finally:
        for one in living:
            one.kill()
            one.wait()
    until(lambda: not work.seen(str(tmp_path)) and not os.listdir(tmp_path / "work"))


def test_what_somebody_has_removed_is_told_again(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_EVERY", 0.02)
    # Not the process's own, which other tests tell of.
    mine = work._Running()
    monkeypatch.setattr(work, "running", mine)
    mine.add("k", Progress("snapshot s of v"))
    work.tell(str(tmp_path))
    for _time in range(2):
        until(lambda: work.seen(str(tmp_path)))
        shutil.rmtree(tmp_path / "work")
    until(lambda: work.seen(str(tmp_path)))
    mine.remove("k")
    until(lambda: not os.listdir(tmp_path / "work"))


def test_the_command_and_the_metrics_show_it(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Driver(tmp_path / "d", {"RUNVOL_CSI_METRICS": f"127.0.0.1:{port}"}) as driver:
        assert json.loads(driver.cli("volumes", "work", "--json").stdout)["items"] == []
        assert "nothing is under way" in driver.cli("volumes", "work").stdout
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        assert "runvol_jobs 0.0" in text
        place = driver.run / "work"
        place.mkdir(mode=0o700, exist_ok=True)
        with held(place, "other", [{"what": "snapshot s of v", "done": 1 << 20, "total": 4 << 20, "seconds": 2.5}]):
            (row,) = json.loads(driver.cli("volumes", "work", "--json").stdout)["items"]
            assert (row["work"], row["doneBytes"], row["percent"]) == ("snapshot s of v", 1 << 20, 25)
            assert "snapshot s of v" in driver.cli("volumes").stdout
