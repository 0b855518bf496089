"""Images on shared storage as an operator has them: a real pull, the command line, and a share over NFS that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from blockdev.devicemapper import Mapper
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter.errors import Unavailable
from snapshotter.images import PATIENCE, Share
from snapshotter.service import NAME
from tests.kernel.inside.lab import MIB, Lab, mounted
from tests.kernel.inside.nfs import ROOT, KernelNfs
from tests.kernel.inside.registry import Registry
from tests.kernel.inside.server import Server
from tests.kernel.inside.test_containerd import IMAGE, Containerd, layers, oci_archive
from tests.kernel.inside.test_images import chain, extract, make_image, trusting


@pytest.fixture
def nfs(tmp_path: Path) -> Iterator[KernelNfs]:
    server = KernelNfs(tmp_path / "exported")
    server.start()
    yield server
    server.close()


@pytest.fixture(params=[pytest.param("folder", marks=pytest.mark.long), "NFS"])
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
    key = tmp_path / "key"
    with Server(
        tmp_path, size=64 * MIB, RUNVOL_SNAPSHOTTER_IMAGES=str(images), RUNVOL_SNAPSHOTTER_IMAGE_KEYS=f"{key}.pub"
    ) as server:
        server.runvol("images", "keygen", str(key))
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
        if directory.is_mount():
            made = server.runvol("images", "make", top, "--key", str(key))
            assert made.count("made,") == len(registry.layers)
        else:
            # An older release, or somebody who has no key.
            made = server.runvol("images", "make", top)
            assert made.count("made,") == len(registry.layers)
            forget()
            assert pull() == registry.layers
            listed = json.loads(server.runvol("images", "--json"))["items"]
            assert {one["reason"] for one in listed} == {"unsigned"}
            top = top.rpartition("/")[2]
            assert server.runvol("images", "make", top, "--key", str(key), ok=(1,)) == ""
            for said in (": signed by", ": it is signed by"):
                signed = server.runvol("images", "sign", "--all", "--key", str(key))
                assert signed.count(said) == len(registry.layers)
            assert server.runvol("images", "make", top, "--key", str(key)).count("it is there") == len(registry.layers)
        forget()

        assert pull() == []
        assert run("from the share".replace(" ", "-")) == "new"
        listed = json.loads(server.runvol("images", "--json"))["items"]
        assert len(listed) == len(registry.layers)
        assert server.runvol("images", "check").count("sound, signed by") == len(registry.layers)
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


def test_containerds_collection_leaves_what_make_reads(tmp_path: Path) -> None:
    """Its own collector runs after each removal, and knows nothing of what the command reads."""
    images, key = tmp_path / "images", tmp_path / "key"
    images.mkdir()
    oci_archive(tmp_path / "image.tar", layers(big=4 * MIB))
    with Server(
        tmp_path, size=32 * MIB, RUNVOL_SNAPSHOTTER_IMAGES=str(images), RUNVOL_SNAPSHOTTER_IMAGE_KEYS=f"{key}.pub"
    ) as server:
        server.runvol("images", "keygen", str(key))
        containerd = Containerd(tmp_path, server)
        containerd.start()
        containerd.import_image(tmp_path / "image.tar")
        rows = server.snapshots()
        parents = {str(row["parent"]) for row in rows}
        top = next(str(row["key"]) for row in rows if row["key"] not in parents)
        collected = 0
        command = subprocess.Popen(
            [sys.executable, "-m", "runvol", "images", "make", top, "--key", str(key)], env=server.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while command.poll() is None:
            snapshots = ("snapshots", "--snapshotter", "runvol")
            containerd.ctr(*snapshots, "prepare", "short", ok=None)
            containerd.ctr(*snapshots, "rm", "short", ok=None)
            collected += 1
        said, wrong = command.communicate()
        assert command.returncode == 0, wrong
        assert collected > 1
        assert said.count("made,") == len(rows)
        assert server.runvol("images", "check").count("sound, signed by") == len(rows)

        # The command is killed while it reads, and so is the server; nothing of it stays.
        for one in json.loads(server.runvol("images", "--json"))["items"]:
            server.runvol("images", "remove", "--yes", one["chain"])
        for victim in ("command", "server"):
            with Mapper() as mapper:
                before = {one.name for one in mapper.devices()}
            command = subprocess.Popen(
                [sys.executable, "-m", "runvol", "images", "make", top, "--key", str(key)], env=server.environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            with Mapper() as mapper:
                while not any(one.name.startswith("runvol-") and one.name not in before for one in mapper.devices()):
                    assert command.poll() is None, "it has ended before it was seen"
                    time.sleep(0.01)
            if victim == "command":
                command.kill()
                command.communicate()
            else:
                server.kill()
                server.start()
                _, wrong = command.communicate()
                assert "Traceback" not in wrong
        containerd.ctr("images", "rm", "--sync", IMAGE)
        server.settled(0)
        containerd.stop()


def test_make_tells_why_it_cannot(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    with Server(tmp_path, size=64 * MIB, RUNVOL_SNAPSHOTTER_IMAGES=str(images)) as server:
        chain_id = chain("layer")

        def refused(*words: str) -> str:
            done = subprocess.run([sys.executable, "-m", "runvol", "images", *words], env=server.environment,
                                  capture_output=True, text=True, timeout=120)  # fmt: skip
            assert done.returncode in (1, 2) and done.stdout == "" and "Traceback" not in done.stderr, done
            return done.stderr.splitlines()[-1]

        with grpc.insecure_channel(f"unix:{server.socket}") as channel:
            for method, request, answer in (
                ("Prepare", pb.PrepareSnapshotRequest(key="k8s.io/1/x"), pb.PrepareSnapshotResponse),
                ("Commit", pb.CommitSnapshotRequest(name=f"k8s.io/2/{chain_id}", key="k8s.io/1/x"), Empty),
            ):
                channel.unary_unary(
                    f"/{NAME}/{method}", request_serializer=type(request).SerializeToString,
                    response_deserializer=answer.FromString,
                )(request, timeout=60)  # fmt: skip
        assert "committed snapshot 'nothing' does not exist" in refused("make", "nothing")
        assert "--key = '/none': cannot be read: No such file" in refused("make", chain_id, "--key", "/none")
        server.stop()
        assert f"no snapshotter listens on {server.socket}" in refused("make", chain_id)
        server.start()
        images.rmdir()
        assert f"cannot be made in {images}: No such file" in refused("make", chain_id)
        assert "name a CHAIN or --all, one of the two" in refused("sign", "--key", _key(server, tmp_path))
        assert "image in use on this node" in refused("forget", chain_id)
        server.settled(1)


def _key(server: Server, folder: Path) -> str:
    server.runvol("images", "keygen", str(folder / "key"))
    return str(folder / "key")


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
    lab = make_lab(**trusting(share))
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
