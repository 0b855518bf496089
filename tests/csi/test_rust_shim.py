"""Pods under Kata's Rust shim, as an API server tells them: whose containers may share a block volume."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.csi.helpers import PODS, refused
from tests.driver import Driver

A = PODS[1]
CONTAINERD = """[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
runtime_path = "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2"
"""


class Api(ThreadingHTTPServer):
    """Answers for one pod, and for every RuntimeClass with the handler kata."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.spec: dict[str, Any] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def runs(
        self, *, init: tuple[str, ...] = (), sidecars: tuple[str, ...] = (), containers: tuple[str, ...] = ()
    ) -> None:
        """The pod has these containers, and each of them writes to the volume."""

        def named(names: tuple[str, ...], **more: str) -> list[dict[str, Any]]:
            return [{"name": name, "volumeMounts": [{"name": "data", "mountPath": "/data"}], **more} for name in names]

        self.spec = {
            "runtimeClassName": "kata",
            "initContainers": [*named(init), *named(sidecars, restartPolicy="Always")], "containers": named(containers),
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "pvc"}}],
        }  # fmt: skip


class Answer(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        pod = {"metadata": {"uid": A, "name": "pod", "namespace": "default"}, "spec": self.server.spec}
        found = pod if "/pods/" in self.path else {"handler": "kata"}
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as one:
        yield one
        one.shutdown()


@pytest.fixture
def driver(api: Api, request: pytest.FixtureRequest) -> Iterator[Driver]:
    one = Driver(environment={"RUNVOL_DETECT_API_SERVER": api.address, **getattr(request, "param", {})})
    (one.directory / "containerd.toml").write_text(CONTAINERD)
    config = one.directory / "kata/etc/kata-containers/runtime-rs/configuration.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\ndisable_block_device_use = false\n")
    with one:
        yield one
        assert not one.mounts()


def test_two_writers_are_refused_and_what_is_delivered_stays(driver, api):
    volume = driver.create("pvc-1")
    driver.stage(volume)
    api.runs(containers=("one", "two"))
    with refused("FAILED_PRECONDITION", "'one' and 'two'", "'data'", "claim 'pvc'", "kata.rust_shared_block"):
        driver.publish(volume, A)
    assert not driver.mounts()
    api.runs(containers=("one",), sidecars=("two",))
    with refused("FAILED_PRECONDITION", "'two' and 'one'"):
        driver.publish(volume, A)
    api.runs(containers=("one",), init=("two",))
    driver.publish(volume, A)
    api.runs(containers=("one", "two"))
    driver.publish(volume, A)
    driver.unpublish(volume, A)


@pytest.mark.parametrize("driver", [{"RUNVOL_KATA_RUST_SHARED_BLOCK": "allow"}], indirect=True)
def test_an_operator_may_allow_two_writers(driver, api):
    volume = driver.create("pvc-1")
    driver.stage(volume)
    api.runs(containers=("one", "two"))
    driver.publish(volume, A)
    driver.unpublish(volume, A)


def test_a_read_only_publish_has_no_writers(driver, api):
    volume = driver.create("pvc-1")
    driver.stage(volume)
    api.runs(containers=("one", "two"))
    driver.publish(volume, A, read_only=True)
    driver.unpublish(volume, A)


def test_doctor_says_where_nobody_is_refused(driver):
    def said() -> list[str]:
        rows = json.loads(driver.cli("doctor", "--json", check=False).stdout)["items"]
        return [row["finding"] for row in rows if "Rust shim" in row["finding"]]

    assert not said()
    del driver.environment["RUNVOL_DETECT_API_SERVER"]
    (finding,) = said()
    assert "no Kubernetes API" in finding
    driver.environment["RUNVOL_KATA_RUST_SHARED_BLOCK"] = "allow"
    (finding,) = said()
    assert 'kata.rust_shared_block is "allow"' in finding
    driver.environment["RUNVOL_KATA_RUST_SHARED_BLOCK"] = "maybe"
    assert "takes refuse, allow" in driver.cli("doctor", check=False).stderr
