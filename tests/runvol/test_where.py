"""`runvol where POD`: what a log collector finds on the node, and what only a guest has."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.csi.helpers import PODS
from runvol.where import Bundle, Pod, places
from tests.driver import Driver

pytestmark = pytest.mark.kernel
A, B = PODS[:2]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    state = tmp_path / "containerd"
    with Driver(environment={"RUNVOL_CRI_ENDPOINT": f"unix://{state}/containerd.sock",
                             "RUNVOL_PATHS_POD_LOGS": str(tmp_path / "logs")}) as one:  # fmt: skip
        yield one
        subprocess.run(["umount", "-q", *map(str, state.glob("*/k8s.io/*/rootfs"))], check=False)


def bundle(
    tmp_path: Path, name: str, pod: str, uid: str, mounts: dict[str, str], *, on_host: bool, kind: str = "container"
) -> Path:
    """As containerd's CRI plugin writes it."""
    place = tmp_path / "containerd/io.containerd.runtime.v2.task/k8s.io" / name
    (place / "rootfs").mkdir(parents=True)
    annotations = {f"io.kubernetes.cri.{key}": value for key, value in {
        "container-type": kind, "container-name": name, "sandbox-id": "s", "sandbox-namespace": "default",
        "sandbox-name": pod, "sandbox-uid": uid}.items()}  # fmt: skip
    spec = {"ociVersion": "1.1.0", "root": {"path": "rootfs"}, "annotations": annotations,
            "mounts": [{"destination": to, "source": source, "type": "bind"} for source, to in mounts.items()]}  # fmt: skip
    (place / "config.json").write_text(json.dumps(spec))
    if on_host:
        subprocess.run(["mount", "-t", "tmpfs", "layers", place / "rootfs"], check=True)
    return place


def output(tmp_path: Path, pod: str, uid: str, container: str, *numbers: int) -> Path:
    place = tmp_path / "logs" / f"default_{pod}_{uid}" / container
    place.mkdir(parents=True)
    for number in numbers:
        (place / f"{number}.log").write_text("")
    return place


def where(driver: Driver, pod: str) -> list[dict[str, Any]]:
    found = json.loads(driver.cli("where", pod, "--json").stdout)
    rows: list[dict[str, Any]] = found["items"] if isinstance(found, dict) else found
    return rows


def test_a_runc_pod_is_read_on_the_host_and_a_guests_volume_is_not(driver: Driver, tmp_path: Path) -> None:
    volumes = [driver.create(name) for name in ("web", "db")]
    targets = {}
    for volume, uid, runtime, name in zip(volumes, (A, B), ("runc", "kata"), ("web-0", "db-0"), strict=True):
        driver.stage(volume)
        targets[name] = driver.publish(volume, uid, runtime=runtime, name=name)
    empty = f"{driver.kubelet}/pods/{A}/volumes/kubernetes.io~empty-dir/tmp"
    runc = bundle(
        tmp_path, "web", "web-0", A, {targets["web-0"]: "/www", empty: "/tmp", "/etc/hosts": "/etc/hosts"}, on_host=True
    )
    guest = bundle(tmp_path, "db", "db-0", B, {targets["db-0"]: "/data"}, on_host=False)
    bundle(tmp_path, "pause", "web-0", A, {}, on_host=False, kind="sandbox")
    (tmp_path / "containerd/io.containerd.runtime.v2.task/k8s.io/half").mkdir()
    log = output(tmp_path, "web-0", A, "web", 0, 2, 10)

    for name in ("web-0", "default/web-0", A):
        rows = where(driver, name)
        assert [(one["what"], one["container"], one["seenAt"], one["path"], one["readable"]) for one in rows] == [
            ("root filesystem", "web", "/", f"{runc}/rootfs", True),
            ("standard output", "web", None, f"{log}/10.log", True),
            ("volume", "web", "/www", targets["web-0"], True),
            ("volume", "web", "/tmp", empty, True),
        ]
    assert {one["podUid"] for one in rows} == {A}
    rows = where(driver, "db-0")
    assert [(one["what"], one["path"], one["readable"]) for one in rows] == [
        ("root filesystem", f"{guest}/rootfs", False),
        ("volume", targets["db-0"], False),
    ]
    assert "the guest has it" in rows[0]["why"]
    assert "its guest has it mounted" in rows[1]["why"]
    assert (rows[1]["volume"], rows[1]["handler"]) == (volumes[1].volume_id, "kata")
    assert "its guest has it mounted" in driver.cli("where", "db-0").stdout
    for volume, uid in zip(volumes, (A, B), strict=True):
        driver.unpublish(volume, uid)
        driver.unstage(volume)


def test_nothing_of_a_pod_is_said_in_words(driver: Driver) -> None:
    done = driver.cli("where", "none", check=False)
    assert done.returncode == 1
    assert "nothing of a pod none is on this node" in done.stderr


def test_what_is_no_bundle_is_passed_over(driver: Driver, tmp_path: Path) -> None:
    """A FIFO, a link, and JSON of another form: nobody waits, and the others are told."""
    import os

    bundles = tmp_path / "containerd/io.containerd.runtime.v2.task/k8s.io"
    for name, content in (("text", "{"), ("other", '{"annotations": 7}')):
        (bundles / name).mkdir(parents=True)
        (bundles / name / "config.json").write_text(content)
    (bundles / "fifo").mkdir()
    os.mkfifo(bundles / "fifo/config.json")
    place = bundle(tmp_path, "c", "p", A, {}, on_host=False)
    (row,) = where(driver, "p")
    assert row["path"] == f"{place}/rootfs"


def test_no_name_is_nobodys_name() -> None:
    """Of a pod whose name is not known."""
    nameless = Bundle(pod=Pod(uid="u1"), container="c", root="/r", read_only=False, mounts=[])
    for wanted, number in (("", 0), ("/", 0), ("u1", 1)):
        assert len(places(wanted, claims=[], containers=[nameless], outputs=[], root="/")) == number
