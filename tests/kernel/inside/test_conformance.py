"""containerd's own snapshotter suite, against the real process."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.kernel.inside.server import MIB, Server, program

ALL = {
    "Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update", "Remove", "Walk",
    "LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown", "DirectoryPermissionOnCommit", "RemoveIntermediateSnapshot",
    "DeletedFilesInChildSnapshot", "MoveFileFromLowerLayer", "ViewReadonly", "StatInWalk", "CloseTwice", "RootPermission",
    "Rename", "128LayersMount",
}  # fmt: skip
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}


def _run(tmp_path: Path, fstype: str, *arguments: str) -> set[str]:
    """The tests that passed; the server must be left without a snapshot's device that nobody needs."""
    with Server(tmp_path, fstype=fstype, size=SIZES[fstype]) as server:
        done = subprocess.run(
            [program("conformance"), "-test.v", "-test.timeout", "15m", *arguments],
            env={**os.environ, "RUNVOL_SOCKET": str(server.socket), "TMPDIR": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        failed = re.findall(r"--- FAIL: TestSnapshotter/(\S+)", done.stdout)
        assert done.returncode == 0, f"{failed}: {done.stdout[-3000:]}\n{server.said()}"
        server.settled(len(server.snapshots()))
        return set(re.findall(r"--- PASS: TestSnapshotter/(\S+)", done.stdout))


@pytest.mark.short
def test_the_suite_without_its_longest_test(tmp_path: Path) -> None:
    assert _run(tmp_path, "ext4", "-test.skip", "TestSnapshotter/128LayersMount") == ALL - {"128LayersMount"}


SUITES = int(os.environ.get("RUNVOL_SUITES", "1"))


@pytest.mark.parametrize("number", range(SUITES))
@pytest.mark.parametrize("fstype", ["ext4", "xfs"] if SUITES > 1 else ["xfs"])
def test_the_whole_suite(tmp_path: Path, fstype: str, number: int) -> None:
    assert _run(tmp_path, fstype) == ALL
