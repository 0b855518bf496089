"""What one snapshot, one busy device or one part that cannot grow costs all others: nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter import bases
from snapshotter.errors import BadRequest, PoolFull, Unavailable
from snapshotter.pool import Limits
from tests.kernel.inside.lab import MIB, Lab, mounted, soon


@pytest.mark.short
def test_devices_that_stay_open_keep_no_others_from_being_deleted(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(size=16 * MIB, data=512 * MIB)
    opened = []
    for number in range(70):
        (mount,) = lab.prepare(f"busy{number}")
        opened.append(os.open(mount.source, os.O_RDONLY))
        lab.remove(f"busy{number}")
    lab.prepare("free")
    free = lab.stat("free").device
    lab.remove("free")
    lab.reap()
    assert free not in lab.ids()
    assert len(lab.node.store.doomed()) == 70
    os.close(opened.pop(3))
    lab.reap()
    assert len(lab.node.store.doomed()) == 69
    for fd in opened:
        os.close(fd)
    assert not lab.leaks()


def test_a_device_that_cannot_be_unmapped_keeps_no_others(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("a", "b", "c"):
        lab.prepare(key)
        lab.commit(f"layer {key}", key)
    stuck = lab.stat("layer a").device
    deactivate = lab.node.pool.deactivate

    def failing(device: int) -> bool:
        if device == stuck:
            raise OSError(5, "Input/output error")
        return deactivate(device)

    monkeypatch.setattr(lab.node.pool, "deactivate", failing)
    lab.remove("layer c")
    lab.reap()
    assert lab.mapped() == {stuck}
    assert not lab.node.store.doomed()
    monkeypatch.undo()
    assert not lab.leaks()


@pytest.mark.parametrize("size", [1 << 40, 1 << 44, 1 << 62, 10**30, 1025 * MIB])
@pytest.mark.parametrize("parent", ["", "layer"])
def test_a_size_beyond_the_pools_is_refused_by_name(lab: Lab, size: int, parent: str) -> None:
    lab.layer("layer", files={"f": b"x"})
    before = lab.status().data_used
    with pytest.raises(BadRequest, match=f"max-size = '{size}': at most {4 * 256 * MIB} bytes"):
        lab.prepare("a", parent, size=str(size))
    assert lab.status().data_used == before
    assert lab.node.store.bases()[0].size == 32 * MIB
    assert not lab.leaks()


def test_a_size_that_the_namespace_gives_may_be_asked_for(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(data=64 * MIB, size=10 << 30)
    lab.prepare("a", size=str(10 << 30))
    with pytest.raises(BadRequest, match="max-size"):
        lab.prepare("b", size=str(11 << 30))


@pytest.mark.parametrize(("fstype", "size"), [("ext4", 32 * MIB), ("xfs", 300 * MIB)])
def test_what_a_larger_filesystem_writes_at_once_is_counted_before(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, fstype: str, size: int
) -> None:
    """The tables of a filesystem that grows much take room that nobody has asked for by writing."""
    lab = make_lab(fstype=fstype, size=size, data=4096 * MIB if fstype == "ext4" else 1024 * MIB)
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    before, limit = lab.status(), 4 * lab.status().data_total * 65536
    lab.prepare("large", "layer", size=str(limit))
    after = lab.status()
    places, each = bases.cost(fstype, size, size, limit)
    assert after.data_used - before.data_used <= places * max(2, each // 65536)
    # As full as it may be for an ordinary snapshot, but for a few blocks.
    kept = after.data_total * lab.node.pool.limits.data_reserve // 100
    full = replace(after, data_used=after.data_total - kept - places)
    monkeypatch.setattr(lab.node.pool, "_seen", None)
    monkeypatch.setattr(lab.node.pool, "status", lambda: full)
    with pytest.raises(PoolFull, match="no room for a filesystem of this size"):
        lab.prepare("larger", "layer", size=str(limit))
    lab.prepare("as large as its parent", "layer")
    monkeypatch.undo()
    assert not lab.leaks()


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Path]:
    """A directory of 60 MiB for the pool's files."""
    directory = tmp_path / "lab0"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60M", "tmpfs", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.usefixtures("narrow")
def test_metadata_grows_though_data_cannot(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(size=16 * MIB, data=256 * MIB, metadata=8 * MIB, limits=Limits(extend_above=1, extend_by=20))
    for number in range(30):
        lab.prepare(f"k{number}")
    with mounted(lab.mounts("k0")) as root:
        (root / "f").write_bytes(os.urandom(10 * MIB))
    before = lab.status()
    with pytest.raises(Unavailable, match=r"the data: .*cannot grow"):
        lab.extender().as_needed(soon())
    assert lab.status().metadata_total > before.metadata_total
    assert lab.status().data_total == before.data_total
