"""A real containerd with the proxy plugin: images, containers, garbage collection, and kill -9 in the middle."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.inside.server import MIB, Server

IMAGE = "runvol.io/test/layers:1"


def _layer(files: dict[str, bytes | None], *, links: dict[str, str] | None = None) -> bytes:
    """A layer's tar; None deletes a file of the layers below (a whiteout)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, content in files.items():
            if content is None:
                directory, _, name = path.rpartition("/")
                path, content = f"{directory}/.wh.{name}".lstrip("/"), b""
            if path.endswith("/"):
                info = tarfile.TarInfo(path.rstrip("/"))
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
                continue
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(content), 0o755 if path.startswith("bin/") else 0o644
            tar.addfile(info, io.BytesIO(content))
        for path, target in (links or {}).items():
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return out.getvalue()


def layers(*, big: int = 0) -> list[bytes]:
    """Busybox, then a change, a deletion and an addition, each in a layer of its own."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    return [
        _layer({"bin/": b"", "etc/": b"", "proc/": b"", "sys/": b"", "dev/": b"", "tmp/": b"", "bin/busybox": busybox,
                "etc/changed": b"old", "etc/deleted": b"x", "etc/passwd": b"root:x:0:0::/:/bin/sh\n",
                "etc/group": b"root:x:0:\n"},
               links={f"bin/{name}": "busybox" for name in ("sh", "cat", "ls", "dd", "echo", "sleep", "test")}),
        _layer({"etc/changed": b"new", "etc/deleted": None}),
        _layer({"etc/added": b"a" * 1000, "big": os.urandom(big)}),
    ]  # fmt: skip


def oci_archive(
    path: Path, blobs: list[bytes], name: str = IMAGE, command: tuple[str, ...] = ("/bin/sh",)
) -> list[str]:
    """An OCI image archive; its diff ids."""
    entries: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}

    def add(content: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        entries[f"blobs/sha256/{digest}"] = content
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    described = [add(blob, "application/vnd.oci.image.layer.v1.tar") for blob in blobs]
    diff_ids = [str(one["digest"]) for one in described]
    config = {"architecture": "amd64", "os": "linux", "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
              "rootfs": {"type": "layers", "diff_ids": diff_ids}}  # fmt: skip
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": add(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"), "layers": described,
    }  # fmt: skip
    top = add(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    top["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"}
    entries["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [top]}).encode()
    with tarfile.open(path, "w") as tar:
        for entry, content in entries.items():
            info = tarfile.TarInfo(entry)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return diff_ids


# Debian 12's, the last of 1.x, and today's.
VERSIONS = ("v1.6.20", "v1.7.33", "v2.4.2")
# What is of no use to these tests, and takes its time to start.
_WITHOUT = {
    "v1": ("grpc.v1.cri", "snapshotter.v1.devmapper", "snapshotter.v1.zfs", "snapshotter.v1.btrfs", "snapshotter.v1.native",
           "snapshotter.v1.aufs", "tracing.processor.v1.otlp", "internal.v1.tracing", "internal.v1.opt"),
    "v2": ("cri.v1.images", "cri.v1.runtime", "grpc.v1.cri", "snapshotter.v1.devmapper", "snapshotter.v1.blockfile",
           "snapshotter.v1.erofs", "snapshotter.v1.zfs", "snapshotter.v1.native", "nri.v1.nri",
           "tracing.processor.v1.otlp", "internal.v1.tracing"),
}  # fmt: skip


class Containerd:
    """A containerd of its own, with a configuration that runvol has put its snapshotter into."""

    def __init__(self, directory: Path, server: Server, version: str = "v2.4.2") -> None:
        self.directory = directory
        self.socket = f"/run/ctrd-{os.getpid()}.sock"
        self._log = directory / "containerd.log"
        self._config = directory / "config.toml"
        self._programs = Path(os.environ["RUNVOL_PROGRAMS"]).parent / f"containerd-{version}"
        if not (self._programs / "ctr").exists():
            pytest.skip(f"containerd {version} is not prepared: run tests/prepare/containerds.sh")
        # 1.6 knows no other way than to unpack itself.
        self.local = [] if version.startswith("v1.6.") else ["--local"]
        head = f'root = "{directory}/root"\nstate = "/run/ctrd-{os.getpid()}"\n'
        form = 2 if version.startswith("v1.") else 3
        self._config.write_text(f'version = {form}\n{head}[grpc]\n  address = "{self.socket}"\n')
        server.runvol("snapshotter", "containerd-config", "--containerd-version", version[1:], "--config",
                      str(self._config), "--all-runtimes", "--write")  # fmt: skip
        without = [f"io.containerd.{name}" for name in _WITHOUT[version[:2]]]
        self._config.write_text(f"disabled_plugins = {json.dumps(without)}\n{self._config.read_text()}")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        path = f"{self._programs}:/usr/sbin:/usr/bin:/sbin:/bin"
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen([self._programs / "containerd", "-c", str(self._config)], stdout=log, stderr=log,
                                            env={"PATH": path, "HOME": "/root"})  # fmt: skip
        until = time.monotonic() + 60
        while self.ctr("version", ok=None)[0] != 0:
            assert time.monotonic() < until, self._log.read_text()[-3000:]
            assert self.process.poll() is None, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def ctr(self, *arguments: str, ok: tuple[int, ...] | None = (0,), limit: float = 120) -> tuple[int, str]:
        done = subprocess.run(self.words(*arguments), capture_output=True, text=True, timeout=limit, check=False)
        if ok is not None:
            assert done.returncode in ok, f"{arguments}: {done.stderr[-1500:]}\n{self._log.read_text()[-1500:]}"
        return done.returncode, done.stdout

    def words(self, *arguments: str) -> list[str]:
        return [str(self._programs / "ctr"), "-a", self.socket, "-n", "t", *arguments]

    def be_back(self) -> None:
        """Returns once containerd has dialled a snapshotter that was away, after a pause of up to three seconds."""
        until = time.monotonic() + 20
        while self.ctr("snapshots", "--snapshotter", "runvol", "ls", ok=None)[0] != 0 and time.monotonic() < until:
            time.sleep(0.5)

    def import_image(self, archive: Path) -> None:
        """As kubelet would, again: containerd waits up to three seconds before it dials a snapshotter that was away."""
        arguments = self.importing(archive)
        until = time.monotonic() + 20
        while self.ctr(*arguments, ok=None)[0] != 0 and time.monotonic() < until:
            time.sleep(0.5)
        self.ctr(*arguments)

    def importing(self, archive: Path) -> list[str]:
        return ["images", "import", *self.local, "--snapshotter", "runvol", str(archive)]

    def run_container(self, name: str, *command: str) -> str:
        return self.ctr("run", "--rm", "--snapshotter", "runvol", IMAGE, name, *command)[1]

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, size=128 * MIB) as running:
        yield running


@pytest.fixture
def containerd(tmp_path: Path, server: Server, request: pytest.FixtureRequest) -> Iterator[Containerd]:
    one = Containerd(tmp_path, server, getattr(request, "param", "v2.4.2"))
    one.start()
    yield one
    one.stop()


def _remove_everything(containerd: Containerd, server: Server) -> None:
    # An import that was killed leaves its lease, which keeps what it had unpacked for a day.
    for lease in containerd.ctr("leases", "ls", "-q")[1].split():
        containerd.ctr("leases", "rm", lease)
    containerd.ctr("images", "rm", "--sync", IMAGE)
    server.settled(0)


@pytest.mark.parametrize("containerd", VERSIONS, indirect=True)
def test_an_image_is_imported_run_changed_committed_and_collected(
    containerd: Containerd, server: Server, tmp_path: Path
) -> None:
    diff_ids = oci_archive(tmp_path / "image.tar", layers(big=4 * MIB))
    containerd.import_image(tmp_path / "image.tar")
    rows = server.snapshots()
    assert len(rows) == len(diff_ids)
    assert {row["kind"] for row in rows} == {"committed"}
    assert diff_ids[0] in " ".join(str(row["key"]) for row in rows)
    assert containerd.run_container("one", "/bin/cat", "/etc/changed") == "new"
    assert containerd.run_container("two", "/bin/ls", "/etc").split() == ["added", "changed", "group", "passwd"]
    # A container that changes something, kept, and committed to a snapshot that others start from.
    containerd.ctr("run", "--snapshotter", "runvol", IMAGE, "three", "/bin/sh", "-c", "echo mine > /etc/changed")
    containerd.ctr("snapshots", "--snapshotter", "runvol", "commit", "changed", "three")
    containerd.ctr("snapshots", "--snapshotter", "runvol", "prepare", "four", "changed")
    place = tmp_path / "place"
    place.mkdir()
    _, told = containerd.ctr("snapshots", "--snapshotter", "runvol", "mounts", str(place), "four")
    # Without options an older ctr prints a bare -o.
    subprocess.run(["sh", "-c", told.strip().removesuffix(" -o")], check=True)
    assert (place / "etc/changed").read_text() == "mine\n"
    subprocess.run(["umount", str(place)], check=True)
    _, usage = containerd.ctr("snapshots", "--snapshotter", "runvol", "usage", "-b", "four")
    assert int(usage.split()[-2]) >= 0
    for key in ("four", "changed"):
        containerd.ctr("snapshots", "--snapshotter", "runvol", "rm", key)
    containerd.ctr("containers", "rm", "three", ok=None)
    _remove_everything(containerd, server)


@pytest.mark.parametrize("containerd", [*(pytest.param(one, marks=pytest.mark.long) for one in VERSIONS[:-1]), VERSIONS[-1]],
                         indirect=True)  # fmt: skip
def test_containers_run_on_after_a_restart_of_the_snapshotter(
    containerd: Containerd, server: Server, tmp_path: Path
) -> None:
    oci_archive(tmp_path / "image.tar", layers())
    containerd.import_image(tmp_path / "image.tar")
    containerd.ctr("run", "-d", "--snapshotter", "runvol", IMAGE, "long", "/bin/sh", "-c",
                   "while test ! -e /stop; do echo x >> /log; sleep 0.1; done")  # fmt: skip
    server.stop()
    server.start()
    server.kill()
    server.start()
    _, lines = containerd.ctr("tasks", "exec", "--exec-id", "e1", "long", "/bin/cat", "/log")
    assert lines.count("x") > 1
    containerd.be_back()
    assert containerd.run_container("beside", "/bin/cat", "/etc/changed") == "new"
    # The container may have ended, and dd with it, before dd has.
    containerd.ctr("tasks", "exec", "--exec-id", "e2", "long", "/bin/dd", "if=/dev/null", "of=/stop", ok=(0, 137))
    containerd.ctr("tasks", "rm", "-f", "long", ok=None)
    containerd.ctr("containers", "rm", "long")
    _remove_everything(containerd, server)


@pytest.mark.parametrize("victim", ["snapshotter", pytest.param("containerd", marks=pytest.mark.long)])
def test_kill_9_in_the_middle_of_an_import(containerd: Containerd, server: Server, tmp_path: Path, victim: str) -> None:
    oci_archive(tmp_path / "image.tar", layers(big=2 * MIB))
    chance = random.Random(4711)
    for number in range(3):
        importing = subprocess.Popen(
            containerd.words(*containerd.importing(tmp_path / "image.tar")),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(chance.uniform(0.1, 1.5))
        if victim == "snapshotter":
            server.kill()
            server.start()
        else:
            containerd.kill()
            containerd.start()
        importing.wait(60)
        containerd.import_image(tmp_path / "image.tar")
        # By the exit status: ctr gives up on the output of a container that ends before it has opened the pipe.
        containerd.run_container(f"c{number}", "/bin/sh", "-c", '[ "$(cat /etc/changed)" = new ]')
        _unmount_left_overs(tmp_path)
        _remove_everything(containerd, server)


def _unmount_left_overs(directory: Path) -> None:
    """What a killed containerd left mounted; it does that itself at its next boot."""
    with open("/proc/self/mounts") as mounts:
        named = (str(directory), "/containerd-mount")
        places = [line.split()[1] for line in mounts if any(one in line.split()[1] for one in named)]
    for place in places:
        subprocess.run(["umount", place], check=False)
