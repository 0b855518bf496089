"""Giving many files to a group takes longer than a call: it goes on behind, and from where it was."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from tests.csi.helpers import PODS, image, refused
from tests.driver import mount_capability

pytestmark = pytest.mark.kernel
A, B = PODS[:2]
FILES = 30_000
PLAIN, GROUP, OTHER = mount_capability(), mount_capability(group="3000"), mount_capability(group="3001")


@pytest.fixture
def volume(driver):
    """With many files of root's."""
    one = driver.create("v", 1 << 30)
    driver.stage(one)
    target = Path(driver.publish(one, A, runtime="runc"))
    for number in range(FILES // 500):
        (target / f"d{number}").mkdir()
        for inner in range(500):
            os.close(os.open(target / f"d{number}/{inner}", os.O_CREAT | os.O_WRONLY))
    driver.unpublish(one, A)
    yield one
    for pod in (A, B):
        driver.unpublish(one, pod)
    driver.unstage(one)
    driver.delete(one)


def publish(driver, volume, pod, runtime, capability, timeout=0.25):
    """How many calls it took, each with so little time that one is never enough."""
    for calls in range(1, 200):
        try:
            driver.publish(volume, pod, runtime=runtime, capability=capability, timeout=timeout)
            return calls
        except Exception as error:
            assert error.code().name in ("ABORTED", "DEADLINE_EXCEEDED"), error
            said = error.details()
            assert error.code().name != "ABORTED" or "under way; ask again" in said, said
        time.sleep(0.1)
    raise AssertionError("it never ended")


def groups(driver, volume) -> set[int]:
    """Of all its files, as the host sees them."""
    target = driver.publish(volume, B, runtime="runc", capability=PLAIN)
    found = {os.lstat(Path(place, name)).st_gid for place, _, names in os.walk(target) for name in names}
    driver.unpublish(volume, B)
    return found


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_many_files_are_given_over_several_calls(driver, volume, runtime):
    assert publish(driver, volume, A, runtime, GROUP) > 1
    assert publish(driver, volume, A, runtime, GROUP) == 1
    driver.unpublish(volume, A)
    assert groups(driver, volume) == {3000}


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_a_volume_that_is_taken_back_meanwhile_is_free_at_once(driver, volume, runtime):
    with refused("ABORTED", "under way"):
        driver.publish(volume, A, runtime=runtime, capability=GROUP, timeout=0.25)
    driver.unpublish(volume, A)
    driver.unstage(volume)
    assert not driver.mounts() and not driver.loop_devices()
    driver.stage(volume)
    assert publish(driver, volume, B, runtime, GROUP, timeout=30) == 1
    driver.unpublish(volume, B)
    assert groups(driver, volume) == {3000}


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_a_kill_in_the_middle_costs_nothing_that_was_done(driver, volume, runtime):
    with refused("ABORTED", "under way"):
        driver.publish(volume, A, runtime=runtime, capability=GROUP, timeout=0.25)
    driver.kill()
    driver.start()
    assert publish(driver, volume, A, runtime, GROUP)
    driver.unpublish(volume, A)
    assert groups(driver, volume) == {3000}


def test_another_pod_with_another_group_waits_for_the_first(driver, volume):
    with refused("ABORTED", "under way"):
        driver.publish(volume, A, runtime="runc", capability=GROUP, timeout=0.25)
    with refused("ABORTED", "to group 3000 first"):
        driver.publish(volume, B, runtime="runc", capability=OTHER, timeout=0.25)
    assert publish(driver, volume, A, "runc", GROUP)
    driver.unpublish(volume, B)


def test_no_program_of_the_host_meets_the_walk_in_a_guests_volume(driver, volume):
    """A repeated publish joins the walk; what is mounted for it, and so unclean, is not checked."""
    with refused("ABORTED", "under way"):
        driver.publish(volume, A, runtime="kata", capability=GROUP, timeout=0.25)
    path, seen, over = str(image(driver, volume)).encode(), [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            for one in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
                    seen.extend([words] if path in words else [])

    watcher = threading.Thread(target=watch)
    watcher.start()
    publish(driver, volume, A, "kata", GROUP)
    over.set()
    watcher.join()
    assert not seen
    driver.unpublish(volume, A)
    assert groups(driver, volume) == {3000}
