"""Full and read-only places, no descriptors, writes that end early: every call says so in words, and none is half done.

For every backend and façade from one list. While the attack lasts, each verb either succeeds or fails in the same words
each time; afterwards the same calls succeed, a neighbour's bytes are what they were, and nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.attacks import hostile
from tests.attacks.lives import CSI, ELSEWHERE, FLEX, CsiLife, Failed, FlexLife, pods
from tests.driver import Driver
from tests.flexvolume.test_driver import Flex
from volumes.registry import REGISTRY

Life = CsiLife | FlexLife
# What an answer holds that people cannot use, or that changes each time.
_USELESS = re.compile(r"see the driver's log|Traceback|tmp[0-9a-z_]{6,}|\.new\b")
SECRET = b"a neighbour's bytes"
ROUNDS = int(os.environ.get("RUNVOL_ATTACKS", "1"))


def test_every_backend_is_attacked():
    assert {*CSI, *FLEX, *ELSEWHERE} == {entry.name for entry in REGISTRY}


@pytest.fixture
def driver() -> Iterator[Driver]:
    one = Driver()
    one.environment |= {
        "RUNVOL_FLEXVOLUME_DIRECTORIES": str(one.directory / "given"),
        "RUNVOL_FLEXVOLUME_DEVICES": str(one.directory / "given"),
        "RUNVOL_FLEXVOLUME_CALL_SECONDS": "20",
    }
    with hostile.small_disk(one.state), hostile.small_disk(one.run, "4m"):
        try:
            yield one
        finally:
            one.stop()
            one.remove()


def _csi(backend: str, runtime: str, *, raw: bool = False) -> Callable[[Driver], Life]:
    def life(driver: Driver) -> Life:
        if driver.process is None:
            driver.start()
        return CsiLife(driver, backend, runtime, raw=raw)

    return life


def _flex(backend: str, runtime: str) -> Callable[[Driver], Life]:
    return lambda driver: FlexLife(Flex(driver), backend, runtime)


LIVES = {
    "csi-loop-runc": _csi("loop", "runc"),
    "csi-loop-kata": _csi("loop", "kata"),
    "csi-loop-raw": _csi("loop", "runc", raw=True),
    "csi-directory-runc": _csi("directory", "runc"),
    "csi-directory-kata": _csi("directory", "kata"),
    **{f"flex-{backend}-{runtime}": _flex(backend, runtime) for backend in FLEX for runtime in ("runc", "kata")},
}
Attack = Callable[[Driver], AbstractContextManager[None]]
DISKS: dict[str, Attack] = {
    "full state": lambda driver: hostile.full(driver.state),
    "full run": lambda driver: hostile.full(driver.run),
    "both full": lambda driver: hostile.full(driver.state, driver.run),
    "read-only run": lambda driver: hostile.read_only(driver.run),
}


def _of_process(attack: Callable[[int], AbstractContextManager[None]]) -> Attack:
    def on(driver: Driver) -> AbstractContextManager[None]:
        assert driver.process is not None
        return attack(driver.process.pid)

    return on


PROCESSES: dict[str, Attack] = {
    **{f"{more} descriptors": _of_process(lambda pid, more=more: hostile.few_descriptors(pid, more))
       for more in (0, 1, 2, 4, 8)},
    **{f"writes of {size} bytes": _of_process(lambda pid, size=size: hostile.short_writes(pid, size))
       for size in (0, 100)},
}  # fmt: skip


def _attempt(call: Callable[[], object], tries: list[str]) -> Failed | None:
    """The answer of a call under attack; where it fails, it fails the same way at once again."""
    tries.append("call")
    try:
        call()
    except Failed as first:
        assert not _USELESS.search(first.sentence), first
        with contextlib.suppress(Failed):
            call()
            return None
        return first
    return None


def _survives(driver: Driver, make: Callable[[Driver], Life], attack: Attack) -> list[str]:
    tries: list[str] = []
    neighbour, victim, late = make(driver), make(driver), make(driver)
    first, second, third = pods()[:3]
    neighbour.make("neighbour")
    mark = _marked(neighbour.mount(first))
    victim.make("victim")
    with attack(driver):
        _attempt(lambda: late.make("late"), tries)
        _attempt(lambda: victim.mount(second), tries)
        _attempt(lambda: victim.unmount(second), tries)
        _attempt(lambda: neighbour.mount(first), tries)  # kubelet repeats it for running pods
    mark()
    late.make("late")
    late.mount(third)
    victim.mount(second)
    neighbour.mount(first)
    mark()
    for life, pod in ((neighbour, first), (victim, second), (late, third)):
        life.unmount(pod)
        life.delete()
    return tries


def _marked(target: Path) -> Callable[[], None]:
    """Write a neighbour's bytes where the host can see them; the answer looks whether they are still there."""
    if target.is_block_device():
        target.write_bytes(SECRET.ljust(512))
        return lambda: _same(target, 512)
    if os.access(target, os.W_OK) and not os.statvfs(target).f_flag & os.ST_RDONLY:
        (target / "mine").write_bytes(SECRET)
        return lambda: _same(target / "mine", 512)
    return lambda: None


def _same(path: Path, count: int) -> None:
    with path.open("rb") as file:
        assert file.read(count).rstrip() == SECRET


def _nothing_left(driver: Driver) -> None:
    assert not [one for one in driver.mounts() if one not in (str(driver.state), str(driver.run))]
    assert not driver.loop_devices()
    for place in (driver.state / "volumes", driver.state / "directories", driver.run / "claims", driver.run / "tmp"):
        assert not place.exists() or not os.listdir(place), place
    handed = driver.direct_volumes
    assert not handed.exists() or not os.listdir(handed)


@pytest.mark.kernel
@pytest.mark.parametrize("life", LIVES)
def test_no_place_to_write(driver, life):
    for _ in range(ROUNDS):
        for name, attack in DISKS.items():
            print(f"{life}, {name}: {len(_survives(driver, LIVES[life], attack))} tries")
            _nothing_left(driver)


@pytest.mark.kernel
@pytest.mark.parametrize("life", [name for name in LIVES if name.startswith("csi")])
def test_no_descriptors_and_short_writes(driver, life):
    LIVES[life](driver)
    for _ in range(ROUNDS):
        for name, attack in PROCESSES.items():
            print(f"{life}, {name}: {len(_survives(driver, LIVES[life], attack))} tries")
            _nothing_left(driver)
    assert driver.process is not None
    assert driver.process.poll() is None
