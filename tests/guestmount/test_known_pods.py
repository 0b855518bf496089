"""A pod is known before it is asked for, by a server that comes and goes, and after a reboot without one."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import Deadline
from guestmount import KubernetesApi, PodRef, api_watch, claims_by_name, kept_answers
from guestmount.kept_answers import Kept
from guestmount.known_pods import KnownPods
from guestmount.pods import NotThere, PodFacts, PodUnknown, with_own
from tests.api_double import ApiDouble
from tests.until import until

UID = "6dad7281-57ff-49e4-b844-c588ceabec1{}"


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
    until(pods.healthy)
    for number in range(3):
        api.pod(f"p{number}", UID.format(number), runtime_class="kata")
    until(lambda: len(pods._pods) == 3)
    assert pods.pod(ref(1, "p1"), Deadline.after(5)).runtime_class == "kata"
    assert pods.handler("kata", Deadline.after(5)) == "kata-qemu"
    assert asked(api) == 0
    assert {agent.split("/")[0] for _, agent in api.requests} == {"runvol"}


def volume(claim: str | None, driver: str = "csi.runvol.io") -> dict[str, object]:
    bound = {"claimRef": {"namespace": "default", "name": claim}} if claim else {}
    return {"spec": {"csi": {"driver": driver}, **bound}}


def test_a_volume_that_is_followed_is_asked_for_nobody(api, known):
    api.put("persistentvolumes", "pv", volume("one"))
    api.put("persistentvolumes", "others", volume("x", "disk.example.com"))
    pods = known()
    until(lambda: pods._volumes.healthy)
    assert pods.claim_of("pv", Deadline.after(5)) == ("default", "one") and asked(api) == 0
    assert pods._claims == {"pv": ("default", "one")}  # what is others' costs no memory
    api.put("persistentvolumes", "pv", volume("two"))
    until(lambda: pods.claim_of("pv", Deadline.after(5)) == ("default", "two"))
    assert asked(api) == 0
    api.put("persistentvolumes", "pv", volume(None))
    until(lambda: not pods._claims)
    with pytest.raises(NotThere, match="bound to no claim"):
        pods.claim_of("pv", Deadline.after(5))
    api.put("persistentvolumes", "pv", volume("three"))
    until(lambda: pods._claims)
    api.drop("persistentvolumes", "pv")
    until(lambda: not pods._claims)


def test_what_is_followed_is_asked_anew_where_the_pod_has_no_such_claim(api, known):
    api.put("persistentvolumes", "pv", volume("old"))
    pods = known()
    until(lambda: pods._volumes.healthy)
    api.bookmark_seconds = 30
    pods._claims["pv"] = ("default", "older")  # as before an event that is still on its way
    pod = PodFacts(uid=UID.format(0), claims={"data": "old"})
    own = with_own(pod, PodRef(namespace="default", name="p", persistent_volume="pv"), pods, Deadline.after(5))
    assert own.own == {"data"} and asked(api) == 1


def test_without_the_right_to_volumes_pods_are_followed_all_the_same(api, known):
    api.denied.add("persistentvolumes")
    api.pod("p", UID.format(0))
    pods = known()
    until(pods.healthy)
    assert pods.pod(ref(), Deadline.after(5)).uid == UID.format(0)
    with pytest.raises(PodUnknown, match="403"):
        pods.claim_of("pv", Deadline.after(5))


def by_names_only(api: ApiDouble) -> None:
    """As Kubernetes' Node authorizer treats a node's own credentials."""
    api.refuses = lambda path, query: path == "/api/v1/persistentvolumes"


def of_ours(claim: str, uid: str = "uid") -> dict[str, object]:
    return {"spec": {"csi": {"driver": "csi.runvol.io"}, "claimRef": {"namespace": "d", "name": claim, "uid": uid}}}


def named(api: ApiDouble, name: str) -> int:
    return sum(path == f"/api/v1/persistentvolumes/{name}" for path, _ in api.requests)


def test_who_may_not_list_volumes_asks_for_each_by_its_name_once_and_waits_for_none(api, known):
    by_names_only(api)
    api.put("persistentvolumes", "pv", of_ours("one"))
    api.put("persistentvolumes", "others", volume("x", "disk.example.com"))
    pods = known()
    until(lambda: pods._volumes.refused and pods.healthy())
    assert pods.claim_heard_of("pv") == ("", "", "")
    assert until(lambda: pods.claim_heard_of("pv") == ("d", "one", "uid"))
    for name in ("others", "none", "no/name"):
        assert pods.claim_heard_of(name) == ("", "", "")
    until(lambda: named(api, "others") and named(api, "none"))
    for _ in range(100):
        for name in ("pv", "others", "none", "no/name"):
            pods.claim_heard_of(name)
    time.sleep(0.1)
    assert [named(api, name) for name in ("pv", "others", "none")] == [1, 1, 1]
    # Of volumes there is no watch, so none is told to be ill.
    assert [one.what for one in pods.watches] == ["pods of this node", "RuntimeClasses"]
    # An answer is believed for a while; then the last one counts until there is another.
    api.put("persistentvolumes", "pv", of_ours("two"))
    answers = pods._by_name._answers
    answers["pv"] = dataclasses.replace(answers["pv"], until=time.monotonic() - 1)
    assert pods.claim_heard_of("pv") == ("d", "one", "uid")
    assert until(lambda: pods.claim_heard_of("pv") == ("d", "two", "uid"))


def test_who_comes_once_is_told_at_once_and_waits_no_longer_than_said(api, known):
    by_names_only(api)
    api.put("persistentvolumes", "pv", of_ours("one"))
    pods = known()
    until(lambda: pods._volumes.refused)
    assert pods.claim_heard_of("pv", 1.0) == ("d", "one", "uid")
    assert pods.claim_heard_of("none", 1.0) == ("", "", "")
    api.frozen = True
    began = time.monotonic()
    assert pods.claim_heard_of("other", 0.3) == ("", "", "")
    assert pods.claim_heard_of("pv", 0.3) == ("d", "one", "uid")
    assert time.monotonic() - began < 1.5


def test_who_may_list_volumes_after_all_follows_them(api, known):
    by_names_only(api)
    api.put("persistentvolumes", "pv", of_ours("one"))
    pods = known()
    until(lambda: pods._volumes.refused)
    api.refuses = lambda *_: False
    until(lambda: pods._volumes.healthy and not pods._volumes.refused)
    assert pods.claim_heard_of("pv") == ("d", "one", "uid") and not named(api, "pv")
    assert len(pods.watches) == 3


def test_what_was_followed_before_the_right_went_is_asked_anew(api, known):
    api.put("persistentvolumes", "pv", of_ours("one"))
    pods = known()
    until(lambda: pods._volumes.healthy)
    by_names_only(api)
    api.put("persistentvolumes", "pv", of_ours("two"))
    until(lambda: pods.claim_heard_of("pv")[1] == "two")
    api.stop()
    api.put("persistentvolumes", "pv", of_ours("three"))
    api.start()
    until(lambda: pods._volumes.refused)
    assert until(lambda: pods.claim_heard_of("pv")[1] == "three")


def test_an_api_that_is_away_is_no_refusal(api, known):
    api.put("persistentvolumes", "pv", of_ours("one"))
    pods = known()
    until(lambda: pods._volumes.healthy)
    api.stop()
    until(lambda: not pods._volumes.healthy)
    assert not pods._volumes.refused and pods.claim_heard_of("pv") == ("d", "one", "uid")


def test_volumes_beyond_what_is_remembered_take_no_memory(api, known, monkeypatch):
    monkeypatch.setattr(claims_by_name, "_MOST", 10)
    by_names_only(api)
    pods = known()
    until(lambda: pods._volumes.refused)
    for number in range(200):
        pods.claim_heard_of(f"pv-{number}")
    names = pods._by_name
    assert len(names._wanted) <= 10
    until(lambda: not names._wanted)
    assert len(names._answers) <= 10


def test_only_this_nodes_pods_are_followed(api, known):
    api.pod("here", UID.format(0))
    api.pod("there", UID.format(1), node="node-2")
    pods = known()
    until(pods.healthy)
    assert [*pods._pods] == [UID.format(0)]
    api.pod("there", UID.format(2), node="node-2")
    api.drop("pods", "here")
    until(lambda: not pods._pods)


def test_many_pods_come_page_by_page(api, known):
    for number in range(120):
        api.pod(f"p{number}", f"uid-{number}")
    pods = known()
    until(lambda: len(pods._pods) == 120)
    assert sum("pods?limit=50" in path for path, _ in api.requests) == 3


def test_a_pod_that_the_watch_has_not_yet_is_asked_for(api, known):
    pods = known()
    until(pods.healthy)
    api.frozen = True
    api.objects["pods"]["p"] = {
        "metadata": {"name": "p", "uid": UID.format(0)},
        "spec": {"runtimeClassName": "kata", "containers": []},
    }
    api.frozen = False
    assert pods.pod(ref(), Deadline.after(5)).runtime_class == "kata"


@pytest.mark.parametrize("how", ["dies", "forgets"])
def test_a_watch_goes_on_whatever_happens_to_the_server(api, known, how):
    api.pod("p", UID.format(0))
    pods = known()
    until(pods.healthy)
    if how == "forgets":
        api.bookmark_seconds = 30
        api.forget()
    api.stop()
    until(lambda: not pods.healthy())
    api.drop("pods", "p")
    api.pod("q", UID.format(1), runtime_class="kata")
    if how == "forgets":
        api.forget()
        api.bookmark_seconds = 0.2
    api.start()
    until(lambda: pods.healthy() and [*pods._pods] == [UID.format(1)])


def test_after_a_reboot_without_the_server_everything_is_known(api, known):
    api.put("runtimeclasses", "kata", {"handler": "kata-qemu"})
    api.put("persistentvolumes", "pv", {"spec": {"claimRef": {"namespace": "default", "name": "claim"}}})
    api.pod("p", UID.format(0), runtime_class="kata")
    before = known()
    first = before.pod(ref(), Deadline.after(5))
    before.handler("kata", Deadline.after(5))
    assert before.claim_of("pv", Deadline.after(5)) == ("default", "claim")
    kept = before._kept
    until(lambda: kept.get("pod", UID.format(0), PodFacts) and kept.get("claim", "pv", tuple[str, str]))
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
    until(lambda: pods._kept.get("pod", UID.format(0), PodFacts))
    api.frozen = True
    began = time.monotonic()
    assert pods.pod(ref(), Deadline.after(10)).runtime_class == "kata"
    assert time.monotonic() - began < 3


def test_a_class_that_was_made_anew_has_its_new_handler(api, known):
    api.put("runtimeclasses", "k", {"handler": "one"})
    pods = known()
    until(pods.healthy)
    assert pods.handler("k", Deadline.after(5)) == "one"
    api.drop("runtimeclasses", "k")
    api.put("runtimeclasses", "k", {"handler": "two"})
    until(lambda: pods.handler("k", Deadline.after(5)) == "two")


def test_a_writer_without_memory_for_a_moment_writes_on(tmp_path, monkeypatch):
    kept = Kept(str(tmp_path / "answers"))
    whole = kept_answers.durable.replace
    for trouble in (MemoryError, IndexError):
        monkeypatch.setattr(
            kept_answers.durable, "replace", lambda *_, _trouble=trouble, **__: (_ for _ in ()).throw(_trouble)
        )
        kept.put("class", trouble.__name__.lower(), "x")
    until(kept._waiting.empty)
    time.sleep(0.05)
    monkeypatch.setattr(kept_answers.durable, "replace", whole)
    kept.put("class", "after", "x")
    until(lambda: kept.get("class", "after", str))


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
    kept.put("class", "last", "x")
    until(lambda: kept.get("class", "last", str))
    assert kept.get("pod", name, PodFacts) is None
    assert names(tmp_path / "answers") == ["class-last.json"] and names(tmp_path) == []


# -- what the server says, and what it is no answer to


def names(kept: Path) -> list[str]:
    return sorted(path.name for path in kept.glob("*.json"))


def remembered(pods: KnownPods, **more: str) -> None:
    """Kept from before, all of it."""
    pods._kept.put("pod", UID.format(0), PodFacts(uid=UID.format(0), runtime_class="kata"))
    pods._kept.put("class", "kata", "kata-qemu", **more)
    pods._kept.put("claim", "pv", ("default", "claim"), **more)
    until(lambda: len(names(Path(pods._kept._directory))) == 3)


def answers(pods: KnownPods) -> list[object]:
    """What is known of the pod, the class and the volume, or why not."""
    found: list[object] = []
    for ask in (lambda soon: pods.pod(ref(), soon).runtime_class, lambda soon: pods.handler("kata", soon),
                lambda soon: pods.claim_of("pv", soon)):  # fmt: skip
        try:
            found.append(ask(Deadline.after(5)))
        except PodUnknown as error:
            found.append(type(error))
    return found


ALL = ["kata", "kata-qemu", ("default", "claim")]


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_what_was_kept_is_for_a_server_that_cannot_say(api, known, status):
    api.says = status, {"kind": "Status", "code": status}
    pods = known(follows=False)
    remembered(pods)
    assert answers(pods) == ALL


def test_nothing_that_was_kept_is_believed_over_an_answer(api, known):
    pods = known(follows=False)
    remembered(pods)
    assert answers(pods) == [NotThere, NotThere, NotThere]
    api.stop()
    # A pod of this UID has this class for ever; a class or a volume that is no more may come again as another.
    until(lambda: not pods._kept.has("class", "kata") and not pods._kept.has("claim", "pv"))
    assert answers(pods) == ["kata", PodUnknown, PodUnknown]


def test_a_pod_that_was_made_anew_is_not_the_one_that_was_kept(api, known):
    pods = known(follows=False)
    remembered(pods)
    api.pod("p", UID.format(5))
    assert answers(pods)[0] is NotThere


def test_a_class_that_went_while_it_was_followed_is_not_kept(api, known):
    api.put("runtimeclasses", "kata", {"handler": "kata-qemu"})
    pods = known()
    until(pods.healthy)
    assert pods.handler("kata", Deadline.after(5)) == "kata-qemu"
    until(lambda: pods._kept.get("class", "kata", str))
    api.drop("runtimeclasses", "kata")
    until(lambda: not pods._kept.get("class", "kata", str))


def test_a_kept_class_is_renewed_by_what_the_server_lists(api, known):
    before = known(follows=False)
    remembered(before)
    api.put("runtimeclasses", "kata", {"handler": "other"})
    pods = known()
    until(lambda: pods._kept.get("class", "kata", str) == "other")


def test_a_pod_of_another_node_is_nobodys_here(api, known):
    api.selects = False
    api.pod("there", UID.format(1), node="node-2")
    pods = known()
    until(pods.healthy)
    api.pod("p", UID.format(2), node="node-2")
    api.pod("here", UID.format(3))
    until(lambda: [*pods._pods] == [UID.format(3)])
    with pytest.raises(NotThere, match=r"on the node 'node-2', and this one is 'node-1' \(node.id\)"):
        pods.pod(ref(2), Deadline.after(5))
    pods._kept.put("pod", UID.format(4), PodFacts(uid=UID.format(4)))
    until(lambda: pods._kept.get("pod", UID.format(4), PodFacts))
    assert pods._kept.get("pod", UID.format(2), PodFacts) is None


@pytest.mark.parametrize("spec", [{"containers": [None]}, {"containers": [], "volumes": "x"}, {},
                                  {"containers": "\ud800"}, {"containers": [{"name": "\udfff", "volumeMounts": "\ud800"}]}])  # fmt: skip
def test_an_object_that_is_no_pod_is_passed_over(api, known, spec, caplog):
    odd = {"metadata": {"uid": UID.format(0)}, "spec": {"nodeName": "node-1", **spec}}
    api.put("pods", "odd", odd)
    api.pod("before", UID.format(1))
    api.put("runtimeclasses", "odd", {"handler": {"a": 1}})
    api.put("runtimeclasses", "kata", {"handler": "kata-qemu"})
    pods = known()
    until(pods.healthy)
    for _ in range(3):
        api.put("pods", "odd", odd)
    api.put("runtimeclasses", "other", {"handler": [1]})
    api.pod("after", UID.format(2))
    until(lambda: {*pods._pods} == {UID.format(1), UID.format(2)})
    assert pods._classes == {"kata": "kata-qemu"} and pods.healthy()
    assert sum("passed over" in one.message for one in caplog.records) == 1


@pytest.mark.parametrize("event", [None, [], "x", 7])
def test_an_event_without_an_object_is_passed_over(api, known, event, caplog):
    pods = known()
    until(pods.healthy)
    watch = pods._watches[0]
    caplog.clear()
    watch._line(json.dumps({"type": "ADDED", "object": event}).encode())
    watch._line(b'{"type": "ADDED", "object":' + b"[" * 100_000)
    watch._line(json.dumps({"type": "ADDED", "object": {"metadata": event}}).encode())
    watch._line(json.dumps({"type": "DELETED", "object": {"metadata": event}}).encode())
    assert watch._version not in ("", "None")
    assert len([one for one in caplog.records if one.name == "runvol.watch"]) == 1


# -- a watch that says nothing


def test_a_watch_is_believed_from_its_first_word_and_for_a_while(api, known, monkeypatch):
    api.bookmark_seconds = 1.0
    pods = known()
    until(lambda: sum("watch=1" in path for path, _ in api.requests) == 3)
    assert not pods.healthy()
    until(pods.healthy)
    monkeypatch.setattr(api_watch, "_NEWS", 0.3)
    api.bookmark_seconds = 30.0
    until(lambda: not pods.healthy(), 3)


def test_bytes_that_never_make_a_line_are_no_news(api, known, monkeypatch):
    """A class that was made anew meanwhile is known by its new handler, and such a watch ends."""
    monkeypatch.setattr(api_watch, "_LINE", 1.0)
    api.drips = True
    api.put("runtimeclasses", "k", {"handler": "one"})
    pods = known()
    until(lambda: pods._classes)
    api.drop("runtimeclasses", "k")
    api.put("runtimeclasses", "k", {"handler": "two"})
    time.sleep(0.3)
    assert not pods.healthy()
    assert pods.handler("k", Deadline.after(5)) == "two"
    until(lambda: sum("watch=1" in path for path, _ in api.requests) >= 4, 5)


@pytest.mark.parametrize(("status", "anew"), [(410, True), (400, True), (403, True), (429, False), (503, False)])
def test_a_watch_that_is_refused_begins_with_a_list(api, known, status, anew):
    api.says_of_watches = status, {"kind": "Status", "code": status}
    pods = known()
    watch = pods._watches[0]
    path = watch._path + "?"

    def asked_for(word: str) -> int:
        return sum(path in one and word in one for one, _ in api.requests)

    until(lambda: asked_for("watch=1") >= 3)
    assert (asked_for("limit=") >= 3) is anew
    api.pod("p", UID.format(0))
    api.says_of_watches = None
    until(lambda: pods.healthy() and UID.format(0) in pods._pods)


# -- what is kept, and for how long


def test_a_file_that_got_another_name_is_no_answer(api, known, tmp_path):
    api.stop()
    pods = known(follows=False)
    remembered(pods)
    kept = tmp_path / "answers"
    os.rename(kept / f"pod-{UID.format(0)}.json", kept / f"pod-{UID.format(1)}.json")
    os.rename(kept / "class-kata.json", kept / "class-runc.json")
    with pytest.raises(PodUnknown, match="nothing is kept"):
        pods.pod(ref(1), Deadline.after(5))
    with pytest.raises(PodUnknown, match="nothing is kept"):
        pods.handler("runc", Deadline.after(5))


def test_another_clusters_classes_and_volumes_are_not_this_ones(api, known, tmp_path):
    api.stop()
    (tmp_path / "ca.crt").write_text("one")
    pods = known(follows=False)
    remembered(pods, cluster=pods._api.cluster())
    assert answers(pods) == ALL
    (tmp_path / "ca.crt").write_text("two")
    assert answers(pods) == ["kata", PodUnknown, PodUnknown]


def test_what_was_kept_of_a_cluster_stays_its_own_while_no_cluster_is_known(known, tmp_path):
    """The kubeconfig of the cluster to which the node went cannot be read yet."""
    pods = known(follows=False)
    remembered(pods, cluster="one")
    away = KnownPods(KubernetesApi(kubeconfig=str(tmp_path / "none")), node="node-1", kept=str(tmp_path / "answers"),
                     follows=False)  # fmt: skip
    assert away.handler("kata", Deadline.after(5)) == "kata-qemu"
    time.sleep(0.1)
    assert pods._kept.get("class", "kata", str, cluster="two") is None
    assert pods._kept.get("class", "kata", str, cluster="one") == "kata-qemu"


@pytest.mark.parametrize("what", ["api", "kubeconfig"])
def test_where_no_thread_is_to_be_had_what_was_kept_counts(api, known, tmp_path, monkeypatch, what):
    def none(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pods = known(follows=False)
    remembered(pods)
    config = tmp_path / "kubeconfig"
    config.write_text(
        json.dumps({"clusters": [{"name": "a", "cluster": {"server": api.url}}], "current-context": "a",
                    "contexts": [{"name": "a", "context": {"cluster": "a"}}]})
    )  # fmt: skip
    if what == "kubeconfig":
        pods._api = KubernetesApi(kubeconfig=str(config))
    with monkeypatch.context() as scarce:
        scarce.setattr(threading.Thread, "start", none)
        assert answers(pods) == ALL
    api.pod("p", UID.format(0), runtime_class="now")
    api.put("runtimeclasses", "now", {"handler": "now"})
    assert pods.handler("now", Deadline.after(10)) == "now"


@pytest.mark.parametrize("known_as", [("elsewhere", "data"), ("default", "older")])
def test_a_claim_of_another_namespace_is_asked_for_anew(known_as):
    class Lags:
        def claim_of(self, _volume: str, _deadline: Deadline, *, anew: bool = False) -> tuple[str, str]:
            return ("default", "data") if anew else known_as

    pod = PodFacts(uid=UID.format(0), claims={"v": "data"})
    own = with_own(pod, PodRef(namespace="default", name="p", persistent_volume="pv"), Lags(), Deadline.after(5))
    assert own.own == {"v"}


def test_a_list_that_takes_long_and_fails_is_not_asked_for_at_once_again(api, known, monkeypatch):
    monkeypatch.setattr(api_watch, "_LIST", 0.3)  # longer than the longest pause
    real = api._listed
    monkeypatch.setattr(api, "_listed", lambda *asked: (time.sleep(0.4), real(*asked)))
    pauses: list[float] = []
    monkeypatch.setattr(api_watch.random, "uniform", lambda _low, _high: 1.0)
    pods = known()
    monkeypatch.setattr(pods._volumes._stop, "wait", lambda pause: (pauses.append(pause), time.sleep(pause)))
    until(lambda: len(pauses) > 6)
    assert pauses[-3:] == [0.1] * 3


def kubelets(tmp_path: Path, *uids: str) -> Path:
    for uid in uids:
        (tmp_path / "kubelet/pods" / uid).mkdir(parents=True)
    return tmp_path / "kubelet"


def aged(directory: Path) -> None:
    day = time.time() - 25 * 3600
    for path in directory.glob("*.json"):
        os.utime(path, (day, day))


def test_answers_of_pods_that_are_no_more_go_after_a_day(api, known, tmp_path):
    api.pod("followed", "followed")
    pods = known(roots=[str(kubelets(tmp_path, "there"))])
    until(lambda: pods._pods)
    kept = tmp_path / "answers"
    for name in ("followed", "there", "old"):
        pods._kept.put("pod", name, PodFacts(uid=name))
    until(lambda: len(names(kept)) == 3)
    aged(kept)
    pods._kept.put("pod", "new", PodFacts(uid="new"))
    until(lambda: "pod-new.json" in names(kept))
    pods._kept.tidy()
    assert names(kept) == ["pod-followed.json", "pod-new.json", "pod-there.json"]


def test_a_list_without_pods_takes_no_answer_away(api, known, tmp_path):
    """As of a proxy that has nothing yet: kubelet has the pods all the same."""
    pods = known(roots=[str(kubelets(tmp_path, UID.format(0)))])
    remembered(pods)
    aged(tmp_path / "answers")
    until(pods.healthy)
    pods._kept.tidy()
    assert len(names(tmp_path / "answers")) == 3


def test_where_kubelets_directory_is_not_to_be_seen_no_pod_is_gone(api, known, tmp_path):
    for roots in ([], [str(tmp_path / "nowhere")]):
        pods = known(roots=roots)
        remembered(pods)
        aged(tmp_path / "answers")
        pods._kept.tidy()
        assert len(names(tmp_path / "answers")) == 3


def test_the_oldest_of_too_many_answers_go(api, known, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_answers, "_MOST", {"pod": 2, "class": 3, "claim": 1})
    pods = known(roots=[str(kubelets(tmp_path, "p0", "p1"))])
    kept = tmp_path / "answers"
    for number in range(5):
        for kind, name in (("pod", f"p{number}"), ("class", f"c{number}"), ("claim", f"v{number}")):
            pods._kept.put(kind, name, name)
        there = {f"{one}{number}.json" for one in ("pod-p", "class-c", "claim-v")}
        until(lambda there=there: there <= {*names(kept)})
        for path in kept.glob(f"*{number}.json"):
            os.utime(path, (time.time() - 100 + number,) * 2)
    pods._kept.tidy()
    assert names(kept) == ["claim-v4.json", "class-c2.json", "class-c3.json", "class-c4.json",
                           "pod-p0.json", "pod-p1.json", "pod-p3.json", "pod-p4.json"]  # fmt: skip


def test_the_oldest_of_too_much_goes_and_what_nobody_could_read_is_not_kept(api, known, tmp_path, monkeypatch):
    """A pod may be 1.5 MiB, and whoever makes pods makes many."""
    pods = known(roots=[str(tmp_path)])
    (tmp_path / "pods/uid-0").mkdir(parents=True)
    monkeypatch.setattr(kept_answers, "_ALL", 100_000)
    for n in range(20):
        pods._kept.put("pod", f"uid-{n}", PodFacts(uid=f"uid-{n}", claims={"v": "c" * 20_000}))
        until(lambda n=n: os.path.exists(tmp_path / f"answers/pod-uid-{n}.json"))
        os.utime(tmp_path / f"answers/pod-uid-{n}.json", (time.time() - 60 + n,) * 2)
    pods._kept.tidy()
    assert pods._kept.get("pod", "uid-0", PodFacts)  # it is there
    assert 3 <= len(os.listdir(tmp_path / "answers")) <= 6
    assert pods._kept.get("pod", "uid-19", PodFacts) and not pods._kept.get("pod", "uid-2", PodFacts)
    pods._kept.put("pod", "uid-19", PodFacts(uid="uid-19", claims={"v": "c" * (1 << 20)}))
    until(lambda: not os.path.exists(tmp_path / "answers/pod-uid-19.json"))
    assert pods._kept.get("pod", "uid-19", PodFacts) is None


def test_it_is_tidied_while_much_is_kept(api, known, tmp_path, monkeypatch):
    pods = known(roots=[str(tmp_path)])
    (tmp_path / "pods").mkdir()
    monkeypatch.setattr(kept_answers, "_ALL", 100_000)
    for n in range(20):
        pods._kept.put("pod", f"uid-{n}", PodFacts(uid=f"uid-{n}", claims={"v": "c" * 20_000}))
    until(lambda: pods._kept._waiting.empty() and 0 < len(os.listdir(tmp_path / "answers")) <= 10)


def test_it_is_tidied_as_long_as_the_process_lives(api, known, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_answers, "_TIDY", 0.1)
    pods = known(roots=[str(kubelets(tmp_path, "there"))])
    for name in ("there", "gone"):
        pods._kept.put("pod", name, PodFacts(uid=name))
    kept = tmp_path / "answers"
    until(lambda: len(names(kept)) == 2)
    aged(kept)
    until(lambda: names(kept) == ["pod-there.json"])
