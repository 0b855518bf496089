"""A pod is known before it is asked for, by a server that comes and goes, and after a reboot without one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import Deadline
from guestmount import KubernetesApi, PodRef, api_watch
from guestmount.known_pods import Kept, KnownPods
from guestmount.pods import PodFacts, PodUnknown
from tests.api_double import ApiDouble

UID = "6dad7281-57ff-49e4-b844-c588ceabec1{}"


def wait(ready: Callable[[], object], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiDouble]:
    monkeypatch.setattr(api_watch, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(api_watch, "_LONGEST_PAUSE", 0.1)
    one = ApiDouble()
    yield one
    if not one.stopped:
        one.stop()


@pytest.fixture
def known(api: ApiDouble, tmp_path: Path) -> Iterator[Callable[..., KnownPods]]:
    made = []

    def one(**more: object) -> KnownPods:
        source = KubernetesApi(server=api.url, account=str(tmp_path))
        made.append(KnownPods(source, node="node-1", kept=str(tmp_path / "answers"), **more))
        made[-1].warm()
        return made[-1]

    yield one
    for each in made:
        each.stop()


def ref(number: int = 0, name: str = "p") -> PodRef:
    return PodRef(namespace="default", name=name, uid=UID.format(number))


def asked(api: ApiDouble) -> int:
    """Single objects; what is followed comes by itself."""
    return sum("watch" not in path and "limit" not in path for path, _ in api.requests)


def test_a_pod_that_is_followed_is_asked_for_nobody(api, known):
    api.put("runtimeclasses", "kata", {"handler": "kata-qemu"})
    pods = known()
    wait(pods.healthy)
    for number in range(3):
        api.pod(f"p{number}", UID.format(number), runtime_class="kata")
    wait(lambda: len(pods._pods) == 3)
    assert pods.pod(ref(1, "p1"), Deadline.after(5)).runtime_class == "kata"
    assert pods.handler("kata", Deadline.after(5)) == "kata-qemu"
    assert asked(api) == 0
    assert {agent.split("/")[0] for _, agent in api.requests} == {"runvol"}


def test_only_this_nodes_pods_are_followed(api, known):
    api.pod("here", UID.format(0))
    api.pod("there", UID.format(1), node="node-2")
    pods = known()
    wait(pods.healthy)
    assert [*pods._pods] == [UID.format(0)]
    api.pod("there", UID.format(2), node="node-2")
    api.drop("pods", "here")
    wait(lambda: not pods._pods)


def test_many_pods_come_page_by_page(api, known):
    for number in range(120):
        api.pod(f"p{number}", f"uid-{number}")
    pods = known()
    wait(lambda: len(pods._pods) == 120)
    assert sum("pods?limit=50" in path for path, _ in api.requests) == 3


def test_a_pod_that_the_watch_has_not_yet_is_asked_for(api, known):
    pods = known()
    wait(pods.healthy)
    api.frozen = True
    api.objects["pods"]["p"] = {"metadata": {"name": "p", "uid": UID.format(0)}, "spec": {"runtimeClassName": "kata"}}
    api.frozen = False
    assert pods.pod(ref(), Deadline.after(5)).runtime_class == "kata"


@pytest.mark.parametrize("how", ["dies", "forgets"])
def test_a_watch_goes_on_whatever_happens_to_the_server(api, known, how):
    api.pod("p", UID.format(0))
    pods = known()
    wait(pods.healthy)
    if how == "forgets":
        api.bookmark_seconds = 30
        api.forget()
    api.stop()
    wait(lambda: not pods.healthy())
    api.drop("pods", "p")
    api.pod("q", UID.format(1), runtime_class="kata")
    if how == "forgets":
        api.forget()
    api.start()
    wait(lambda: pods.healthy() and [*pods._pods] == [UID.format(1)])


def test_after_a_reboot_without_the_server_everything_is_known(api, known):
    api.put("runtimeclasses", "kata", {"handler": "kata-qemu"})
    api.put("persistentvolumes", "pv", {"spec": {"claimRef": {"namespace": "default", "name": "claim"}}})
    api.pod("p", UID.format(0), runtime_class="kata")
    before = known()
    first = before.pod(ref(), Deadline.after(5))
    before.handler("kata", Deadline.after(5))
    assert before.claim_of("pv", Deadline.after(5)) == ("default", "claim")
    before._kept.flush()
    before.stop()
    api.stop()
    after = known()
    assert after.pod(ref(), Deadline.after(5)) == first
    assert after.handler("kata", Deadline.after(5)) == "kata-qemu"
    assert after.claim_of("pv", Deadline.after(5)) == ("default", "claim")
    with pytest.raises(PodUnknown, match="nothing is kept of it"):
        after.pod(ref(7), Deadline.after(5))
    with pytest.raises(PodUnknown, match="nothing is kept of that class"):
        after.handler("other", Deadline.after(5))


def test_a_frozen_server_costs_a_second(api, known):
    pods = known()
    pods._kept.put("pod", UID.format(0), PodFacts(uid=UID.format(0), runtime_class="kata"))
    pods._kept.flush()
    api.frozen = True
    began = time.monotonic()
    assert pods.pod(ref(), Deadline.after(10)).runtime_class == "kata"
    assert time.monotonic() - began < 3


def test_a_class_that_was_made_anew_has_its_new_handler(api, known):
    api.put("runtimeclasses", "k", {"handler": "one"})
    pods = known()
    wait(pods.healthy)
    assert pods.handler("k", Deadline.after(5)) == "one"
    api.drop("runtimeclasses", "k")
    api.put("runtimeclasses", "k", {"handler": "two"})
    wait(lambda: pods.handler("k", Deadline.after(5)) == "two")


@pytest.mark.parametrize("content", ["{", '{"uid": 7}', "\0", "[]"])
def test_what_was_kept_and_cannot_be_read_is_nothing(tmp_path, content):
    kept = Kept(str(tmp_path))
    (tmp_path / f"pod-{UID.format(0)}.json").write_text(content)
    assert kept.get("pod", UID.format(0), PodFacts) is None


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "x" * 300, "a\0b"])
def test_a_name_leads_nowhere(tmp_path, name):
    kept = Kept(str(tmp_path / "answers"))
    kept.put("pod", name, PodFacts(uid="x"))
    kept.put("class", name, "x")
    kept.flush()
    assert kept.get("pod", name, PodFacts) is None
    assert not (tmp_path / "answers").exists()


def test_answers_of_pods_that_are_no_more_go_after_a_day(tmp_path):
    kept = Kept(str(tmp_path))
    for name in ("lives", "old", "new"):
        kept.put("pod", name, PodFacts(uid=name))
    wait(lambda: len([*tmp_path.glob("pod-*.json")]) == 3)
    day = time.time() - 25 * 3600
    for name in ("lives", "old"):
        os.utime(tmp_path / f"pod-{name}.json", (day, day))
    kept.tidy("pod", {"lives"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pod-lives.json", "pod-new.json"]
