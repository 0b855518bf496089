"""Events: the same trouble is one that counts, nobody waits, and without an API nothing happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blockdev import Deadline
from guestmount import Claim, Claims, KubernetesApi, Node, Target, nri
from guestmount import events as events_module
from guestmount.claims import NfsMount, Use
from guestmount.events import NORMAL, WARNING, About, Events
from guestmount.known_pods import KnownPods
from guestmount.notices import REASONS, Notices, snapshot_taken
from guestmount.survey import Seen, Surveyed, User
from guestmount.ways import Usage
from runvol_proto import nri_pb2 as pb
from tests.api_double import ApiDouble
from tests.until import until
from volumes import VolumeKind

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


# -- a snapshot of a volume in use, and a container without its volume


PV = "/var/lib/kubelet/pods/{}/volumes/kubernetes.io~csi/pv/mount"


@pytest.fixture
def known(api: ApiDouble, tmp_path: Path) -> Iterator[KnownPods]:
    api.put("persistentvolumes", "pv", {"spec": {
        "csi": {"driver": "csi.runvol.io"}, "claimRef": {"namespace": "default", "name": "data", "uid": "u2"}}})  # fmt: skip
    one = KnownPods(KubernetesApi(server=api.url), node="node-1", kept=str(tmp_path / "answers"))
    one.warm()
    yield one
    one.stop()


def node_of(events: Events | None, known: KnownPods | None, claims: Claims) -> Node:
    return cast(Node, SimpleNamespace(events=events, claims=claims, detector=SimpleNamespace(pods=known)))


def staged(claims: Claims, *pods: str, kind: VolumeKind = VolumeKind.BLOCK) -> None:
    targets = {PV.format(one): Target(read_only=False, pod_uid=one, pod_namespace="default", pod_name=f"db-{one}")
               for one in pods}  # fmt: skip
    made = Claim(volume="loop-1", source="/x", staging_path="/s", kind=kind, targets=targets,
                 use=Use(mode="single_node_writer", fstype="ext4"))  # fmt: skip
    with claims.locked("loop-1", Deadline.after(5)) as cell:
        cell.write(made)


@pytest.mark.parametrize("may_list", [True, False])
def test_a_snapshot_of_a_volume_in_use_is_told_once_to_its_claim(
    api: ApiDouble, known: KnownPods, tmp_path: Path, may_list: bool
) -> None:
    """Also where the node's account may get volumes by their names alone; and though the sidecar asks again."""
    if not may_list:
        api.refuses = lambda path, _query: path == "/api/v1/persistentvolumes"
        known.stop()
        known.start()
        until(lambda: known._volumes is not None and known._volumes.refused)
    else:
        until(lambda: known.claim_heard_of("pv")[0])
    claims, events = Claims(str(tmp_path / "run")), speaker(api)
    staged(claims, "a", "b")
    for _ in range(3):
        snapshot_taken(node_of(events, known, claims), "snap-1", "loop-1")
    (event,) = until(lambda: events_of(api))
    about = event["involvedObject"]
    assert (about["kind"], about["namespace"], about["name"], about["uid"]) == (
        "PersistentVolumeClaim", "default", "data", "u2"
    )  # fmt: skip
    assert (event["type"], event["reason"]) == ("Normal", "SnapshotOfVolumeInUse")
    assert event["message"] == (
        "snapshot snap-1 of volume loop-1 was taken while default/db-a, default/db-b had it: it is what a power cut at "
        "that moment would have left"
    )
    time.sleep(0.3)
    assert len(events_of(api)) == 1
    snapshot_taken(node_of(events, known, claims), "snap-2", "loop-1")
    assert until(lambda: len(events_of(api)) == 2)


def test_a_snapshot_of_what_nobody_has_or_of_files_is_told_to_nobody(tmp_path: Path) -> None:
    heard = Heard()
    claims = Claims(str(tmp_path / "run"))
    node = node_of(cast(Events, heard), None, claims)
    snapshot_taken(node, "snap-1", "loop-1")
    staged(claims)
    snapshot_taken(node, "snap-1", "loop-1")
    staged(claims, "a", kind=VolumeKind.FILES)
    snapshot_taken(node, "snap-1", "loop-1")
    (record,) = Path(claims.directory).glob("*.json")
    record.write_bytes(b"{")
    snapshot_taken(node, "snap-1", "loop-1")
    snapshot_taken(node_of(None, None, claims), "snap-1", "loop-1")
    assert not heard.said


def test_a_container_without_its_volume_is_told_once_to_its_pod(api: ApiDouble, tmp_path: Path) -> None:
    """At each connection the runtime says what containers there are: the same is one event."""
    claims, events = Claims(str(tmp_path / "run")), speaker(api)
    mount = NfsMount(server="nas", path="/e", version="4.2", options=(), address="10.0.0.5")
    targets = {
        PV.format(one): Target(
            read_only=False, pod_uid=one, pod_namespace="d", pod_name=name, handler="kata", dialect="kata"
        )
        for one, name in (("u", "web-0"), ("nameless", ""))
    }
    with claims.locked("nfs-1", Deadline.after(5)) as cell:
        cell.write(Claim(volume="nfs-1", source="nas:/e", staging_path="/s", kind=VolumeKind.FILES, nfs=mount,
                         use=Use(mode="multi_node_multi_writer"), targets=targets))  # fmt: skip
    pods = [pb.PodSandbox(id=uid, uid=uid, name=name, namespace="d", runtime_handler="kata")
            for uid, name in (("u", "web-0"), ("nameless", "web-1"), ("v", "other"))]  # fmt: skip
    binds = {one: pb.Mount(destination="/data", type="bind", source=PV.format(one)) for one in ("u", "nameless")}
    containers = [pb.Container(id=f"c{pod}", name="app", pod_sandbox_id=pod, mounts=[binds["u" if pod == "v" else pod]])
                  for pod in ("u", "nameless", "v")]  # fmt: skip
    for _ in range(3):
        nri.Plugin(claims, events=events).Synchronize(pb.SynchronizeRequest(pods=pods, containers=containers))
    assert until(lambda: len(events_of(api)) == 2)
    time.sleep(0.3)
    about = sorted((one["involvedObject"]["kind"], one["involvedObject"]["namespace"], one["involvedObject"]["name"],
                    one["involvedObject"]["uid"]) for one in events_of(api))  # fmt: skip
    assert about == [("Pod", "d", "web-0", "u"), ("Pod", "d", "web-1", "nameless")]
    for event in events_of(api):
        assert (event["type"], event["reason"]) == ("Warning", "VolumeMissing")
        assert event["message"] == (
            "container app was made while runvol's NRI plugin was away, and has an empty read-only directory in the place "
            "of its NFS volume; restart the pod"
        )


def test_the_page_has_every_reason() -> None:
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
