"""Broken installations: the Kubernetes API, the sidecars, the running containerd. See `test_broken`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockdev import selinux
from tests import api_double
from tests.api_double import ApiDouble
from tests.cri import Runtime
from tests.guestmount.test_running_containerd import KATA, WITH_KATA, says
from tests.installation import ROOT, Installation
from tests.runvol.test_broken import Broken, found_and_put_right

GOOD = {"attachRequired": False, "podInfoOnMount": True, "fsGroupPolicy": "None"}
NAME = "csi.runvol.io"
# What `kubectl apply -f` and `kubectl delete csidriver` do, to the double of this test.
_KUBECTL = """#!{python}
import json, sys, urllib.request, yaml
words = sys.argv[1:]
if words[0] == "apply":
    found = [one for one in yaml.safe_load_all(open(words[2])) if one]
    body = {{"apply": [[one["kind"], one["metadata"]["name"], one] for one in found]}}
elif words[0] == "patch":
    assert words[3] == "--type=merge" and words[4] == "-p", words
    body = {{"patch": [*words[1:3], json.loads(words[5])]}}
else:
    body = {{"delete": words[1:]}}
open({queue!r}, "a").write(json.dumps(body) + "\\n")
"""


@pytest.fixture
def api() -> Iterator[ApiDouble]:
    one = ApiDouble()
    one.objects |= {"csidrivers": {NAME: {"spec": GOOD}}, "nodes": {}}
    one.objects["nodes"]["node-1"] = {"status": {"runtimeHandlers": [{"name": "runc"}, {"name": "kata"}]}}
    yield one
    if not one.stopped:
        one.stop()


@pytest.fixture
def it(api: ApiDouble) -> Iterator[Installation]:
    with Installation() as one:
        one.handler()
        one.set(detect__api_server=api.url)
        yield one


def _with_kubectl(it: Installation, api: ApiDouble) -> Callable[[str, dict[str, str]], int]:
    """Applies a fix whose commands speak to the API."""
    queue = it.directory / "asked"
    it.program("kubectl", _KUBECTL.format(python=sys.executable, queue=str(queue)))
    plain = it.apply

    def apply(fix: str, given: Any) -> int:
        import json

        done = plain(fix, given)
        for line in queue.read_text().splitlines() if queue.exists() else ():
            asked = json.loads(line)
            for kind, name, what in asked.get("apply", ()):
                api.objects[f"{kind.lower()}s"][name] = what
            if "patch" in asked:
                kind, name, changed = asked["patch"]
                api.objects[f"{kind}s"][name]["spec"] |= changed["spec"]
            if "delete" in asked:
                kind, name = asked["delete"]
                del api.objects[f"{kind}s"][name]
        return done

    return apply


def test_csidriver_that_is_missing(it: Installation, api: ApiDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(it, "apply", _with_kubectl(it, api))
    found_and_put_right(it, Broken(id="kubernetes.csidriver-missing", given={"only": "kubectl"},
                                   breaks=lambda _: api.objects["csidrivers"].pop(NAME)))  # fmt: skip


@pytest.mark.parametrize("wrong", [{"podInfoOnMount": False}, {"attachRequired": True}, {"fsGroupPolicy": "File"}])
def test_csidriver_that_says_the_wrong_thing(
    it: Installation, api: ApiDouble, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    monkeypatch.setattr(it, "apply", _with_kubectl(it, api))

    def breaks(_: Installation) -> None:
        api.objects["csidrivers"][NAME] = {"spec": GOOD | wrong}

    found_and_put_right(it, Broken(id="kubernetes.csidriver-wrong", breaks=breaks))


def _of_driver(api: ApiDouble, name: str = NAME, **more: Any) -> Callable[[Installation], None]:
    return lambda _: api.objects["csidrivers"].__setitem__(name, {"spec": GOOD | more})


@pytest.mark.parametrize("name", [NAME, "nfs.csi.runvol.io"])
def test_labels_that_a_drivers_volumes_cannot_be_mounted_with(
    it: Installation, api: ApiDouble, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where SELinux is off kubelet asks for none."""
    monkeypatch.setattr(it, "apply", _with_kubectl(it, api))
    it.set(csi__nfs_endpoint=f"unix://{it.run}/nfs.sock")
    _of_driver(api, "nfs.csi.runvol.io")(it)
    _of_driver(api, name, seLinuxMount=True)(it)
    assert not it.ill("kubernetes.selinux-mount")
    _of_driver(api, name)(it)
    monkeypatch.setattr(selinux, "is_on", lambda: True)
    found_and_put_right(it, Broken(id="kubernetes.selinux-mount", given={"only": "kubectl"},
                                   breaks=_of_driver(api, name, seLinuxMount=True)))  # fmt: skip


def test_labels_are_no_trouble_where_all_volumes_are_block_devices(
    it: Installation, api: ApiDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selinux, "is_on", lambda: True)
    _of_driver(api, seLinuxMount=True)(it)
    assert "volumes.backends" in it.ill("kubernetes.selinux-mount")[0].fix
    it.set(volumes__backends=["loop"])
    assert not it.ill("kubernetes.selinux-mount")


def test_limit_of_volumes_that_kubelet_asks_for_once(
    it: Installation, api: ApiDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(it, "apply", _with_kubectl(it, api))
    for minor in (None, [], "", "x", "33", "33+"):
        api.objects[""] = {"version": {"minor": minor}}
        it.set(csi__max_volumes=5)
        assert not it.ill("kubernetes.limit-not-asked-again"), minor
    api.objects[""] = {"version": {"minor": "34+"}}
    it.set(csi__max_volumes=0)
    found_and_put_right(it, Broken(id="kubernetes.limit-not-asked-again", given={"only": "kubectl"},
                                   breaks=lambda it: it.set(csi__max_volumes=5)))  # fmt: skip


def test_the_file_that_the_fix_names_is_there() -> None:
    found = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/csidrivers.yaml").read_text()))
    assert NAME in [one["metadata"]["name"] for one in found if one]


def test_api_that_does_not_answer(it: Installation, api: ApiDouble) -> None:
    found_and_put_right(it, Broken(id="kubernetes.unreachable", given={"only": "detect.api", "detect.api_server": f'"{api.url}"'},
                                   breaks=lambda it: it.set(detect__api_server="http://127.0.0.1:1")))  # fmt: skip


def test_api_that_does_not_know_who_asks(it: Installation, api: ApiDouble) -> None:
    refused = (401, {"kind": "Status", "code": 401, "reason": "Unauthorized"})
    found_and_put_right(it, Broken(id="kubernetes.unauthorized", breaks=lambda _: setattr(api, "says", refused),
                                   words="renew the token", by_hand=lambda _: setattr(api, "says", None)))  # fmt: skip


@pytest.mark.parametrize("kind", ["pods", "runtimeclasses"])
def test_account_that_may_not(it: Installation, api: ApiDouble, kind: str) -> None:
    found_and_put_right(it, Broken(id="kubernetes.forbidden", breaks=lambda _: api.denied.add(kind),
                                   words="allow the plugin's account", by_hand=lambda _: api.denied.clear()))  # fmt: skip


def test_driver_objects_that_may_not_be_read_are_not_known(it: Installation, api: ApiDouble) -> None:
    api.refuses = lambda path, _query: "csidrivers" in path
    (found,) = it.ill("kubernetes.csidriver-unreadable")
    assert found.state == "unknown" and "allow the plugin's account to get csidrivers" in found.fix


def test_class_that_binds_at_once(it: Installation, api: ApiDouble) -> None:
    def of(mode: str) -> None:
        api.objects["storageclasses"]["a"] = {
            "metadata": {"name": "a"}, "provisioner": NAME, "volumeBindingMode": mode
        }  # fmt: skip

    found_and_put_right(it, Broken(id="kubernetes.class-binds-at-once", breaks=lambda _: of("Immediate"),
                                   words="WaitForFirstConsumer", by_hand=lambda _: of("WaitForFirstConsumer")))  # fmt: skip


def test_node_of_another_name(it: Installation) -> None:
    found_and_put_right(it, Broken(id="kubernetes.node-unreadable", breaks=lambda it: it.set(node__id="other"),
                                   given={"node.id": '"node-1"'}))  # fmt: skip


def test_handlers_that_kubelets_runtime_has_not(it: Installation, api: ApiDouble) -> None:
    """Restarted, containerd reads its file, and kubelet writes its handlers into the node."""

    def restarted(it: Installation) -> None:
        names = [{"name": "runc"}, {"name": "kata"}, {"name": "more"}]
        api.objects["nodes"]["node-1"] = {"status": {"runtimeHandlers": names}}

    found_and_put_right(it, Broken(id="kubernetes.handlers-differ", breaks=lambda it: it.handler("more"),
                                   words="restart containerd", by_hand=restarted))  # fmt: skip


def test_no_api_at_all(it: Installation, api: ApiDouble) -> None:
    kubeconfig = it.directory / "kubeconfig"
    kubeconfig.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nusers: [{name: u, user: {}}]\n"
        f"clusters: [{{name: c, cluster: {{server: '{api.url}'}}}}]\n"
        "contexts: [{name: c, context: {cluster: c, user: u}}]\n"
    )
    found_and_put_right(it, Broken(id="kubernetes.not-configured", breaks=lambda it: it.set(detect__api_server=""),
                                   given={"detect.kubeconfig": f'"{kubeconfig}"'}))  # fmt: skip
    assert "kubernetes.api" in [one.id for one in it.look()]


@pytest.mark.parametrize(("off", "state"), [(-3600, "broken"), (3600, "broken"), (20, "warning")])
def test_clock_that_is_off(it: Installation, monkeypatch: pytest.MonkeyPatch, off: float, state: str) -> None:
    ahead = [0.0]
    monkeypatch.setattr(api_double.BaseHTTPRequestHandler, "date_time_string",
                        lambda *_: formatdate(time.time() + ahead[0], usegmt=True))  # fmt: skip
    monkeypatch.setattr(it, "apply", lambda fix, _given: ahead.__setitem__(0, 0.0) or fix.count("chronyd"))
    found_and_put_right(it, Broken(id="clock.off", breaks=lambda _: ahead.__setitem__(0, off)))
    ahead[0] = off
    (found,) = it.ill("clock.off")
    assert found.state == state and abs(int(found.finding.split()[1]) - abs(off)) <= 2


# -- on the node


def test_containerd_that_was_not_started_since_its_file_was_changed(it: Installation) -> None:
    with Runtime() as runtime:
        it.containerd.write_text(WITH_KATA)
        runtime.config = says(kata=KATA)
        it.set(cri__endpoint=runtime.endpoint)

        def restarted(_: Installation) -> None:
            runtime.config = says(kata=KATA, more={**KATA, "runtimePath": "/opt/other"})

        def breaks(it: Installation) -> None:
            more = WITH_KATA.rpartition("[plugins")[0].rpartition("[plugins")
            it.containerd.write_text(WITH_KATA + (more[1] + more[2]).replace("runtimes.kata", "runtimes.more")
                                     .replace("/opt/kata/bin/containerd-shim-kata-v2", "/opt/other")
                                     + '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.more.options]\n'
                                     'ConfigPath = "/opt/kata/configuration-qemu.toml"\n')  # fmt: skip

        found_and_put_right(it, Broken(id="containerd.not-restarted", breaks=breaks, words="restart containerd",
                                       by_hand=restarted))  # fmt: skip


def test_containerd_that_does_not_answer(it: Installation) -> None:
    with Runtime() as runtime:
        it.containerd.write_text(WITH_KATA)
        runtime.config = says(kata=KATA)
        it.set(cri__endpoint=runtime.endpoint)
        found_and_put_right(it, Broken(
            id="containerd.silent", breaks=lambda it: it.set(cri__endpoint=f"unix://{it.directory}/none.sock"),
            given={"cri.endpoint": f'"{runtime.endpoint}"'},
        ))  # fmt: skip


def _sidecar(it: Installation, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [f"/{name}", "-c", "import time; time.sleep(120)", f"--csi-address={it.run}/csi.sock", *arguments],
        executable=sys.executable,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("known", "name", "wrong"),
    [("sidecars.not-per-node", "csi-provisioner", ["--strict-topology"]),
     ("sidecars.topology-not-strict", "csi-provisioner", ["--node-deployment"]),
     ("sidecars.not-per-node", "csi-snapshotter", [])],
)  # fmt: skip
def test_sidecar_with_the_wrong_arguments(it: Installation, known: str, name: str, wrong: list[str]) -> None:
    """It is started anew with the argument that the fix has."""
    running: list[subprocess.Popen[bytes]] = []

    def start(arguments: list[str]) -> None:
        for one in running:
            one.kill()
            one.wait()
        running[:] = [_sidecar(it, name, *arguments)]
        time.sleep(0.2)

    def anew(it: Installation) -> None:
        start([*wrong, *(one.fix.split("`")[1] for one in it.ill(known))])

    try:
        found_and_put_right(it, Broken(id=known, breaks=lambda _: start(wrong), words="`--", by_hand=anew))
    finally:
        for one in running:
            one.kill()
            one.wait()


def test_resizer_beside_a_nodes_plugin(it: Installation) -> None:
    running: list[subprocess.Popen[bytes]] = []

    def stop(_: Installation) -> None:
        running[0].kill()
        running[0].wait()

    try:
        found_and_put_right(it, Broken(
            id="sidecars.resizer-on-node", breaks=lambda it: (running.append(_sidecar(it, "csi-resizer")), time.sleep(0.2)),
            words="beside a controller", by_hand=stop,
        ))  # fmt: skip
    finally:
        stop(it)


# -- shared images


def test_share_that_is_not_mounted(it: Installation, tmp_path: Path) -> None:
    from tests.runvol.test_broken import snapshotter

    snapshotter()(it)
    (tmp_path / "share").mkdir()
    it.set(snapshotter__images=str(tmp_path / "share"))
    found_and_put_right(it, Broken(
        id="images.unreadable", breaks=lambda _: (tmp_path / "share").rename(tmp_path / "gone"), words="mount its storage",
        by_hand=lambda _: (tmp_path / "gone").rename(tmp_path / "share"),
    ))  # fmt: skip
    found_and_put_right(it, Broken(
        id="images.trust-damaged", breaks=lambda it: it.set(snapshotter__image_keys=[str(tmp_path / "key.pub")]),
        words="its message", by_hand=lambda it: it.execute(f"runvol images keygen {tmp_path}/key"),
    ))  # fmt: skip
