"""Which runtime runs the pod: every rung of the ladder, and failing closed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blockdev import Deadline
from guestmount import (
    Detector,
    DetectSettings,
    KubernetesApi,
    PodRef,
    Refused,
    RuntimeUnknown,
    containerd_readings,
    kata_config,
    runtimes,
)
from guestmount.pods import NotThere, PodUnknown, facts_from

REF = PodRef(namespace="default", name="web", uid="uid-1")

CONTAINERD = """
version = 3
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "{default}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.gvisor]
runtime_type = "io.containerd.runsc.v1"
{more}
"""
KATA = """
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.secure]
runtime_type = "io.containerd.kata-qemu.v2"
"""


class Pods:
    def __init__(self, pod=None, handlers=None):
        self.facts, self.handlers, self.asked = pod, handlers or {}, 0

    def pod(self, ref, deadline):
        self.asked += 1
        if self.facts is None:
            raise PodUnknown("the API server does not answer")
        return facts_from(self.facts)

    def followed(self, uid):
        return None

    def handler(self, runtime_class, deadline):
        if runtime_class not in self.handlers:
            raise PodUnknown(f"no RuntimeClass {runtime_class}")
        return self.handlers[runtime_class]


def a_pod(runtime_class=None, annotations=None):
    spec = {"runtimeClassName": runtime_class, "containers": []}
    return {"metadata": {"uid": "uid-1", "annotations": annotations or {}}, "spec": spec}


@pytest.fixture
def detect(tmp_path):
    def detect(attribute="", *, pods=None, more=KATA, default="runc", containerd=True, **settings):
        path = tmp_path / "config.toml"
        path.unlink(missing_ok=True)
        if containerd:
            path.write_text(CONTAINERD.format(more=more, default=default))
        settings = DetectSettings(containerd_config=str(path), root=str(tmp_path), **settings)
        return Detector(settings, pods).detect(REF, attribute, Deadline.after(5))

    return detect


def test_without_any_sandbox_handler_the_answer_is_host_and_nobody_is_asked(detect):
    pods = Pods(a_pod())
    answer = detect(pods=pods, more="")
    assert (answer.kind, pods.asked) == ("host", 0)
    assert "no sandbox handler" in answer.source


def test_an_attribute_that_contradicts_containerd_is_refused(detect):
    with pytest.raises(Refused, match="contradicts"):
        detect("sandbox", more="")


def test_an_unreadable_configuration_proves_nothing(detect):
    with pytest.raises(RuntimeUnknown):
        detect(containerd=False)


@pytest.mark.parametrize(
    ("runtime_class", "kind", "handler"),
    [("isolated", "sandbox", "secure"), ("plain", "host", "runc"), ("gv", "host", "gvisor")],
)
def test_the_class_is_resolved_to_its_handler_whatever_it_is_called(detect, runtime_class, kind, handler):
    pods = Pods(a_pod(runtime_class), {"isolated": "secure", "plain": "runc", "gv": "gvisor"})
    answer = detect(pods=pods)
    assert (answer.kind, answer.handler) == (kind, handler)


def test_a_class_named_kata_whose_handler_is_runc_is_runc(detect):
    assert detect(pods=Pods(a_pod("kata"), {"kata": "runc"})).kind == "host"


def test_a_pod_without_a_class_has_the_default_runtime_which_may_be_a_sandbox(detect):
    assert detect(pods=Pods(a_pod())).kind == "host"
    answer = detect(pods=Pods(a_pod()), default="secure")
    assert (answer.kind, answer.handler) == ("sandbox", "secure")


def test_the_untrusted_annotation_counts_without_a_class(detect):
    pods = Pods(a_pod(annotations={"io.kubernetes.cri.untrusted-workload": "true"}))
    assert detect(pods=pods).kind == "sandbox"
    pods = Pods(a_pod(annotations={"io.kubernetes.cri.untrusted-workload": "yes"}))
    assert detect(pods=pods).kind == "host"


def test_an_api_that_does_not_answer_is_never_runc(detect):
    with pytest.raises(RuntimeUnknown, match="does not answer"):
        detect(pods=Pods(None))
    with pytest.raises(RuntimeUnknown, match="no RuntimeClass gone"):
        detect(pods=Pods(a_pod("gone")))


WHOLE = {"metadata": {"uid": "uid-1"}, "spec": {"containers": []}}


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"metadata": {"uid": "uid-1"}}, {"metadata": {"uid": "uid-1"}, "spec": {}},
        {"metadata": {"uid": "uid-1"}, "spec": None}, {"metadata": {}, "spec": {"containers": []}},
        {"metadata": {"uid": ""}, "spec": {"containers": []}}, {"metadata": {"uid": 1}, "spec": {"containers": []}},
        {"metadata": [1], "spec": {"containers": []}}, {**WHOLE, "spec": {"containers": {}}},
        {**WHOLE, "spec": {"containers": [None]}}, {**WHOLE, "spec": {"containers": [], "volumes": [None]}},
        {**WHOLE, "spec": {"containers": [], "volumes": "abc"}}, {**WHOLE, "spec": {"containers": [], "volumes": [{}]}},
        {**WHOLE, "spec": {"containers": [], "runtimeClassName": {"a": 1}}},
        {**WHOLE, "spec": {"containers": [], "nodeName": 7}},
        {**WHOLE, "spec": {"containers": [{"name": "c", "volumeMounts": [7]}]}},
        {"metadata": {"uid": "uid-1", "annotations": {"a": 1}}, "spec": {"containers": []}},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_that_is_no_whole_pod_is_never_the_host(detect, answer):
    """A proxy that filters, or that only has the metadata (PartialObjectMetadata)."""
    assert detect(pods=Pods(WHOLE)).kind == "host"
    with pytest.raises(RuntimeUnknown, match="no whole pod"):
        detect(pods=Pods(answer))


def test_what_decides_nothing_of_a_pod_is_not_remembered(detect):
    kata = "io.katacontainers.config.hypervisor.disable_block_device_use"
    whole = a_pod(annotations={"a": "x" * 200_000, kata: "true", "io.katacontainers.config_path": "y" * 100_000})
    facts = facts_from(whole)
    assert facts.annotations[kata] == "true" and "io.katacontainers.config_path" in facts.annotations
    assert len(facts.annotations) == 2 and sum(map(len, facts.annotations.values())) < 1000


def test_the_attribute_fills_the_gap_and_no_more(detect):
    assert detect("secure", pods=Pods(None)).kind == "sandbox"
    assert detect("runc", pods=Pods(None)).kind == "host"
    with pytest.raises(Refused, match="contradicts default/web"):
        detect("runc", pods=Pods(a_pod("isolated"), {"isolated": "secure"}))
    with pytest.raises(Refused, match="contradicts"):
        detect("sandbox", pods=Pods(a_pod("plain"), {"plain": "runc"}))


def test_sandbox_means_the_only_sandbox_handler_or_the_configured_one(detect):
    assert detect("sandbox").handler == "secure"
    assert detect("sandbox", containerd=False).handler == "kata"
    assert detect("sandbox", containerd=False, sandbox_handler="kata-clh").handler == "kata-clh"


def test_the_configured_default_comes_last(detect):
    assert detect(default_runtime="kata").kind == "sandbox"
    assert detect("runc", default_runtime="kata").kind == "host"
    with pytest.raises(RuntimeUnknown, match="default_runtime is not set"):
        detect()


def test_a_handler_that_nobody_knows_is_no_runc(detect):
    with pytest.raises(RuntimeUnknown, match="'exotic'"):
        detect("exotic")
    assert detect("exotic", sandbox_handlers=("exot*",)).kind == "sandbox"


@pytest.mark.parametrize(
    ("handler", "dialect"), [("kata-qemu", "kata"), ("runv", "runv"), ("rund", "rund2"), ("untrusted", "kata")]
)
def test_the_handler_selects_the_dialect(detect, handler, dialect):
    if handler == "untrusted":
        pods = Pods(a_pod(annotations={"io.kubernetes.cri.untrusted-workload": "true"}))
        assert detect(pods=pods).dialect == dialect
    else:
        assert detect(handler).dialect == dialect


def test_imports_and_older_tables_of_containerd_are_read(tmp_path):

    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "kata.toml").write_text(
        'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
        'runtime_path = "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2"\n'
        '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]\nConfigPath = "/opt/kata/x.toml"\n'
    )
    main = tmp_path / "config.toml"
    main.write_text(
        f'version = 2\nimports = ["{tmp_path}/conf.d/*.toml", "config.toml"]\n'
        '[plugins."io.containerd.grpc.v1.cri".containerd]\ndefault_runtime_name = "crun"\n'
    )
    older, newer = containerd_readings.read(str(main)).found
    assert (older.default_handler, newer.default_handler) == ("runc", "crun")  # 1.x takes the last one's table
    found = newer
    assert found.handlers["kata"].config_path == "/opt/kata/x.toml"


# -- a real HTTP server that speaks as an API server does


def test_the_default_runtime_of_containerd_up_to_1_7_comes_before_its_name(tmp_path):
    file = tmp_path / "config.toml"
    cri = '[plugins."io.containerd.grpc.v1.cri".containerd]\ndefault_runtime_name = "runc"\n'
    runc = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]\nruntime_type = "io.containerd.runc.v2"\n'
    cri = f"version = 2\n{cri}"
    unnamed = '[plugins."io.containerd.grpc.v1.cri".containerd.default_runtime]\nruntime_type = "{}"\n'
    file.write_text(cri + runc + unnamed.format(""))
    (found,) = containerd_readings.read(str(file)).found
    assert (found.default_handler, found.has_sandbox) == ("runc", False)
    file.write_text(cri + runc + unnamed.format("io.containerd.kata.v2"))
    found, newer = containerd_readings.read(str(file)).found
    assert (found.default_handler, found.has_sandbox) == ("default", True)
    assert newer.default_handler == "runc"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a = " + b"[" * 100000, b"imports = 7\n= "], ids=["text", "deep", "no TOML"]
)
def test_a_configuration_that_cannot_be_read_is_nothing(tmp_path, content):
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    assert "is no TOML" in containerd_readings.read(str(file)).why and runtimes.tables(str(file), "grpc") == []


def test_a_configuration_that_was_changed_is_read_again(tmp_path):
    file = tmp_path / "config.toml"
    for name in ("a", "b"):
        table = f'[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{name}]\n'
        file.write_text(f'version = 3\n{table}runtime_type = "x"\n')
        assert [{*one.handlers} for one in containerd_readings.read(str(file)).found] == [{name}]


@pytest.fixture(params=["address", "in-cluster", "kubeconfig"])
def api(request, tmp_path):
    pods = {"web": a_pod("isolated")}
    (tmp_path / "token").write_text("t1")

    seen, accepted = [], ["t1", "t2"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("?")[0].rsplit("/", 1)[1]
            said = self.headers.get("Authorization")
            if said and said.removeprefix("Bearer ") not in accepted:
                self.send_response(401)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            seen.append(self.headers.get("Authorization"))
            if "/pods/" in self.path and name in pods:
                body, code = pods[name], 200
            elif self.path.startswith("/apis/node.k8s.io/v1/runtimeclasses/isolated"):
                body, code = {"metadata": {"name": "isolated"}, "handler": "secure"}, 200
            elif name == "slow":
                import time

                time.sleep(3)
                return
            elif name == "drip":
                import time

                with contextlib.suppress(OSError):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    for _ in range(20):
                        time.sleep(0.3)
                        self.wfile.write(b"X")
                        self.wfile.flush()
                return
            elif self.path.startswith("/api/v1/persistentvolumes/pv-1"):
                body = {"kind": "PersistentVolume", "spec": {"claimRef": {"namespace": "default", "name": "data"}}}
                code = 200
            else:
                body, code = {"kind": "Status", "code": 404, "reason": "NotFound"}, 404
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    if request.param == "kubeconfig":
        (tmp_path / "kubeconfig").write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "clusters": [{"name": "k", "cluster": {"server": address}}],
            "users": [{"name": "u", "user": {"token": "t1"}}], "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        }))  # fmt: skip
        made = KubernetesApi(kubeconfig=str(tmp_path / "kubeconfig"))
    else:
        made = KubernetesApi(server=address, account=str(tmp_path) if request.param == "in-cluster" else "/nowhere")
    made.seen, made.kind, made.token, made.accepted = seen, request.param, tmp_path / "token", accepted
    yield made
    server.shutdown()


def test_the_service_accounts_token_is_sent_and_read_anew(api, soon):
    api.pod(REF, soon)
    assert api.seen == [None if api.kind == "address" else "Bearer t1"]
    if api.kind == "in-cluster":
        api.token.write_text("t2")  # kubelet rotates it
        api.pod(REF, soon)
        assert api.seen[-1] == "Bearer t2"


def test_a_cluster_that_cannot_be_found_or_a_kubeconfig_that_cannot_be_read_is_unknown(soon, tmp_path):
    with pytest.raises(PodUnknown, match="KUBERNETES_SERVICE_HOST"):
        KubernetesApi(environment={}).pod(REF, soon)
    with pytest.raises(PodUnknown):
        KubernetesApi(
            account=str(tmp_path), environment={"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
        ).pod(REF, soon)
    (tmp_path / "kubeconfig").write_text("not: [a kubeconfig")
    with pytest.raises(PodUnknown, match="kubeconfig"):
        KubernetesApi(kubeconfig=str(tmp_path / "kubeconfig")).pod(REF, soon)
    with pytest.raises(PodUnknown, match="nowhere"):
        KubernetesApi(kubeconfig="/nowhere/config").pod(REF, soon)


def test_the_pod_and_its_class_come_from_a_kubernetes_api(api, detect):
    answer = detect(pods=api)
    assert (answer.kind, answer.handler, answer.source) == ("sandbox", "secure", "the pod's RuntimeClass isolated")


def test_a_pod_of_the_same_name_and_another_uid_is_another_pod(api, soon):
    with pytest.raises(PodUnknown, match="uid-1 now, not uid-0"):
        api.pod(PodRef(namespace="default", name="web", uid="uid-0"), soon)


def test_an_unknown_pod_an_unnamed_pod_and_a_dead_server_are_unknown(api, soon):
    with pytest.raises(PodUnknown, match="Not Found"):
        api.pod(PodRef(namespace="default", name="gone"), soon)
    with pytest.raises(PodUnknown, match="podInfoOnMount"):
        api.pod(PodRef(uid="uid-1"), soon)
    with pytest.raises(PodUnknown):
        KubernetesApi(server="http://127.0.0.1:1").pod(REF, soon)


@pytest.mark.parametrize("name", ["../../secrets/x", "a/b", "A", "x?watch=1", "..", "x" * 300])
def test_a_name_that_no_pod_can_have_never_becomes_an_address(api, soon, name):
    with pytest.raises(PodUnknown, match="no name"):
        api.pod(PodRef(namespace="default", name=name), soon)
    with pytest.raises(PodUnknown, match="no name"):
        api.pod(PodRef(namespace=name, name="web"), soon)
    with pytest.raises(PodUnknown, match="no name"):
        api.handler(name, soon)
    assert api.seen == []


def test_a_slow_server_costs_a_second_at_most(api, soon):
    import time

    started = time.monotonic()
    with pytest.raises(PodUnknown):
        api.pod(PodRef(namespace="default", name="slow"), soon)
    assert time.monotonic() - started < 2


def test_a_server_that_drips_costs_a_second_in_all(api, soon):
    """Each byte comes in time; the whole answer never does."""
    import time

    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(PodUnknown):
            api.pod(PodRef(namespace="default", name="drip"), soon)
        assert time.monotonic() - started < 2


@contextlib.contextmanager
def answering(answer):
    """The address of a server that leaves each connection to `answer`, in a thread."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def one(connection):
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                answer(connection)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def said(status, body, *more):
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *more, "", ""]).encode() + body


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_server_that_drips_leaves_nobody_behind_and_is_asked_again_at_once(soon, where, closes):
    dripping = True

    def answer(connection):
        whole = said("200 OK", json.dumps(WHOLE).encode(), *(["Connection: close"] if closes else []))
        if not dripping:
            connection.sendall(whole)
            return
        head, _, _ = whole.partition(b"\r\n\r\n")
        connection.sendall(head.replace(b"Length: ", b"Length: 9") + (b"\r\n\r\n" if where == "body" else b"\r\nX: "))
        while True:
            connection.sendall(b" ")
            time.sleep(0.1)

    with answering(answer) as server:
        api = KubernetesApi(server=server, account="/nowhere")
        with pytest.raises(PodUnknown):
            api.pod(REF, soon)
        waited(lambda: not [one for one in threading.enumerate() if one.name.startswith("asking the API")], 2)
        dripping = False
        assert api.pod(REF, soon).uid == "uid-1"


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"7", b"\xff", b""])
def test_an_answer_that_is_no_object_is_unknown(soon, body):
    with answering(lambda connection: connection.sendall(said("200 OK", body))) as server:
        with pytest.raises(PodUnknown):
            KubernetesApi(server=server, account="/nowhere").pod(REF, soon)


@pytest.mark.parametrize(
    ("status", "body", "gone"),
    [
        ("404 Not Found", b'{"kind": "Status", "code": 404}', True),
        ("404 Not Found", b"404 page not found", False),
        ("404 Not Found", b"[" * 100_000, False),
        ("403 Forbidden", b'{"kind": "Status", "code": 403}', False),
        ("401 Unauthorized", b'{"kind": "Status", "code": 401}', False),
        ("500 Oh", b'{"kind": "Status", "code": 500}', False),
        ("503 Oh", b"", False),
    ],
)
def test_what_the_server_itself_says_is_not_there_is_not_there(soon, status, body, gone):
    with answering(lambda connection: connection.sendall(said(status, body))) as server:
        api = KubernetesApi(server=server, account="/nowhere")
        for ask in (lambda: api.pod(REF, soon), lambda: api.handler("k", soon), lambda: api.claim_of("pv", soon)):
            with pytest.raises(PodUnknown) as told:
                ask()
            assert isinstance(told.value, NotThere) is gone


def test_the_claim_of_a_persistent_volume_is_asked_for_each_time(api, soon):
    """One that is retained may be given to another claim at any moment."""
    assert api.claim_of("pv-1", soon) == ("default", "data")
    asked = len(api.seen)
    assert api.claim_of("pv-1", soon) == ("default", "data") and len(api.seen) == asked + 1
    with pytest.raises(PodUnknown):
        api.claim_of("pv-2", soon)
    with pytest.raises(PodUnknown, match="no name"):
        api.claim_of("../x", soon)


def test_a_kubeconfig_that_was_changed_is_read_again(api, soon, tmp_path):
    if api.kind != "kubeconfig":
        return
    api.pod(REF, soon)
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace('"t1"', '"t2"'))
    while api.seen[-1] != "Bearer t2":  # the old one is used until the new one was read, which no publish waits for
        soon.check("the new token")
        assert api.seen[-1] == "Bearer t1"
        api.pod(REF, soon)


@pytest.mark.parametrize("kind", ["inline", "file"])
def test_a_token_that_ended_costs_no_publish(api, soon, tmp_path, kind):
    """The server refuses the old one at once; a file beside the kubeconfig that was replaced is read again."""
    if api.kind != "kubeconfig":
        return
    path, token = tmp_path / "kubeconfig", tmp_path / "beside"
    if kind == "file":
        token.write_text("t1")
        path.write_text(path.read_text().replace('"token": "t1"', '"tokenFile": "beside"'))
    api.pod(REF, soon)
    api.accepted.append("t2")
    (token if kind == "file" else path).write_text((token if kind == "file" else path).read_text().replace("t1", "t2"))
    api.accepted.remove("t1")
    assert api.pod(REF, soon).uid == "uid-1"
    assert api.seen[-1] == "Bearer t2"
    api.accepted.clear()
    api.accepted.append("t3")
    with pytest.raises(PodUnknown, match="401"):
        api.pod(REF, soon)


def test_a_cluster_behind_certificates_which_are_replaced(soon, tmp_path):
    """As kubelet's: an authority, a client's certificate and key in files."""

    def made(name, *more):
        subprocess.run(
            ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key",
             "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", *more, "-out", f"{name}.crt"],
            check=True, capture_output=True, cwd=tmp_path,
        )  # fmt: skip

    made("ca", "-x509")
    for name in ("server", "client", "next"):
        made(name, "-x509", "-CA", "ca.crt", "-CAkey", "ca.key")
    names = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            names.append(dict(pair[0] for pair in self.connection.getpeercert()["subject"])["commonName"])
            data = json.dumps(a_pod("isolated")).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    context.load_verify_locations(tmp_path / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "kubeconfig").write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": f"https://127.0.0.1:{server.server_port}", "certificate-authority": "ca.crt"}}],
        "users": [{"name": "u", "user": {"client-certificate": "client.crt", "client-key": "client.key"}}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
    }))  # fmt: skip
    api = KubernetesApi(kubeconfig=str(tmp_path / "kubeconfig"))
    try:
        assert api.pod(REF, soon).uid == "uid-1"
        for kind in ("crt", "key"):
            os.replace(tmp_path / f"next.{kind}", tmp_path / f"client.{kind}")
        while names[-1] != "next":
            soon.check("the new certificate")
            api.pod(REF, soon)
    finally:
        server.shutdown()


def test_what_a_kubeconfig_needs_is_never_imported_into_a_process_that_stays(api, soon):
    if api.kind == "kubeconfig":
        api.pod(REF, soon)
        assert "kubernetes" not in sys.modules


def test_a_runtime_class_that_was_made_anew_is_asked_for_again(api, soon, monkeypatch):
    api.handler("isolated", soon)
    asked = len(api.seen)
    api.handler("isolated", soon)
    assert len(api.seen) == asked
    monkeypatch.setattr("guestmount.kubernetes_api._REMEMBERED", -1.0)
    api._handlers.clear()
    api.handler("isolated", soon)
    api.handler("isolated", soon)
    assert len(api.seen) == asked + 2


@pytest.mark.parametrize(
    "kind", ["io.containerd.kuasar.v1", "aws.firecracker", "io.containerd.urunc.v2", "io.containerd.hyperv.v1"]
)
def test_what_looks_like_a_virtual_machine_is_never_the_host(detect, kind):
    more = f"""
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.odd]
runtime_type = "{kind}"
"""
    with pytest.raises(RuntimeUnknown, match=r"detect\.host_handlers"):
        detect("odd", more=more)
    with pytest.raises(RuntimeUnknown):
        detect("", more=more)  # without any other sandbox handler, nothing is sure
    assert detect("odd", more=more, host_handlers=("odd",)).kind == "host"
    assert detect("runc", more=more).kind == "host"


@pytest.mark.parametrize("runtime", ["runtime_type", "BinaryName"])
def test_a_kata_that_is_named_by_its_path_is_a_sandbox(detect, runtime):
    shim = "/opt/kata/bin/containerd-shim-kata-v2"
    table = 'plugins."io.containerd.cri.v1.runtime".containerd.runtimes.odd'
    more = f'[{table}]\nruntime_type = "{shim}"\n'
    if runtime == "BinaryName":
        more = (
            f'[{table}]\nruntime_type = "io.containerd.runc.v2"\n'
            f'[{table}.options]\nBinaryName = "/opt/kata/bin/kata-runtime"\n'
        )
    found = detect("odd", more=more)
    assert (found.kind, found.dialect) == ("sandbox", "kata")


def test_a_readers_plugin_ends_with_the_process_that_asked(tmp_path):
    """kill -9 of a driver leaves nobody who waits for a credential plugin."""
    mark = f"98{os.getpid()}"
    plugin = tmp_path / "plugin"
    plugin.write_text(f"#!/bin/sh\nexec sleep {mark}\n")
    plugin.chmod(0o755)
    user = {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}
    }
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "c",
              "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
              "clusters": [{"name": "k", "cluster": {"server": "https://127.0.0.1:1"}}],
              "users": [{"name": "u", "user": user}]}  # fmt: skip
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    program = (
        f"import time; from guestmount.kubeconfig import Kubeconfig; Kubeconfig({str(path)!r}).begin(); time.sleep(60)"
    )
    asking = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).resolve().parents[2])

    def left() -> list[str]:
        found = []
        for one in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
                if mark.encode() in words or (str(path).encode() in words and int(one) != asking.pid):
                    found.append(one)
        return found

    try:
        waited(lambda: len(left()) >= 2)
    finally:
        asking.kill()
        asking.wait()
    waited(lambda: not left())


def waited(true, seconds=20.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_nodes_files_are_read_where_its_root_is_mounted(tmp_path):
    """As a pod sees them: links, those of directories on the way among them, lead where the node's do."""
    host = tmp_path / "host"
    (host / "var/lib/agent/conf.d").mkdir(parents=True)
    (host / "etc").mkdir()
    (host / "etc/containerd").symlink_to("/var/lib/agent")
    (host / "var/lib/agent/config.toml").write_text('version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n')
    (host / "var/lib/agent/conf.d/kata.toml").write_text(
        '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.k]\nruntime_type = "io.containerd.kata.v2"\n'
        '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.k.options]\nConfigPath = "/opt/kata.toml"\n'
    )
    (host / "opt").mkdir()
    (host / "opt/real.toml").write_text("[hypervisor.qemu]\ndisable_block_device_use = true\n")
    (host / "opt/kata.toml").symlink_to("/opt/real.toml")
    (found,) = containerd_readings.read("/etc/containerd/config.toml", str(host)).found
    assert found.handlers["k"].is_sandbox
    kata = kata_config.read(found.handlers["k"], root=str(host))
    assert kata is not None and kata.disable_block_device_use
    assert not containerd_readings.read("/etc/absent.toml", str(host)).found
