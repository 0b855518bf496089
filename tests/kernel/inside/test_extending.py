"""Pools are made larger as their errors and the documents say it, whatever they stand on; and who excludes whom."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from blockdev import Deadline, loops
from blockdev.devicemapper import Mapper
from blockdev.errors import WaitExpired
from snapshotter import adopting, assembly, backing, making, quarantine, repairing, turns
from snapshotter.adopting import Claim
from snapshotter.assembly import Extender, Wish
from snapshotter.errors import BadRequest, PoolFull, PoolRefused, Unavailable
from snapshotter.node import Node
from snapshotter.pool import Limits, Pool
from tests.kernel.inside.killpoints import Steps
from tests.kernel.inside.lab import MIB, Lab, in_child, mounted, soon
from tests.kernel.inside.test_making import group  # noqa: F401
from tests.kernel.inside.test_pool import _apart, _taken_apart, loop_device


def _runvol(state: str, *arguments: str, ok: int = 0) -> str:
    environment = {**os.environ, "RUNVOL_SNAPSHOTTER_STATE_DIR": state}
    done = subprocess.run([sys.executable, "-m", "runvol", *arguments], env=environment, capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip
    assert done.returncode == ok, done.stderr
    return done.stdout + done.stderr


def _totals(mapper: Mapper, state: str) -> tuple[int, int]:
    """Bytes of data and of metadata."""
    it = backing.load(state)
    assert it is not None
    status = mapper.pool_status(it.name)
    return status.data_total * it.block, status.metadata_total * 4096


@pytest.fixture
def kinds(mapper: Mapper, tmp_path: Path, group: str) -> Iterator[Callable[[str], tuple[str, Callable[[], None]]]]:  # noqa: F811
    """A pool of each kind, and what makes its devices larger."""
    with loop_device(tmp_path / "data", 256 * MIB) as data, loop_device(tmp_path / "meta", 8 * MIB) as metadata:
        state = str(tmp_path / "state")

        def grow() -> None:
            for path, device, size in (("data", data, 320 * MIB), ("meta", metadata, 12 * MIB)):
                os.truncate(tmp_path / path, size)
                loops.resize(device)

        def make(kind: str) -> tuple[str, Callable[[], None]]:
            wish = {
                "files": Wish(name="grown", directory=str(tmp_path / "pool"), size=128 * MIB, metadata_size=8 * MIB),
                "volumes": Wish(name="grown", group=group, size=128 * MIB, metadata_size=8 * MIB),
                "one device": Wish(name="grown", device=data),
                "two devices": Wish(name="grown", device=data, metadata_device=metadata),
            }[kind]
            assembly.init(mapper, state, wish, soon())
            return state, grow

        yield make
        _apart(mapper, state)


@pytest.mark.parametrize("kind", ["files", "volumes"])
def test_what_can_be_made_larger_is_by_the_commands_as_they_are_named(
    mapper: Mapper, kinds: Callable[[str], tuple[str, Callable[[], None]]], kind: str
) -> None:
    state, _ = kinds(kind)
    data, metadata = _totals(mapper, state)
    assert "grown" in _runvol(state, "pool", "extend")
    assert _totals(mapper, state)[0] == pytest.approx(data * 1.2, rel=0.03)
    data, _ = _totals(mapper, state)
    _runvol(state, "pool", "extend", "--metadata")
    assert _totals(mapper, state)[1] > metadata
    _, metadata = _totals(mapper, state)
    _runvol(state, "pool", "extend", "--by", "32Mi")
    _runvol(state, "pool", "extend", "--metadata", "--by", str(4 * MIB))
    assert _totals(mapper, state) == (data + 32 * MIB, metadata + 4 * MIB)
    assert "a pool only grows" in _runvol(state, "pool", "extend", "--by", "0", ok=2)
    assert "is no size" in _runvol(state, "pool", "extend", "--by", "-5", ok=2)
    # Less than a block is a block.
    _runvol(state, "pool", "extend", "--by", "1")
    assert _totals(mapper, state)[0] > data + 32 * MIB


@pytest.mark.parametrize("kind", ["one device", "two devices"])
def test_devices_that_have_grown(
    mapper: Mapper, kinds: Callable[[str], tuple[str, Callable[[], None]]], tmp_path: Path, kind: str
) -> None:
    state, grow = kinds(kind)
    data, metadata = _totals(mapper, state)
    assert "make it larger first, then `runvol pool extend`" in _runvol(state, "pool", "extend", ok=1)
    said = _runvol(state, "pool", "extend", "--metadata", ok=1)
    assert ("cannot be extended: remove images" if kind == "one device" else "then `runvol pool extend --met") in said
    grow()
    _runvol(state, "pool", "extend")
    assert _totals(mapper, state)[0] == data + 64 * MIB
    # The kernel takes what there is of both.
    assert _totals(mapper, state)[1] == metadata + (0 if kind == "one device" else 4 * MIB)
    _runvol(state, "pool", "extend", "--metadata", ok=1)
    if kind == "two devices":
        it = backing.load(state)
        assert it is not None
        os.truncate(tmp_path / "meta", 16 * MIB)
        loops.resize(it.metadata)
        _runvol(state, "pool", "extend", "--metadata")
        assert _totals(mapper, state)[1] == metadata + 8 * MIB


def test_errors_of_a_full_pool_name_what_works_for_it(
    mapper: Mapper, kinds: Callable[[str], tuple[str, Callable[[], None]]]
) -> None:
    state, _ = kinds("one device")
    pool, _ = assembly.assemble(mapper, state, soon(), Limits(data_reserve=100, extend_by=0))
    it = backing.load(state)
    assert it is not None
    pool.create_thin(1)
    pool.activate(1, MIB)
    with open(pool.path(1), "r+b") as opened:
        opened.write(b"x")
    pool.flush(1)
    pool._seen = None
    with pytest.raises(PoolFull, match=f"make {it.data} larger, then `runvol pool extend`"):
        pool.admit()
    status = pool.status()
    full = type(status)(mode="ro", metadata_used=8, metadata_total=8, data_total=8)
    assert f"lies at the start of {it.data} and cannot grow" in pool.health(full)[0].message


def test_two_at_once_both_count(make_lab: Callable[..., Lab], mapper: Mapper) -> None:
    lab = make_lab(data=128 * MIB)
    command = [sys.executable, "-m", "runvol", "pool", "extend", "--by", "16Mi"]
    environment = {**os.environ, "RUNVOL_SNAPSHOTTER_STATE_DIR": lab.state}
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    extender = lab.extender()
    own = [threading.Thread(target=extender.extend, args=("data", 16 * MIB, soon())) for _ in range(2)]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    for one in running:
        assert one.wait(60) == 0, one.stderr
    assert os.path.getsize(lab.description.data) == (128 + 5 * 16) * MIB
    assert lab.status().data_total == (128 + 5 * 16) * 16


def test_what_is_made_while_the_pool_is_extended_again_and_again_is_made(make_lab: Callable[..., Lab]) -> None:
    lab, count = make_lab(data=128 * MIB), int(os.environ.get("RUNVOL_ROUNDS", "15"))
    lab.layer("layer", files={"f": b"content"})
    extender, stop = lab.extender(), threading.Event()
    failed: list[Exception] = []

    def extend() -> None:
        while not stop.is_set():
            try:
                extender.extend("data", MIB, soon())
            except Exception as error:
                failed.append(error)
                return

    another = threading.Thread(target=extend)
    another.start()
    try:
        for number in range(count):
            with mounted(lab.prepare(f"a{number}", "layer")) as root:
                (root / "mine").write_bytes(b"%d" % number)
            lab.commit(f"l{number}", f"a{number}")
    finally:
        stop.set()
        another.join()
    assert not failed
    assert [lab.read(f"l{number}", "mine") for number in range(count)] == [b"%d" % number for number in range(count)]


def test_while_a_pool_is_left_suspended_nothing_hangs_and_it_is_said(lab: Lab) -> None:
    lab.layer("layer", files={"f": b"content"})
    lab.reap()
    lab.node.mapper.suspend(lab.name)
    try:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="is suspended"):
            lab.node.pool.activate(lab.stat("layer").device, lab.stat("layer").size)
        assert time.monotonic() - started < 4
    finally:
        lab.node.mapper.resume(lab.name)
    lab.prepare("a", "layer")


def test_an_extension_that_is_killed_anywhere_is_ended_by_the_next(lab: Lab) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "f").write_bytes(b"kept")
    for number in range(1, 40):
        before = lab.status().data_total
        status = in_child(partial(_die_extending, lab.state, number))
        # Nothing hangs for good that a killed process left suspended.
        lab.extender().as_needed(soon())
        if lab.status().data_total == before:
            grown = os.path.getsize(lab.description.data) // 65536 > before
            lab.extender().extend_somehow("data", soon())
            assert not grown or lab.status().data_total == before + 16 * 16
        assert lab.status().data_total == os.path.getsize(lab.description.data) // 65536
        assert lab.status().data_total > before
        with mounted(lab.mounts("a")) as root:
            assert (root / "f").read_bytes() == b"kept"
        if status == 0:
            break
    else:
        pytest.fail("too many steps")
    assert number > 2


def _die_extending(state: str, number: int) -> None:
    with Mapper() as mapper:
        pool, below = assembly.assemble(mapper, state, soon(), Limits(extend_by=0))
        Steps(number).install()
        Extender(mapper, pool, below).extend("data", 16 * MIB, soon())


def test_a_disk_without_room_leaves_the_pool_as_it_was(mapper: Mapper, tmp_path: Path) -> None:
    place, state = tmp_path / "small", str(tmp_path / "state")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "none", str(place)], check=True)
    try:
        assembly.init(mapper, state, Wish(name="small", directory=str(place), size=64 * MIB), soon())
        before = _totals(mapper, state), os.path.getsize(place / "small.data")
        extender = Extender(mapper, *assembly.assemble(mapper, state, soon()))
        said = []
        for _ in range(2):
            with pytest.raises(Unavailable, match="its filesystem has no room for that") as caught:
                extender.extend("data", 128 * MIB, soon())
            said.append(str(caught.value))
            (place / "more").write_bytes(b"x" * 4096 * len(said))
        assert said[0] == said[1], "the same trouble, the same sentence"
        assert (_totals(mapper, state), os.path.getsize(place / "small.data")) == before
        _apart(mapper, state)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_one_part_that_cannot_grow_does_not_keep_the_other_from_it(
    mapper: Mapper, kinds: Callable[[str], tuple[str, Callable[[], None]]], tmp_path: Path
) -> None:
    state, _ = kinds("two devices")
    os.truncate(tmp_path / "meta", 12 * MIB)
    it = backing.load(state)
    assert it is not None
    loops.resize(it.metadata)
    _, metadata = _totals(mapper, state)
    extender = Extender(mapper, *assembly.assemble(mapper, state, soon(), Limits(extend_above=0)))
    said = []
    for _ in range(2):
        with pytest.raises(Unavailable, match="the data: .* has not grown") as caught:
            extender.as_needed(soon())
        said.append(str(caught.value))
    assert _totals(mapper, state)[1] == metadata + 4 * MIB
    assert said[0].split("; ")[-1] == said[1].split("; ")[-1]


# -- who excludes whom ------------------------------------------------------------------------------------------------


def _refused(work: Callable[[], object], said: str = "another process serves or changes") -> None:
    """In a process of its own, as locks and the keeper are a process's."""

    def alone() -> None:
        try:
            work()
        except PoolRefused as error:
            assert said in str(error), error
            os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(alone)) == 7


def _changes(lab: Lab) -> list[Callable[[], object]]:
    def with_mapper(call: Callable[[Mapper], object]) -> Callable[[], object]:
        def work() -> None:
            with Mapper() as mapper:
                call(mapper)

        return work

    wanted = quarantine.Wanted(device=1, key="k")
    return [
        with_mapper(lambda mapper: assembly.repair(mapper, lab.state, soon())),
        with_mapper(lambda mapper: repairing.repair_store(mapper, lab.state, soon())),
        with_mapper(lambda mapper: quarantine.adopt(mapper, lab.state, wanted, soon())),
        with_mapper(lambda mapper: adopting.adopt(
            mapper, lab.state, Claim(data=lab.description.data, metadata=lab.description.metadata), soon())),
        with_mapper(lambda mapper: assembly.init(
            mapper, lab.state, Wish(name="x", directory=lab.state, size=64 * MIB), soon())),
    ]  # fmt: skip


def test_what_changes_a_pool_excludes_a_server_and_each_other(lab: Lab) -> None:
    """A server holds the locks for its life, a command while it works; one of a copied state the pool's alone."""
    lab.stop()
    for held in (turns.whole(lab.state), turns.only_pool(lab.description.identity)):
        with held:
            for work in _changes(lab)[:3]:
                _refused(work)
    with turns.whole(lab.state):
        os.unlink(os.path.join(lab.state, "pool.made"))
        for work in _changes(lab)[3:]:
            _refused(work)
        with pytest.raises(WaitExpired, match="another command that changes the pool"):
            quarantine.free(lab.state, [1], Deadline.after(0.2))
    lab.start()


def test_the_keeper_keeps_a_repair_away_from_a_server_elsewhere(lab: Lab) -> None:
    """In another mount namespace a server has locks of its own."""
    assert lab.node.keeper.held
    _refused(_changes(lab)[0], "another process serves or changes pool")
    assert lab.node.keeper.held
    lab.prepare("a")


def _rebuilt(repair: Callable[[str, str, Deadline], str]) -> Callable[[str, str, Deadline], str]:
    """The metadata are rebuilt, although they are sound."""

    def repaired(state_dir: str, metadata: str, deadline: Deadline) -> str:
        if os.path.exists(os.path.join(state_dir, "metadata.replacing")):
            return repair(state_dir, metadata, deadline)
        return assembly._rebuild(state_dir, metadata, deadline)

    return repaired


def test_while_metadata_are_repaired_nobody_maps_the_pool(
    lab: Lab, mapper: Mapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.layer("layer", files={"f": b"x"})
    _taken_apart(lab, mapper)
    monkeypatch.setattr(assembly, "_repair", _rebuilt(assembly._repair))
    tried: list[str] = []
    replace = assembly._replace

    def replacing(state_dir: str, metadata: str) -> None:
        with pytest.raises((PoolRefused, Unavailable)) as caught:
            Node(lab.settings).open_pool()
        tried.append(str(caught.value))
        replace(state_dir, metadata)

    monkeypatch.setattr(assembly, "_replace", replacing)
    assembly.repair(mapper, lab.state, Deadline.after(120))
    assert len(tried) == 1
    assert mapper.find(lab.name) is not None
    lab.start()
    assert lab.read("layer", "f") == b"x"


def test_a_repair_that_is_killed_while_it_writes_is_ended_by_the_same_call(lab: Lab, mapper: Mapper) -> None:
    lab.layer("layer", files={"f": b"x"})
    _taken_apart(lab, mapper)
    assert in_child(partial(_die_repairing, lab.state)) == 9
    with pytest.raises(Unavailable, match="the repair of pool .* did not end: repeat `runvol pool check --repair`"):
        lab.start()
    lab.stop()
    assert "by a repair that had not ended" in assembly.repair(mapper, lab.state, Deadline.after(120))
    lab.start()
    assert lab.read("layer", "f") == b"x"
    assert not lab.leaks()


def _die_repairing(state: str) -> None:
    def half(source: str, target: str) -> None:
        if source.endswith("metadata.replacing"):
            with open(target, "r+b") as opened:
                opened.write(Path(source).read_bytes()[: 64 << 10])
                os.fsync(opened.fileno())
            os.kill(os.getpid(), 9)
        copy(source, target)

    copy = assembly._copy
    assembly._copy, assembly._repair = half, _rebuilt(assembly._repair)
    with Mapper() as mapper:
        assembly.repair(mapper, state, Deadline.after(120))


def test_a_pool_that_is_not_assembled_says_why(lab: Lab, mapper: Mapper) -> None:
    lab.stop()
    _apart(mapper, lab.state)
    assert "`runvol pool check` looks at the metadata" in _runvol(lab.state, "pool", "status", ok=1)
    os.rename(lab.description.metadata, lab.description.metadata + ".away")
    assert "does not exist; bring it back" in _runvol(lab.state, "pool", "status", ok=1)
    os.rename(lab.description.metadata + ".away", lab.description.metadata)
    Path(lab.state, "metadata.replacing").touch()
    assert "repeat `runvol pool check --repair`" in _runvol(lab.state, "pool", "status", ok=1)
    os.unlink(os.path.join(lab.state, "metadata.replacing"))
    lab.start()


# -- wiping what was typed --------------------------------------------------------------------------------------------


def _with_something(device: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    with open(device, "r+b") as opened:
        opened.seek(101 * MIB)
        opened.write(b"somebody's" * 1000)


def test_only_the_name_as_it_is_given_wipes(mapper: Mapper, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with loop_device(tmp_path / "disk", 256 * MIB) as disk, loop_device(tmp_path / "other", 256 * MIB) as other:
        _with_something(disk)
        for typed in ("yes", other, os.path.basename(disk), f"{disk} "):
            with pytest.raises(BadRequest, match="--force-wipe"):
                assembly.init(mapper, state, Wish(name="wiped", device=disk, force_wipe=(typed,)), soon())
        place = tmp_path / "mounted"
        place.mkdir()
        subprocess.run(["mount", disk, str(place)], check=True)
        with pytest.raises(PoolRefused, match="in use"):
            assembly.init(mapper, state, Wish(name="wiped", device=disk, force_wipe=(disk,)), soon())
        subprocess.run(["umount", str(place)], check=True)
        pool = assembly.init(mapper, state, Wish(name="wiped", device=disk, force_wipe=(disk,)), soon())
        pool.create_thin(1)
        # A pool that is mapped is in use, whatever is typed; one that is not is wiped, and another.
        elsewhere = str(tmp_path / "elsewhere")
        with pytest.raises(PoolRefused, match="in use"):
            assembly.init(mapper, elsewhere, Wish(name="again", device=disk, force_wipe=(disk,)), soon())
        with pytest.raises(PoolRefused, match="already has pool"):
            assembly.init(mapper, state, Wish(name="wiped", device=disk, force_wipe=(disk,)), soon())
        _apart(mapper, state)
        pool = assembly.init(mapper, elsewhere, Wish(name="again", device=disk, force_wipe=(disk,)), soon())
        assert pool.ids(soon()) == set()
        _apart(mapper, elsewhere)


def test_a_partitioned_disk_is_wiped_with_its_partitions(mapper: Mapper, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with loop_device(tmp_path / "disk", 256 * MIB) as disk:
        subprocess.run(["sh", "-c", f"echo size=200000 | sfdisk -q {disk}"], check=True)
        subprocess.run(["partx", "-a", disk], check=False)
        with pytest.raises(Exception, match="stands on it|not blank"):
            assembly.init(mapper, state, Wish(name="wiped", device=disk), soon())
        assembly.init(mapper, state, Wish(name="wiped", device=disk, force_wipe=(disk,)), soon())
        _apart(mapper, state)


def test_volumes_and_files_are_wiped_by_their_names(
    mapper: Mapper, tmp_path: Path, group: str  # noqa: F811
) -> None:  # fmt: skip
    state, directory = str(tmp_path / "state"), tmp_path / "pool"
    for number, wish in enumerate((Wish(name="wiped", group=group, size=64 * MIB),
                                   Wish(name="wiped", directory=str(directory), size=64 * MIB))):  # fmt: skip
        names = ([f"{group}/wiped_data", f"{group}/wiped_meta"] if wish.group
                 else [str(directory / "wiped.data"), str(directory / "wiped.metadata")])  # fmt: skip
        for lost in range(2):
            one = f"{state}{number}{lost}"
            if lost:
                with pytest.raises(PoolRefused, match=f"`--force-wipe {names[0]}` does"):
                    assembly.init(mapper, one, wish, soon())
                with pytest.raises(PoolRefused, match="in use"):
                    assembly.init(mapper, one, _wiping(wish, names), soon())
                _apart(mapper, f"{state}{number}0")
                with pytest.raises(PoolRefused, match="exists already"):
                    assembly.init(mapper, one, _wiping(wish, names[:1]), soon())
            pool = assembly.init(mapper, one, _wiping(wish, names) if lost else wish, soon())
            assert pool.ids(soon()) == set()
            pool.create_thin(1)
        _apart(mapper, one)


def _wiping(wish: Wish, names: list[str]) -> Wish:
    import dataclasses

    return dataclasses.replace(wish, force_wipe=tuple(names))


@pytest.mark.parametrize("kind", ["one device", "two devices"])
def test_wiping_that_is_killed_anywhere_is_ended_by_the_same_call(mapper: Mapper, tmp_path: Path, kind: str) -> None:
    with loop_device(tmp_path / "data", 80 * MIB) as data, loop_device(tmp_path / "meta", 4 * MIB) as metadata:
        two = kind == "two devices"
        wish = Wish(name="wiped", device=data, metadata_device=metadata if two else "",
                    force_wipe=(data, metadata) if two else (data,))  # fmt: skip
        for number in range(1, 60, 2):
            state = str(tmp_path / f"state{number}")
            for device in (data, metadata):
                subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
            with open(data, "r+b") as opened:
                opened.seek(51 * MIB)
                opened.write(b"somebody's" * 1000)
            status = in_child(partial(_die_wiping, state, wish, number))
            if not os.path.exists(os.path.join(state, "pool.made")):
                assembly.init(mapper, state, wish, soon())
            assert assembly.assemble(mapper, state, soon())[0].ids(soon()) == set()
            _apart(mapper, state)
            if status == 0:
                break
        else:
            pytest.fail("too many steps")
        assert number > 4


def _die_wiping(state: str, wish: Wish, number: int) -> None:
    from blockdev import blankness

    steps = Steps(number)
    steps.install()
    blankness.run = making.run = _counted(steps, making.run)
    with Mapper() as mapper:
        assembly.init(mapper, state, wish, soon())


def _counted(steps: Steps, run: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
    def running(program: str, *arguments: str, **more: object) -> tuple[int, str]:
        steps.reached(program)
        return run(program, *arguments, **more)

    return running


def test_a_pool_that_is_served_though_not_mapped_is_not_wiped(mapper: Mapper, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with loop_device(tmp_path / "data", 128 * MIB) as data, loop_device(tmp_path / "meta", 4 * MIB) as metadata:
        wish = Wish(name="two", device=data, metadata_device=metadata)
        pool = assembly.init(mapper, state, wish, soon())
        _apart(mapper, state)
        with turns.only_pool(pool.identity), pytest.raises(PoolRefused, match="another process serves the pool"):
            assembly.init(mapper, str(tmp_path / "x"), _wiping(wish, [data, metadata]), soon())
        assert isinstance(assembly.assemble(mapper, state, soon())[0], Pool)
        _apart(mapper, state)
