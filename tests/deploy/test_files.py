"""What an operator copies: the unit, and what the chart takes."""

from __future__ import annotations

import configparser
import json
import os
from pathlib import Path
from typing import Any

from runvol import config
from tests.kernel.__main__ import ROOT
from volumes import parameters


def test_the_unit_starts_before_containerd_and_says_when_it_listens() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "deploy/systemd/runvol-snapshotter.service")
    assert unit["Unit"]["Before"] == "containerd.service"
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["ExecStart"].endswith("runvol snapshotter")
    assert os.access(ROOT / "deploy/systemd/runvol-snapshotter.service", os.R_OK)


def _schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "deploy/helm/runvol/values.schema.json").read_text())
    return found["properties"]


# Settings that the chart has values for, or arguments, by which a node's pod fits its node.
_CHARTS = {"node.id", "node.roots", "paths.state_dir", "paths.run_dir", "paths.host_root", "detect.kubeconfig",
           "detect.kubelet", "detect.kubelet_ca", "csi.endpoint", "csi.nfs_endpoint", "csi.startup_taint", "csi.metrics",
           "csi.services", "nri.socket", "nri.metrics"}  # fmt: skip


def test_the_chart_takes_the_settings_that_there_are() -> None:
    """A wrong one is refused by Helm, and not by each node after the upgrade."""
    known = {
        f"{section}.{key}": kind
        for section, keys in _schema()["config"]["properties"].items()
        for key, kind in keys["properties"].items()
    }
    wanted = {key for key in config.TABLE if key.split(".")[0] not in ("snapshotter", "pool")}
    assert known.keys() == wanted - _CHARTS
    for key, kind in known.items():
        default = config.TABLE[key].default
        if "enum" in kind:
            assert default in kind["enum"]
        elif isinstance(default, tuple):
            assert kind["$ref"].endswith("/texts")
        else:
            assert kind["type"] == {int: "integer", str: "string"}[type(default)], key


def test_the_chart_takes_the_parameters_that_there_are() -> None:
    known = _schema()["storageClasses"]["items"]["properties"]["parameters"]["properties"]
    names = [name for one in parameters.TABLE for name in (one.key, *one.aliases)]
    assert known.keys() == {name for name in names if "/" not in name}


def test_a_switch_may_be_written_as_toml_has_it(tmp_path: Path) -> None:
    file = tmp_path / "runvol.toml"
    file.write_text("[paths]\nstate_dir_mounted = true\n")
    assert config.load(file=str(file), environment={}).text("paths.state_dir_mounted") == "true"
