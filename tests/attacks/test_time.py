"""Lost and restored memories: `/run` emptied under whoever works, records played back, for every backend and façade.

Nothing that a pod has is lost, given to another kernel, or left behind.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.attacks import hostile
from tests.attacks.lives import Failed, pods
from tests.attacks.test_scarcity import LIVES, ROUNDS, _marked, _nothing_left
from tests.attacks.test_scarcity import driver as driver  # noqa: PLC0414 - a fixture

pytestmark = pytest.mark.kernel


def forgotten_run(driver):
    """While the plugin, where there is one, serves."""
    hostile.emptied_around_mounts(driver.run)


def lost_records(driver):
    """With the claims of this boot, and the plugin starts anew."""
    serving = driver.process is not None
    if serving:
        driver.stop()
    hostile.emptied_around_mounts(driver.records)
    hostile.emptied_around_mounts(driver.run)
    if serving:
        driver.start()


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("loss", [forgotten_run, lost_records], ids=lambda loss: loss.__name__)
def test_what_was_lost_costs_no_pod_anything(driver, life, loss):
    first, second = pods()[:2]
    for number in range(ROUNDS):
        one = LIVES[life](driver)
        one.make(f"one-{number}")
        mark = _marked(one.mount(first))
        loss(driver)
        mark()
        if (one.backend, loss) == ("given-device", lost_records):
            # Nothing tells whose it is, as its path stood in the options alone: refused in words, and kept until its end.
            with pytest.raises(Failed, match="is mounted at|mounted on"):
                one.mount(first)
        else:
            one.mount(first)  # kubelet repeats it
        mark()
        one.unmount(first)
        one.mount(second)
        one.unmount(second)
        one.delete()
        _nothing_left(driver)


@pytest.mark.parametrize("life", [name for name in LIVES if name.startswith("csi-")])
@pytest.mark.parametrize("when", ["before it was made", "before its pod", "before its end"])
def test_records_that_are_played_back_cost_no_pod_anything(driver, life, when):
    first, second = pods()[:2]
    for number in range(ROUNDS):
        one, copy = LIVES[life](driver), driver.directory / f"copy-{number}"
        driver.records.mkdir(parents=True, exist_ok=True)

        def kept(at: str, copy=copy) -> None:
            if at == when:
                shutil.copytree(driver.records, copy)

        kept("before it was made")
        one.make(f"one-{number}")
        kept("before its pod")
        target = one.mount(first)
        mark = _marked(target)
        kept("before its end")
        if when == "before its end":
            one.unmount(first)
            target = one.mount(second)
            mark = _marked(target)
        driver.stop()
        shutil.rmtree(driver.records)
        shutil.copytree(copy, driver.records)
        driver.start()
        pod = second if when == "before its end" else first
        mark()
        if one.runtime == "kata" and one.backend == "loop" and not target.is_block_device():
            with pytest.raises(Failed, match=pod):
                one.mount(pods()[2])  # the guest between two containers still has it
        one.mount(pod)
        mark()
        one.unmount(pod)
        one.delete()
        _nothing_left(driver)
        assert not os.path.exists(driver.records / "damaged")
