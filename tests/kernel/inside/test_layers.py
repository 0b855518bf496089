"""A layer is what was there at Commit, whoever has its device open then or later."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, WaitExpired
from snapshotter.errors import Unavailable
from snapshotter.pool import Pool
from tests.kernel.inside.lab import MIB, Lab, mounted

# In no block that a filesystem of 32 MiB uses by itself.
_AT = 20 * MIB
_BLOCK = 4096


def _written(fd: int, mark: bytes) -> None:
    """One block past the page cache."""
    with mmap.mmap(-1, _BLOCK) as page:
        page.write(mark * (_BLOCK // len(mark)))
        assert os.pwritev(fd, [page], _AT) == _BLOCK


def _marked(path: str) -> bytes:
    with open(path, "rb", buffering=0) as opened:
        return os.pread(opened.fileno(), 1, _AT)


def _seen(lab: Lab, name: str) -> tuple[bytes, bytes]:
    """What a new view and a new child say."""
    found = _marked(lab.view("v", name)[0].source), _marked(lab.prepare("c", name)[0].source)
    lab.remove("v")
    lab.remove("c")
    return found


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.short
def test_writes_through_a_mount_that_outlives_commit_are_not_in_the_layer(lab: Lab) -> None:
    mounts = lab.prepare("a")
    with mounted(mounts) as root:
        (root / "f").write_text("one")
        lab.commit("layer", "a")
        assert lab.read("layer", "f") == b"one"
        child = lab.prepare("child", "layer")
        (root / "f").write_text("TWO")
        os.sync()
        lab.reap()
        assert lab.read("layer", "f") == b"one"
        with mounted(child) as below:
            assert (below / "f").read_text() == "one"
        assert (root / "f").read_text() == "TWO", "its holder keeps what it has"
    assert lab.read("layer", "f") == b"one"
    lab.remove("child")
    assert not lab.leaks(), "the device of the holder goes with the last close"
    lab.node.pool.check_live(Deadline.after(30))


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_DIRECT])
def test_writes_through_an_old_descriptor_are_not_in_the_layer(lab: Lab, flags: int) -> None:
    (mount,) = lab.prepare("a")
    with _opened(mount.source, flags) as fd:
        _written(fd, b"1")
        lab.commit("layer", "a")
        device = lab.stat("layer").device
        _written(fd, b"2")
        os.fsync(fd)
        assert _seen(lab, "layer") == (b"1", b"1")
        lab.reap()
        assert len(lab.node.store.doomed()) == 1
        assert os.pread(fd, 1, _AT) == b"2" if flags == os.O_RDWR else True
    assert lab.stat("layer").device == device
    assert not lab.leaks()
    assert _seen(lab, "layer") == (b"1", b"1")


def test_who_opens_a_committed_device_cannot_write_to_it(lab: Lab, tmp_path: Path) -> None:
    (mount,) = lab.prepare("a")
    with _opened(mount.source, os.O_RDWR) as fd:
        _written(fd, b"1")
    lab.commit("layer", "a")
    assert lab.node.pool.find(lab.stat("layer").device), "nothing was done behind yet"
    for flags in (os.O_RDWR, os.O_RDWR | os.O_DIRECT):
        with contextlib.suppress(PermissionError, OSError), _opened(mount.source, flags) as fd:
            _written(fd, b"2")
            os.fsync(fd)
    subprocess.run(["mount", "-t", mount.fstype, "-o", "rw", mount.source, str(tmp_path)], check=False)
    with contextlib.suppress(OSError):
        (tmp_path / "f").write_text("no")
    subprocess.run(["umount", str(tmp_path)], check=False)
    assert _seen(lab, "layer") == (b"1", b"1")
    assert "f" not in lab.names()


def test_who_opens_it_while_it_is_committed_keeps_another(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (mount,) = lab.prepare("a")
    device = lab.stat("a").device
    with _opened(mount.source, os.O_RDWR) as fd:
        _written(fd, b"1")
        # It is opened just after the look.
        monkeypatch.setattr(Pool, "in_use", lambda _pool, _device: False)
        lab.commit("layer", "a")
        monkeypatch.undo()
        assert lab.stat("layer").device != device
        _written(fd, b"2")
        assert _seen(lab, "layer") == (b"1", b"1")
    assert not lab.leaks()
    assert _seen(lab, "layer") == (b"1", b"1")


def test_a_start_parts_a_layer_from_who_has_it_open(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process was killed between the store's commit and the next look."""
    (mount,) = lab.prepare("a")
    with _opened(mount.source, os.O_RDWR) as fd:
        _written(fd, b"1")
        monkeypatch.setattr(Pool, "in_use", lambda _pool, _device: False)
        monkeypatch.setattr(Pool, "shut", lambda _pool, _device: True)
        lab.commit("layer", "a")
        monkeypatch.undo()
        lab.restart()
        _written(fd, b"2")
        assert _seen(lab, "layer") == (b"1", b"1")
    assert not lab.leaks()


def test_a_layer_that_cannot_be_parted_now_is_parted_behind(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (mount,) = lab.prepare("a")
    with _opened(mount.source, os.O_RDWR) as fd:
        _written(fd, b"1")
        monkeypatch.setattr(Pool, "in_use", lambda _pool, _device: False)
        monkeypatch.setattr(Pool, "create_snapshot", _fails)
        lab.commit("layer", "a")
        monkeypatch.undo()
        lab.reap()
        _written(fd, b"2")
        assert _seen(lab, "layer") == (b"1", b"1")
    assert not lab.leaks()


def _fails(*_: object, **_more: object) -> None:
    raise OSError(5, "the pool does not answer")


def test_a_device_that_does_not_come_to_rest_keeps_commit_no_longer_than_its_limit(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mount,) = lab.prepare("a")
    suspend, release = lab.node.mapper.suspend, threading.Event()

    def hangs(name: str, **more: bool) -> None:
        release.wait(30)
        suspend(name, **more)

    monkeypatch.setattr(lab.node.mapper, "suspend", hangs)
    with _opened(mount.source, os.O_RDWR) as fd:
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(WaitExpired, match="snapshotting device"):
                lab.node.snapshots.commit("layer", "a", {}, "", Deadline.after(1))
        assert time.monotonic() - began < 4
        lab.reap()
        release.set()
        until = time.monotonic() + 20
        while not _ended(lab):
            assert time.monotonic() < until
            time.sleep(0.05)
        monkeypatch.undo()
        _written(fd, b"1")
        lab.commit("layer", "a")
        _written(fd, b"2")
        assert _seen(lab, "layer") == (b"1", b"1")
    assert not lab.leaks()


def _ended(lab: Lab) -> bool:
    """The hanging call has come back and left the device as it was."""
    found = lab.node.mapper.find(lab.node.pool.device_name(lab.stat("a").device))
    return found is not None and not found.suspended and not any(map(lab.node.snapshots.copies.holds, range(1, 200)))


def test_a_refused_commit_leaves_the_device_as_it_is(lab: Lab) -> None:
    lab.layer("there", files={"f": b"x"})
    (mount,) = lab.prepare("a")
    with pytest.raises(Exception, match="already exists"):
        lab.commit("there", "a")
    with _opened(mount.source, os.O_RDWR | os.O_DIRECT) as fd:
        with pytest.raises(Exception, match="already exists"):
            lab.commit("there", "a")
        _written(fd, b"1")
    with mounted(lab.mounts("a")) as root:
        (root / "f").write_text("as ever")
    assert not lab.leaks()


def test_what_somebody_has_frozen_is_refused_with_a_reason_and_committed_once_it_is_thawed(lab: Lab) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "f").write_bytes(b"before")
        subprocess.run(["fsfreeze", "-f", str(root)], check=True)
        try:
            with pytest.raises(Unavailable, match="is frozen by somebody else"):
                lab.commit("layer", "a")
        finally:
            subprocess.run(["fsfreeze", "-u", str(root)], check=True)
        lab.commit("layer", "a")
    assert lab.read("layer", "f") == b"before"
    assert not lab.leaks()
