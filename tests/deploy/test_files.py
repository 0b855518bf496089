"""What an operator copies: containerd takes the drop-ins, and doctor finds itself in them."""

from __future__ import annotations

import configparser
import os
import subprocess
import tomllib
from pathlib import Path

import pytest

from runvol import config, doctor_snapshots
from tests.kernel.__main__ import ROOT, programs

DROP_INS = sorted((ROOT / "deploy/containerd").glob("*.toml"))


@pytest.mark.parametrize("path", DROP_INS, ids=lambda path: path.name)
def test_containerd_takes_the_drop_in(path: Path, tmp_path: Path) -> None:
    """2.4 migrates the older versions' tables; what it prints has ours."""
    main = tmp_path / "config.toml"
    version = tomllib.loads(path.read_text())["version"]
    main.write_text(
        f'version = {version}\nroot = "{tmp_path}/root"\nstate = "{tmp_path}/state"\nimports = ["{path}"]\n'
    )
    done = subprocess.run(
        [programs() / "containerd", "-c", str(main), "config", "dump"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    dumped = tomllib.loads(done.stdout)
    assert dumped["proxy_plugins"]["runvol"]["address"] == "/run/runvol/snapshotter.sock"
    assert "runvol" in done.stdout.replace("[proxy_plugins", "")


@pytest.mark.parametrize("path", DROP_INS, ids=lambda path: path.name)
def test_doctor_finds_the_runtimes_that_use_it(path: Path) -> None:
    loaded = config.load(file=None, flags={"paths.containerd_config": str(path)}, environment={})
    found = list(doctor_snapshots._containerd(loaded))
    assert [one.state for one in found] == ["ok"], found
    assert ("every runtime" if "1.6" in path.name else "kata") in found[0].finding


def test_doctor_names_what_containerd_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    flags = {"paths.containerd_config": str(file), "snapshotter.images": str(tmp_path)}
    loaded = config.load(file=None, flags=flags, environment={})
    file.write_text("version = 3\n")
    assert "no [proxy_plugins.runvol]" in next(iter(doctor_snapshots._containerd(loaded))).finding
    file.write_text('version = 3\n[proxy_plugins.runvol]\naddress = "/run/other.sock"\n')
    found = list(doctor_snapshots._containerd(loaded))
    assert [one.state for one in found] == ["broken", "warning", "broken"]
    assert "'/run/other.sock'" in found[0].finding
    assert "disable_snapshot_annotations" in found[2].finding


def test_the_unit_starts_before_containerd_and_says_when_it_listens() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "deploy/systemd/runvol-snapshotter.service")
    assert unit["Unit"]["Before"] == "containerd.service"
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["ExecStart"].endswith("runvol snapshotter")
    assert os.access(ROOT / "deploy/systemd/runvol-snapshotter.service", os.R_OK)
