"""Kubelet's own list of pods: between the API server, which is silent, and what is kept."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from blockdev import Deadline
from guestmount import KubernetesApi, PodRef, kubelet_pods, loopback
from guestmount.known_pods import KnownPods
from guestmount.kubelet_pods import KubeletPods
from guestmount.pods import NotThere, PodFacts, PodUnknown
from runvol import assembly, config
from tests.api_double import ApiDouble
from tests.until import until

REF = PodRef(namespace="default", name="web", uid="uid-1")


def pod(uid: str, *, node: str = "node-1", size: int = 0) -> dict[str, Any]:
    annotations = {"big": "x" * size, "io.katacontainers.config.hypervisor.x": "1"}
    spec = {"nodeName": node, "runtimeClassName": "kata", "containers": [{"name": "c"}]}
    return {"metadata": {"uid": uid, "name": uid, "namespace": "default", "annotations": annotations}, "spec": spec}


class Kubelet:
    """`pods`, or `body`, is its answer; `tokens` are what it was shown; `slow`: seconds before it, or between bytes."""

    def __init__(self) -> None:
        self.pods: list[Any] = [pod("uid-0"), pod("uid-1")]
        self.body: bytes | None = None
        self.status, self.slow, self.drips = 200, 0.0, False
        self.tokens: list[str | None] = []
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kubelet.tokens.append(self.headers["Authorization"])
                time.sleep(kubelet.slow)
                if self.path != "/pods":
                    self.send_error(404)
                    return
                content = kubelet.body
                if content is None:
                    content = json.dumps(
                        {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": kubelet.pods}
                    ).encode()
                self.send_response(kubelet.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                for at in range(0, len(content), 10) if kubelet.drips else ():
                    self.wfile.write(content[at : at + 10])
                    time.sleep(0.3)
                if not kubelet.drips:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    one = Kubelet()
    yield one
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def api() -> Iterator[ApiDouble]:
    one = ApiDouble()
    yield one
    if not one.stopped:
        one.stop()


@pytest.fixture
def known(api: ApiDouble, kubelet: Kubelet, tmp_path: Path) -> Callable[[], KnownPods]:
    def one() -> KnownPods:
        source = KubernetesApi(server=api.url, account=str(tmp_path))
        asked = KubeletPods(kubelet.url, source, node="node-1", authority=[], is_beside=is_own)
        return KnownPods(source, node="node-1", kept=str(tmp_path / "answers"), follows=False, kubelet=asked)

    return one


def is_own(pid: int) -> bool:
    return pid == os.getpid()


def soon() -> Deadline:
    return Deadline.after(10)


def test_kubelet_tells_of_a_pod_while_the_api_is_away_and_nobody_else_is_asked_before(api, kubelet, known):
    api.pod("web", "uid-1")
    assert known().pod(REF, soon()).runtime_class == "" and not kubelet.tokens
    api.stop()
    found = known().pod(REF, soon())
    assert (found.runtime_class, len(kubelet.tokens)) == ("kata", 1)


def test_an_api_that_knows_of_no_such_pod_is_believed_over_kubelet(api, kubelet, known):
    with pytest.raises(NotThere):
        known().pod(REF, soon())
    assert not kubelet.tokens


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b'{"items": []}'), (200, b'{"items": null}'), (200, b"{}"), (200, b"[]"), (200, b"{"), (200, b""),
     (200, b'{"items": ' + b"[" * 100000), (200, json.dumps({"items": [pod("uid-1")]}).encode()[:-2] + b",0" * 1100000 + b"]}"), (200, b"x" * (17 << 20)),
     (200, json.dumps({"items": [{**pod("uid-1"), "spec": {}}]}).encode()), (401, b""), (403, b"Forbidden"),
     (404, b'{"kind": "Status", "code": 404}'), (500, b""),
     (200, json.dumps({"items": [pod("uid-1", node="node-2")]}).encode())],
    ids=lambda said: str(said)[:50],
)  # fmt: skip
def test_an_answer_without_the_pod_says_nothing_and_what_was_kept_counts(api, kubelet, known, status, body):
    api.stop()
    kubelet.status, kubelet.body = status, body
    pods = known()
    with pytest.raises(PodUnknown, match=r"kubelet \(http.*nothing is kept") as error:
        pods.pod(REF, soon())
    assert not isinstance(error.value, NotThere)
    pods._kept.put("pod", "uid-1", PodFacts(uid="uid-1", runtime_class="before"))
    until(lambda: pods._kept.get("pod", "uid-1", PodFacts))
    assert pods.pod(REF, soon()).runtime_class == "before"


def test_one_odd_pod_is_no_trouble_of_the_others(api, kubelet, known):
    api.stop()
    kubelet.pods = [7, None, {"metadata": {"uid": "uid-1"}}, {"metadata": {}}, *[pod(f"u{n}", size=20000) for n in range(500)],
                    pod("uid-1")]  # fmt: skip
    assert known().pod(REF, soon()).runtime_class == "kata"


@pytest.mark.parametrize("how", ["slow", "drips"])
def test_a_kubelet_that_is_slow_costs_a_second(api, kubelet, known, how):
    api.stop()
    kubelet.slow, kubelet.drips = (5.0, False) if how == "slow" else (0.0, True)
    pods = known()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(PodUnknown, match="asking kubelet"):
            pods.pod(REF, soon())
        assert time.monotonic() - began < 2


def test_many_that_ask_at_once_are_told_by_few_answers(api, kubelet, tmp_path):
    kubelet.slow = 0.2
    source = KubernetesApi(server=api.url, account=str(tmp_path))
    asked = KubeletPods(kubelet.url, source, node="node-1", authority=[], is_beside=is_own)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(asked(REF, soon()).uid)) for _ in range(30)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == ["uid-1"] * 30 and len(kubelet.tokens) <= 3


@pytest.fixture
def certified(kubelet: Kubelet, tmp_path: Path) -> Callable[[str], str]:
    """Kubelet behind TLS, with a certificate of its own for this name; its address."""

    def secured(name: str) -> str:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
             "key", "-subj", "/CN=kubelet", "-addext", f"subjectAltName=DNS:{name}", "-days", "2", "-out", "crt"],
            check=True, capture_output=True, cwd=tmp_path,
        )  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
        kubelet.server.socket = context.wrap_socket(kubelet.server.socket, server_side=True)
        return kubelet.url.replace("http:", "https:")

    return secured


def test_the_accounts_token_is_shown_to_a_kubelet_whose_certificate_is_the_nodes(kubelet, certified, tmp_path):
    address = certified("node-1")
    (tmp_path / "token").write_text("secret\n")
    source = KubernetesApi(server="http://127.0.0.1:1", account=str(tmp_path))
    authority = str(tmp_path / "crt")
    assert KubeletPods(address, source, node="node-1", authority=[authority])(REF, soon()).uid == "uid-1"
    (tmp_path / "both").write_text((tmp_path / "key").read_text() + (tmp_path / "crt").read_text())
    several = [str(tmp_path / "none"), str(tmp_path / "both"), str(tmp_path / "key")]
    assert KubeletPods(address, source, node="node-1", authority=several)(REF, soon()).uid == "uid-1"
    assert kubelet.tokens == ["Bearer secret"] * 2
    with pytest.raises(PodUnknown, match="nothing proves kubelet's certificate"):
        KubeletPods(address, source, node="node-1", authority=[])(REF, soon())
    with pytest.raises(PodUnknown, match="certificate"):
        KubeletPods(address, source, node="node-2", authority=[authority])(REF, soon())
    (tmp_path / "other").mkdir()
    for wrong, words in (
        (str(tmp_path / "absent"), "is not there"),
        (str(tmp_path / "key"), "has no certificate"),
    ):
        with pytest.raises(PodUnknown, match=words):
            KubeletPods(address, source, node="node-1", authority=[wrong])(REF, soon())
    certified_again = tmp_path / "another"
    certified_again.mkdir()
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", certified_again / "key", "-out",
                    certified_again / "crt", "-subj", "/CN=node-1", "-addext", "subjectAltName=DNS:node-1"],
                   check=True, capture_output=True)  # fmt: skip
    with pytest.raises(PodUnknown, match="certificate"):  # of the node's name, by somebody else
        KubeletPods(address, source, node="node-1", authority=[str(certified_again / "crt")])(REF, soon())
    assert len(kubelet.tokens) == 2


def test_the_read_only_port_is_shown_no_token(kubelet, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    source = KubernetesApi(server="http://127.0.0.1:1", account=str(tmp_path))
    assert KubeletPods(kubelet.url, source, node="node-1", authority=[], is_beside=is_own)(REF, soon()).uid == "uid-1"
    assert kubelet.tokens == [None]


def test_nobody_else_is_believed_who_has_kubelets_port(kubelet, tmp_path):
    """A pod in the node's network may listen there, and say of any pod that it runs on the host's kernel."""
    source = KubernetesApi(server="http://127.0.0.1:1", account=str(tmp_path))

    def asked(is_beside: Callable[[int], bool]) -> KubeletPods:
        return KubeletPods(kubelet.url, source, node="node-1", authority=[], is_beside=is_beside)

    for nobody in (lambda _pid: False, lambda pid: pid not in (os.getpid(),) and pid != os.getppid()):
        with pytest.raises(PodUnknown, match="not proved that kubelet has that port"):
            asked(nobody)(REF, soon())
    with pytest.raises(PodUnknown, match="not proved"):
        KubeletPods(kubelet.url, source, node="node-1", authority=[])(REF, soon())
    assert asked(is_own)(REF, soon()).uid == "uid-1"
    # Another one beside it, of whom is not known which of the two a connection was for.
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::1", kubelet.server.server_port))
        other.listen()
        assert len(loopback.listeners(kubelet.server.server_port).inodes) == 2
        assert asked(is_own)(REF, soon()).uid == "uid-1"
        with subprocess.Popen(["sleep", "60"], pass_fds=[other.fileno()]) as holder:
            try:
                other.close()
                with pytest.raises(PodUnknown, match="not proved"):
                    asked(is_own)(REF, soon())
                assert asked(lambda pid: pid in (os.getpid(), holder.pid))(REF, soon()).uid == "uid-1"
            finally:
                holder.kill()


def test_who_takes_the_port_over_while_it_is_asked_is_not_believed(kubelet, tmp_path, monkeypatch):
    source = KubernetesApi(server="http://127.0.0.1:1", account=str(tmp_path))
    asked = KubeletPods(kubelet.url, source, node="node-1", authority=[], is_beside=is_own)
    before = loopback.Listeners(inodes=frozenset({1}))
    said = [before]
    real = loopback.listeners
    monkeypatch.setattr(loopback, "listeners", lambda port: said.pop() if said else real(port))
    with pytest.raises(PodUnknown, match="not proved"):
        asked(REF, soon())
    assert asked(REF, soon()).uid == "uid-1"


@pytest.mark.parametrize(
    ("flags", "words"),
    [({}, "set detect.kubeconfig too"), ({"detect.kubelet": "10250"}, "takes https://"),
     ({"detect.kubelet": "http://10.0.0.1:10255"}, "on the loopback"),
     ({"detect.kubelet": "http://127.0.0.1.example.org:10255"}, "on the loopback"),
     ({"detect.kubelet": "https://a@127.0.0.1:10250"}, "takes https://")],
)  # fmt: skip
def test_an_address_that_would_be_believed_without_proof_is_refused(flags, words):
    account = {"detect.kubeconfig": "in-cluster"} if flags else {}
    with pytest.raises(config.ConfigError, match=words):
        config.load(file=None, flags={"detect.kubelet": "https://127.0.0.1:10250", **account, **flags}, environment={})


def test_it_is_asked_only_where_it_is_set(tmp_path, kubelet):
    for address in ("", kubelet.url, "https://[::1]:10250", "https://node:10250"):
        flags = {"detect.kubeconfig": "in-cluster", "detect.kubelet": address}
        loaded = config.load(file=None, flags=flags, environment={})
        made = assembly.kubelet_pods(loaded, KubernetesApi(account=str(tmp_path)))
        assert isinstance(made, kubelet_pods.KubeletPods) if address else made is None
