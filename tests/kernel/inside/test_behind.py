"""What is done behind the calls goes on whatever the calls do."""

from __future__ import annotations

import os
import time

import pytest

from tests.kernel.inside.lab import MIB, Lab, mounted


@pytest.mark.short
def test_deleting_goes_on_under_endless_calls(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    for number in range(12):
        with mounted(lab.prepare(f"k{number}", "layer")) as root:
            (root / "own").write_bytes(os.urandom(MIB))
    before = lab.status().data_used
    for number in range(12):
        lab.remove(f"k{number}")
    lab.node.activity.begin()
    assert lab.node.activity.quiet_for() == 0
    lab.node.reaper.start()
    try:
        until = time.monotonic() + 30
        while lab.node.store.doomed():
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        lab.node.reaper.stop()
    assert before - lab.status().data_used >= 12 * 16, "their blocks are given back"


def test_what_is_opened_after_its_removal_keeps_its_blocks(lab: Lab) -> None:
    (mount,) = lab.prepare("a")
    with mounted([mount]) as root:
        (root / "f").write_bytes(b"x" * MIB)
    with open(mount.source, "rb") as opened:
        opened.seek(1024)
        first = opened.read(4096)
        lab.remove("a")
        lab.node.reaper.round()
        assert lab.node.store.doomed()
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        opened.seek(1024)
        assert opened.read(4096) == first
    assert not lab.leaks()
