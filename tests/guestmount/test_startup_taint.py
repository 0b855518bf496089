"""A node's taint goes once its driver is registered, whatever happens to the API meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from blockdev import Deadline
from blockdev.deadlines import NoThread
from guestmount import KubernetesApi, startup_taint
from guestmount.pods import PodUnknown
from guestmount.startup_taint import StartupTaint
from tests.api_double import ApiDouble
from tests.until import until

KEY = "csi.runvol.io/not-ready"
OTHER = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiDouble]:
    monkeypatch.setattr(startup_taint, "_LOOK", 0.01)
    monkeypatch.setattr(startup_taint, "_LATER", 0.01)
    monkeypatch.setattr(startup_taint, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(startup_taint, "_LONGEST_PAUSE", 0.1)
    one = ApiDouble()
    one.put(
        "nodes", "node-1", {"spec": {"podCIDR": "10.0.0.0/24", "taints": [{"key": KEY, "effect": "NoSchedule"}, OTHER]}}
    )
    yield one
    one.stop()


@pytest.fixture
def taint(api: ApiDouble, tmp_path) -> Iterator[Callable[..., StartupTaint]]:
    made = []

    def one(registered: Callable[[], int]) -> StartupTaint:
        source = KubernetesApi(server=api.url, account=str(tmp_path))
        made.append(StartupTaint(source, node_id="node-1", key=KEY, registered=registered))
        made[-1].start()
        return made[-1]

    yield one
    for each in made:
        each.stop()


def taints(api: ApiDouble) -> list[dict[str, str]]:
    return api.objects["nodes"]["node-1"]["spec"]["taints"]


def test_it_goes_with_the_registration_and_nothing_else_does(api, taint):
    registered = []
    taint(lambda: bool(registered))
    time.sleep(0.1)
    assert len(taints(api)) == 2 and not api.requests
    registered.append(1)
    until(lambda: taints(api) == [OTHER])
    assert api.objects["nodes"]["node-1"]["spec"]["podCIDR"] == "10.0.0.0/24"


@pytest.mark.parametrize("trouble", ["forbidden", "away"])
def test_it_is_tried_until_it_is_done(api, taint, trouble):
    if trouble == "forbidden":
        api.forbids = True
    else:
        api.says = (503, {"kind": "Status"})
    taint(lambda: True)
    until(lambda: len(api.requests) > 3)
    assert len(taints(api)) == 2
    api.forbids, api.says = False, None
    until(lambda: taints(api) == [OTHER])


def test_somebody_elses_change_meanwhile_is_kept(api, taint):
    """The server refuses what was made of an older version."""
    change = api.objects["nodes"]["node-1"]["spec"] | {"unschedulable": True}
    api.before_put = lambda: (setattr(api, "before_put", None), api.put("nodes", "node-1", {"spec": change}))
    taint(lambda: True)
    until(lambda: taints(api) == [OTHER])
    assert api.objects["nodes"]["node-1"]["spec"]["unschedulable"] is True


@pytest.mark.parametrize("spec", [{}, {"taints": None}, {"taints": []}, {"taints": [OTHER]}, None, []])
def test_a_node_without_it_is_left_alone(api, taint, spec):
    api.put("nodes", "node-1", {"spec": spec})
    taint(lambda: True)
    until(lambda: api.requests)
    time.sleep(0.1)
    assert not any(path.startswith("PUT") for path, _ in api.requests) and len(api.requests) == 1


def test_a_node_that_a_kubelet_made_anew_loses_it_again(api, taint):
    """A kubelet that starts registers its node, and then the driver."""
    before, times = api.objects["nodes"]["node-1"], [1]
    taint(lambda: times[0])
    until(lambda: taints(api) == [OTHER])
    api.drop("nodes", "node-1")
    api.put("nodes", "node-1", {"spec": before["spec"]})
    time.sleep(0.1)
    assert len(taints(api)) == 2
    times[0] = 0  # it is not registered yet
    time.sleep(0.1)
    assert len(taints(api)) == 2
    times[0] = 2
    until(lambda: taints(api) == [OTHER])


@pytest.mark.parametrize("error", [NoThread("asking"), MemoryError(), RuntimeError("can't start new thread")])
def test_want_of_a_thread_or_of_memory_is_of_a_moment(api, taint, monkeypatch, error):
    real, moments = KubernetesApi.one, [error] * 3

    def one(self, *asked):
        if moments:
            raise moments.pop()
        return real(self, *asked)

    monkeypatch.setattr(KubernetesApi, "one", one)
    taint(lambda: 1)
    until(lambda: taints(api) == [OTHER])


@pytest.mark.parametrize("metadata", [None, {}, {"resourceVersion": ""}, []])
def test_what_says_no_moment_is_not_put_over_what_others_change(api, tmp_path, metadata):
    """As a proxy answers that keeps a part of the objects; without a version the server takes any."""
    source = KubernetesApi(server=api.url, account=str(tmp_path))
    with pytest.raises(PodUnknown, match="has no resourceVersion"):
        source.replace("the node", "/api/v1/nodes/node-1", {"metadata": metadata, "spec": {}}, Deadline.after(5))
    assert not api.requests and len(taints(api)) == 2
