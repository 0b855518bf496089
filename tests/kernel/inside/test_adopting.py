"""Pools that are there already: runvol's own whose description is lost, and others'; quarantined devices as snapshots."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from blockdev import loops
from blockdev.devicemapper import Mapper, node
from blockdev.dm_targets import SECTOR, Linear, Thin, ThinPool
from snapshotter import adopting, assembly, backing, existing, making, quarantine, repairing
from snapshotter.adopting import Claim
from snapshotter.assembly import Wish
from snapshotter.errors import AlreadyExists, BadRequest, NotFound, PoolRefused, WrongState
from snapshotter.model import Kind
from snapshotter.node import Node, Settings
from snapshotter.pool import Limits
from snapshotter.store import STORE, Store
from tests.kernel.inside.killpoints import Steps
from tests.kernel.inside.lab import MIB, Lab, in_child, mounted, soon
from tests.kernel.inside.test_making import group  # noqa: F401
from tests.kernel.inside.test_pool import _apart, loop_device


def _lose(state: str, *, store: bool = False) -> None:
    """What describes the pool, and with `store` all of the state."""
    if store:
        shutil.rmtree(state)
        return
    for name in (backing.FILE, "pool.made"):
        os.unlink(os.path.join(state, name))


def _claim(lab: Lab) -> Claim:
    return Claim(data=lab.description.data, metadata=lab.description.metadata)


# -- runvol's own -----------------------------------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize("is_mapped", [False, True], ids=["after a reboot", "while it is mapped"])
def test_a_pool_whose_state_is_lost_comes_back_with_its_snapshots(lab: Lab, mapper: Mapper, is_mapped: bool) -> None:
    lab.layer("layer", files={"f": b"kept"})
    lab.node.follow()
    before, claim = lab.description, _claim(lab)
    lab.stop()
    if not is_mapped:
        _apart(mapper, lab.state)
    metadata = Path(before.metadata).read_bytes()
    _lose(lab.state, store=True)
    done = adopting.adopt(mapper, lab.state, claim, soon())
    assert (done.own, done.name, lab.description) == (True, lab.name, before)
    if not is_mapped:
        assert Path(before.metadata).read_bytes() == metadata, "adopting one's own writes nothing to it"
        assert not loops.find(before.data)
    with pytest.raises(PoolRefused, match="already has pool"):
        adopting.adopt(mapper, lab.state, claim, soon())
    report = repairing.repair_store(mapper, lab.state, soon())
    assert report.restored == ["layer"]
    lab.start()
    assert lab.read("layer", "f") == b"kept"
    assert not lab.leaks()


def test_with_its_store_nothing_has_to_be_repaired(lab: Lab, mapper: Mapper) -> None:
    lab.layer("layer", files={"f": b"kept"})
    before, claim = lab.description, _claim(lab)
    lab.stop()
    _apart(mapper, lab.state)
    _lose(lab.state)
    assert adopting.adopt(mapper, lab.state, claim, soon()).own
    assert lab.description == before
    lab.start()
    assert lab.read("layer", "f") == b"kept"
    assert lab.node.store.past == ""


@pytest.mark.parametrize("kind", ["split", "two devices", "volumes"])
def test_each_kind_of_pool_tells_whose_it_is(
    mapper: Mapper, tmp_path: Path, kind: str, group: str  # noqa: F811
) -> None:  # fmt: skip
    state = str(tmp_path / "state")
    with loop_device(tmp_path / "data", 256 * MIB) as data, loop_device(tmp_path / "meta", 4 * MIB) as metadata:
        wish, claim = {
            "split": (Wish(name="mine", device=data), Claim(device=data)),
            "two devices": (Wish(name="mine", device=data, metadata_device=metadata),
                            Claim(device=data, metadata_device=metadata)),
            "volumes": (Wish(name="mine", group=group, size=128 * MIB),
                        Claim(group=group, data="mine_data", metadata="mine_meta")),
        }[kind]  # fmt: skip
        assembly.init(mapper, state, wish, soon())
        served = Node(Settings(state_dir=state, size=32 * MIB, limits=Limits(extend_by=0)))
        served.open_pool()
        with mounted(served.snapshots.prepare("a", "", {}, soon())) as root:
            (root / "f").write_bytes(b"kept")
        served.store.write_made()
        served.follow()
        served.store.close()
        _apart(mapper, state)
        before = backing.load(state)
        _lose(state, store=True)
        with pytest.raises(BadRequest, match="this pool is mine"):
            adopting.adopt(mapper, state, Claim(**{**_fields(claim), "name": "other"}), soon())
        assert adopting.adopt(mapper, state, claim, soon()).own
        found = backing.load(state)
        assert found is not None
        assert before is not None
        assert (found.name, found.identity, found.data, found.metadata, found.data_bytes) == (
            "mine", before.identity, before.data, before.metadata, before.data_bytes)  # fmt: skip
        assert repairing.repair_store(mapper, state, soon()).restored == ["a"]
        served = Node(Settings(state_dir=state, size=32 * MIB, limits=Limits(extend_by=0)))
        served.open_pool()
        with mounted(served.snapshots.mounts("a", soon())) as root:
            assert (root / "f").read_bytes() == b"kept"
        served.store.close()
        served.mapper.close()
        _apart(mapper, state)


def _fields(claim: Claim) -> dict[str, object]:
    return {name: getattr(claim, name) for name in claim.__dataclass_fields__}


# -- somebody else's --------------------------------------------------------------------------------------------------


class Others:
    """A pool that was made by hand, as containerd's own snapshotter wants one: two files or devices, all of both."""

    def __init__(self, mapper: Mapper, data: str, metadata: str, size: int) -> None:
        self.mapper, self.data, self.metadata, self.size = mapper, data, metadata, size

    def map(self) -> None:
        table = ThinPool(length=self.size // SECTOR, metadata=self.metadata, data=self.data, block=128, low_water=1)
        self.mapper.establish("others", [table])

    def make(self, *ids: int) -> None:
        for one in ids:
            self.mapper.message("others", f"create_thin {one}")
            with self.device(one) as path:
                subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)
                subprocess.run(["debugfs", "-w", "-R", f"write {__file__} f{one}", path], check=True,
                               capture_output=True)  # fmt: skip

    @contextlib.contextmanager
    def device(self, one: int) -> Iterator[str]:
        pool = self.mapper.find("others")
        assert pool is not None
        self.mapper.establish("others-one", [Thin(length=16 * MIB // SECTOR, pool=pool.number, thin_id=one)])
        yield node("others-one")
        self.mapper.remove("others-one")

    def unmap(self) -> None:
        self.mapper.remove("others")


@pytest.fixture
def others(mapper: Mapper, tmp_path: Path) -> Iterator[Others]:
    with loop_device(tmp_path / "data", 128 * MIB) as data, loop_device(tmp_path / "meta", 4 * MIB) as metadata:
        one = Others(mapper, data, metadata, 128 * MIB)
        one.map()
        yield one
        existing.clear(mapper)


def _two(others: Others) -> Claim:
    return Claim(name="taken", device=others.data, metadata_device=others.metadata)


@pytest.mark.short
def test_a_pool_of_others_is_served_and_none_of_its_devices_is_given(
    mapper: Mapper, tmp_path: Path, others: Others
) -> None:
    state = str(tmp_path / "state")
    others.make(1, 2, 7)
    with pytest.raises(PoolRefused, match="in use"):
        adopting.adopt(mapper, state, _two(others), soon())
    others.unmap()
    done = adopting.adopt(mapper, state, _two(others), soon())
    assert (done.own, done.quarantined) == (False, 3)
    # All of the device is the pool's, so the keeper is what tells it from others.
    described = backing.load(state)
    assert described is not None
    assert (described.data_bytes, described.keeper_at > 0) == (0, True)
    served = Node(Settings(state_dir=state, size=32 * MIB, limits=Limits(extend_by=0)))
    served.open_pool()
    served.recover()
    assert (served.store.quarantined(), served.store.past) == ([1, 2, 7], "")
    served.snapshots.prepare("k8s.io/1/a", "", {}, soon())
    while served.reaper.round():
        pass
    assert served.pool.ids(soon()) >= {1, 2, 7}
    served.store.close()
    served.mapper.close()
    _becomes_a_snapshot(mapper, state)
    # After a reboot the same device, and no other, is its data.
    _apart(mapper, state)
    with loop_device(tmp_path / "other", 128 * MIB) as other:
        link = tmp_path / "link"
        link.symlink_to(other)
        it = backing.load(state)
        assert it is not None
        import msgspec

        backing.save(state, msgspec.structs.replace(it, data=str(link)))
        with pytest.raises(Exception, match="is not the data device of pool taken: no mark of it begins at byte"):
            assembly.assemble(mapper, state, soon())
        backing.save(state, it)
    assert assembly.assemble(mapper, state, soon())[0].ids(soon()) >= {1, 2, 7}
    _apart(mapper, state)


def _becomes_a_snapshot(mapper: Mapper, state: str) -> None:
    """Device 7 of the others: its content is a layer afterwards."""
    wanted = partial(quarantine.Wanted, device=7, key="k8s.io/9/layer", committed=True)
    for wrong, error, said in (
        (quarantine.Wanted(device=8, key="k"), NotFound, "quarantined device '8'"),
        (quarantine.Wanted(device=7, key=""), BadRequest, "--key"),
        (wanted(key="k8s.io/1/a"), AlreadyExists, "already exists"),
        (wanted(parent="nobody"), NotFound, "nobody"),
        (wanted(parent="k8s.io/1/a"), WrongState, "is not committed"),
    ):
        with pytest.raises(error, match=said):
            quarantine.adopt(mapper, state, wrong, soon())
    row = quarantine.adopt(mapper, state, wanted(), soon())
    assert (row.kind, row.size, row.fstype) == (Kind.COMMITTED, 16 * MIB, "ext4")
    served = Node(Settings(state_dir=state, size=32 * MIB, limits=Limits(extend_by=0)))
    served.open_pool()
    assert served.store.quarantined() == [1, 2]
    with mounted(served.snapshots.prepare("b", "k8s.io/9/layer", {}, soon())) as root:
        assert (root / "f7").read_bytes() == Path(__file__).read_bytes()
    served.store.close()
    served.mapper.close()


def test_a_device_without_a_filesystem_becomes_no_snapshot(lab: Lab, mapper: Mapper) -> None:
    lab.node.mapper.message(lab.name, "create_thin 4000")
    lab.restart()
    wanted = quarantine.Wanted(device=4000, key="a")
    lab.stop()
    with pytest.raises(WrongState, match="device 4000 becomes no snapshot: it holds no filesystem"):
        quarantine.adopt(mapper, lab.state, wanted, soon())
    lab.start()
    assert lab.node.store.quarantined() == [4000]
    assert 4000 not in lab.mapped()


def test_two_files_of_others(mapper: Mapper, tmp_path: Path, others: Others) -> None:
    state = str(tmp_path / "state")
    others.make(3)
    others.unmap()
    for device, name in ((others.data, "data"), (others.metadata, "meta")):
        loops.detach(device, str(tmp_path / name), soon())
    claim = Claim(data=str(tmp_path / "data"), metadata=str(tmp_path / "meta"))
    assert adopting.adopt(mapper, state, claim, soon()).quarantined == 1
    pool, _ = assembly.assemble(mapper, state, soon())
    assert (pool.name, pool.ids(soon())) == ("runvol", {3})
    _apart(mapper, state)


@pytest.mark.parametrize(("option", "name", "how"), [
    ("--data-file", "data", "-o64K"), ("--metadata-file", "meta", "-r"),
    pytest.param("--data-file", "data", "-r", marks=pytest.mark.long),
    pytest.param("--metadata-file", "meta", "-o64K", marks=pytest.mark.long),
])  # fmt: skip
def test_a_file_that_somebody_looks_inside_is_adopted_once_he_lets_it_go(
    mapper: Mapper, tmp_path: Path, others: Others, option: str, name: str, how: str
) -> None:
    """A window shows the file shifted, and a read-only device takes no writes: neither is a part of the pool."""
    others.make(3)
    others.unmap()
    for device, one in ((others.data, "data"), (others.metadata, "meta")):
        loops.detach(device, str(tmp_path / one), soon())
    done = subprocess.run(["losetup", "--show", how, "-f", str(tmp_path / name)], capture_output=True, text=True,
                          check=True)  # fmt: skip
    theirs = done.stdout.strip()
    claim, state = Claim(data=str(tmp_path / "data"), metadata=str(tmp_path / "meta")), str(tmp_path / "state")
    try:
        with pytest.raises(PoolRefused, match=f"{option}: .*{theirs}"):
            adopting.adopt(mapper, state, claim, soon())
        assert not os.path.exists(state) or backing.load(state) is None
    finally:
        subprocess.run(["losetup", "-d", theirs], check=True)
    assert adopting.adopt(mapper, state, claim, soon()).quarantined == 1
    _apart(mapper, state)


def test_a_foreign_device_that_has_the_keepers_id(mapper: Mapper, tmp_path: Path, others: Others) -> None:
    others.make(0)
    others.unmap()
    before = Path(tmp_path / "meta").read_bytes()
    with pytest.raises(PoolRefused, match="device 0 of the pool is somebody else's"):
        adopting.adopt(mapper, str(tmp_path / "state"), _two(others), soon())
    assert Path(tmp_path / "meta").read_bytes() == before
    assert not os.path.exists(tmp_path / "state" / backing.FILE)


def test_what_is_no_pool_is_not_adopted(mapper: Mapper, tmp_path: Path, others: Others) -> None:
    state = str(tmp_path / "state")
    others.make(1)
    others.unmap()
    with loop_device(tmp_path / "blank", 128 * MIB) as blank, loop_device(tmp_path / "short", 64 * MIB) as short:
        for claim, said in (
            (Claim(device=others.data, metadata_device=blank), "does not begin with the metadata of a thin pool"),
            (Claim(device=short, metadata_device=others.metadata), "another pool's"),
            (Claim(device=str(tmp_path / "nothing")), "no block device"),
            (Claim(data=str(tmp_path / "nothing"), metadata=str(tmp_path / "meta")), "does not exist"),
            (Claim(), "exactly one"),
            (Claim(group="vg0", data="x"), "both are needed"),
        ):
            with pytest.raises((PoolRefused, BadRequest), match=said):
                adopting.adopt(mapper, state, claim, soon())
    mapper.establish("user", [Linear(length=8, device=others.data)])
    with pytest.raises(PoolRefused, match="in use"):
        adopting.adopt(mapper, state, _two(others), soon())
    mapper.remove("user")
    _spoil(others.metadata)
    with pytest.raises(PoolRefused, match="do not pass thin_check"):
        adopting.adopt(mapper, state, _two(others), soon())
    assert not os.path.exists(os.path.join(state, backing.FILE))


def _spoil(metadata: str) -> None:
    with open(metadata, "r+b") as opened:
        for at in range(4096, 64 << 10, 4096):
            opened.seek(at)
            opened.write(b"\xff" * 4096)


def test_a_store_of_another_pool_is_in_the_way(lab: Lab, mapper: Mapper, others: Others) -> None:
    lab.prepare("a")
    lab.node.store.write_made()
    lab.stop()
    _apart(mapper, lab.state)
    files = [Path(lab.state, name).read_bytes() for name in (backing.FILE, "pool.made")]
    _lose(lab.state)
    others.make(1)
    others.unmap()
    with pytest.raises(PoolRefused, match="is that of another pool"):
        adopting.adopt(mapper, lab.state, _two(others), soon())
    for name, content in zip((backing.FILE, "pool.made"), files, strict=True):
        Path(lab.state, name).write_bytes(content)
    lab.start()
    assert "a" in lab


def test_a_pool_of_lvms_own_is_refused_with_what_to_do(mapper: Mapper, tmp_path: Path, group: str) -> None:  # noqa: F811
    subprocess.run(["lvcreate", "-q", "-y", "-an", "-Zn", "-T", f"{group}/pool", "-L", "64M"], check=True,
                   capture_output=True)  # fmt: skip
    for data, metadata in (("pool", "pool_tmeta"), ("pool_tdata", "pool_tmeta")):
        claim = Claim(group=group, data=data, metadata=metadata)
        with pytest.raises(PoolRefused, match="LVM would go on changing it.*runvol pool init --vg rv-making"):
            adopting.adopt(mapper, str(tmp_path / "state"), claim, soon())
    with pytest.raises(BadRequest, match="is no logical volume of rv-making"):
        adopting.adopt(mapper, str(tmp_path / "state"), Claim(group=group, data="x", metadata="y"), soon())


def test_an_adoption_that_is_killed_anywhere_is_ended_by_the_same_call(
    mapper: Mapper, tmp_path: Path, others: Others
) -> None:
    others.make(1, 2)
    others.unmap()
    before = Path(tmp_path / "meta").read_bytes()
    for number in range(1, 80):
        with (tmp_path / "meta").open("r+b") as opened:
            opened.write(before)
        subprocess.run(["blockdev", "--flushbufs", others.metadata], check=True)
        state = str(tmp_path / f"state{number}")
        status = in_child(partial(_die_adopting, state, _two(others), number))
        described = backing.load(state) if os.path.isdir(state) else None
        if described is None or not os.path.exists(os.path.join(state, "pool.made")):
            if described is not None:
                with pytest.raises(PoolRefused, match="the adoption of pool taken.* did not end"):
                    assembly.assemble(mapper, state, soon())
            assert adopting.adopt(mapper, state, _two(others), soon()).quarantined == 2
        pool, _ = assembly.assemble(mapper, state, soon())
        assert pool.ids(soon()) == {1, 2}
        with contextlib.closing(Store(os.path.join(state, STORE))) as store:
            assert store.quarantined() == [1, 2]
            assert store.read_fact("generation") == str(pool.status().transaction)
        _apart(mapper, state)
        if status == 0:
            break
    else:
        pytest.fail("too many steps")
    assert number > 10


def _die_adopting(state: str, claim: Claim, number: int) -> None:
    Steps(number).install()
    with Mapper() as mapper:
        adopting.adopt(mapper, state, claim, soon())


def test_the_data_of_one_pool_and_the_metadata_of_another(mapper: Mapper, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        devices = {name: stack.enter_context(loop_device(tmp_path / name, size * MIB))
                   for name, size in (("d1", 128), ("m1", 4), ("d2", 128), ("m2", 4))}  # fmt: skip
        for one in ("1", "2"):
            state = str(tmp_path / f"state{one}")
            wish = Wish(name=f"pool{one}", device=devices[f"d{one}"], metadata_device=devices[f"m{one}"])
            assembly.init(mapper, state, wish, soon())
            served = Node(Settings(state_dir=state, size=32 * MIB, limits=Limits(extend_by=0)))
            served.open_pool()
            served.snapshots.prepare("a", "", {}, soon())
            served.follow()
            served.store.close()
            _apart(mapper, state)
        claim = Claim(device=devices["d1"], metadata_device=devices["m2"])
        with pytest.raises(PoolRefused, match="not data and metadata of one pool"):
            adopting.adopt(mapper, str(tmp_path / "state"), claim, soon())
        assert making.superblock(devices["m2"])
