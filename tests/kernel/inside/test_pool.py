"""Pools: made, assembled, recognised, extended, degraded, repaired."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blockdev import CommandFailed, Deadline, WaitExpired, loops
from blockdev.devicemapper import Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, Error, Flakey, Linear
from blockdev.errors import NotBlank
from snapshotter import assembly, backing
from snapshotter.assembly import Wish
from snapshotter.errors import BadRequest, PoolFull, PoolRefused, SnapshotterError, Unavailable
from snapshotter.node import STORE, Node
from snapshotter.pool import Limits, Pool
from tests.kernel.inside.lab import MIB, Lab, mounted, soon


@contextlib.contextmanager
def loop_device(path: Path, size: int) -> Iterator[str]:
    with open(path, "wb") as opened:
        opened.truncate(size)
    device = loops.attach(str(path), deadline=soon())
    try:
        yield device
    finally:
        loops.detach(device, str(path), soon())


# -- making -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        (Wish(name="Upper", directory="/tmp/x", size=64 * MIB), "--pool"),
        (Wish(name="p" * 60, directory="/tmp/x", size=64 * MIB), "--pool"),
        (Wish(name="p"), "exactly one"),
        (Wish(name="p", directory="/tmp/x", device="/dev/null", size=64 * MIB), "exactly one"),
        (Wish(name="p", directory="/tmp/x"), "--size"),
        (Wish(name="p", directory="/tmp/x", size=64 * MIB, block=1000), "--block-size"),
        (Wish(name="p", directory="/tmp/x", size=64 * MIB, metadata_size=4096), "--metadata-size"),
        (Wish(name="p", device="/etc/passwd"), "no block device"),
        (Wish(name="p", directory="/tmp/x", size=64 * MIB, metadata_device="/dev/null"), "--metadata-device"),
    ],
)
def test_a_wish_that_cannot_be_a_pool_is_refused_by_name(
    mapper: Mapper, tmp_path: Path, wish: Wish, named: str
) -> None:
    with pytest.raises(BadRequest, match=named):
        assembly.init(mapper, str(tmp_path / "state"), wish, soon())
    assert not (tmp_path / "state" / backing.FILE).exists()


def test_a_second_pool_is_refused(lab: Lab) -> None:
    with pytest.raises(PoolRefused, match="already has pool"):
        assembly.init(lab.node.mapper, lab.state, Wish(name="other", directory=lab.state, size=64 * MIB), soon())


def test_a_whole_device_becomes_a_pool_and_comes_back(mapper: Mapper, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with loop_device(tmp_path / "disk", 256 * MIB) as disk:
        pool = assembly.init(mapper, state, Wish(name="whole", device=disk), soon())
        pool.create_thin(1)
        assert pool.status().data_total * 65536 > 200 * MIB
        _, below = assembly.assemble(mapper, state, soon())
        assembly.disassemble(mapper, pool, below, soon())
        assert mapper.find("whole-data") is None
        pool, below = assembly.assemble(mapper, state, soon())
        assert pool.ids(soon()) == {1}
        assembly.disassemble(mapper, pool, below, soon())


@pytest.mark.short
def test_a_device_for_the_data_and_one_for_the_metadata(mapper: Mapper, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with loop_device(tmp_path / "data", 256 * MIB) as data, loop_device(tmp_path / "meta", 4 * MIB) as metadata:
        wish = Wish(name="two", device=data, metadata_device=metadata)
        pool = assembly.init(mapper, state, wish, soon())
        # Nothing lies between the pool and its devices.
        assert {data, metadata} == {f"/dev/{os.path.basename(os.path.realpath(f'/sys/dev/block/{one}'))}"
                                    for one in mapper.dependencies("two")}  # fmt: skip
        pool.create_thin(1)
        pool.activate(1, 64 * MIB)
        Path(pool.path(1)).write_bytes(b"first")
        before = pool.status()
        assert before.data_total == 256 * 16 - 1

        extender = assembly.Extender(mapper, *assembly.assemble(mapper, state, soon()))
        for part in ("data", "metadata"):
            with pytest.raises(Unavailable, match="has not grown"):
                extender.extend(part, MIB, soon())
        for path, size, device in ((tmp_path / "data", 384 * MIB, data), (tmp_path / "meta", 8 * MIB, metadata)):
            os.truncate(path, size)
            loops.resize(device)
        # Grown, but not extended, is no other disk.
        grown = _again(mapper, state).status()
        assert (grown.data_total, grown.metadata_total > before.metadata_total) == (before.data_total, True)
        os.truncate(tmp_path / "meta", 12 * MIB)
        loops.resize(metadata)
        assert extender.extend("metadata", MIB, soon()).metadata_total > grown.metadata_total
        # By another process than the one that goes on to use the pool.
        assembly.Extender(mapper, *assembly.assemble(mapper, state, soon())).extend("data", MIB, soon())
        with pytest.raises(Unavailable, match="has not grown"):
            extender.extend("data", MIB, soon())
        pool = _again(mapper, state)
        assert pool.status().data_total == 384 * 16 - 1
        pool.activate(1, 64 * MIB)
        with open(pool.path(1), "rb") as opened:
            assert opened.read(5) == b"first"
        _apart(mapper, state)


def _apart(mapper: Mapper, state: str) -> None:
    pool, below = assembly.assemble(mapper, state, soon())
    assembly.disassemble(mapper, pool, below, soon())


def _again(mapper: Mapper, state: str) -> Pool:
    _apart(mapper, state)
    return assembly.assemble(mapper, state, soon())[0]


def test_a_disk_that_took_the_name_of_the_pools_is_not_written_to(mapper: Mapper, tmp_path: Path) -> None:
    state, link = str(tmp_path / "state"), tmp_path / "by-id"
    with (loop_device(tmp_path / "data", 256 * MIB) as data, loop_device(tmp_path / "meta", 4 * MIB) as metadata,
          loop_device(tmp_path / "other", 256 * MIB) as other):  # fmt: skip
        link.symlink_to(data)
        assembly.init(mapper, state, Wish(name="two", device=str(link), metadata_device=metadata), soon())
        _apart(mapper, state)
        link.unlink()
        link.symlink_to(other)
        with pytest.raises(Unavailable, match=f"{link} is not the data device of pool two"):
            assembly.assemble(mapper, state, soon())
        assert mapper.find("two") is None
        link.unlink()
        with pytest.raises(Unavailable, match="no block device now"):
            assembly.assemble(mapper, state, soon())
        link.symlink_to(data)
        _again(mapper, state)
        _apart(mapper, state)


@pytest.mark.parametrize("which", ["same", "small", "used"])
def test_a_metadata_device_that_cannot_be_one_is_refused(mapper: Mapper, tmp_path: Path, which: str) -> None:
    size = MIB if which == "small" else 8 * MIB
    with loop_device(tmp_path / "data", 256 * MIB) as data, loop_device(tmp_path / "meta", size) as metadata:
        if which == "used":
            subprocess.run(["mkfs.ext4", "-q", metadata], check=True)
        wish = Wish(name="two", device=data, metadata_device=data if which == "same" else metadata)
        said = {"same": "is the device of the data", "small": "2 MiB", "used": "not blank"}[which]
        with pytest.raises((BadRequest, NotBlank), match=said):
            assembly.init(mapper, str(tmp_path / "state"), wish, soon())
        assert not (tmp_path / "state" / backing.FILE).exists()


def test_a_device_with_something_on_it_is_not_taken(mapper: Mapper, tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk", 256 * MIB) as disk:
        subprocess.run(["mkfs.ext4", "-q", disk], check=True)
        with pytest.raises(Exception, match="not blank"):
            assembly.init(mapper, str(tmp_path / "state"), Wish(name="whole", device=disk), soon())


def test_a_volume_group_becomes_a_pool_that_is_extended_and_comes_back(mapper: Mapper, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with loop_device(tmp_path / "disk", 512 * MIB) as disk:
        group = "rv-group"
        subprocess.run(["vgcreate", "-q", group, disk], check=True, capture_output=True)
        try:
            pool = assembly.init(mapper, state, Wish(name="lvmpool", group=group, size=128 * MIB), soon())
            before = pool.status().data_total
            pool, below = assembly.assemble(mapper, state, soon())
            assembly.Extender(mapper, pool, below).extend("data", 64 * MIB, soon())
            assembly.Extender(mapper, pool, below).extend("metadata", 8 * MIB, soon())
            assert pool.status().data_total == before + 1024
            assembly.disassemble(mapper, pool, below, soon())
            subprocess.run(["vgchange", "-q", "-an", group], check=True, capture_output=True)
            pool, below = assembly.assemble(mapper, state, soon())
            assert pool.status().data_total == before + 1024
            assembly.disassemble(mapper, pool, below, soon())
        finally:
            subprocess.run(["vgremove", "-q", "-f", group], check=True, capture_output=True)


# -- recognising ------------------------------------------------------------------------------------------------------


def test_everything_comes_back_after_a_reboot(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"kept"})
    with mounted(lab.prepare("a", "layer")) as root:
        (root / "g").write_bytes(b"kept too")
    lab.reboot()
    with mounted(lab.mounts("a")) as root:
        assert (root / "f").read_bytes() + (root / "g").read_bytes() == b"keptkept too"
    assert not lab.leaks()


def test_a_suspended_device_is_resumed_by_a_start(lab: Lab) -> None:
    (mount,) = lab.prepare("a")
    lab.node.mapper.suspend(os.path.basename(mount.source))
    lab.restart()
    assert lab.found.resumed == 1
    with mounted(lab.mounts("a")) as root:
        assert os.listdir(root) == []


def test_a_half_made_device_is_finished_by_mounts(lab: Lab) -> None:
    (mount,) = lab.prepare("a")
    name = os.path.basename(mount.source)
    lab.node.mapper.remove(name)
    lab.node.mapper.create(name)
    with mounted(lab.mounts("a")) as root:
        assert os.listdir(root) == []


def test_a_foreign_device_of_the_pools_name_is_not_taken_for_it(lab: Lab, mapper: Mapper) -> None:
    lab.stop()
    pool, below = assembly.assemble(mapper, lab.state, soon())
    assembly.disassemble(mapper, pool, below, soon())
    mapper.create(lab.name, "SOMEBODY")
    mapper.load(lab.name, [Error(length=8)])
    mapper.resume(lab.name)
    with pytest.raises(PoolRefused, match="is not this pool"):
        lab.start()
    mapper.remove(lab.name)
    lab.start()


def test_without_a_pool_nothing_starts_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    from snapshotter.node import Settings

    with pytest.raises(PoolRefused, match="runvol pool init"):
        Node(Settings(state_dir=str(tmp_path)))


def test_a_lost_backing_file_is_named(lab: Lab) -> None:
    lab.stop()
    with Mapper() as mapper:
        pool, below = assembly.assemble(mapper, lab.state, soon())
        assembly.disassemble(mapper, pool, below, soon())
    os.rename(lab.description.data, lab.description.data + ".away")
    with pytest.raises(Unavailable, match=r"\.data does not exist"):
        lab.start()
    os.rename(lab.description.data + ".away", lab.description.data)
    lab.start()


# -- a lost store -----------------------------------------------------------------------------------------------------


def _lose_store(lab: Lab) -> None:
    lab.stop()
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(lab.state, STORE + suffix))


@pytest.mark.parametrize(("part", "how"), [("data", "-o1M"), ("metadata", "-o4K"), ("data", "-r"), ("metadata", "-r")])
def test_a_loop_device_that_somebody_made_to_look_inside_is_not_the_pools(lab: Lab, part: str, how: str) -> None:
    lab.layer("layer", files={"f": b"content" * 5000})
    it = lab.description
    lab.stop()
    with Mapper() as mapper:
        assembly.disassemble(mapper, *assembly.assemble(mapper, lab.state, soon()), soon())
    file = it.data if part == "data" else it.metadata
    # As an extension that was killed has left it: longer than the pool, so that it would do with an offset too.
    os.truncate(file, os.path.getsize(file) + 4 * MIB)
    done = subprocess.run(["losetup", "--show", how, "-f", file], capture_output=True, text=True, check=True)
    theirs = done.stdout.strip()
    try:
        lab.start()
        assert lab.read("layer", "f") == b"content" * 5000
        lab.layer("another", files={"g": b"more" * 50000})
        assert lab.read("another", "g") == b"more" * 50000
        lab.extender().extend("data", 8 * MIB, soon())
    finally:
        subprocess.run(["losetup", "-d", theirs], check=False)


def test_a_pool_whose_disk_has_become_too_small_is_served_once_it_is_as_it_was(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"content"})
    it = lab.description
    lab.stop()
    with Mapper() as mapper:
        assembly.disassemble(mapper, *assembly.assemble(mapper, lab.state, soon()), soon())
    size = os.path.getsize(it.data)
    os.truncate(it.data, size - MIB)
    with pytest.raises(Unavailable, match="is smaller than the pool says"):
        lab.start()
    assert lab.node.mapper.find(it.name) is None
    lab.stop()
    os.truncate(it.data, size)
    for device in loops.find(it.data):
        loops.resize(device)
    lab.start()
    assert lab.read("layer", "f") == b"content"


def test_a_lost_store_quarantines_what_the_pool_has_and_new_work_goes_on(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"x"})
    lab.prepare("a", "layer")
    old = lab.ids()
    _lose_store(lab)
    lab.start()
    assert set(lab.node.store.quarantined()) == old
    assert lab.names() == []
    lab.layer("layer", files={"f": b"new"})
    assert lab.ids() > old
    assert lab.read("layer", "f") == b"new"
    lab.restart()
    assert set(lab.node.store.quarantined()) == old
    with lab.node.store.transaction():
        for device in old:
            lab.node.store.doom(device, 0)
        lab.node.store.release(old)
    lab.reap()
    assert not lab.ids() & old
    assert not lab.leaks()


def test_devices_that_others_made_are_quarantined_and_never_used(lab: Lab) -> None:
    lab.node.mapper.message(lab.name, "create_thin 4000")
    lab.restart()
    assert lab.node.store.quarantined() == [4000]
    lab.prepare("a")
    assert lab.stat("a").device > 4000
    lab.reap()
    assert 4000 in lab.ids()


def test_a_device_without_a_row_is_quarantined_although_its_id_is_one_of_ours(lab: Lab) -> None:
    """It may be a snapshot's that a copy of the store does not know."""
    lab.prepare("a")
    with lab.node.store.transaction():
        orphan = lab.node.store.new_device()
    lab.node.mapper.message(lab.name, f"create_thin {orphan}")
    lab.restart()
    assert lab.found.orphans == [orphan]
    assert lab.node.store.quarantined() == [orphan]
    lab.reap()
    assert orphan in lab.ids()


# -- degraded ---------------------------------------------------------------------------------------------------------


def test_a_pool_out_of_data_says_so_and_comes_back_when_extended(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(data=64 * MIB, size=200 * MIB)
    (mount,) = lab.prepare("a")
    writer = subprocess.Popen(
        ["dd", "if=/dev/urandom", f"of={mount.source}", "bs=1M", "count=80", "oflag=direct"], stderr=subprocess.DEVNULL
    )
    _until(lambda: lab.status().mode == "out_of_data_space")
    lab.node.pool._seen = None
    with pytest.raises(PoolFull, match="no free data blocks"):
        lab.prepare("b")
    assert lab.node.pool.health()[0].mode == "out_of_data_space"
    lab.extender().extend("data", 64 * MIB, soon())
    assert writer.wait(30) == 0
    assert lab.status().mode == "rw"
    lab.prepare("b")


def _until(ready: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_pool_is_extended_by_itself_when_its_threshold_is_passed(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(data=64 * MIB, size=200 * MIB, limits=Limits(extend_above=50, extend_by=100))
    with mounted(lab.prepare("a")) as root:
        (root / "f").write_bytes(os.urandom(40 * MIB))
    done = lab.extender().as_needed(soon())
    assert "extended the data" in done[0]
    assert lab.status().data_total == 2048
    assert lab.extender().as_needed(soon()) == []


def test_full_metadata_is_refused_before_it_is_full_and_named_when_it_is(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(metadata=2 * MIB, size=200 * MIB, data=1 << 30)
    _touch(lab.prepare("a")[0].source, every=64 << 10)
    lab.commit("layer", "a")
    with pytest.raises(PoolFull, match="metadata"):
        for number in range(200):
            # Each write far from the others takes a leaf of the tree of its own.
            _touch(lab.prepare(f"a{number}", "layer")[0].source, every=8 * MIB)
            lab.status()
    assert lab.status().mode == "rw", "the reserve was used up"
    # Deleting still works, which is what the reserve is for.
    for key in lab.names():
        if key != "layer":
            lab.remove(key)
    lab.remove("layer")
    assert not lab.leaks()


def test_only_what_somebody_could_write_to_is_suspended_for_a_copy(lab: Lab) -> None:
    """A suspended device holds up whoever looks at it."""
    lab.prepare("k")
    pool, device = lab.node.pool, lab.stat("k").device

    def is_suspended() -> bool:
        with pool.quiet(device):
            found = pool.mapper.find(pool.device_name(device))
            assert found is not None
            return found.suspended

    assert is_suspended()
    assert pool.shut(device)
    assert not is_suspended()
    with open(pool.path(device), "rb"):
        assert is_suspended()
    pool.reopen(device)
    assert is_suspended()
    assert pool.shut(device)
    assert pool.deactivate(device)
    pool.activate(device, lab.stat("k").size)
    assert is_suspended()


def test_a_device_that_is_unmapped_as_it_is_let_go_on_leaves_no_node(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node would be of a number that another device gets."""
    lab.prepare("k")
    pool, device = lab.node.pool, lab.stat("k").device
    name, call = pool.device_name(device), pool.mapper._call

    def unmapped_then(number: int, operation: str, *arguments: Any, **more: Any) -> Any:
        answer = call(number, operation, *arguments, **more)
        if operation == "resume":
            pool.mapper.remove(name)
        return answer

    monkeypatch.setattr(pool.mapper, "_call", unmapped_then)
    with pool.quiet(device):
        pass
    monkeypatch.undo()
    assert pool.find(device) is None
    assert not os.path.lexists(node(name))
    (mount,) = lab.mounts("k")
    assert os.path.exists(mount.source)


def _touch(device: str, *, every: int) -> None:
    with open(device, "r+b", buffering=0) as opened:
        for at in range(0, 200 * MIB, every):
            os.pwrite(opened.fileno(), b"x" * 512, at)
        os.fsync(opened.fileno())


def _swap_metadata(lab: Lab, mapper: Mapper, *targets: object) -> None:
    """Put a linear device below the pool that the test can break: the pool is assembled on it."""
    name = f"{lab.name}-below"
    if mapper.find(name) is None:
        mapper.create(name)
    mapper.load(name, targets)  # type: ignore[arg-type]
    mapper.suspend(name, flush=False, freeze=False) if mapper.find(name).active else None  # type: ignore[union-attr]
    mapper.resume(name)


@pytest.fixture
def breakable(make_lab: Callable[..., Lab], mapper: Mapper) -> Iterator[tuple[Lab, Callable[..., None]]]:
    """A lab whose metadata device can be broken and mended."""
    lab = make_lab()
    lab.layer("layer", files={"f": b"x"})
    lab.reap()
    lab.stop()
    pool, below = assembly.assemble(mapper, lab.state, soon())
    assembly.disassemble(mapper, pool, below, soon())
    metadata = loops.attach(lab.description.metadata, deadline=soon())
    data = loops.attach(lab.description.data, deadline=soon())
    length = os.path.getsize(lab.description.metadata) // SECTOR
    good = Linear(length=length, device=metadata)
    _swap_metadata(lab, mapper, good)
    mapper.create(lab.name, assembly.UUID + lab.description.identity)
    mapper.load(lab.name, [backing.pool_table(node(f"{lab.name}-below"), data, lab.description.block,
                                               os.path.getsize(lab.description.data))])  # fmt: skip
    mapper.resume(lab.name)
    lab.start()

    def swap(*targets: object) -> None:
        _swap_metadata(lab, mapper, *(targets or [good]))

    swap.metadata = metadata  # type: ignore[attr-defined]
    swap.length = length  # type: ignore[attr-defined]
    yield lab, swap
    swap()
    with contextlib.suppress(Exception):
        lab.stop()
    for entry in mapper.devices():
        if entry.name.startswith("runvol-"):
            mapper.remove(entry.name)
    if mapper.find(lab.name) is not None:
        mapper.remove(lab.name)
    mapper.remove(f"{lab.name}-below")


def test_metadata_that_cannot_be_written_is_no_success(breakable: tuple[Lab, Callable[..., None]]) -> None:
    """The kernel answers 0 to create_snap all the same."""
    lab, swap = breakable
    lab.prepare("before", "layer")
    swap(Flakey(length=swap.length, device=swap.metadata, up=0, down=600, features=("error_writes",)))  # type: ignore[attr-defined]
    with pytest.raises((Unavailable, SnapshotterError), match="check|failed|read-only"):
        lab.prepare("a", "layer")
    assert lab.node.pool.health()[0].state == "broken"
    lab.node.pool._seen = None
    with pytest.raises(Unavailable, match="runvol pool check"):
        lab.prepare("b", "layer")
    assert "before" in lab
    # Forgetting is bookkeeping, and works.
    lab.remove("before")
    swap()
    lab.stop()
    with Mapper() as mapper:
        for entry in mapper.devices():
            if entry.name.startswith(f"runvol-{lab.description.identity[:8]}-"):
                mapper.remove(entry.name)
        mapper.remove(lab.name)
        mapper.remove(f"{lab.name}-below")
        for path in (lab.description.metadata, lab.description.data):
            for device in loops.find(path):
                loops.detach(device, path, soon())
        assert "metadata" in assembly.repair(mapper, lab.state, Deadline.after(120))
    lab.start()
    assert lab.node.pool.health()[0].state == "ok"
    lab.prepare("a", "layer")
    assert lab.read("layer", "f") == b"x"
    assert not lab.leaks()
    with Mapper() as mapper:
        _swap_metadata(lab, mapper, Error(length=8))


def _taken_apart(lab: Lab, mapper: Mapper) -> bytes:
    """The metadata of the pool, which is not assembled any more."""
    lab.reap()
    lab.stop()
    pool, below = assembly.assemble(mapper, lab.state, soon())
    assembly.disassemble(mapper, pool, below, soon())
    return Path(lab.description.metadata).read_bytes()


def test_damaged_metadata_is_not_assembled_and_a_repair_that_fails_changes_nothing(lab: Lab, mapper: Mapper) -> None:
    lab.layer("layer", files={"f": b"x"})
    sound = _taken_apart(lab, mapper)
    damaged = _spoil(lab.description.metadata, sound)
    with pytest.raises(Unavailable, match="damaged"):
        lab.start()
    lab.stop()
    with pytest.raises((CommandFailed, PoolRefused), match="thin_repair"):
        assembly.repair(mapper, lab.state, Deadline.after(120))
    assert Path(lab.description.metadata).read_bytes() == damaged
    for device in loops.find(lab.description.metadata):
        loops.detach(device, lab.description.metadata, soon())
    Path(lab.description.metadata).write_bytes(sound)
    lab.start()
    assert lab.read("layer", "f") == b"x"


def _spoil(path: str, sound: bytes) -> bytes:
    """Spoil all but the superblock, so that nothing is left to rebuild from; the spoilt metadata."""
    with open(path, "r+b") as opened:
        for at in range(4096, len(sound), 4096):
            if any(sound[at : at + 4096]):
                opened.seek(at)
                opened.write(b"\xff" * 4096)
    return Path(path).read_bytes()


def test_rebuilt_metadata_still_has_every_snapshot(lab: Lab, mapper: Mapper) -> None:
    lab.layer("layer", files={"f": b"x"})
    _taken_apart(lab, mapper)
    said = assembly._rebuild(lab.state, lab.description.metadata, Deadline.after(120))
    assert "kept as" in said
    lab.start()
    assert lab.read("layer", "f") == b"x"
    assert not lab.leaks()


def test_a_stale_metadata_snapshot_is_released(lab: Lab) -> None:
    lab.node.mapper.message(lab.name, "reserve_metadata_snap")
    lab.restart()
    assert not lab.status().held_root
    with pytest.raises(MapperError):
        lab.node.mapper.message(lab.name, "release_metadata_snap")


@pytest.mark.short
def test_readers_of_the_metadata_take_turns_within_their_deadlines(lab: Lab) -> None:
    """A pool has one metadata snapshot; the command line reads it beside the server."""
    lab.layer("layer", files={"f": b"x"})
    mine = lab.node.pool
    other = Pool(mine.mapper, mine.name, mine.identity, mine.metadata)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda number: (mine, other)[number % 2].ids(soon()), range(12)))
    assert all(one == read[0] for one in read)
    with other.metadata_snapshot(soon()), pytest.raises(WaitExpired, match=mine.name):
        mine.ids(Deadline.after(0.2))
    assert not lab.status().held_root
