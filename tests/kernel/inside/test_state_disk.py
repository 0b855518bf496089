"""The disk under the state directory fails at any write of any call, loses power, lies, hangs, is full; and comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import grpc
import pytest

from blockdev.devicemapper import Mapper
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter import flushes, repairing
from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.model import Kind
from tests.kernel.inside.lab import MIB, Lab, mounted, soon
from tests.kernel.inside.server import Server
from tests.kernel.inside.state_disk import StateDisk
from tests.kernel.inside.test_service import Client

_XFS = 320 * MIB


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StateDisk]:
    home = tmp_path / "lab0"
    home.mkdir()
    with StateDisk(
        home, home / "state", fstype=request.param, size=_XFS if request.param == "xfs" else 32 * MIB
    ) as one:
        yield one


@pytest.fixture
def lab(disk: StateDisk, tmp_path: Path) -> Iterator[Lab]:
    one = Lab(tmp_path / "lab0", data=384 * MIB, size=16 * MIB)
    yield one
    disk.well()
    with contextlib.suppress(Exception):
        one.stop()
    disk.remount()
    one.destroy()


class _Points:
    """Commits and flushes of the store are counted, and before one of them something happens to the disk."""

    def __init__(self, lab: Lab, at: int, happens: Callable[[], None]) -> None:
        self._lab, self._at, self._happens = lab, at, happens
        self.passed = 0

    def _pass(self) -> None:
        self.passed += 1
        if self.passed == self._at:
            self._happens()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        commit, flush = self._lab.node.store._commit, os.fdatasync

        def committing() -> None:
            self._pass()
            commit()

        def flushing(fd: int) -> None:
            self._pass()
            flush(fd)

        with (
            mock.patch.object(self._lab.node.store, "_commit", committing),
            mock.patch.object(flushes.os, "fdatasync", flushing),
        ):
            yield


class _Life:
    """What was answered, and what each root holds. A call is made on keys of its own, prepared while all is well."""

    def __init__(self, lab: Lab, disk: StateDisk) -> None:
        self.lab, self.disk, self.number = lab, disk, 0
        lab.layer("layer", files={"secret": b"of the layer"})
        self.kinds = {"layer": Kind.COMMITTED}
        self.secrets: dict[str, bytes] = {}
        # What a call that failed may have done or not.
        self.unsure: set[str] = set()

    def root(self, key: str) -> str:
        with mounted(self.lab.prepare(key, "layer")) as place:
            (place / "secret").write_bytes(key.encode())
        self.kinds[key], self.secrets[key] = Kind.ACTIVE, key.encode()
        return key

    def calls(self) -> dict[str, Callable[[int], Callable[[], None]]]:
        """Each makes ready for call number `n`, and returns the call itself, which notes what was answered."""
        return {"Prepare": self.prepare, "a base": self.base, "View": self.view, "Commit": self.commit,
                "Remove": self.remove, "Update": self.update, "Mounts": self.mounts, "the keeper": self.keeper}  # fmt: skip

    def prepare(self, n: int) -> Callable[[], None]:
        def call() -> None:
            self.unsure.add(f"p{n}")
            self.lab.prepare(f"p{n}", "layer")
            self.kinds[f"p{n}"] = Kind.ACTIVE

        return call

    def base(self, n: int) -> Callable[[], None]:
        def call() -> None:
            self.unsure.add(f"b{n}")
            self.lab.prepare(f"b{n}", size=str((17 + n % 40) * MIB))
            self.kinds[f"b{n}"] = Kind.ACTIVE

        return call

    def view(self, n: int) -> Callable[[], None]:
        def call() -> None:
            self.unsure.add(f"v{n}")
            self.lab.view(f"v{n}", "layer")
            self.kinds[f"v{n}"] = Kind.VIEW

        return call

    def commit(self, n: int) -> Callable[[], None]:
        self.root(f"c{n}")

        def call() -> None:
            self.unsure |= {f"c{n}", f"l{n}"}
            self.lab.commit(f"l{n}", f"c{n}")
            del self.kinds[f"c{n}"]
            self.kinds[f"l{n}"] = Kind.COMMITTED

        return call

    def remove(self, n: int) -> Callable[[], None]:
        self.root(f"r{n}")

        def call() -> None:
            self.unsure.add(f"r{n}")
            self.lab.remove(f"r{n}")
            del self.kinds[f"r{n}"]

        return call

    def update(self, n: int) -> Callable[[], None]:
        self.root(f"u{n}")

        def call() -> None:
            self.lab.node.snapshots.update(f"u{n}", {"number": str(n)}, None, soon())
            self.labelled = f"u{n}", str(n)

        return call

    def mounts(self, n: int) -> Callable[[], None]:
        self.root(f"m{n}")
        self.lab.reap_idle()

        def call() -> None:
            self.lab.mounts(f"m{n}")

        return call

    def keeper(self, n: int) -> Callable[[], None]:
        self.root(f"k{n}")
        self.lab.node._copy_at = 0.0
        return self.lab.node.follow

    def again(self) -> None:
        """A start from what the device holds, with the disk well."""
        self.disk.fails()
        self.lab.stop()
        self.disk.cut()
        self.lab.start()

    def check(self, where: str) -> None:
        """What was answered is so; what was not may be; nothing is shared; and all works."""
        lab = self.lab
        assert not lab.node.store.past, (where, lab.node.store.past)
        assert not lab.node.store.barred, (where, lab.node.store.barred)
        found = {row.key: row for page in lab.node.store.pages() for row in page if row.key in lab.names()}
        devices = Counter(row.device for row in found.values())
        devices.update(lab.bases())
        assert max(devices.values()) == 1, where
        for key, kind in self.kinds.items():
            assert key in self.unsure or key in found, (where, key)
            assert key not in found or found[key].kind is kind, (where, key)
        assert found.keys() <= self.kinds.keys() | self.unsure, where
        for key in self.unsure & found.keys() - self.kinds.keys():
            self.kinds[key] = found[key].kind
        for key in self.kinds.keys() - found.keys():
            del self.kinds[key]
        for key, secret in self.secrets.items():
            if key in found and found[key].kind is Kind.ACTIVE:
                with mounted(lab.mounts(key)) as place:
                    assert (place / "secret").read_bytes() == secret, (where, key)
        assert set(lab.node.store.quarantined()) == set(), where

    def clear(self) -> None:
        for key in [key for key in self.kinds if key != "layer"]:
            with contextlib.suppress(NotFound):
                self.lab.remove(key)
            del self.kinds[key]
        self.secrets.clear()
        self.unsure.clear()
        self.lab.reap()
        assert self.lab.names() == ["layer"]


def _answers(work: Callable[[], None]) -> bool:
    """Whether the call was answered; one that was refused said why, as itself."""
    try:
        work()
    except SnapshotterError as error:
        assert "store" in str(error) or "state" in str(error), error
        return False
    except OSError as error:
        assert error.errno in (5, 30), error
        return False
    return True


@pytest.mark.parametrize(("disk", "how"), [
    ("ext4", "fails"), ("xfs", "refuses_writes"), pytest.param("ext4", "refuses_writes", marks=pytest.mark.long),
    pytest.param("xfs", "fails", marks=pytest.mark.long),
], indirect=["disk"])  # fmt: skip
def test_the_disk_fails_at_each_write_of_each_call(lab: Lab, disk: StateDisk, how: str) -> None:
    life, number, failed = _Life(lab, disk), 0, Counter[str]()
    for name, ready in life.calls().items():
        at = 0
        while True:
            at, number = at + 1, number + 1
            call = ready(number)
            points = _Points(lab, at, getattr(disk, how))
            with points.watched():
                done = _answers(call)
            reached, where = points.passed >= at, f"{name}, write {at}"
            if reached:
                failed[name] += not done
            if done:
                life.unsure.clear()  # answered: it holds whatever happens next
            life.again()
            life.check(where)
            life.clear()
            if not reached:
                break
    assert {"Prepare", "View", "Commit", "Remove", "Update", "a base"} <= failed.keys(), failed


def test_a_power_cut_keeps_what_was_answered(lab: Lab, disk: StateDisk) -> None:
    life = _Life(lab, disk)
    for number, (name, ready) in enumerate(life.calls().items()):
        ready(number)()
        life.unsure.clear()
        life.again()
        life.check(name)
        if name == "Update":
            key, value = life.labelled
            assert lab.stat(key).labels == {"number": value}
    life.clear()
    assert not lab.leaks()


@pytest.mark.short
def test_a_disk_that_lied_is_a_store_from_the_past(lab: Lab, disk: StateDisk) -> None:
    life = _Life(lab, disk)
    life.root("before")
    lab.node.follow()
    disk.loses_writes()
    for number in range(3):
        life.root(f"lied-{number}")
        lab.node._copy_at = 0.0
        lab.node.follow()
    life.again()
    assert "old copy" in lab.node.store.past
    lab.stop()
    with Mapper() as mapper:
        report = repairing.repair_store(mapper, lab.state, soon())
    lab.start()
    assert report.lost == []
    life.check("after the repair")
    assert {f"lied-{number}" for number in range(3)} <= set(lab.names())


def test_removals_go_on_where_the_disk_is_full_and_the_reserve_comes_back(lab: Lab, disk: StateDisk) -> None:
    reserve = disk.place / "snapshots.db.reserve"
    count = 200
    for number in range(count):
        lab.prepare(f"n{number}", label="x" * 2000)
    assert reserve.exists()
    filler = disk.place / "filler"
    with open(filler, "wb", buffering=0) as opened, contextlib.suppress(OSError):
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(opened.fileno(), os.fstat(opened.fileno()).st_size, size)
    for number in range(count):
        lab.remove(f"n{number}")
    assert lab.names() == []
    assert not reserve.exists()
    filler.unlink()
    lab.reap()
    lab.node.store.tidy()
    assert reserve.stat().st_size == MIB
    lab.prepare("goes on")
    assert not [one for one in lab.leaks() if "goes on" not in one]


def _doctor(server: Server) -> str:
    done = subprocess.run([sys.executable, "-m", "runvol", "doctor"], env=server.environment, capture_output=True,
                          text=True, check=False, timeout=120)  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def _well_at_the_end(disk: StateDisk, server: Server) -> Iterator[None]:
    try:
        yield
    finally:
        disk.well()
        server.kill()
        disk.remount()


@pytest.mark.parametrize("fstype", ["ext4", pytest.param("xfs", marks=pytest.mark.long)])
def test_it_is_said_and_a_remount_is_enough(tmp_path: Path, fstype: str) -> None:
    size = _XFS if fstype == "xfs" else 32 * MIB
    with (
        StateDisk(tmp_path, tmp_path / "state", fstype=fstype, size=size) as disk,
        Server(tmp_path) as server,
        _well_at_the_end(disk, server),
    ):
        client = Client(server)
        client.prepare("a")
        client.prepare("b")
        disk.fails()
        for name, words in (("prepare", ("c",)), ("remove", ("b",))):
            code, said = client.refused(name, *words)
            assert code is grpc.StatusCode.INTERNAL
            assert "snapshots.db" in said
        disk.gives_up()
        disk.well()
        code, said = client.refused("prepare", "d")
        assert server.process is not None
        if code is grpc.StatusCode.INTERNAL:
            assert "Read-only file system" in said or "its filesystem says: Input/output error" in said
        else:
            # A page of the store that is mapped into its memory could not be had.
            assert server.process.wait(10) == -signal.SIGBUS
            assert "Bus error" in server.said()
        said = _doctor(server)
        assert "takes no writes: " in said or "pool.json cannot be read" in said, said
        server.stop()
        started = subprocess.run([sys.executable, "-m", "runvol", "snapshotter"], env=server.environment, check=False,
                                 capture_output=True, text=True, timeout=60)  # fmt: skip
        assert started.returncode == 1
        assert started.stderr.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in started.stderr
        disk.remount()
        assert "takes no writes" not in _doctor(server)
        server.start()
        client = Client(server)
        for key in ("c", "d"):
            client.prepare(key)
        assert client.stat("a").info.name == "a"
        for key in ("a", "c", "d"):
            client.remove(key)
        with contextlib.suppress(grpc.RpcError):
            client.remove("b")  # that was refused may have been done all the same
        server.settled(0)


def _timed(call: Callable[[], object]) -> tuple[float, bool]:
    """Seconds, and whether it was answered."""
    began = time.monotonic()
    try:
        call()
    except grpc.RpcError as error:
        print(f"refused: {error}")
        return time.monotonic() - began, False
    return time.monotonic() - began, True


def test_the_disk_hangs(tmp_path: Path) -> None:
    with (
        StateDisk(tmp_path, tmp_path / "state") as disk,
        Server(tmp_path, RUNVOL_SNAPSHOTTER_CALL_SECONDS="3") as server,
    ):
        client = Client(server)
        for key in ("a", "b", "c"):
            client.prepare(key)
        time.sleep(3)
        with disk.hanging():
            stuck = [lambda: client.prepare("new"), lambda: client.remove("b"), lambda: client.commit("layer", "c")]
            for call in stuck:
                seconds, answered = _timed(call)
                assert not answered
                assert seconds < 3 + 1 + 4
            for call in (
                lambda: client.stat("a"),
                lambda: client.call("Mounts", pb.MountsRequest(key="a"), pb.MountsResponse),
            ):
                seconds, answered = _timed(call)
                assert answered
                assert seconds < 2
        until = time.monotonic() + 20
        while not _timed(lambda: client.prepare("goes-on"))[1]:
            assert time.monotonic() < until, server.said()
        client.call("Update", pb.UpdateSnapshotRequest(info=pb.Info(name="a", labels={"x": "y"})))

        with disk.hanging():
            assert not _timed(lambda: client.prepare("newer"))[1]
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 40
            while _state(server.process.pid) != "Z":
                assert time.monotonic() < until, "it goes on without end"
                time.sleep(0.5)
        assert server.process.wait(20) == 0, server.said()
        server.start()
        client = Client(server)
        assert dict(client.stat("a").info.labels) == {"x": "y"}
        client.prepare("newest")


def _state(pid: int) -> str:
    """Of the first thread; the others may hang in the kernel, out of which no signal takes them."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
