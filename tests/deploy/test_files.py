"""What an operator copies: containerd takes the drop-ins, and doctor finds itself in them."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from runvol import config, doctor_snapshots
from tests.kernel.__main__ import ROOT, programs
from volumes import parameters

DROP_INS = sorted((ROOT / "deploy/containerd").glob("*.toml"))
PASTED = sorted((ROOT / "deploy/containerd").glob("*.paste"))
CRI = '[plugins."io.containerd.grpc.v1.cri".containerd]'
# What a node has, and must keep.
THEIRS = """version = 2

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.local/pause:3.9"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/libexec/cni"

[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"

[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = true
"""


def _pieces(path: Path) -> list[str]:
    """What stands under each heading."""
    parts: list[str] = [""]
    for line in path.read_text().splitlines():
        if line.startswith(">>>"):
            parts += [""] if parts[-1].strip() else []
        else:
            parts[-1] += f"{line}\n"
    return [part for part in parts if part.strip()]


def _pasted(path: Path) -> str:
    """A node's file, with the pieces where their headings say: pieces without a table into the CRI plugin's."""
    text = THEIRS
    for piece in _pieces(path):
        if piece.lstrip().startswith("["):
            text += piece
        else:
            text = text.replace(f"{CRI}\n", f"{CRI}\n{piece}")
    return text


def _dump(main: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [programs() / "containerd", "-c", str(main), "config", "dump"], capture_output=True, text=True
    )


def _is_served(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    dumped = tomllib.loads(done.stdout)
    assert dumped["proxy_plugins"]["runvol"]["address"] == "/run/runvol/snapshotter.sock"
    assert "runvol" in done.stdout.replace("[proxy_plugins", "")


@pytest.mark.parametrize("path", DROP_INS, ids=lambda path: path.name)
def test_containerd_takes_the_drop_in(path: Path, tmp_path: Path) -> None:
    main = tmp_path / "config.toml"
    version = tomllib.loads(path.read_text())["version"]
    main.write_text(
        f'version = {version}\nroot = "{tmp_path}/root"\nstate = "{tmp_path}/state"\nimports = ["{path}"]\n'
    )
    _is_served(_dump(main))


def test_only_what_merges_can_be_imported() -> None:
    """containerd 1.x replaces whole tables by those of an import, and 2.x merges them."""
    assert [path.name for path in DROP_INS] == ["runvol-2.toml"]
    assert [path.name for path in PASTED] == ["runvol-1.6.toml.paste", "runvol-1.7.toml.paste"]


@pytest.mark.parametrize("path", PASTED, ids=lambda path: path.name)
def test_what_is_to_be_pasted_cannot_be_imported(path: Path, tmp_path: Path) -> None:
    """Neither as it is, nor under another name, nor without its first line."""
    text = path.read_text()
    for number, content in enumerate((text, text.split("\n", 1)[1])):
        with pytest.raises(tomllib.TOMLDecodeError):
            tomllib.loads(content)
        copy = tmp_path / f"copy{number}.toml"
        copy.write_text(content)
        main = tmp_path / "config.toml"
        main.write_text(f'version = 2\nimports = ["{copy}"]\n')
        assert _dump(main).returncode != 0


@pytest.mark.parametrize("path", PASTED, ids=lambda path: path.name)
def test_what_was_pasted_leaves_the_nodes_own_settings(path: Path, tmp_path: Path) -> None:
    """2.4 migrates the older versions' tables; what it prints has ours and theirs."""
    main = tmp_path / "config.toml"
    text = _pasted(path)
    main.write_text(f'root = "{tmp_path}/root"\nstate = "{tmp_path}/state"\n{text}')
    theirs, now = tomllib.loads(THEIRS), tomllib.loads(text)
    cri, was = (one["plugins"]["io.containerd.grpc.v1.cri"] for one in (now, theirs))
    assert {name: cri[name] for name in was if name != "containerd"} == {
        name: value for name, value in was.items() if name != "containerd"
    }
    assert cri["containerd"]["runtimes"]["runc"] == was["containerd"]["runtimes"]["runc"]
    done = _dump(main)
    _is_served(done)
    for kept in ("registry.local/pause:3.9", "/usr/libexec/cni", "SystemdCgroup = true"):
        assert kept in done.stdout


@pytest.mark.parametrize("path", [*DROP_INS, *PASTED], ids=lambda path: path.name)
def test_doctor_finds_the_runtimes_that_use_it(path: Path, tmp_path: Path) -> None:
    main = tmp_path / "config.toml"
    main.write_text(_pasted(path) if path in PASTED else path.read_text())
    loaded = config.load(file=None, flags={"paths.containerd_config": str(main)}, environment={})
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
    # Shared images need no setting of containerd's: the reference that they are known by is always sent.
    assert [one.state for one in found] == ["broken", "warning"]
    assert "'/run/other.sock'" in found[0].finding


def test_no_file_asks_for_labels_that_nothing_needs() -> None:
    for path in (*DROP_INS, *PASTED):
        assert "annotations" not in path.read_text()


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
           "csi.services", "nri.socket"}  # fmt: skip


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
