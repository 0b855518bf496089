"""A real containerd with running containers whose snapshotter loses its store, gets an old one, or a power cut of the
state's disk alone: what runs goes on, `runvol pool repair-store` brings back the rest, and the commands that it and
docs/snapshotter.md name put right what it could not."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.devicemapper import Mapper
from snapshotter.store import STORE
from tests.kernel.inside.server import MIB, Server, program
from tests.kernel.inside.state_disk import StateDisk
from tests.kernel.inside.test_containerd import Containerd, _layer, layers, oci_archive

_WRITER = "i=0; while test ! -e /stop; do i=$((i+1)); echo line $i >> /log; sleep 0.4; done"
_JUDGES = 'read line < /etc/passwd && test "$line" = root:x:0:0::/:/bin/sh || exit 9'
# A server that copies its store into the pool once, soon after its start.
_ONE_COPY = (
    "import sys; from snapshotter import node; node._COPY_PAUSE = 1e6; sys.argv = ['runvol', 'snapshotter']; "
    "from runvol.entry import main; main()"
)
# Who writes, by namespace and name, and on which image.
_WRITERS = {("t", "wt"): "a", ("t", "wb"): "b", ("k", "wk"): "a"}
_RUNVOL = ("--snapshotter", "runvol")


class Node:
    """A containerd, its snapshotter on a state disk of its own, four images, and containers that write all the time."""

    def __init__(self, directory: Path, disk: StateDisk, server: Server) -> None:
        self.directory, self.disk, self.server = directory, disk, server
        self.containerd = Containerd(directory, server)
        bottom = layers()[0]
        self._archive("a", layers())
        self._archive("b", [bottom, _layer({"etc/b": b"b"})])
        self._archive("d", [bottom, _layer({"etc/d": b"d"})])
        self._archive("e", [bottom, _layer({"etc/e": b"e"})])
        # Nothing of this one is there already.
        self._archive("n", [layers()[0] + bytes(1 << 10), _layer({"etc/n": b"n"})])
        self.seen: dict[tuple[str, str], int] = {}

    def _archive(self, image: str, blobs: list[bytes]) -> None:
        oci_archive(self.directory / f"{image}.tar", blobs, self.name(image))

    @staticmethod
    def name(image: str) -> str:
        return f"runvol.io/test/{image}:1"

    def ctr(self, namespace: str, *words: str) -> tuple[int, str]:
        """Exit status, and what was said."""
        done = subprocess.run([program("ctr"), "-a", self.containerd.socket, "-n", namespace, *words], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)  # fmt: skip
        return done.returncode, done.stdout

    def well(self, namespace: str, *words: str) -> str:
        code, said = self.ctr(namespace, *words)
        assert code == 0, (words, said)
        return said

    def bring(self, image: str, namespace: str = "t") -> tuple[int, str]:
        """Import it; containerd waits up to three seconds before it dials a snapshotter that was away."""
        words = ("images", "import", "--local", *_RUNVOL, str(self.directory / f"{image}.tar"))
        return self.ctr(namespace, *words)

    def run(self, image: str, container: str, namespace: str = "t") -> tuple[int, str]:
        """Status 0 if the root holds what the image has. The container judges: ctr may lose what one says that ends
        before ctr has opened its pipe."""
        return self.ctr(namespace, "run", "--rm", *_RUNVOL, self.name(image), container, "/bin/sh", "-c", _JUDGES)

    def write(self, image: str, container: str, namespace: str) -> None:
        self.well(namespace, "run", "-d", *_RUNVOL, self.name(image), container, "/bin/sh", "-c", _WRITER)
        self.seen[namespace, container] = 0

    def drop(self, container: str, namespace: str) -> None:
        self.well(namespace, "tasks", "rm", "-f", container)
        self.well(namespace, "containers", "rm", container)
        self.seen.pop((namespace, container), None)

    def written(self) -> None:
        """Each container has written on since, and its root holds all of it, byte for byte."""
        for (namespace, container), before in self.seen.items():
            until = time.monotonic() + 20
            while True:
                mark = f"e{time.monotonic_ns()}"
                code, said = self.ctr(namespace, "tasks", "exec", "--exec-id", mark, container, "/bin/cat", "/log")
                lines = said.splitlines()
                if code == 0 and len(lines) > before:
                    break
                assert time.monotonic() < until, (container, code, said[-500:])
            assert lines == [f"line {number}" for number in range(1, len(lines) + 1)], container
            self.seen[namespace, container] = len(lines)

    def settle(self) -> None:
        """Until the pool is served, and containerd has dialled again."""
        until = time.monotonic() + 30
        for namespace in ("t", "k"):
            while self.ctr(namespace, "snapshots", *_RUNVOL, "ls")[0]:
                assert time.monotonic() < until, self.server.said()
                time.sleep(0.3)

    def lose(self, instead: Path | None = None) -> None:
        for suffix in ("", "-wal", "-shm", ".refused"):
            (self.server.state / f"{STORE}{suffix}").unlink(missing_ok=True)
        if instead is not None:
            shutil.copy(instead, self.server.state / STORE)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Three containers write; their store is in the pool's copy, and what is done from now on is not."""
    with StateDisk(tmp_path, tmp_path / "state") as disk, Server(tmp_path, size=64 * MIB) as server:
        one = Node(tmp_path, disk, server)
        one.containerd.start()
        for namespace, image in (("t", "a"), ("t", "b"), ("k", "a")):
            assert one.bring(image, namespace)[0] == 0
        for (namespace, container), image in _WRITERS.items():
            one.write(image, container, namespace)
        one.written()
        server.stop()
        _start(server, "-c", _ONE_COPY)
        one.settle()
        time.sleep(4)  # the copy that follows a start
        yield one
        for namespace, container in list(one.seen):
            one.drop(container, namespace)
        one.containerd.stop()


def _start(server: Server, *words: str) -> None:
    """With these instead of `-m runvol snapshotter`."""
    if words:
        server._prefix = ("sh", "-c", f"exec {shlex.join([sys.executable, *words])}", "instead")
    server.start()
    server._prefix = ()


def _late(node: Node) -> None:
    """An image and a container on it that the pool's copy of the store does not know, and one that is gone since."""
    assert node.bring("d")[0] == 0
    node.write("d", "late", "t")
    node.written()


def _after(node: Node, *, without: str = "") -> None:
    """Everything goes on, but for the image `without`."""
    node.server.start()
    node.settle()
    node.written()
    for image, namespace in (("a", "t"), ("b", "t"), ("a", "k")):
        if image != without:
            code, said = node.run(image, f"new-{image}", namespace)
            assert code == 0, said
    for image in ("a", "e"):
        code, said = node.bring(image)
        assert code == 0, said
    assert node.run("e", "new-e")[0] == 0
    node.written()


def _unpacked(node: Node) -> set[str]:
    """The images that the documented command calls unpacked."""
    rows = [line.split() for line in node.well("t", "images", "check", *_RUNVOL).splitlines()[1:]]
    assert {row[-1] for row in rows} <= {"true", "false"}
    return {row[0] for row in rows if row[-1] == "true"}


def _pull_again(node: Node, image: str, container: str) -> None:
    """As the page says: the containers of the image, the image, and it is there anew."""
    node.drop(container, "t")
    node.well("t", "images", "rm", "--sync", node.name(image))
    assert node.bring(image)[0] == 0
    code, said = node.run(image, "anew")
    assert code == 0, said


def _end(node: Node, images: tuple[str, ...]) -> None:
    """containerd collects all of it, and the pool is as empty as the snapshotter says."""
    for namespace, container in list(node.seen):
        node.drop(container, namespace)
    for image in images:
        node.well("t", "images", "rm", "--sync", node.name(image))
    node.well("k", "images", "rm", "--sync", node.name("a"))
    node.server.settled(0)
    left = json.loads(node.server.runvol("pool", "quarantine", "--json"))["items"]
    if left:
        node.server.runvol("pool", "quarantine", "--free-all", "--yes")
        node.server.settled(0)


def test_a_lost_store(node: Node) -> None:
    _late(node)
    node.server.kill()
    node.lose()
    node.server.start()
    node.settle()
    node.written()
    assert node.well("t", "snapshots", *_RUNVOL, "ls").splitlines()[1:] == []
    for image in ("a", "d"):
        code, said = node.run(image, "refused")
        assert code == 1
        assert "does not exist: containerd has it in its own database" in said
    code, said = node.bring("n")
    assert code == 0, said
    assert node.run("n", "new-n")[0] == 0, "an image of which containerd has nothing"
    node.server.stop()
    said = node.server.runvol("pool", "repair-store")
    assert "devices stay quarantined" in said
    assert "Gone" not in said
    assert "images check" in said
    _after(node)
    code, said = node.run("d", "refused")
    assert code == 1
    assert "does not exist: containerd has it in its own database" in said
    assert _unpacked(node) == {node.name(image) for image in ("a", "b", "e", "n")}
    _pull_again(node, "d", "late")
    assert node.name("d") in _unpacked(node)
    _end(node, ("a", "b", "d", "e", "n"))


@pytest.mark.long
def test_an_old_copy_of_the_store_and_a_device_that_the_pool_lost(node: Node) -> None:
    copy = node.directory / "copy"
    with contextlib.closing(sqlite3.connect(node.server.state / STORE)) as source:
        with contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    _late(node)
    node.server.kill()
    node.lose(copy)
    node.server.start()
    node.settle()
    node.written()
    assert node.run("a", "known-to-both")[0] == 0
    assert "does not exist" in node.run("d", "refused")[1]
    rows = {str(row["key"]): row for row in node.server.snapshots()}
    (top,) = [str(row["parent"]) for key, row in rows.items() if key.endswith("/wb")]
    node.server.stop()
    with Mapper() as mapper:
        mapper.message(node.server.pool_name, f"delete {rows[top]['device']}")
    said = node.server.runvol("pool", "repair-store")
    typed = [line.strip() for line in said.splitlines() if line.startswith("  ctr ")]
    assert typed == [f"ctr -n t snapshots --snapshotter runvol rm {top.partition('/')[2].partition('/')[2]}"]
    _after(node, without="b")
    assert _unpacked(node) == {node.name("a"), node.name("e")}
    # As it is typed: refused while a container is on it, as containerd has its snapshot as a child.
    words = shlex.split(typed[0])[3:]
    assert "cannot remove snapshot with child" in node.ctr("t", *words)[1]
    node.drop("wb", "t")
    node.well("t", *words)
    for image, container in (("b", ""), ("d", "late")):
        if container:
            node.drop(container, "t")
        node.well("t", "images", "rm", "--sync", node.name(image))
        assert node.bring(image)[0] == 0
        assert node.run(image, "anew")[0] == 0
    _end(node, ("a", "b", "d", "e"))


def test_a_power_cut_of_the_state_alone_loses_nothing_that_was_answered(node: Node) -> None:
    _late(node)
    node.server.kill()
    node.disk.cut()
    node.server.start()
    node.settle()
    node.written()
    for image in ("a", "b", "d"):
        code, said = node.run(image, f"new-{image}")
        assert code == 0, said
    assert node.bring("e")[0] == 0
    node.server.stop()
    assert node.server.runvol("pool", "repair-store", ok=(1,)) == ""
    node.server.start()
    node.settle()
    assert _unpacked(node) == {node.name(image) for image in ("a", "b", "d", "e")}
    _end(node, ("a", "b", "d", "e"))
    assert json.loads(node.server.runvol("pool", "quarantine", "--json"))["items"] == []
