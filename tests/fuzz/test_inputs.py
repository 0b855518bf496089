"""Mutated inputs over everything that is read from outside: no crash, no hang, no path outside of the roots.

A short round here; `RUNVOL_FUZZ=1000000` says how many inputs there are in all, and a run prints how many there were.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flexvolume.options import parse
from guestmount import BadRequest, Rund2Dialect, Rund3Dialect, RunvDialect, paths, ttrpc
from guestmount.handoff import KataDialect
from guestmount.handoff.kata import key_of, target_of

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

    fuzz(45, one, capsys, "FlexVolume options")


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

    fuzz(25, one, capsys, "ttrpc frames")


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

    fuzz(20, one, capsys, "paths")


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
