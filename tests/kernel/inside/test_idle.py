"""Devices that nobody has open for long are unmapped, and come back when they are asked for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from snapshotter.pool import Limits
from tests.kernel.inside.lab import MIB, Lab, mounted, soon


def mapped(lab: Lab, key: str) -> bool:
    return lab.node.pool.find(lab.stat(key).device) is not None


def test_what_nobody_has_open_is_unmapped_and_mounts_maps_it_again(lab: Lab) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "word").write_text("kept")
    lab.reap()
    assert mapped(lab, "a")
    lab.reap_idle()
    assert not mapped(lab, "a")
    assert lab.node.reaper.idled == 1
    with mounted(lab.mounts("a")) as root:
        assert (root / "word").read_text() == "kept"
    assert mapped(lab, "a")


@pytest.mark.short
def test_what_is_mounted_or_open_stays(lab: Lab) -> None:
    opened = os.open(lab.prepare("opened")[0].source, os.O_RDONLY)
    with mounted(lab.prepare("mounted")):
        lab.prepare("neither")
        lab.reap_idle()
        assert (mapped(lab, "opened"), mapped(lab, "mounted"), mapped(lab, "neither")) == (True, True, False)
        # What was looked at once is looked at again, when it is free.
        os.close(opened)
        lab.reap_idle()
        assert (mapped(lab, "opened"), mapped(lab, "mounted")) == (False, True)
    lab.reap_idle()
    assert not mapped(lab, "mounted")


def test_an_unmapped_snapshot_is_committed_with_all_that_was_written(lab: Lab) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "word").write_bytes(b"x" * MIB)
    lab.reap_idle()
    lab.commit("layer", "a")
    lab.reap()
    lab.reboot()
    with mounted(lab.view("v", "layer")) as root:
        assert (root / "word").read_bytes() == b"x" * MIB
    lab.node.pool.check_live(soon())


def test_an_unmapped_snapshot_is_removed(lab: Lab) -> None:
    device = lab.stat("a").device if lab.prepare("a") else 0
    lab.reap_idle()
    lab.remove("a")
    lab.reap()
    assert device not in lab.node.pool.ids(soon())


def test_zero_is_never(lab: Lab) -> None:
    lab.node.idle.after = 0
    lab.prepare("a")
    lab.reap()
    assert mapped(lab, "a")


def test_devices_that_were_mapped_before_a_restart_become_idle_too(lab: Lab) -> None:
    lab.prepare("a")
    lab.restart()
    lab.reap()
    assert mapped(lab, "a")
    lab.reap_idle()
    assert not mapped(lab, "a")


def test_a_verified_view_is_unmapped_with_what_verifies_it(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(verity=True)
    lab.layer("layer", files={"word": b"sealed"})
    assert lab.node.sealer is not None
    assert lab.node.sealer.seal("layer")
    lab.reap()
    with mounted(lab.view("v", "layer")):
        lab.reap_idle()
        assert mapped(lab, "v")
    lab.reap_idle()
    assert not mapped(lab, "v")
    prefix = lab.node.pool.prefix
    assert [name for name in os.listdir("/dev/mapper") if name.startswith(prefix)] == [f"{prefix}keeper"]
    with mounted(lab.mounts("v")) as root:
        assert (root / "word").read_bytes() == b"sealed"


@pytest.mark.short
def test_entries_beyond_the_kept_are_given_up_and_nothing_else_changes(lab: Lab) -> None:
    """The kernel shows its list to nobody: that it gets shorter is seen by the benchmark only."""
    for key in ("a", "b"):
        with mounted(lab.prepare(key)) as root:
            (root / "word").write_text(key)
    lab.layer("layer", files={"word": b"committed"})
    lab.reap_idle()
    devices = lab.ids()
    assert len(lab.node.reaper.entries) == 3
    lab.node.reaper.entries.kept = 1
    lab.reap()
    assert len(lab.node.reaper.entries) == 1
    assert lab.ids() == devices
    assert not lab.leaks()
    for key in ("a", "b"):
        with mounted(lab.mounts(key)) as root:
            assert (root / "word").read_text() == key
            (root / "word").write_text(f"{key} again")
        lab.commit(f"committed {key}", key)
        assert lab.read(f"committed {key}", "word") == f"{key} again".encode()
    assert lab.read("layer", "word") == b"committed"


def test_a_full_pool_is_not_burdened_with_snapshots_of_ours(lab: Lab) -> None:
    lab.prepare("a")
    lab.reap_idle()
    lab.node.reaper.entries.kept = 0
    lab.node.pool.limits = Limits(extend_by=0, data_reserve=100)
    lab.reap()
    assert len(lab.node.reaper.entries) == 1
    lab.node.pool.limits = Limits(extend_by=0)
    lab.reap()
    assert len(lab.node.reaper.entries) == 0


@pytest.mark.short
def test_a_device_that_was_just_handed_out_is_never_taken_away(lab: Lab) -> None:
    """Callers ask for mounts and open them at once, while the reaper does nothing but unmap what is idle."""
    keys = [f"k{number}" for number in range(4)]
    for key in keys:
        lab.prepare(key)
    # Long against the moment between an answer and its use; short against the pauses of the callers.
    lab.node.idle.after = 0.3
    failed: list[BaseException] = []
    ended = threading.Event()

    def ask(key: str, pause: float) -> None:
        try:
            for _ in range(15):
                os.close(os.open(lab.mounts(key)[0].source, os.O_RDONLY))
                time.sleep(pause)
        except BaseException as error:
            failed.append(error)

    def unmap() -> None:
        while not ended.is_set():
            lab.node.reaper.round()

    reaper = threading.Thread(target=unmap)
    callers = [threading.Thread(target=ask, args=(key, 0.29 + 0.01 * number)) for number, key in enumerate(keys)]
    for thread in (reaper, *callers):
        thread.start()
    for thread in callers:
        thread.join(60)
    ended.set()
    reaper.join(60)
    assert not failed, failed
    assert lab.node.reaper.idled > 5
