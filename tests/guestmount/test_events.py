"""Events: the same trouble is one that counts, nobody waits, and without an API nothing happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from guestmount import KubernetesApi
from guestmount import events as events_module
from guestmount.events import NORMAL, WARNING, About, Events
from guestmount.notices import REASONS, Notices
from guestmount.survey import Seen, Surveyed, User
from guestmount.ways import Usage
from tests.api_double import ApiDouble
from tests.until import until

POD = About(kind="Pod", namespace="default", name="db-0", uid="u1")


@pytest.fixture
def api() -> Iterator[ApiDouble]:
    one = ApiDouble()
    yield one
    one.stop()


def events_of(api: ApiDouble) -> list[dict[str, Any]]:
    return [*api.objects.get("events", {}).values()]


def speaker(api: ApiDouble, again: float = 600.0) -> Events:
    return Events(KubernetesApi(server=api.url), reporter="node-1", again=again)


def test_an_event_is_as_a_recorder_writes_it(api: ApiDouble) -> None:
    events = speaker(api)
    events.tell(POD, WARNING, "VolumeAlmostFull", "volume v has less than 5 % of its bytes left")
    (event,) = until(lambda: events_of(api))
    assert event["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": "default",
        "name": "db-0",
        "uid": "u1",
    }
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "VolumeAlmostFull", 1)
    assert event["source"] == {"component": "runvol", "host": "node-1"}
    assert event["metadata"]["namespace"] == "default"
    assert event["firstTimestamp"] == event["lastTimestamp"]
    assert until(lambda: events.outcomes["written"]) == 1


def test_the_same_is_one_event_that_counts(api: ApiDouble) -> None:
    events = speaker(api, again=0.3)
    for _ in range(5):
        events.tell(POD, WARNING, "HandOffLost", "it is gone")
    until(lambda: events_of(api))
    time.sleep(0.4)
    events.tell(POD, WARNING, "HandOffLost", "it is gone")
    assert until(lambda: events_of(api)[0]["count"] >= 2)
    assert len(events_of(api)) == 1
    events.tell(POD, WARNING, "HandOffLost", "another is gone")
    assert until(lambda: len(events_of(api)) == 2)


def test_an_event_that_the_server_has_forgotten_begins_anew(api: ApiDouble) -> None:
    events = speaker(api, again=0.1)
    events.tell(POD, NORMAL, "A", "a")
    (one,) = until(lambda: events_of(api))
    api.drop("events", one["metadata"]["name"])
    time.sleep(0.2)
    events.tell(POD, NORMAL, "A", "a")
    (other,) = until(lambda: events_of(api))
    assert other["metadata"]["name"] != one["metadata"]["name"]


def test_nobody_waits_for_a_server_that_says_nothing(api: ApiDouble) -> None:
    """More than may wait are dropped, and counted."""
    api.frozen = True
    events = speaker(api)
    began = time.monotonic()
    for number in range(1000):
        events.tell(POD, WARNING, "A", f"trouble {number}")
    assert time.monotonic() - began < 1
    assert events.outcomes["dropped"] >= 1000 - events_module._WAITING - 1


def test_what_is_forbidden_is_counted_and_survived(api: ApiDouble) -> None:
    api.forbids = True
    events = speaker(api)
    events.tell(POD, WARNING, "A", "a")
    assert until(lambda: events.outcomes["failed"])
    api.forbids = False
    events.tell(POD, WARNING, "A", "a")
    assert until(lambda: events_of(api))


def test_many_at_once_flood_no_server(api: ApiDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "_BURST", 5)
    events = speaker(api)
    for number in range(50):
        events.tell(POD, WARNING, "A", f"trouble {number}")
    until(lambda: len(events_of(api)) >= 5)
    time.sleep(1)
    assert len(events_of(api)) <= 6


def test_about_nobody_nothing_is_said(api: ApiDouble) -> None:
    events = speaker(api)
    events.tell(About(kind="PersistentVolumeClaim", namespace="default", name="", uid=""), WARNING, "A", "a")
    time.sleep(0.2)
    assert not api.requests


# -- what is told


class Heard:
    def __init__(self) -> None:
        self.said: list[tuple[str, str, str, str]] = []

    def tell(self, about: About, kind: str, reason: str, message: str) -> None:
        self.said.append((about.kind, about.name, reason, message))


USER = User(namespace="default", pod="db-0", persistent_volume_claim="data", pod_uid="u1", claim_uid="u2", target="/t")


def surveyed(used: int = 1, inodes_used: int = 1, owner: str = "sandbox", **more: Any) -> Surveyed:
    usage = Usage(total_bytes=100, used_bytes=used, available_bytes=100 - used, inodes=100, used_inodes=inodes_used)
    return Surveyed(volume="v", backend="loop", owner=owner, handler="kata", users=(USER,), usage=usage, **more)


def told(*looks: Seen) -> list[tuple[str, str, str, str]]:
    heard = Heard()
    notices = Notices(heard)  # type: ignore[arg-type]
    for one in looks:
        notices.looked(one)
    return heard.said


def test_a_volume_that_is_almost_full_is_told_to_pod_and_claim() -> None:
    said = told(Seen(volumes=(surveyed(used=96),)))
    assert [(kind, name, reason) for kind, name, reason, _message in said] == [
        ("Pod", "db-0", "VolumeAlmostFull"),
        ("PersistentVolumeClaim", "data", "VolumeAlmostFull"),
    ]
    assert "it grows with the pod's next start" in said[0][3]
    assert "it grows while the pod runs" in told(Seen(volumes=(surveyed(used=96, owner="host"),)))[0][3]
    # The same sentence, however full: it is one event.
    assert said == told(Seen(volumes=(surveyed(used=99),)))
    assert not told(Seen(volumes=(surveyed(used=90),)))
    assert told(Seen(volumes=(surveyed(inodes_used=99),)))[0][2] == "VolumeInodesAlmostGone"


def test_a_hand_off_is_lost_only_when_it_stays_so() -> None:
    """Between a claim and its hand-off lies a moment of each publish."""
    lost, well = (Seen(volumes=(surveyed(),), lost=frozenset(paths)) for paths in (("/t",), ()))
    assert not told(lost, lost, well, lost, lost)
    assert [reason for _kind, _name, reason, _message in told(lost, lost, lost)] == ["HandOffLost"]


def test_a_server_that_stays_silent_is_told() -> None:
    silent = Seen(volumes=(surveyed(trouble="the server s does not answer"),))
    assert not told(silent, silent)
    ((_kind, _name, reason, message),) = told(silent, silent, silent)
    assert (reason, "the server s does not answer" in message) == ("VolumeUnreachable", True)


def test_the_page_has_every_reason() -> None:
    from pathlib import Path

    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    for reason, meaning in REASONS.items():
        assert f"| `{reason}` | {meaning} |" in page, json.dumps({reason: meaning})


def test_a_message_is_text_of_a_length_that_kubernetes_takes(api: ApiDouble) -> None:
    events = speaker(api)
    assert events.outcomes.keys() == {"written", "counted", "failed", "dropped"}
    events.tell(POD, WARNING, "VolumeUnreachable", "server \x1b[31m\udcff" + "\u20ac" * 2000)
    (event,) = until(lambda: events_of(api))
    assert event["message"].startswith("server \\u001b[31m\\udcff\u20ac")
    assert 990 < len(event["message"].encode()) <= 1000
    assert until(lambda: events.outcomes["written"]) == 1
