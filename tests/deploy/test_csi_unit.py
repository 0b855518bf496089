"""The plugin under systemd: told when it serves and as long as it does, with the capabilities that its unit leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockdev import daemon
from tests.driver import POD, Driver, mount_capability
from tests.kernel.__main__ import ROOT
from tests.units import PROGRAM, confined, unit
from tests.until import until

UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
# Each gives the service mounts of its own, from which none of ours would reach kubelet.
OWN_MOUNTS = re.compile(
    r"(Private(Tmp|Devices|Mounts|IPC)|Protect\w+|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths|ExecPaths|NoExecPaths|"
    r"TemporaryFileSystem|BindPaths|BindReadOnlyPaths|RootDirectory|RootImage|MountFlags|DynamicUser)"
)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_understands_the_unit(path: Path, tmp_path: Path):
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed on this machine")
    # With a program that is there.
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    done = subprocess.run([tool, "verify", copy], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_names_its_program_and_is_never_given_up(path: Path):
    """No search along a PATH as root; the place is the one that docs/install.md puts it at."""
    read = unit(path.name)
    assert read["Service"]["ExecStart"].split()[0] == PROGRAM
    assert f"ln -s /opt/runvol/bin/runvol {PROGRAM}" in (ROOT / "docs/install.md").read_text()
    assert read["Unit"]["StartLimitIntervalSec"] == "0"
    assert read["Service"]["Restart"] == "always"


@pytest.mark.parametrize(("name", "most"), [("csi", 7.7), ("nri", 2.0), ("snapshotter", 4.7)])
def test_how_exposed_a_unit_is(name: str, most: float):
    """What docs/install.md says of each, as systemd 252 counts."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed on this machine")
    file = ROOT / f"deploy/systemd/runvol-{name}.service"
    done = subprocess.run(
        [tool, "security", "--offline=true", file], capture_output=True, text=True, timeout=60, check=False
    )
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= most + 0.3


@pytest.mark.parametrize("name", ["runvol-csi.service", "runvol-snapshotter.service"])
def test_the_unit_leaves_mounts_as_they_are(name: str):
    service = unit(name)["Service"]
    assert [key for key in service if OWN_MOUNTS.fullmatch(key)] == []


def test_the_capabilities_of_the_unit_are_enough(tmp_path: Path):
    with Driver(prefix=confined("runvol-csi.service")) as driver:
        pod = POD.format(0)
        volume = driver.create("one")
        capability = mount_capability(group="1234")
        driver.stage(volume, capability)
        target = Path(driver.publish(volume, pod, runtime="runc", capability=capability))
        (target / "f").write_text("x")
        os.chown(target / "f", 12, 13)
        driver.unpublish(volume, pod)
        driver.unstage(volume)
        snapshot = driver.client.CreateSnapshot(name="s", source_volume_id=volume.volume_id).snapshot
        driver.client.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
        driver.delete(volume)


def test_systemd_hears_that_it_serves_and_as_long_as_it_does(tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(20)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        driver = Driver(environment=environment)
        driver.start()
        assert heard.recv(100) == b"READY=1"
        assert {heard.recv(100) for _ in range(5)} == {b"WATCHDOG=1"}
        # Nobody gets an answer any more: systemd hears nothing, and starts it anew.
        driver.socket.unlink()
        until = time.monotonic() + 10
        heard.settimeout(2)
        with pytest.raises(TimeoutError):
            while time.monotonic() < until:
                heard.recv(100)
        driver.stop()
        assert heard.recv(100) == b"STOPPING=1"
        driver.remove()


def probe(run: Path) -> list[str]:
    """What kubelet runs in the chart's container, for the plugin of this run directory."""
    template = (ROOT / "deploy/helm/runvol/templates/node.yaml").read_text()
    command = template.partition('define "runvol.lives" -}}\n')[2].partition("\n")[0]
    path = '{{ printf "%s/alive" . | quote }}'
    words = json.loads(command.replace(path, json.dumps(f"{run}/alive")))
    return [sys.executable, *words[1:]]


def lives(run: Path) -> bool:
    return subprocess.run(probe(run), capture_output=True, timeout=20, check=False).returncode == 0


def test_a_probe_sees_whether_the_plugin_lives_and_nobody_keeps_it_from_that(tmp_path: Path):
    with Driver(environment={"WATCHDOG_USEC": "400000"}) as driver:
        sign = Path(daemon.sign_of(str(driver.run)))
        until(sign.exists, 15)
        assert lives(driver.run)
        assert stat.S_IMODE(sign.stat().st_mode) == 0o600
        minutes_ago = time.time() - 300
        os.utime(sign, (minutes_ago, minutes_ago))
        until(lambda: lives(driver.run), 15)
        sign.unlink()
        until(sign.exists, 15)
        # Nobody gets an answer any more.
        driver.socket.unlink()
        time.sleep(2)
        os.utime(sign, (minutes_ago, minutes_ago))
        time.sleep(2)
        assert not lives(driver.run)
        driver.stop()
        # What the last plugin has said is not said of the next.
        os.utime(sign)
        driver.start()
        until(lambda: lives(driver.run), 15)
        driver.process.kill()
        driver.process.wait()
        os.utime(sign, (time.time() + 300, time.time() + 300))
        assert not lives(driver.run), "a time that is still to come says nothing"
        sign.unlink()
        assert not lives(driver.run)


def test_a_process_whose_work_was_not_seen_once_is_looked_at_again(tmp_path: Path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(daemon, "_EVERY", 0.02)
    told: list[str] = []
    monkeypatch.setattr(daemon, "notify", told.append)

    def alive() -> bool:
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError("can't start new thread")
        return True

    daemon.watched(alive, str(tmp_path / "run/alive"))
    until(lambda: len(told) > 3, 15)
    assert (tmp_path / "run/alive").exists()
