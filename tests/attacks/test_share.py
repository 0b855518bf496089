"""Somebody who can write to a share, every name and byte of it at any moment, while controllers work on it.

The share is a directory of this machine, and the attacker is root: more than a pod over NFS is. Nothing outside of the
share changes, no call hangs or ends INTERNAL, and the volumes of another share are served as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from blockdev import Deadline
from csi.errors import code_of
from tests.nas_of_directories import below, serve
from volumes import ContentSource, SizeRange
from volumes.nfs import NfsBackend

MIB = 1 << 20
ROUNDS = int(os.environ.get("RUNVOL_ROUNDS", "25"))
# Seconds that no call takes longer.
LONGEST = 60.0


class Attacker:
    """Swaps what it finds, and puts some of it back, as fast as it can. `deeds`: how often it did what."""

    def __init__(self, share: Path, outside: Path, seed: int) -> None:
        self._share, self._outside, self._dice = share, outside, random.Random(seed)
        self.deeds, self._over = Counter[str](), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Attacker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        deeds = (self._link_records, self._plant_record, self._swap, self._plant_names, self._rewrite, self._clean)
        while not self._over.wait(0.0005):
            deed = self._dice.choice(deeds)
            with contextlib.suppress(OSError, ValueError, LookupError, shutil.Error):
                deed()
                self.deeds[deed.__name__.strip("_")] += 1

    def _link_records(self) -> None:
        records, away = self._share / ".runvol", self._share / ".away"
        records.rename(away)
        records.symlink_to(self._outside)
        time.sleep(self._dice.random() * 0.002)
        records.unlink()
        away.rename(records)

    def _a_name(self) -> Path:
        found = [path for place in (self._share, self._share / ".runvol") for path in place.iterdir()]
        return self._dice.choice([path for path in found if path.name != ".runvol"])

    def _other(self, path: Path) -> None:
        """Something else lies there."""
        kind = self._dice.choice(["link", "fifo", "directory", "file", "hard link", "broken link", "huge"])
        if kind == "link":
            path.symlink_to(self._outside / "victim")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            made = path.with_name(f".made-{self._dice.randbytes(4).hex()}")
            (made / "deep/er").mkdir(parents=True)
            made.rename(path)
        elif kind == "file":
            with path.open("x") as file:
                file.write("{")
        elif kind == "hard link":
            path.hardlink_to(self._a_name())
        elif kind == "broken link":
            path.symlink_to("/nowhere")
        else:
            with path.open("x") as file:
                file.truncate(1 << 40)

    def _plant_record(self) -> None:
        name = f"nfs-{self._dice.randbytes(6).hex()}-{self._dice.randbytes(10).hex()}.json"
        self._other(self._share / ".runvol" / name)

    def _swap(self) -> None:
        path = self._a_name()
        away = path.with_name(f".swapped-{path.name}")
        path.rename(away)
        self._other(path)
        time.sleep(self._dice.random() * 0.002)
        if self._dice.random() < 0.7:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            away.rename(path)

    def _plant_names(self) -> None:
        record = self._dice.choice(list((self._share / ".runvol").glob("nfs*.json"))).stem
        begins = self._dice.choice(["gone-", "new-", ".", ""])
        self._other(self._share / ".runvol" / f"{begins}{record}.{self._dice.choice(['', 'x', '0', 'new.tar', 'tar'])}")

    def _rewrite(self) -> None:
        path = self._dice.choice(list((self._share / ".runvol").glob("nfs*.json")))
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as file:  # it may be what this one has put there
            facts = json.loads(file.read(1 << 16))
        key = self._dice.choice([*facts])
        facts[key] = self._dice.choice(
            [None, "", "../..", -1, 1 << 80, True, {}, "/etc", f"{self._outside}", "a/" * 5000]
        )
        path.write_text(json.dumps(facts))

    def _clean(self) -> None:
        """Else nothing would be whole after a while."""
        for path in (self._share / ".runvol").iterdir():
            if self._dice.random() < 0.5:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


@pytest.fixture
def shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    top = tmp_path / "nas"
    for name in ("hostile", "quiet"):
        (top / name).mkdir(parents=True)
        (top / name).chmod(0o777)

    serve(monkeypatch, below(top))
    return top


def looked_at(place: Path) -> list[tuple[str, int, int, bytes]]:
    found = []
    for path in [place, *sorted(place.rglob("*"))]:
        facts = path.lstat()
        found.append((str(path), facts.st_mode, facts.st_uid, path.read_bytes() if path.is_file() else b""))
    return found


def test_a_hostile_share_stops_itself_only(shares, tmp_path, capsys):
    outside = tmp_path / "outside"
    (outside / "victim/deep").mkdir(parents=True)
    (outside / "victim/deep/secret").write_text("precious")
    for path in (outside / "victim/deep", outside / "victim", outside):
        path.chmod(0o700)
    before = looked_at(outside)
    told, slowest = Counter[str](), 0.0
    lock = threading.Lock()

    def call(what: str, deed: Callable[[], object]) -> object | None:
        nonlocal slowest
        began = time.monotonic()
        try:
            answer, code = deed(), "OK"
        except Exception as error:
            answer, code = None, code_of(error).name
            assert code != grpc.StatusCode.INTERNAL.name, f"{what}: {type(error).__name__}: {error}"
        with lock:
            slowest = max(slowest, time.monotonic() - began)
            told[f"{what} {code}"] += 1
        return answer

    def made(backend: NfsBackend, name: str, path: str, source: ContentSource | None = None):
        parameters = {"backend": "nfs", "server": "nas", "path": path, "archiveOnDelete": "false"}
        return backend.create(name, SizeRange(required=MIB), parameters, [], source)

    def attacked(number: int) -> None:
        state = tmp_path / f"state-{number}"
        state.mkdir()
        backend = NfsBackend(str(state), exports_known=["nas:/hostile"])
        volume = call("create", lambda: made(backend, f"v{number % 5}", "/hostile"))
        if volume is None:
            return
        with contextlib.suppress(OSError):  # what a pod writes is in its volume
            directory = os.open(shares / "hostile" / f"v{number % 5}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                os.close(os.open("file", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory))
            finally:
                os.close(directory)
        call("get", lambda: backend.get(volume.volume_id))
        call("list", backend.list)
        call("expand", lambda: backend.expand(volume.volume_id, SizeRange(required=2 * MIB)))
        taken = call("snapshot", lambda: backend.take_snapshot(f"s{number}", volume.volume_id, Deadline.after(10)))
        if taken is not None:
            source = ContentSource(kind="snapshot", source_id=taken.snapshot_id)
            call("restore", lambda: made(backend, f"r{number}", "/hostile", source))
            call("delete snapshot", lambda: backend.delete_snapshot(taken.snapshot_id))
        source = ContentSource(kind="volume", source_id=volume.volume_id)
        call("clone", lambda: made(backend, f"c{number}", "/hostile", source))
        call("delete", lambda: backend.delete(volume.volume_id))

    def quiet(over: threading.Event) -> None:
        state = tmp_path / "state-quiet"
        state.mkdir()
        backend = NfsBackend(str(state), exports_known=["nas:/hostile", "nas:/quiet"])
        number = 0
        while not over.is_set():
            number += 1
            volume = made(backend, f"q{number}", "/quiet")
            assert backend.get(volume.volume_id) == volume
            assert volume.volume_id in {one.volume_id for _place, one in backend.list(trouble=lambda _said: None)}
            backend.delete(volume.volume_id)
            assert backend.get(volume.volume_id) is None
        told["volumes of the other share"] = number

    over, wrong = threading.Event(), list[BaseException]()

    def watched() -> None:
        try:
            quiet(over)
        except BaseException as error:
            wrong.append(error)

    beside = threading.Thread(target=watched)
    with Attacker(shares / "hostile", outside, 20261127) as attacker:
        beside.start()
        for number in range(ROUNDS):
            attacked(number)
        over.set()
        beside.join(LONGEST)
    assert not beside.is_alive() and not wrong, wrong
    assert slowest < LONGEST
    assert looked_at(outside) == before
    assert told["volumes of the other share"] > 0
    assert sum(attacker.deeds.values()) > ROUNDS
    with capsys.disabled():
        deeds = sum(attacker.deeds.values())
        print(
            f"\n  {ROUNDS} rounds, {deeds} deeds {dict(attacker.deeds)}: {dict(told)}; slowest {slowest:.1f} s ", end=""
        )
