"""A service starts without the command line's library, and means the same as with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runvol.entry import plain


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (["snapshotter"], {}),
        (["snapshotter", "--endpoint", "unix:///run/x.sock"], {"snapshotter.endpoint": "unix:///run/x.sock"}),
        (["--config=/etc/x", "--log-level", "debug", "snapshotter", "--pool=p"],
         {"file": "/etc/x", "log.level": "debug", "pool": "p"}),
        (["snapshotter", "--state-dir", "/x", "--pool", "p"], {"paths.state_dir": "/x", "pool": "p"}),
    ],
)  # fmt: skip
def test_a_plain_command_line_is_understood(words: list[str], meaning: dict[str, str]) -> None:
    assert plain(words) == meaning


@pytest.mark.parametrize(
    "words",
    [[], ["csi"], ["snapshots"], ["snapshotter", "--help"], ["snapshotter", "--pool"], ["snapshotter", "x"],
     ["snapshotter", "snapshotter"], ["--version"], ["--endpoint", "x", "snapshotter"], ["snapshotter", "--json"], ["--config", "snapshotter"]],
)  # fmt: skip
def test_everything_else_is_the_command_lines(words: list[str]) -> None:
    assert plain(words) is None


def run(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "runvol"]
    return subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, check=False)


def test_a_mistake_is_told_in_one_line(tmp_path: Path) -> None:
    done = run("--state-dir", str(tmp_path), "--config", f"{tmp_path}/none.toml", "snapshotter")
    assert done.returncode == 2
    assert done.stderr == f"Error: the configuration file {tmp_path}/none.toml does not exist\n"
    assert "runvol pool init" in run("snapshotter").stderr
    assert "No such option" in run("snapshotter", "--nonsense").stderr


def test_nothing_heavy_is_loaded_before_the_socket() -> None:
    code = """
import sys
from runvol import entry, serve_snapshots
import snapshotter.server
# Where images are shared, signatures are verified when the first one is looked at.
import snapshotter.images
print([name for name in ("click", "rich", "hmac", "sh", "pyudev", "kubernetes", "cryptography") if name in sys.modules])
"""
    assert run(code=code).stdout == "[]\n"
