"""`runvol doctor` about root filesystems: what a newcomer lacks, and what containerd's file has to say."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from runvol import config, doctor_proxy_plugin, doctor_snapshots, pool_absence
from runvol.cli import main
from runvol.config import Config
from runvol.containerd_wish import machine
from runvol.diagnosis import Diagnosis

OTHER = "linux/s390x"
ENTRY = '[proxy_plugins.runvol]\ntype = "snapshot"\naddress = "/run/runvol/snapshotter.sock"\n'
KATA = ('[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
        'snapshotter = "runvol"\n')  # fmt: skip


def loaded(tmp_path: Path, **more: object) -> Config:
    flags = {"paths.containerd_config": str(tmp_path / "config.toml"), "snapshotter.state_dir": str(tmp_path / "state"),
             "cri.endpoint": f"unix://{tmp_path}/none.sock"} | more  # fmt: skip
    return config.load(file=None, flags=flags, environment={})


def told(found: list[Diagnosis]) -> str:
    return "\n".join(f"{one.state} {one.subject}: {one.finding}; {one.fix}" for one in found)


def unpack(*entries: tuple[str, str]) -> str:
    return "".join(
        f'[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nplatform = "{platform}"\nsnapshotter = "{name}"\n'
        for platform, name in entries
    )


def test_who_does_without_it_is_told_of_it_and_lacks_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pool_absence, "installed", lambda program: "" if program == "thin_ls" else "/usr/sbin/x")
    found = list(doctor_snapshots.examine(loaded(tmp_path)))
    assert {one.state for one in found} == {"ok"}
    said = told(found)
    assert "`runvol pool init` makes one" in said
    assert "thin_ls: is not installed: no pool can be served; first install the package thin-provisioning-tools" in said
    assert "thin_check" not in said
    assert "`runvol snapshotter containerd-config`" in said


def test_what_containerd_waits_for_is_broken(tmp_path: Path, monkeypatch) -> None:
    """It has an entry, and there is no pool: no container starts on it."""
    monkeypatch.setattr(pool_absence, "installed", lambda _program: "")
    (tmp_path / "config.toml").write_text(f"version = 3\n{ENTRY}")
    said = told(list(doctor_snapshots.examine(loaded(tmp_path))))
    assert "broken pool: none is described in" in said
    assert "broken thin_check: is not installed" in said
    assert "broken debugfs: is not installed: root filesystems cannot be made; install the package e2fsprogs" in said
    assert "mkfs.xfs" not in said
    assert "warning runtimes on it: none has snapshotter = 'runvol' in" in said


def test_only_what_the_filesystem_needs_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pool_absence, "installed", lambda _program: "")
    said = told(list(doctor_snapshots.examine(loaded(tmp_path, **{"snapshotter.fstype": "xfs"}))))
    assert "mkfs.xfs: is not installed: root filesystems cannot be made; first install the package xfsprogs" in said
    assert "debugfs" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version = 3\n", "has no [proxy_plugins.runvol]"),
        (f"version = 3\n{ENTRY.replace('/run/runvol', '/run/other')}{KATA}", "is '/run/other/snapshotter.sock' in"),
        (f"version = 3\n{ENTRY}", "none has snapshotter = 'runvol'"),
        (f"version = 3\n{ENTRY}{KATA}", "has no unpack_config for runvol"),
        (f"version = 3\n{ENTRY}{KATA}{unpack(('linux', 'overlayfs'))}", "the unpack_config of runvol is missing"),
        (f"version = 3\n{ENTRY}{KATA}{unpack((OTHER, 'runvol'), (OTHER, 'overlayfs'))}",
         f"is for '{OTHER}', and this machine is {machine()}"),
        (f"version = 3\n{ENTRY}{KATA}{unpack((machine(), 'runvol'), (OTHER, 'overlayfs'))}",
         f"has no entry for {machine()} but runvol's"),
        (f'version = 3\n{ENTRY}{KATA}[plugins."io.containerd.cri.v1.images".runtime_platforms.kata]\n'
         f'platform = "{OTHER}"\n', f"runtime_platforms.kata.platform is '{OTHER}', and this machine is {machine()}"),
        (f'version = 3\n{ENTRY}{KATA}[plugins."io.containerd.cri.v1.images"]\ndiscard_unpacked_layers = true\n',
         "discard_unpacked_layers is true"),
        ("version = [\n", "is no TOML"),
        ('version = 3\nimports = ["none.toml"]\n', "which does not exist: containerd does not start with it"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_containerds_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    found = list(doctor_proxy_plugin.examine(loaded(tmp_path)))
    assert said in told([one for one in found if one.state != "ok"])


@pytest.mark.parametrize(("version", "more"), [("2.4", ()), ("1.7", ()), ("1.6", ("--all-runtimes",))])
def test_what_the_command_writes_is_well(version: str, more: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    form = 3 if version == "2.4" else 2
    plugin = "io.containerd.cri.v1.runtime" if form == 3 else "io.containerd.grpc.v1.cri"
    file.write_text(
        f'version = {form}\n[plugins."{plugin}".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
    )
    words = ["snapshotter", "containerd-config", "--write", "--containerd-version", version, "--config", str(file)]
    done = CliRunner().invoke(main, [*words, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    # Shared images need no label that containerd does not send by itself.
    found = list(doctor_proxy_plugin.examine(loaded(tmp_path, **{"snapshotter.images": str(tmp_path)})))
    assert {one.state for one in found} == {"ok"}
    assert found[-1].finding == ("every runtime" if version == "1.6" else "kata")
