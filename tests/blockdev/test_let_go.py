"""A mount that cannot be let go of is told, not tried for ever."""

from __future__ import annotations

import subprocess
import time

import pytest

from blockdev import mounts
from blockdev.errors import MountFailed

pytestmark = pytest.mark.kernel


def test_a_mount_that_another_one_hides_is_told_at_once(tmp_path):
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "inner", str(inner)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "outer", str(inner.parent)], check=True)
    try:
        started = time.monotonic()
        with pytest.raises(MountFailed, match="detaching failed"):
            mounts.be_let_go(str(inner))
        assert time.monotonic() - started < 30
    finally:
        subprocess.run(["umount", str(inner.parent)], check=True)
    mounts.be_let_go(str(inner))
    assert not mounts.in_table(str(inner))
