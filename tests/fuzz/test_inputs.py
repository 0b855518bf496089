"""Mutated inputs over everything that is read from outside: no crash, no hang, no path outside of the roots.

A short round here; `RUNVOL_FUZZ=1000000` says how many inputs there are in all, and a run prints how many there were.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError


from blockdev import Deadline, filesystems, superblocks
from blockdev.errors import FilesystemDamaged
from flexvolume.options import parse
from guestmount import BadRequest, Claims, Rund2Dialect, Rund3Dialect, RunvDialect, nri, paths, ttrpc
from guestmount.claims import Claim, NfsMount, Target, Use
from guestmount.handoff import KataDialect
from guestmount.handoff.kata import key_of, target_of
from guestmount.nri_mux import HEADER, PLUGIN, RUNTIME, Mux
from runvol_proto import nri_pb2
from volumes import VolumeKind

TOTAL = int(os.environ.get("RUNVOL_FUZZ", "10000"))
SEED = 20261124
# The slowest that one input may be, in seconds: far above what any costs, far below a hang.
HANG = 5.0

OPTIONS = json.dumps({
    "image": "/x/y.img", "kubernetes.io/fsType": "ext4", "kubernetes.io/mounterArgs.FsGroup": "2000",
    "kubernetes.io/pod.uid": "88945909", "kubernetes.io/readwrite": "rw", "kubernetes.io/secret/user": "Ym9i",
    "volume": "loop-1", "runtime": "kata", "mountOptions": "noatime",
}).encode()  # fmt: skip
HANDOFFS = {
    "alibabacloudcsiplugin.json": b'{"device":"/dev/vdc","volumeType":"block","identity":"/k/mount","mountfile":"/k","runtime":"runv"}',
    "vol_data.json": b'{"specVolID":"pv","csi.alibabacloud.com/server":"s","csi.alibabacloud.com/path":"/p"}',
    "vol_attr.json": b'{"Source":"s:/p","DeviceType":"nfs","MountOpts":["ro"],"Extra":{},"FSType":""}',
}
MOUNT_INFO = b'{"volume-type":"directvol","device":"/dev/loop0","fstype":"ext4","metadata":{},"options":["rw"]}'
FRAME = bytes.fromhex("000000140000000101000a0b677270632e4865616c74681205436865636b")
PIECES = [b"\0", b"\xff", b"..", b"/", b"../../etc/passwd", b'"', b"{", b"}", b"[" * 50, b"$(id)", b"`id`", b";", b"\n",
          b"\\u0000", b"9" * 400, b"null", b"true", b"-1", b"1e999", b"\xed\xa0\x80", b"%s", b" "]  # fmt: skip


def mutated(chance: random.Random, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at:at] = chance.choice(PIECES)
            case 1:
                del data[at : at + chance.randint(1, 12)]
            case 2 if data:
                data[at % len(data)] = chance.randrange(256)
            case 3:
                data[at:at] = data[: chance.randint(0, len(data))]
            case _:
                data = data[:at]
    return bytes(data[:8192])


def fuzz(share: int, one: Callable[[random.Random], None], capsys: pytest.CaptureFixture[str], what: str) -> None:
    chance, count = random.Random(SEED), max(200, TOTAL * share // 100)
    for number in range(count):
        started = time.monotonic()
        try:
            one(chance)
        except Exception as error:
            raise AssertionError(f"input {number} of {what} (seed {SEED}): {type(error).__name__}: {error}") from error
        assert time.monotonic() - started < HANG, f"input {number} of {what} took {time.monotonic() - started:.1f} s"
    with capsys.disabled():
        print(f"\n  {what}: {count} inputs ", end="")


def test_flexvolume_options(capsys: pytest.CaptureFixture[str]) -> None:
    def one(chance: random.Random) -> None:
        text = mutated(chance, OPTIONS).decode("utf-8", "surrogateescape")
        try:
            found = parse(text)
        except BadRequest as error:
            assert "Ym9i" not in str(error)
            return
        assert found.volume
        assert "\0" not in found.volume + found.runtime + found.fstype

    fuzz(40, one, capsys, "FlexVolume options")


def test_ttrpc_frames(capsys: pytest.CaptureFixture[str]) -> None:
    class Bytes:
        def __init__(self, data: bytes, chance: random.Random) -> None:
            self._data, self._chance = data, chance

        def read(self, count: int) -> bytes:
            part = self._data[: self._chance.randint(1, count)]
            self._data = self._data[len(part) :]
            return part

        def write(self, data: bytes) -> None:
            raise AssertionError("nothing is written while a frame is read")

        def close(self) -> None:
            pass

    def one(chance: random.Random) -> None:
        stream = Bytes(mutated(chance, FRAME * chance.randint(1, 3)), chance)
        try:
            while True:
                _stream, _kind, data = ttrpc.read_frame(stream)
                assert data is None or len(data) <= ttrpc.LARGEST
        except ttrpc.Closed:
            pass

    fuzz(20, one, capsys, "ttrpc frames")


def test_nri_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "pods/p/volumes/kubernetes.io~csi/pv/mount")
    claims = Claims(str(tmp_path / "run"))
    export = NfsMount(server="nas", path="/e", version="4.2", options=("nconnect=2",), address="10.0.0.5")
    use = Use(mode="multi_node_multi_writer", mount_flags=("noatime",))
    with claims.locked("nfs-1", Deadline.after(5)) as cell:
        cell.write(Claim(volume="nfs-1", source="nas:/e", staging_path="/s", kind=VolumeKind.FILES, nfs=export, use=use,
                         targets={target: Target(read_only=False, pod_uid="u", handler="kata", dialect="kata")}))  # fmt: skip
    plugin = nri.Plugin(claims)
    mounts = [nri_pb2.Mount(destination=d, type="bind", source=s, options=["rbind", "rw"])
              for d, s in (("/data", target), ("/etc/hosts", "/var/lib/hosts"))]  # fmt: skip
    seed = nri_pb2.CreateContainerRequest(
        pod=nri_pb2.PodSandbox(uid="u", name="p", namespace="d", runtime_handler="kata", ips=["10.1.1.1"]),
        container=nri_pb2.Container(name="c", mounts=mounts),
    ).SerializeToString()
    adjusted = 0

    def one(chance: random.Random) -> None:
        nonlocal adjusted
        try:
            request = nri_pb2.CreateContainerRequest.FromString(mutated(chance, seed))
        except DecodeError:
            return
        binds = {(m.destination, m.type) for m in request.container.mounts if m.source == target}
        for mount in plugin.CreateContainer(request).adjust.mounts:
            adjusted += 1
            assert (mount.destination, "bind") in binds
            assert (mount.type, mount.source) == ("nfs4", "nas:/e")
            assert "addr=10.0.0.5" in mount.options
            assert not {"bind", "rbind"} & set(mount.options)

    fuzz(10, one, capsys, "NRI messages")
    assert adjusted


def test_nri_multiplexer(capsys: pytest.CaptureFixture[str]) -> None:
    seed = b"".join(HEADER.pack(number, len(FRAME)) + FRAME for number in (PLUGIN, RUNTIME, 9))

    def one(chance: random.Random) -> None:
        mine, theirs = socket.socketpair()
        mux = Mux(mine)
        theirs.sendall(mutated(chance, seed))
        theirs.close()
        for number in (PLUGIN, RUNTIME):
            while mux.stream(number).read(4096):
                pass
        mux.close()

    fuzz(2, one, capsys, "streams of NRI's multiplexer")


def test_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "kubelet")
    os.makedirs(f"{root}/pods/a")
    os.symlink("/etc", f"{root}/pods/out")
    seeds = [f"{root}/pods/a/mount", f"{root}/pods/out/passwd", f"{root}/pods/../../etc", "/etc/passwd"]

    def one(chance: random.Random) -> None:
        text = os.fsdecode(mutated(chance, chance.choice(seeds).encode()))
        try:
            found = paths.check("target_path", text, [root])
        except BadRequest:
            return
        assert os.path.realpath(os.path.dirname(found)).startswith(root)

    fuzz(18, one, capsys, "paths")


def test_kata_keys(capsys: pytest.CaptureFixture[str]) -> None:
    def one(chance: random.Random) -> None:
        name = os.fsdecode(mutated(chance, key_of("/var/lib/kubelet/pods/x/mount").encode()))
        target = target_of(name)
        assert target is None or isinstance(target, str)

    fuzz(8, one, capsys, "names of direct volumes")


def test_hand_off_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, direct = tmp_path / "kubelet", tmp_path / "direct"
    folder = root / "pods/p/volumes/kubernetes.io~csi/pv"
    (folder / "mount").mkdir(parents=True)
    kata = direct / key_of(str(folder / "mount"))
    kata.mkdir(parents=True)
    kept = tmp_path / "kept"
    kept.write_text("x")
    dialects = [
        RunvDialect([str(root)]),
        Rund2Dialect([str(root)]),
        Rund3Dialect([str(root)]),
        KataDialect(str(direct)),
    ]

    def one(chance: random.Random) -> None:
        for name, seed in HANDOFFS.items():
            (folder / name).write_bytes(mutated(chance, seed))
        kata.mkdir(exist_ok=True)
        (kata / "mountInfo.json").write_bytes(mutated(chance, MOUNT_INFO))
        for dialect in dialects:
            for found in dialect.delivered():
                assert found.place.startswith(str(tmp_path))
            dialect.withdraw(str(folder / "mount"))

    fuzz(2, one, capsys, "hand-off files")
    assert kept.read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["direct", "kept", "kubelet"]


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_superblocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fstype: str
) -> None:
    """A guest's: only the named error comes out, and no input costs a millisecond or reads or takes a megabyte."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(64 << 20 if fstype == "ext4" else 320 << 20)
    filesystems.make(str(path), fstype, Deadline.after(60))
    whole = path.read_bytes()[:2048]
    fd, read, took, most = os.open(path, os.O_RDWR), [0], [], 0
    real = os.pread

    def counted(*arguments: int) -> bytes:
        data = real(*arguments)
        read[0] += len(data)
        return data

    def one(chance: random.Random) -> None:
        head = bytearray(whole)
        first, length = (1024, 1024) if fstype == "ext4" else (0, 512)
        for _ in range(chance.randint(1, 8)):
            width = chance.choice((1, 2, 4, 8))
            at = first + chance.randrange(length - width)
            value = chance.choice((0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, chance.getrandbits(8 * width)))
            head[at : at + width] = value.to_bytes(width, "little")
        os.pwrite(fd, head, 0)
        cost = looked()
        # Another load makes one look dear; what an input costs, it costs each time.
        took.append(cost if cost < 0.001 else min(cost, looked(), looked()))

    def looked() -> float:
        nonlocal most
        read[0], started = 0, time.thread_time()
        try:
            superblocks.space(str(path))
        except FilesystemDamaged:
            pass
        cost = time.thread_time() - started
        most = max(most, read[0])
        return cost

    monkeypatch.setattr(os, "pread", counted)
    try:
        fuzz(50, one, capsys, f"superblocks of {fstype}")
        tracemalloc.start()
        for seed in range(500):
            one(random.Random(seed))
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    finally:
        os.close(fd)
    took.sort()
    slow = took[len(took) * 999 // 1000] * 1000
    with capsys.disabled():
        print(f"p99.9 {slow:.2f} ms of a processor, at most {most} bytes read, {taken} taken ", end="")
    assert slow < 1 and most <= 1 << 20 and taken <= 1 << 20
