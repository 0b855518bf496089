"""What the running containerd says, and which containerd is kubelet's."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from blockdev import Deadline
from guestmount import Detector, DetectSettings, PodRef, RuntimeUnknown, running_containerd
from guestmount.containerd_places import AUTO, PLACES, Places
from guestmount.cri import Sandboxes
from guestmount.pods import facts_from
from guestmount.running_containerd import KubeletsContainerd
from runvol import config as settings
from runvol import doctor_containerd
from tests.cri import READY, WITNESS, Runtime

REF = PodRef(namespace="default", name="web", uid="uid-1")
KATA = {
    "runtimeType": "io.containerd.kata.v2",
    "runtimePath": "/opt/kata/bin/containerd-shim-kata-v2",
    "PodAnnotations": ["io.katacontainers.*"],
    "ContainerAnnotations": None,
    "options": {"ConfigPath": "/opt/kata/configuration-qemu.toml"},
    "privileged_without_host_devices": False,
    "snapshotter": "native",
    "sandboxer": "podsandbox",
}
RUNC = {"runtimeType": "io.containerd.runc.v2", "runtimePath": "", "PodAnnotations": None, "options": None}
NEWER = """
version = 3
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
WITH_KATA = (
    NEWER
    + """
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
runtime_path = "/opt/kata/bin/containerd-shim-kata-v2"
pod_annotations = ["io.katacontainers.*"]
snapshotter = "native"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata.options]
ConfigPath = "/opt/kata/configuration-qemu.toml"
"""
)


def says(default: str = "runc", *, untrusted: Any = None, **handlers: Any) -> str:
    """As containerd 2.4 prints it; `untrusted` stands in 1.6's and 1.7's."""
    table = {"defaultRuntimeName": default, "runtimes": {"runc": RUNC, **handlers}, "ignoreRdtNotEnabledErrors": False}
    if untrusted is not None:
        table |= {"snapshotter": "overlayfs", "untrustedWorkloadRuntime": untrusted, "defaultRuntime": untrusted}
    return json.dumps({"containerd": table, "cni": {"binDirs": ["/opt/cni/bin"]}, "enableSelinux": False})


class Pods:
    """A pod, with a RuntimeClass of its handler's name."""

    def __init__(self, handler: str = "") -> None:
        self._class = handler

    def pod(self, _ref: PodRef, _deadline: Deadline) -> Any:
        spec = {"containers": [], **({"runtimeClassName": self._class} if self._class else {})}
        return facts_from({"metadata": {"uid": "uid-1"}, "spec": spec})

    def followed(self, _uid: str) -> None:
        return None

    def handler(self, runtime_class: str, _deadline: Deadline) -> str:
        return runtime_class


@pytest.fixture
def runtime():
    with Runtime() as one:
        one.config = says()
        yield one


@pytest.fixture
def detector(tmp_path, runtime):
    def detector(file: str | None, pods: Any = None, **more: Any) -> Detector:
        path = tmp_path / "config.toml"
        path.unlink(missing_ok=True)
        if file is not None:
            path.write_text(file)
        found = {"containerd_config": str(path), "cri_endpoint": runtime.endpoint, "root": str(tmp_path)}
        return Detector(DetectSettings(**(found | more)), pods)

    return detector


def detected(detector: Detector) -> tuple[str, str]:
    answer = detector.detect(REF, "", Deadline.after(5))
    return answer.kind, answer.handler


def test_a_handler_that_is_runc_in_the_file_and_kata_in_what_runs_is_kata(detector, runtime):
    runtime.config = says(secure=KATA)
    file = NEWER + '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.secure]\nruntime_type = "runc.v2"\n'
    assert detected(detector(file, Pods("secure"))) == ("sandbox", "secure")
    assert detected(detector(file, Pods("secure"), cri_endpoint="")) == ("host", "runc")


def test_a_default_that_is_another_one_in_what_runs_is_that(detector, runtime):
    runtime.config = says("kata", kata=KATA)
    assert detected(detector(NEWER, Pods())) == ("sandbox", "kata")
    assert detected(detector(None, Pods())) == ("sandbox", "kata")


def test_a_handler_that_what_runs_has_not_yet_is_waited_for(detector, runtime):
    """Its pod cannot start before containerd is started again, which may give the handler any type."""
    with pytest.raises(RuntimeUnknown, match=r"no handler 'kata'.*config.toml has it: restart containerd"):
        detected(detector(WITH_KATA, Pods("kata")))
    runtime.config = says(more=KATA)
    with pytest.raises(RuntimeUnknown, match=r"no handler 'kata'.*add it to .*or see cri.endpoint"):
        detected(detector(NEWER, Pods("kata")))


def test_the_host_without_asking_takes_both_words(detector, runtime):
    assert detected(detector(NEWER)) == ("host", "runc")
    assert detected(detector(None)) == ("host", "runc")
    with pytest.raises(RuntimeUnknown):
        detected(detector(WITH_KATA))
    runtime.config = says(kata=KATA)
    with pytest.raises(RuntimeUnknown):
        detected(detector(NEWER))


def test_all_that_decides_is_read_from_what_containerd_2_and_1_7_print(tmp_path, runtime):
    untrusted = {**KATA, "runtimeEngine": "", "runtimeRoot": ""}
    for said in (says(kata=KATA), says(kata=KATA, untrusted={"runtimeType": ""}), says(untrusted=untrusted)):
        found = running_containerd.parsed(said, "it")
        name = "untrusted" if "runtimeEngine" in said else "kata"
        handler = found.handlers[name]
        assert {*found.handlers} == {"runc", name} and found.running and found.default_handler == "runc"
        assert (handler.runtime_path, handler.config_path) == (KATA["runtimePath"], KATA["options"]["ConfigPath"])
        assert (handler.pod_annotations, handler.snapshotter) == (("io.katacontainers.*",), "native")


@pytest.mark.parametrize(
    "said",
    ["", "{}", "[]", "null", '"x"', '{"sandboxImage": "pause"}', '{"containerd": {"runtimes": null}}',
     '{"containerd": {"runtimes": {}, "defaultRuntimeName": "runc"}}',
     '{"containerd": {"runtimes": {"runc": {}}}}', says(kata=[KATA]), says(kata=None), says(kata={"runtimeType": 7}),
     says(kata={"options": {"ConfigPath": ["/x"]}}), says(kata={"PodAnnotations": "x"}), says({}),
     says(kata={"runtimeType": "x" * 5000}), says(**{f"k{n}": RUNC for n in range(2000)}),
     '{"containerd": ' + "[" * 100000 + "]" * 100000 + "}", says() + "x", "x" * (5 << 20)],
    ids=lambda said: str(said)[:60],
)  # fmt: skip
def test_an_odd_answer_is_passed_over_and_the_file_counts(detector, runtime, said):
    runtime.config = said
    one = detector(WITH_KATA, Pods("kata"))
    assert detected(one) == ("sandbox", "kata")
    assert runtime.told == 1
    detected(one)
    assert runtime.told == 1  # not asked again at once


def test_who_does_not_answer_costs_a_second_once(detector, runtime):
    runtime.before = lambda _n: time.sleep(3)
    one = detector(WITH_KATA, Pods("kata"))
    began = time.monotonic()
    assert detected(one) == ("sandbox", "kata")
    assert time.monotonic() - began < 2.5
    began = time.monotonic()
    assert detected(one) == ("sandbox", "kata")
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("what", ["absent", "file", "dead", "no CRI"])
def test_where_nobody_answers_the_file_counts(detector, runtime, tmp_path, what):
    path = tmp_path / "c.sock"
    if what == "file":
        path.write_text("x")
    elif what == "dead":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    runtime.config = None
    endpoint = runtime.endpoint if what == "no CRI" else f"unix://{path}"
    assert detected(detector(WITH_KATA, Pods("kata"), cri_endpoint=endpoint)) == ("sandbox", "kata")
    assert detected(detector(NEWER, cri_endpoint=endpoint)) == ("host", "runc")
    with pytest.raises(RuntimeUnknown):
        detected(detector(None, cri_endpoint=endpoint))


def test_it_is_asked_once_while_it_lives_and_anew_when_it_was_started_again(tmp_path):
    path = str(tmp_path / "c.sock")
    kept = str(tmp_path / "run/containerd.json")
    one = KubeletsContainerd(Places(config=str(tmp_path / "none"), endpoint=f"unix://{path}"), kept)

    def handlers(of: KubeletsContainerd = one) -> set[str]:
        answer = of.read(Deadline.after(5))
        return {*answer.running.handlers} if answer.running is not None else set()

    with Runtime(path) as runtime:
        runtime.config = says(kata=KATA)
        assert [handlers() for _ in range(3)] == [{"runc", "kata"}] * 3 and runtime.told == 1
        # Another process, such as one that kubelet starts for a call, finds it on the disk.
        again = KubeletsContainerd(one._places, kept)
        assert handlers(again) == {"runc", "kata"} and runtime.told == 1
        for content in ("", "{", "[]", '{"socket": 1}'):
            Path(kept).write_text(content)
            assert handlers(KubeletsContainerd(one._places, kept)) == {"runc", "kata"}
        assert runtime.told == 5
    assert handlers() == set()
    with Runtime(path) as runtime:
        runtime.config = says()
        assert handlers() == {"runc"} and runtime.told == 1
        assert handlers(KubeletsContainerd(one._places, kept)) == {"runc"} and runtime.told == 1


# -- which containerd it is


@pytest.fixture
def node(tmp_path):
    """A node's root; what is called puts a configuration and a socket of one of the known places there."""

    def put(place: int, content: str | None = NEWER, *, lives: bool = True) -> None:
        config, sock = (tmp_path / one.lstrip("/") for one in (PLACES[place].config, PLACES[place].socket))
        for path in (config, sock):
            path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            config.write_text(content)
        if lives and not sock.exists():
            sock.touch()

    return put


def taken(tmp_path: Path, config: str = AUTO, endpoint: str = AUTO) -> tuple[str, str, bool]:
    found = Places(config=config, endpoint=endpoint, root=str(tmp_path)).taken()
    return found.config, found.endpoint.replace(str(tmp_path), "ROOT"), found.certain


K3S = ("/var/lib/rancher/k3s/agent/etc/containerd/config.toml", "unix://ROOT/run/k3s/containerd/containerd.sock", True)
RKE2 = (K3S[0].replace("k3s", "rke2"), *K3S[1:])
USUAL = ("/etc/containerd/config.toml", "unix://ROOT/run/containerd/containerd.sock", True)


def test_the_usual_place_then_k3s_then_rke2(tmp_path, node):
    assert taken(tmp_path) == (USUAL[0], USUAL[1].replace("ROOT", ""), True)
    node(0, None)
    assert taken(tmp_path) == USUAL  # a containerd without a file has its defaults
    node(2)
    assert taken(tmp_path) == RKE2
    node(1)
    assert taken(tmp_path) == K3S
    node(0)
    assert taken(tmp_path) == USUAL


def test_a_containerd_without_cri_is_none_of_kubelets(tmp_path, node):
    """Docker's, beside k3s."""
    node(0, 'disabled_plugins = ["cri"]\n')
    assert taken(tmp_path) == USUAL
    node(1)
    assert taken(tmp_path) == K3S


def test_where_only_a_containerd_without_cri_is_known_the_runtime_is_not(tmp_path, node):
    """Docker's file beside a CRI-O or k0s with sandboxes, whose own is at no place that is known."""
    node(0, 'disabled_plugins = ["cri"]\n')
    where = {"containerd_config": AUTO, "host_root": str(tmp_path), "root": str(tmp_path)}
    with pytest.raises(RuntimeUnknown):
        detected(Detector(DetectSettings(**where)))
    with pytest.raises(RuntimeUnknown, match="set paths.containerd_config and cri.endpoint"):
        detected(Detector(DetectSettings(**where), Pods()))
    assert detected(Detector(DetectSettings(**where), Pods("kata"))) == ("sandbox", "kata")
    assert detected(Detector(DetectSettings(**where, default_runtime="runc"), Pods())) == ("host", "runc")
    with pytest.raises(RuntimeUnknown, match="has its CRI plugin disabled"):
        Detector(DetectSettings(**where)).of_handler("")
    # An operator's word, and a containerd that runs with it switched on.
    named = where | {"containerd_config": PLACES[0].config}
    assert detected(Detector(DetectSettings(**named), Pods())) == ("host", "runc")
    with Runtime() as runtime:
        runtime.config = says()
        assert detected(Detector(DetectSettings(**where, cri_endpoint=runtime.endpoint), Pods())) == ("host", "runc")


def test_beside_a_containerd_without_cri_one_whose_file_is_elsewhere_is_found(tmp_path, node):
    """k3s's with a data directory of its own, beside Docker's."""
    node(0, 'disabled_plugins = ["cri"]\n'), node(1, None, lives=False)
    with Runtime(str(tmp_path / PLACES[1].socket.lstrip("/"))) as runtime:
        runtime.config = says("secure", secure=KATA)
        one = Detector(several(tmp_path), Pods())
        assert taken(tmp_path)[1] == K3S[1]
        assert detected(one) == ("sandbox", "secure")
    with pytest.raises(RuntimeUnknown):
        detected(Detector(several(tmp_path), Pods()))


def test_a_setting_wins(tmp_path, node):
    node(0), node(1)
    assert taken(tmp_path, config=K3S[0]) == K3S
    assert taken(tmp_path, endpoint="unix:///run/k3s/containerd/containerd.sock")[0] == K3S[0]
    assert taken(tmp_path, config="/etc/x.toml", endpoint="unix:///x") == ("/etc/x.toml", "unix:///x", True)
    assert taken(tmp_path, endpoint="") == (USUAL[0], "", True)
    # Of another file it is not known which socket its containerd has, unless the file says so.
    (tmp_path / "etc/x.toml").write_text("version = 3\n")
    assert taken(tmp_path, config="/etc/x.toml") == ("/etc/x.toml", USUAL[1], False)
    (tmp_path / "etc/x.toml").write_text('[grpc]\naddress = "/run/x.sock"\n')
    assert taken(tmp_path, config="/etc/x.toml") == ("/etc/x.toml", "unix:///run/x.sock", True)


def test_beside_another_one_with_sandboxes_nothing_is_proved(tmp_path, node):
    node(0, lives=False), node(1, lives=False)
    one = Detector(DetectSettings(containerd_config=AUTO, cri_endpoint="", host_root=str(tmp_path)))
    assert detected(one) == ("host", "runc")
    node(1, WITH_KATA, lives=False)
    with pytest.raises(RuntimeUnknown):
        detected(one)


def test_sandboxes_are_asked_for_where_containerd_is_found(tmp_path):
    where = [f"unix://{tmp_path}/one.sock", f"unix://{tmp_path}/two.sock"]
    asked = Sandboxes(endpoint=lambda: where.pop(0))
    assert "one.sock" in asked.doubt(["uid"], Deadline.after(2))
    assert "two.sock" in asked.doubt(["uid"], Deadline.after(2))


def test_of_several_all_that_may_be_kubelets_are_asked_for_sandboxes(tmp_path):
    (tmp_path / "pods" / WITNESS).mkdir(parents=True)
    with Runtime(str(tmp_path / "one.sock")) as one, Runtime(str(tmp_path / "two.sock")) as two:
        where = [one.endpoint, two.endpoint]
        asked = Sandboxes(endpoint=lambda: where, roots=[str(tmp_path)], patience=1.0)

        def doubt() -> str:
            return asked.doubt(["uid"], Deadline.after(5))

        assert doubt() == ""
        two.pods = [("uid", READY)]
        assert "the pod runs" in doubt()
        one.kubelets = False  # nobody's, and nobody else's word for it
        assert "the pod runs" in doubt()
        two.pods = []
        assert doubt() == ""
        two.kubelets = False
        assert "lists no pod that kubelet has" in doubt()
        one.kubelets = True
        two.before = lambda _n: time.sleep(3)  # who hangs may be kubelet's
        assert "two.sock does not tell" in doubt()
        where[1] = f"unix://{tmp_path}/none.sock"
        assert doubt() == ""


def test_a_handler_that_several_have_differently_is_not_known_to_nri_either(tmp_path, node):
    node(0, _RUNC_TOO, lives=False), node(1, WITH_KATA.replace("runtimes.kata", "runtimes.secure"), lives=False)
    one = Detector(several(tmp_path))
    with pytest.raises(RuntimeUnknown, match=r"'secure'.*which containerd of this node is kubelet's"):
        one.of_handler("secure")
    with pytest.raises(RuntimeUnknown, match="which containerd of this node is kubelet's"):
        one.detect(REF, "secure", Deadline.after(5))
    assert one.of_handler("").kind == one.of_handler("runc").kind == "host"


def test_a_containerd_that_is_known_by_its_socket_alone_has_to_have_a_pod_of_kubelets(tmp_path, node):
    """It may be another kubelet's, or Docker's; the file of kubelet's own is not at a place that is known."""
    node(0, None, lives=False)
    with Runtime(str(tmp_path / PLACES[0].socket.lstrip("/"))) as runtime:
        runtime.config = says()
        found = DetectSettings(
            containerd_config=AUTO, cri_endpoint=AUTO, host_root=str(tmp_path), roots=[str(tmp_path)]
        )
        with pytest.raises(RuntimeUnknown):
            detected(Detector(found))
        (tmp_path / "pods" / WITNESS).mkdir(parents=True)
        assert detected(Detector(found)) == ("host", "runc")


def several(tmp_path: Path) -> DetectSettings:
    (tmp_path / "pods" / WITNESS).mkdir(parents=True, exist_ok=True)
    return DetectSettings(
        containerd_config=AUTO, cri_endpoint=AUTO, host_root=str(tmp_path), root=str(tmp_path), roots=[str(tmp_path)]
    )


_RUNC_TOO = NEWER + '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.secure]\nruntime_type = "runc.v2"\n'


@pytest.mark.parametrize("handler", ["kata", "secure", ""])
def test_of_several_the_one_that_has_a_pod_of_kubelets_is_kubelets(tmp_path, node, handler):
    """A system's containerd with CRI, which nobody uses, beside k3s's."""
    node(0, _RUNC_TOO, lives=False), node(1, WITH_KATA, lives=False)
    sockets = [str(tmp_path / PLACES[place].socket.lstrip("/")) for place in (0, 1)]
    with Runtime(sockets[0]) as system, Runtime(sockets[1]) as kubelets:
        system.config, system.kubelets = says(secure=RUNC), False
        kubelets.config = says("secure", kata=KATA, secure=KATA)
        one = Detector(several(tmp_path), Pods(handler))
        assert detected(one) == ("sandbox", handler or "secure")
        told = kubelets.told
        assert detected(one) == ("sandbox", handler or "secure") and kubelets.told == told


def test_where_several_differ_and_none_is_known_to_be_kubelets_nothing_is(tmp_path, node):
    node(0, _RUNC_TOO, lives=False), node(1, WITH_KATA.replace("runtimes.kata", "runtimes.secure"), lives=False)
    found = several(tmp_path)
    assert detected(Detector(found, Pods())) == ("host", "runc")
    with pytest.raises(
        RuntimeUnknown, match=r"which containerd of this node is kubelet's.*set paths\.containerd_config"
    ):
        detected(Detector(found, Pods("secure")))
    node(1, WITH_KATA, lives=False)
    assert detected(Detector(found, Pods("kata"))) == ("sandbox", "kata")


def test_a_file_that_was_left_behind_proves_nothing_beside_a_containerd_that_runs(tmp_path, node):
    """Of k3s, which was replaced by a containerd whose file is at no place that is known."""
    node(1, lives=False), node(0, None, lives=False)
    found = several(tmp_path)
    assert detected(Detector(found)) == ("host", "runc")
    with Runtime(str(tmp_path / PLACES[0].socket.lstrip("/"))) as runtime:
        runtime.config = says("kata", kata=KATA)
        assert detected(Detector(found, Pods("kata"))) == ("sandbox", "kata")
        assert detected(Detector(found, Pods())) == ("sandbox", "kata")
        runtime.config = None
        with pytest.raises(RuntimeUnknown):
            detected(Detector(found, Pods()))


def test_want_of_descriptors_does_not_make_the_file_count(detector, runtime, monkeypatch):
    runtime.config = says(secure=KATA)
    one = detector(_RUNC_TOO, Pods("secure"))
    assert detected(one) == ("sandbox", "secure")

    def none(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(running_containerd.socket, "socket", none)
    assert detected(one) == ("sandbox", "secure")


# -- doctor


def diagnosed(tmp_path: Path, runtime: Runtime, file: str | None, **flags: str) -> dict[str, tuple[str, str]]:
    path = tmp_path / "config.toml"
    path.unlink(missing_ok=True)
    if file is not None:
        path.write_text(file)
    flags = {"paths.containerd_config": str(path), "cri.endpoint": runtime.endpoint, **flags}
    loaded = settings.load(file=None, flags=flags, environment={})
    return {
        one.subject: (one.state, f"{one.finding}; {one.fix}")
        for one in doctor_containerd.examine(doctor_containerd.asked(loaded))
    }


def test_doctor_names_what_the_file_and_what_runs_differ_in(tmp_path, runtime):
    runtime.config = says(kata=KATA)
    assert {state for state, _ in diagnosed(tmp_path, runtime, WITH_KATA).values()} == {"ok"}
    bare = WITH_KATA.replace('runtime_type = "io.containerd.runc.v2"', "")
    assert diagnosed(tmp_path, runtime, bare)["running containerd"][0] == "ok"
    for said, file, words in (
        (says(), WITH_KATA, "the file has the handler 'kata', what runs has not; restart containerd"),
        (says(kata=KATA), NEWER, "what runs has the handler 'kata', the file has not"),
        (says(kata=RUNC), WITH_KATA, "runtime_type of the handler 'kata' is 'io.containerd.runc.v2', not"),
        (says(kata={**KATA, "options": None}), WITH_KATA, "config_path of the handler 'kata' is '', not"),
        (says("kata", kata=KATA), WITH_KATA, "default_runtime_name is 'kata', not 'runc'"),
    ):
        runtime.config = said
        state, finding = diagnosed(tmp_path, runtime, file)["running containerd"]
        assert state == "warning" and words in finding and "restart containerd" in finding


def test_doctor_says_which_containerd_was_taken_and_why_it_does_not_tell(tmp_path, runtime, node):
    assert "paths.containerd_config" in diagnosed(tmp_path, runtime, NEWER)["containerd"][1]
    assert "tells its runtimes" in diagnosed(tmp_path, runtime, None)["running containerd"][1]
    runtime.config = None
    assert "UNIMPLEMENTED" in diagnosed(tmp_path, runtime, NEWER)["running containerd"][1]
    assert diagnosed(tmp_path, runtime, None)["running containerd"][0] == "warning"
    assert diagnosed(tmp_path, runtime, NEWER, **{"cri.endpoint": ""})["running containerd"][0] == "ok"
    node(0), node(1)
    flags = {"paths.containerd_config": AUTO, "cri.endpoint": AUTO, "paths.host_root": str(tmp_path)}
    state, finding = diagnosed(tmp_path, runtime, None, **flags)["containerd"]
    assert state == "warning" and K3S[0] in finding and os.path.basename(USUAL[0]) in finding
