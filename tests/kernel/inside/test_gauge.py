"""The filesystem that shows the pool's fill: it follows use and growth, survives kills, and is nobody else's place."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import loops, mountinfo
from blockdev.errors import BlockdevError
from snapshotter.errors import PoolFull, SnapshotterError, Unavailable
from snapshotter.gauge import Fill, Gauge, fill
from snapshotter.node import Node
from tests.kernel.inside.lab import MIB, Lab, in_child
from tests.kernel.inside.server import Server

TIB = 1 << 40


@pytest.fixture
def gauge(tmp_path: Path) -> Iterator[Gauge]:
    (tmp_path / "state").mkdir(exist_ok=True)
    one = Gauge(str(tmp_path / "gauge"), str(tmp_path / "state"))
    yield one
    one.be_absent()
    assert not one.places()
    assert not Path(one.file).exists()
    assert not os.path.exists(one.path)


def _seen(path: str | Path) -> Fill:
    """As kubelet looks."""
    facts = os.statvfs(path)
    return Fill(total=facts.f_blocks * facts.f_frsize, available=facts.f_bavail * facts.f_frsize)


def _devices(gauge: Gauge) -> list[str]:
    """Loop devices on its files, of earlier ones too."""
    return [one for one in loops.bound()
            if gauge.file in Path(f"/sys/block/{os.path.basename(one)}/loop/backing_file").read_text()]  # fmt: skip


def _near(seen: Fill, wanted: Fill) -> bool:
    grain = max(64 << 10, wanted.total // 1000)
    size = wanted.total * 0.98 - 2 * MIB <= seen.total <= wanted.total
    return size and abs(seen.available - min(wanted.available, seen.total)) <= max(grain, wanted.total // 40)


@pytest.mark.short
def test_it_shows_what_it_is_told_again_and_again(gauge: Gauge) -> None:
    for total, available in ((1 << 30, 1 << 30), (1 << 30, 300 << 20), (1 << 30, 0), (1 << 30, 500 << 20), (3 << 30, 1 << 30),
                             (256 << 20, 100 << 20)):  # fmt: skip
        wanted = Fill(total=total, available=available)
        gauge.show(wanted)
        gauge.show(wanted)
        seen = _seen(gauge.path)
        assert _near(seen, wanted), (seen, wanted)
        assert gauge.shown() == seen
        if not available:
            assert seen.available == 0
    facts = os.statvfs(gauge.path)
    assert facts.f_favail > 0.9 * facts.f_files


def test_a_large_one_costs_little_of_the_disk_and_of_time(gauge: Gauge) -> None:
    began = time.monotonic()
    for wanted in (
        Fill(total=6 * TIB, available=TIB),
        Fill(total=6 * TIB, available=0),
        Fill(total=6 * TIB, available=5 * TIB),
    ):
        gauge.show(wanted)
        os.sync()
        assert _near(_seen(gauge.path), wanted)
        assert _seen(gauge.path).available or not wanted.available
        spent = os.stat(gauge.file).st_blocks * 512
        assert spent < 24 * MIB
    assert time.monotonic() - began < 60


def test_it_is_roots_alone_and_nothing_runs_from_it(gauge: Gauge) -> None:
    gauge.show(Fill(total=1 << 30, available=1 << 29))
    (top,) = [one for one in mountinfo.table() if one.target == gauge.path]
    assert {"nosuid", "nodev", "noexec"} <= set(top.options)
    for name in os.listdir(gauge.path):
        facts = os.stat(f"{gauge.path}/{name}")
        assert facts.st_uid == 0
        assert not facts.st_mode & 0o077
    assert not os.stat(gauge.path).st_mode & 0o022
    assert not os.stat(gauge.file).st_mode & 0o077


def test_what_somebody_does_to_it_is_put_right(gauge: Gauge) -> None:
    wanted = Fill(total=1 << 30, available=1 << 29)

    def unmounted() -> None:
        subprocess.run(["umount", gauge.path], check=True)

    def written() -> None:
        Path(gauge.path, "stray").write_bytes(bytes(64 * MIB))

    def emptied() -> None:
        for name in os.listdir(gauge.path):
            if name.startswith("ballast"):
                os.unlink(f"{gauge.path}/{name}")

    def read_only() -> None:
        subprocess.run(["mount", "-o", "remount,ro", gauge.path], check=True)

    def covered() -> None:
        subprocess.run(["mount", "--bind", gauge.path, gauge.path], check=True)

    def unlinked() -> None:
        os.unlink(gauge.file)

    def replaced(make: Callable[[str], object]) -> Callable[[], None]:
        def harm() -> None:
            emptied()
            make(f"{gauge.path}/ballast.0")

        return harm

    def fixed() -> None:
        subprocess.run(["chattr", "+i", f"{gauge.path}/ballast.0"], check=True)

    others = (os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path))
    for harm in (unmounted, written, emptied, read_only, covered, unlinked, fixed, *map(replaced, others)):
        gauge.show(wanted)
        harm()
        gauge.show(Fill(total=1 << 30, available=1 << 28))
        gauge.show(wanted)
        assert _near(_seen(gauge.path), wanted), harm
    assert len(_devices(gauge)) == 1


@pytest.mark.short
def test_another_ones_place_is_refused_and_left_alone(gauge: Gauge, tmp_path: Path) -> None:
    wanted = Fill(total=1 << 30, available=1 << 29)
    Path(gauge.path).mkdir()
    Path(gauge.path, "mine").write_text("x")
    for _ in range(2):
        with pytest.raises(Unavailable, match="takes a directory with nothing in it"):
            gauge.show(wanted)
    assert os.listdir(gauge.path) == ["mine"]
    os.unlink(f"{gauge.path}/mine")
    subprocess.run(["mount", "-t", "tmpfs", "none", gauge.path], check=True)
    with pytest.raises(Unavailable, match="something else is mounted there"):
        gauge.show(wanted)
    gauge.be_absent()
    assert os.path.ismount(gauge.path)
    subprocess.run(["umount", gauge.path], check=True)
    gauge.show(wanted)
    # Over it, too.
    subprocess.run(["mount", "-t", "tmpfs", "none", gauge.path], check=True)
    with pytest.raises(Unavailable, match="something else is mounted there"):
        gauge.show(wanted)
    subprocess.run(["umount", gauge.path], check=True)
    gauge.show(wanted)
    assert _near(_seen(gauge.path), wanted)


def test_a_full_state_disk_is_told_and_once_there_is_room_it_goes_on(tmp_path: Path) -> None:
    state, wanted = tmp_path / "small", Fill(total=4 << 30, available=1 << 30)
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", state], check=True)
    gauge, filler = Gauge(str(tmp_path / "gauge"), str(state)), state / "filler"
    try:
        gauge.show(wanted)
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as opened:
            while opened.write(bytes(1 << 16)):
                pass
        for size in (4 << 30, 64 << 30):
            # What it has no room to write down the kernel may still hold.
            for available in (0, size // 2):
                with contextlib.suppress(SnapshotterError, BlockdevError, OSError):
                    gauge.show(Fill(total=size, available=available))
                    os.sync()
        with pytest.raises((SnapshotterError, BlockdevError, OSError)):
            gauge.show(Fill(total=2 << 40, available=0))
        filler.unlink()
        gauge.show(wanted)
        os.sync()
        gauge.show(wanted)
        assert _near(_seen(gauge.path), wanted)
        assert list(gauge.places()) == [gauge.path]
        assert len(_devices(gauge)) == 1
    finally:
        gauge.be_absent()
        subprocess.run(["umount", "-l", state], check=True)


def test_a_changed_setting_moves_it(gauge: Gauge, tmp_path: Path) -> None:
    wanted = Fill(total=1 << 30, available=1 << 29)
    other = Gauge(str(tmp_path / "other"), str(tmp_path / "state"))
    other.show(wanted)
    gauge.show(wanted)
    assert list(gauge.places()) == [gauge.path]
    os.rmdir(other.path)


@pytest.mark.short
def test_killed_at_any_moment_the_next_one_goes_on(gauge: Gauge) -> None:
    chance = random.Random(5)
    for number in range(12):
        wanted = Fill(total=(1 + number % 3) << 30, available=chance.randrange(1 << 30))
        pid = os.fork()
        if pid == 0:
            try:
                gauge.show(wanted)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        gauge.show(wanted)
        assert _near(_seen(gauge.path), wanted)
        assert list(gauge.places()) == [gauge.path]
        assert len([one for one in mountinfo.table() if one.target == gauge.path]) == 1
    assert len(_devices(gauge)) == 1
    assert in_child(lambda: gauge.show(wanted)) == 0


def test_after_a_reboot_it_is_there_before_the_pool(gauge: Gauge) -> None:
    gauge.be_there()
    assert not gauge.is_mounted()
    gauge.show(Fill(total=1 << 30, available=1 << 29))
    subprocess.run(["umount", gauge.path], check=True)
    gauge.be_there()
    gauge.be_there()
    assert gauge.is_mounted()
    assert _seen(gauge.path).total > 1000 * MIB


def _diagnosis(server: Server, place: Path) -> tuple[str, str]:
    found = {one["subject"]: one for one in json.loads(server.runvol("doctor", "--json", ok=(0, 1, 3)))["items"]}
    return found["gauge"]["state"], found["gauge"]["finding"]


def _follows(server: Server, gauge: Path, seconds: float = 12) -> Fill:
    """What is shown, once it is what the pool has."""
    until = time.monotonic() + seconds
    while True:
        pool = server.pool()
        total, used = int(str(pool["dataTotalBytes"])), int(str(pool["dataUsedBytes"]))
        kept = int(str(pool["metadataTotalBytes"]))
        free = kept - int(str(pool["metadataUsedBytes"])) - (reserve := min(256 * 4096, kept // 8))
        share = min(0.97 - used / total, free / (kept - reserve))
        wanted = Fill(total=total, available=max(0, int(total * share)))
        if os.path.ismount(gauge) and _near(seen := _seen(gauge), wanted):
            return seen
        assert time.monotonic() < until, (wanted, os.path.ismount(gauge) and _seen(gauge), server.said())
        time.sleep(0.2)


def test_the_service_shows_its_pool_through_use_growth_restart_and_kill(tmp_path: Path) -> None:
    from tests.kernel.inside.test_service import Client

    place = tmp_path / "state" / "gauge"
    with Server(tmp_path, data=512 * MIB, size=256 * MIB, RUNVOL_SNAPSHOTTER_GAUGE="auto",
                RUNVOL_POOL_AUTOEXTEND_THRESHOLD="100") as server:  # fmt: skip
        before = _follows(server, place)
        mount = Client(server).prepare("a").mounts[0]
        subprocess.run(["dd", "if=/dev/urandom", f"of={mount.source}", "bs=1M", "count=200", "oflag=direct"], check=True,
                       capture_output=True)  # fmt: skip
        after = _follows(server, place)
        assert before.available - after.available > 140 * MIB
        server.kill()
        assert _seen(place) == after
        device = os.stat(place).st_dev
        server.start()
        _follows(server, place)
        assert os.stat(place).st_dev == device
        server.runvol("pool", "extend", "--by", str(256 * MIB))
        assert _follows(server, place).available > after.available + 240 * MIB
        assert _diagnosis(server, place)[0] == "ok"
        refusal = server.runvol("pool", "gauge", "--remove", ok=(1,))
        assert refusal == ""
        server.stop()
        assert os.path.ismount(place)
        shown = json.loads(server.runvol("pool", "gauge", "--json"))["items"][0]
        assert shown["availableBytes"] == _seen(place).available
        for _ in range(2):
            server.runvol("pool", "gauge", "--remove")
            assert not place.exists()
        state, said = _diagnosis(server, place)
        assert state == "warning"
        assert "the gauge is not mounted on" in said
        server.start()
        _follows(server, place)
        server.stop()
        server.environment["RUNVOL_SNAPSHOTTER_GAUGE"] = ""
        server.start()
        until = time.monotonic() + 10
        while place.exists():
            assert time.monotonic() < until, server.said()
            time.sleep(0.1)
        assert not (tmp_path / "state" / "gauge.img").exists()


def test_a_gauge_that_is_frozen_for_a_backup_holds_nobody_up_and_follows_afterwards(tmp_path: Path) -> None:
    from tests.kernel.inside.test_service import Client

    place = tmp_path / "state" / "gauge"
    with Server(tmp_path, data=512 * MIB, size=256 * MIB, RUNVOL_SNAPSHOTTER_GAUGE="auto") as server:
        before = _follows(server, place)
        client = Client(server)
        subprocess.run(["fsfreeze", "--freeze", str(place)], check=True)
        try:
            mount = client.prepare("a").mounts[0]
            subprocess.run(["dd", "if=/dev/urandom", f"of={mount.source}", "bs=1M", "count=200", "oflag=direct"],
                           check=True, capture_output=True)  # fmt: skip
            began = time.monotonic()
            while time.monotonic() < began + 7:  # longer than it waits between two looks at the pool
                at = time.monotonic()
                client.prepare(f"a{at}")
                server.pool()
                assert time.monotonic() - at < 3
                time.sleep(0.5)
            assert _diagnosis(server, place)[1]
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", str(place)], check=True)
        assert before.available - _follows(server, place, 20).available > 140 * MIB


def test_nothing_is_left_when_new_snapshots_are_refused_and_before(tmp_path: Path) -> None:
    lab = Lab(tmp_path, data=128 * MIB, size=32 * MIB)
    try:
        assert _full(lab.node).available > 0.9 * 124 * MIB
        shown: list[float] = []
        with pytest.raises(PoolFull):
            for number in range(20):
                (mount,) = lab.prepare(f"a{number}")
                for at in range(3):
                    with open(mount.source, "r+b", buffering=0) as device:
                        os.pwrite(device.fileno(), os.urandom(3 * MIB), (8 + 4 * at) * MIB)
                        os.fsync(device.fileno())
                    now = _full(lab.node)
                    shown.append(now.available / now.total)
        assert shown[-1] == 0
        # kubelet's imagefs.available<15 % has been there before that.
        assert any(0 < one < 0.15 for one in shown), shown
        for number in range(20):
            if f"a{number}" in lab:
                lab.remove(f"a{number}")
        lab.reap()
        assert _full(lab.node).available > 0.8 * 124 * MIB
    finally:
        lab.destroy()


def _full(node: Node) -> Fill:
    return fill(node.pool.status(), node.pool.block_bytes(), node.pool.limits.data_reserve)
