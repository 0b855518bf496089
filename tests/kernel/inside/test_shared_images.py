"""Images on shared storage as an operator has them: a real pull, the command line, and a share over NFS that dies."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.errors import Unavailable
from snapshotter.images import PATIENCE, Share
from tests.kernel.inside.lab import MIB, Lab, mounted
from tests.kernel.inside.nfs import ROOT, KernelNfs
from tests.kernel.inside.registry import Registry
from tests.kernel.inside.server import Server
from tests.kernel.inside.test_containerd import Containerd, layers, oci_archive
from tests.kernel.inside.test_images import chain, extract, make_image


@pytest.fixture
def nfs(tmp_path: Path) -> Iterator[KernelNfs]:
    server = KernelNfs(tmp_path / "exported")
    server.start()
    yield server
    server.close()


@pytest.fixture(params=["folder", "NFS"])
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where the share lies."""
    place = tmp_path / "images"
    place.mkdir()
    if request.param == "folder":
        yield place
        return
    server: KernelNfs = request.getfixturevalue("nfs")
    server.mount(place)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_pull_fetches_no_layer_that_the_share_has(tmp_path: Path, directory: Path) -> None:
    """A node pulls as ever; its operator puts the chains onto the share; the next pull is answered from there."""
    images = directory / "of-runvol"
    images.mkdir()
    oci_archive(tmp_path / "image.tar", layers(big=2 * MIB))
    registry = Registry(tmp_path / "image.tar")
    with Server(tmp_path, size=64 * MIB, RUNVOL_SNAPSHOTTER_IMAGES=str(images)) as server:
        containerd = Containerd(tmp_path, server)
        containerd.start()

        def pull() -> list[str]:
            registry.fetched.clear()
            containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "runvol", registry.name)
            return [digest for digest in registry.layers if digest in registry.fetched]

        def run(name: str) -> str:
            return containerd.ctr(
                "run", "--rm", "--snapshotter", "runvol", registry.name, name, "/bin/cat", "/etc/changed"
            )[1]

        def forget() -> None:
            containerd.ctr("images", "rm", "--sync", registry.name)
            server.settled(0)

        assert pull() == registry.layers
        assert run("pulled") == "new"
        keys = [str(row["key"]) for row in server.snapshots()]
        top = next(key for key in keys if not any(row["parent"] == key for row in server.snapshots()))
        made = server.runvol("images", "make", top)
        assert made.count("made,") == len(registry.layers)
        forget()

        assert pull() == []
        assert run("from the share".replace(" ", "-")) == "new"
        listed = json.loads(server.runvol("images", "--json"))
        assert len(listed) == len(registry.layers)
        assert server.runvol("images", "check").count("sound") == len(registry.layers)
        forget()

        # Without the topmost chain the two below are taken from the share, and only the last layer is fetched.
        top_chain = next(one["chain"] for one in listed if one["chain"] in top)
        server.runvol("images", "remove", "--yes", top_chain)
        assert pull() == registry.layers[-1:]
        assert run("mixed") == "new"

        image = images / listed[0]["chain"].removeprefix("sha256:")
        if image.exists():
            with open(image / "image", "r+b") as opened:
                opened.seek(5 * MIB)
                opened.write(b"x" * 4096)
            assert "is not what it was" in server.runvol("images", "check", ok=(1,))
        forget()
        containerd.stop()
    registry.close()


def test_a_server_that_dies_is_an_error_for_new_containers_and_for_nobody_else(
    nfs: KernelNfs, make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    place = tmp_path / "mounted"
    # As an operator mounts shared storage: it waits for its server for ever.
    nfs.mount(place, options="hard")
    share = Share(str(place))
    maker = make_lab()
    maker.layer("base", files={"f": b"base"})
    make_image(maker, share, "base", "base")
    lab = make_lab(images=share.directory)
    base = extract(lab, "base", "")
    with mounted(lab.prepare("before", base)) as root:
        assert (root / "f").read_bytes() == b"base"
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    nfs.stop()
    try:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="do not answer"):
            lab.prepare("new", base)
        assert time.monotonic() - started < PATIENCE + 3
        started = time.monotonic()
        lab.prepare("local")
        lab.commit("layer", "local")
        with pytest.raises(Unavailable, match="do not answer"):
            lab.prepare("newer", base)
        assert time.monotonic() - started < 3
    finally:
        nfs.start()
    until = time.monotonic() + 60
    while True:
        try:
            mounts = lab.prepare("new", base)
            break
        except Unavailable:
            assert time.monotonic() < until
            time.sleep(0.5)
    with mounted(mounts) as root:
        assert (root / "f").read_bytes() == b"base"
    for key in ("before", "new"):
        lab.remove(key)
    lab.reap()
    lab.remove(base)
    lab.reap()
    lab.node.reaper.round()
    assert chain("base") in share.chains()
    subprocess.run(["umount", str(place)], check=True)
    assert ROOT.exists()
