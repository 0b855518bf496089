"""A line that belongs to a call says to which, of which volume and pod; secrets stand in none."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import pytest

from blockdev import Deadline, log_context
from blockdev.deadlines import bounded
from runvol import logs
from tests.csi.helpers import PODS, refused
from tests.driver import Driver, mount_capability

A = PODS[0]


@pytest.fixture
def driver() -> Any:
    with Driver(environment={"RUNVOL_LOG_FORMAT": "json", "RUNVOL_LOG_LEVEL": "debug"}) as one:
        yield one


def lines(driver: Driver) -> list[dict[str, Any]]:
    return [json.loads(line) for line in driver.log.read_text().splitlines() if line.startswith("{")]


@pytest.mark.kernel
def test_each_line_of_a_call_names_its_request_volume_and_pod(driver: Driver) -> None:
    volume = driver.create("pvc")
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata", name="db-0")
    with refused("FAILED_PRECONDITION"):
        driver.publish(volume, PODS[1], runtime="runc", name="web-0")
    driver.unpublish(volume, A)
    driver.unstage(volume)
    found = lines(driver)
    published = [one for one in found if one.get("rpc") == "NodePublishVolume" and one.get("pod") == "default/db-0"]
    assert {"runtime detected", "call done"} <= {one["event"] for one in published}
    assert len({one["request_id"] for one in published}) == 1
    assert {(one["volume"], one["pod_uid"]) for one in published} == {(volume.volume_id, A)}
    (said,) = [one for one in found if one["event"] == "call refused"]
    assert (said["pod"], said["volume"], said["code"]) == ("default/web-0", volume.volume_id, "FAILED_PRECONDITION")
    # kubelet names no pod when it takes a volume back, but its path does.
    (back,) = [one for one in found if one.get("rpc") == "NodeUnpublishVolume"]
    assert (back["pod_uid"], back["volume"]) == (A, volume.volume_id)
    assert all("request_id" in one for one in found if "rpc" in one)
    assert len({one["request_id"] for one in found if one["event"] == "call done"}) == sum(
        one["event"] == "call done" for one in found
    )


@pytest.mark.kernel
def test_no_secret_stands_in_any_line(driver: Driver) -> None:
    volume = driver.create("pvc")
    tokens = {"csi.storage.k8s.io/serviceAccount.tokens": '{"": {"token": "PLANTED-token"}}'}
    driver.client.NodeStageVolume(
        volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id),
        volume_capability=mount_capability(), secrets={"password": "PLANTED-secret"},
    )  # fmt: skip
    with refused("INVALID_ARGUMENT"):
        driver.client.NodeStageVolume(
            volume_id=volume.volume_id, secrets={"k": "PLANTED-refused"}, volume_capability=mount_capability(),
            staging_target_path="/elsewhere", volume_context=tokens,
        )  # fmt: skip
    text = driver.log.read_text()
    assert "NodeStageVolume" in text
    assert "PLANTED" not in text
    driver.unstage(volume)


def test_threads_that_are_begun_for_a_call_are_about_it() -> None:
    with log_context.about(volume="v", pod=""):
        assert bounded("looking", Deadline.after(5), log_context.facts) == {"volume": "v"}
        with log_context.about(volume="w", rpc="R"):
            assert log_context.facts() == {"volume": "w", "rpc": "R"}
        elsewhere: list[Any] = []
        thread = threading.Thread(target=lambda: elsewhere.append(dict(log_context.facts())))
        thread.start()
        thread.join()
        assert elsewhere == [{}]
    assert log_context.facts() == {}


@pytest.mark.parametrize("as_json", [True, False])
def test_one_event_is_one_line_whatever_a_volume_is_called(as_json: bool) -> None:
    record = logging.makeLogRecord({"msg": "call done", "levelname": "INFO", "volume": "own"})
    with log_context.about(volume="theirs", pod='a"b\n2026 ERROR forged'):
        line = logs._Lines(as_json=as_json).format(record)
    assert "\n" not in line
    assert "own" in line
    assert "theirs" not in line
