"""One image in several namespaces of a node is stored once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter.errors import AlreadyExists
from snapshotter.model import LABEL_PARENT_CHAIN, LABEL_REF
from snapshotter.pool import DeviceMissing
from tests.kernel.inside.lab import MIB, Lab, mounted, soon
from tests.kernel.inside.registry import Registry
from tests.kernel.inside.server import Server
from tests.kernel.inside.test_containerd import Containerd, layers, oci_archive
from tests.kernel.inside.test_images import chain, extract

pytestmark = pytest.mark.short


def unpack(lab: Lab, namespace: str, name: str, parent: str, content: bytes) -> str:
    """What containerd does for a layer that is not there; the key of the committed snapshot."""
    key = f"{namespace}/7/extract-1 {chain(name)}"
    with mounted(lab.node.snapshots.prepare(key, parent, {LABEL_REF: chain(name)}, soon())) as root:
        (root / name).write_bytes(content)
    committed = f"{namespace}/8/{chain(name)}"
    # containerd gives the labels of the layer's descriptor, and no reference.
    lab.node.snapshots.commit(committed, key, {}, "", soon())
    return committed


def image(lab: Lab, namespace: str) -> str:
    base = unpack(lab, namespace, "base", "", b"b" * MIB)
    top = unpack(lab, namespace, "top", base, b"t" * MIB)
    lab.reap()
    return top


def test_another_namespace_has_it_without_a_block(lab: Lab) -> None:
    top = image(lab, "k8s.io")
    before = lab.status().data_used
    base = extract(lab, "base", "", namespace="moby")
    assert base
    again = extract(lab, "top", base, namespace="moby")
    assert again
    assert lab.status().data_used == before
    assert lab.usage(again) == lab.usage(top)
    with mounted(lab.prepare("moby/9/c", again)) as root:
        assert ((root / "base").read_bytes(), (root / "top").read_bytes()) == (b"b" * MIB, b"t" * MIB)
        (root / "top").write_bytes(b"mine")
    assert lab.read(top, "top") == b"t" * MIB
    # The same call again finds what it has made, also after a restart.
    lab.restart()
    assert extract(lab, "base", "", namespace="moby") == base


def test_what_one_namespace_removes_stays_for_the_other(lab: Lab) -> None:
    top = image(lab, "k8s.io")
    base = extract(lab, "base", "", namespace="moby")
    again = extract(lab, "top", base, namespace="moby")
    lab.remove(top)
    lab.remove(f"k8s.io/8/{chain('base')}")
    assert not lab.leaks()
    assert lab.read(again, "top") == b"t" * MIB
    assert lab.usage(again)[1] == 1
    # And back: the first has it from the second now.
    with pytest.raises(AlreadyExists):
        lab.node.snapshots.prepare("k8s.io/9/x", "", {LABEL_REF: chain("base")}, soon())
    assert [name for name in lab.names() if name.startswith("runvol-layer/k8s.io/")]
    lab.node.pool.check_live(soon())


def test_only_the_same_chain_on_the_same_chain_in_the_same_filesystem(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(by_namespace={"large": 48 * MIB})
    image(lab, "k8s.io")
    assert extract(lab, "base", "", namespace="large") == "", "it is of another size there"
    assert extract(lab, "top", "", namespace="moby") == "", "it has a layer below"
    other = unpack(lab, "moby", "other", "", b"x")
    assert extract(lab, "top", other, namespace="moby") == "", "another layer is below"
    lab.layer("plain", files={"f": b"x"})
    assert extract(lab, "top", "plain", namespace="moby") == "", "what was unpacked from no image is below"
    key = f"moby/7/extract-1 {chain('base')}"
    lab.node.snapshots.prepare(key, "", {LABEL_REF: chain("base"), LABEL_PARENT_CHAIN: chain("x")}, soon())
    lab.node.snapshots.prepare("moby/1/c", "", {LABEL_REF: "not a chain"}, soon())
    assert not [name for name in lab.names() if name.startswith("runvol-layer/")]


def test_a_device_of_doubtful_content_is_never_taken(lab: Lab) -> None:
    image(lab, "k8s.io")
    device = lab.stat(f"k8s.io/8/{chain('base')}").device
    with lab.node.store.transaction():
        lab.node.store.quarantine([device], 1)
    assert extract(lab, "base", "", namespace="moby") == ""
    lab.restart()
    assert device in lab.node.store.shared
    assert extract(lab, "base", "", namespace="moby") == ""
    with lab.node.store.transaction():
        lab.node.store.release([device])


def test_it_can_be_switched_off(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    image(lab, "k8s.io")
    lab.settings = replace(lab.settings, share_layers=False)
    lab.restart()
    assert extract(lab, "base", "", namespace="moby") == ""


def test_what_is_removed_meanwhile_is_unpacked_as_ever(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    image(lab, "k8s.io")

    create, calls = lab.node.pool.create_snapshot, []

    def gone_at_first(device: int, origin: int, **more: bool) -> None:
        calls.append(origin)
        if len(calls) == 1:
            raise DeviceMissing("gone")
        create(device, origin, **more)

    monkeypatch.setattr(lab.node.pool, "create_snapshot", gone_at_first)
    assert extract(lab, "base", "", namespace="moby") == ""
    assert len(calls) == 2
    assert not [name for name in lab.names() if name.startswith("runvol-layer/")]
    assert not lab.leaks()


def test_a_claimed_layer_is_an_ordinary_one(lab: Lab) -> None:
    image(lab, "k8s.io")
    base = extract(lab, "base", "", namespace="moby")
    (mount,) = lab.view("v", base)
    assert subprocess.run(["e2fsck", "-fn", mount.source], check=False, capture_output=True).returncode == 0


def test_a_pull_in_another_namespace_fetches_and_stores_no_layer(tmp_path: Path) -> None:
    oci_archive(tmp_path / "image.tar", layers(big=2 * MIB))
    registry = Registry(tmp_path / "image.tar")
    with Server(tmp_path, size=64 * MIB) as server:
        containerd = Containerd(tmp_path, server)
        containerd.start()

        def pull(namespace: str) -> list[str]:
            registry.fetched.clear()
            containerd.ctr("-n", namespace, "images", "pull", "--plain-http", "--snapshotter", "runvol", registry.name)
            return [digest for digest in registry.layers if digest in registry.fetched]

        def run(namespace: str) -> str:
            return containerd.ctr("-n", namespace, "run", "--rm", "--snapshotter", "runvol", registry.name, "c", "/bin/cat",
                                  "/etc/changed")[1]  # fmt: skip

        try:
            assert len(pull("first")) == 3
            used = server.pool()["dataUsedBytes"]
            assert pull("second") == []
            # The store's copy in the pool may have grown by some blocks; the layers have two MiB.
            assert server.pool()["dataUsedBytes"] - used < MIB
            assert (run("first"), run("second")) == ("new", "new")
            containerd.ctr("-n", "first", "images", "rm", "--sync", registry.name)
            assert run("second") == "new"
            containerd.ctr("-n", "second", "images", "rm", "--sync", registry.name)
            server.settled(0)
        finally:
            containerd.stop()
            registry.close()
