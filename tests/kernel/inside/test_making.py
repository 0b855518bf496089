"""What `runvol pool init` writes on, and above all what it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from blockdev import loops
from blockdev.devicemapper import Mapper
from blockdev.dm_targets import SECTOR, Error, Linear, Thin
from blockdev.errors import NotBlank
from snapshotter import assembly, backing, making
from snapshotter.assembly import Wish
from snapshotter.errors import PoolRefused
from tests.kernel.inside.killpoints import Steps
from tests.kernel.inside.lab import MIB, Lab, in_child, mounted, soon
from tests.kernel.inside.test_pool import _apart, loop_device

GROUP = "rv-making"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def state(tmp_path: Path) -> str:
    return str(tmp_path / "state")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "disk", 256 * MIB) as device:
        yield device


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "pv", 512 * MIB) as device:
        _run("vgcreate", "-q", GROUP, device)
        yield GROUP
        _run("vgremove", "-q", "-f", GROUP)


def _filesystem(device: str) -> bytes:
    """Somebody's data; what proves that it is whole."""
    _run("mkfs.ext4", "-q", "-F", device)
    with open(device, "rb") as opened:
        return opened.read(MIB)


def _is_whole(device: str, before: bytes) -> None:
    with open(device, "rb") as opened:
        assert opened.read(MIB) == before


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [5 * MIB, 101 * MIB, 200 * MIB])
def test_data_anywhere_on_a_device_is_seen(mapper: Mapper, state: str, disk: str, where: int) -> None:
    with open(disk, "r+b") as opened:
        opened.seek(where)
        opened.write(b"x" * 512)
    with pytest.raises(NotBlank, match="data near byte"):
        assembly.init(mapper, state, Wish(name="whole", device=disk), soon())
    assert not os.path.exists(os.path.join(state, backing.FILE))


def test_a_pools_device_is_no_blank_one_once_its_state_is_lost(mapper: Mapper, state: str, disk: str) -> None:
    pool = assembly.init(mapper, state, Wish(name="whole", device=disk), soon())
    pool.create_thin(1)
    _apart(mapper, state)
    shutil.rmtree(state)
    with pytest.raises(NotBlank, match="the metadata of a thin pool"):
        assembly.init(mapper, state, Wish(name="whole", device=disk), soon())


@pytest.mark.parametrize("user", ["a mapping", "a loop device", "an open mapping of its whole length"])
def test_a_device_that_something_stands_on_is_refused(mapper: Mapper, state: str, disk: str, user: str) -> None:
    above = ""
    if user == "a loop device":
        above = _run("losetup", "--show", "-f", "-o", str(64 * MIB), disk).strip()
    else:
        mapper.establish("somebody", [Linear(length=8 if user == "a mapping" else 256 * MIB // SECTOR, device=disk)])
    try:
        with pytest.raises(PoolRefused, match="in use"):
            assembly.init(mapper, state, Wish(name="whole", device=disk), soon())
    finally:
        if above:
            _run("losetup", "-d", above)
        else:
            mapper.remove("somebody")
    assert not os.path.exists(os.path.join(state, backing.FILE))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(["pvcreate", "-q", "-y", "-ff"], id="LVM"),
        pytest.param(["mkswap"], id="swap"),
        pytest.param(["sh", "-c", "echo size=20000 | sfdisk -q $0"], id="partition table"),
        pytest.param(["sh", "-c", "echo label:gpt | sfdisk -q $0"], id="empty partition table"),
    ],
)
def test_a_device_that_others_have_signed_is_refused(mapper: Mapper, state: str, disk: str, make: list[str]) -> None:
    _run(*make, disk)
    with pytest.raises((NotBlank, PoolRefused)):
        assembly.init(mapper, state, Wish(name="whole", device=disk), soon())
    assert not os.path.exists(os.path.join(state, backing.FILE))


@pytest.mark.parametrize("name", ["whole", "whole-meta", "whole-data"])
def test_a_mapped_device_of_the_name_is_found_before_anything_is_written(
    mapper: Mapper, state: str, disk: str, tmp_path: Path, name: str
) -> None:
    """A volume group `whole` with a volume `data` is one."""
    mapper.establish(name, [Error(length=8)], uuid="SOMEBODY")
    with pytest.raises(PoolRefused, match=f"a mapped device {name} exists"):
        assembly.init(mapper, state, Wish(name="whole", device=disk), soon())
    assert mapper.lines(name, table=True) == [("error", "")]
    mapper.remove(name)
    # And nothing is described that a later call with other arguments would go on with.
    before = _filesystem(disk)
    assembly.init(mapper, state, Wish(name="other", directory=str(tmp_path / "pool"), size=64 * MIB), soon())
    _is_whole(disk, before)
    _apart(mapper, state)


def _killed_after_the_description(mapper: Mapper, state: str, wish: Wish) -> None:
    os.makedirs(state, exist_ok=True)
    backing.save(state, making.describe(wish, soon()))


def test_a_device_that_somebody_took_since_an_init_was_killed_is_refused(mapper: Mapper, state: str, disk: str) -> None:
    wish = Wish(name="whole", device=disk)
    _killed_after_the_description(mapper, state, wish)
    before = _filesystem(disk)
    with pytest.raises(NotBlank, match="ext4"):
        assembly.init(mapper, state, wish, soon())
    _is_whole(disk, before)


def test_a_device_that_somebody_has_mapped_since_is_refused(mapper: Mapper, state: str, disk: str) -> None:
    wish = Wish(name="whole", device=disk)
    _killed_after_the_description(mapper, state, wish)
    mapper.establish("somebody", [Linear(length=8, device=disk)])
    with pytest.raises(PoolRefused, match="in use"):
        assembly.init(mapper, state, wish, soon())
    mapper.remove("somebody")
    assembly.init(mapper, state, wish, soon())
    _apart(mapper, state)


def test_the_second_device_too(mapper: Mapper, state: str, disk: str, tmp_path: Path) -> None:
    with loop_device(tmp_path / "meta", 8 * MIB) as metadata:
        wish = Wish(name="two", device=disk, metadata_device=metadata)
        _killed_after_the_description(mapper, state, wish)
        before = _filesystem(metadata)
        with pytest.raises(NotBlank, match="ext4"):
            assembly.init(mapper, state, wish, soon())
        _is_whole(metadata, before)
        with open(metadata, "r+b") as opened:
            opened.write(bytes(8 * MIB))
        before = _filesystem(disk)
        with pytest.raises(NotBlank, match="ext4"):
            assembly.init(mapper, state, wish, soon())
        _is_whole(disk, before)


def _other(wish: Wish, tmp_path: Path) -> dict[str, Wish]:
    there = {"directory": wish.directory, "size": wish.size, "metadata_size": wish.metadata_size}
    return {
        "--pool": Wish(name="another", **there),  # type: ignore[arg-type]
        "--block-size": Wish(name=wish.name, block=128 << 10, **there),  # type: ignore[arg-type]
        "--metadata-size": Wish(name=wish.name, directory=wish.directory, size=wish.size, metadata_size=12 * MIB),
        "--size": Wish(name=wish.name, directory=wish.directory, size=96 * MIB, metadata_size=wish.metadata_size),
        "--loop": Wish(name=wish.name, directory=str(tmp_path / "elsewhere"), size=wish.size),
        "--vg": Wish(name=wish.name, group="vg0", size=wish.size),
        "--device": Wish(name=wish.name, device="/dev/ubda"),
    }


@pytest.mark.parametrize(
    "option", ["--pool", "--block-size", "--metadata-size", "--size", "--loop", "--vg", "--device"]
)
def test_other_arguments_than_an_interrupted_inits_are_refused(
    mapper: Mapper, state: str, tmp_path: Path, option: str
) -> None:
    wish = Wish(name="looped", directory=str(tmp_path / "pool"), size=64 * MIB, metadata_size=8 * MIB)
    _killed_after_the_description(mapper, state, wish)
    description = backing.load(state)
    assert description is not None
    if option != "--size":
        # Nothing stands yet.
        with pytest.raises(PoolRefused, match=option):
            assembly.init(mapper, state, _other(wish, tmp_path)[option], soon())
    making.Maker(backing.Backing(mapper, state, description), wish, soon()).make(fresh=True)
    with pytest.raises(PoolRefused, match=option):
        assembly.init(mapper, state, _other(wish, tmp_path)[option], soon())
    assembly.init(mapper, state, wish, soon())
    _apart(mapper, state)


def test_an_init_that_made_nothing_does_not_bind_the_next_one(mapper: Mapper, state: str, group: str) -> None:
    with pytest.raises(Exception, match="lvcreate"):
        assembly.init(
            mapper, state, Wish(name="lvmpool", group=group, size=4096 * MIB, metadata_size=4096 * MIB), soon()
        )
    pool = assembly.init(mapper, state, Wish(name="lvmpool", group=group, size=128 * MIB), soon())
    assert pool.status().data_used == 0
    _apart(mapper, state)


# -- logical volumes --------------------------------------------------------------------------------------------------


def _volume(group: str, name: str, megabytes: int) -> str:
    _run("lvcreate", "-q", "-y", "-Wn", "-Zn", "-an", "-n", name, "-L", f"{megabytes}M", group)
    _run("lvchange", "-ay", "-K", f"{group}/{name}")
    _run("vgmknodes", group)
    return f"/dev/mapper/{group.replace('-', '--')}-{name}"


@pytest.mark.short
@pytest.mark.parametrize("name", ["lvmpool_data", "lvmpool_meta"])
@pytest.mark.parametrize("described", [False, True], ids=["by a first init", "by an init that goes on"])
def test_a_logical_volume_that_init_did_not_make_is_not_taken(
    mapper: Mapper, state: str, group: str, name: str, described: bool
) -> None:
    wish = Wish(name="lvmpool", group=group, size=128 * MIB)
    if described:
        _killed_after_the_description(mapper, state, wish)
    device = _volume(group, name, 128)
    before = _filesystem(device)
    with pytest.raises(PoolRefused, match=f"{group}/{name} exists already"):
        assembly.init(mapper, state, wish, soon())
    _is_whole(device, before)
    assert os.path.exists(os.path.join(state, backing.FILE)) is described
    _run("vgchange", "-q", "-an", group)


def test_a_pool_of_volumes_survives_the_loss_of_its_state(mapper: Mapper, state: str, group: str) -> None:
    wish = Wish(name="lvmpool", group=group, size=128 * MIB)
    pool = assembly.init(mapper, state, wish, soon())
    pool.create_thin(1)
    _apart(mapper, state)
    kept = Path(state, backing.FILE).read_bytes()
    shutil.rmtree(state)
    with pytest.raises(PoolRefused, match="exists already"):
        assembly.init(mapper, state, wish, soon())
    os.makedirs(state, exist_ok=True)
    Path(state, backing.FILE).write_bytes(kept)
    assert assembly.assemble(mapper, state, soon())[0].ids(soon()) == {1}
    _apart(mapper, state)


def test_what_lay_in_a_group_before_is_not_taken_for_a_pool(mapper: Mapper, state: str, group: str) -> None:
    """The new volume lies where an older pool's metadata were."""
    wish = Wish(name="lvmpool", group=group, size=128 * MIB)
    for _ in range(2):
        pool = assembly.init(mapper, state, wish, soon())
        assert pool.ids(soon()) == set()
        pool.create_thin(1)
        _apart(mapper, state)
        shutil.rmtree(state)
        _run("lvremove", "-q", "-f", group)


def test_making_a_pool_of_volumes_is_finished_by_the_same_call(mapper: Mapper, tmp_path: Path, group: str) -> None:
    wish = Wish(name="lvmpool", group=group, size=64 * MIB)
    for number in range(1, 60):
        state = str(tmp_path / f"state{number}")
        status = in_child(partial(_die_making, state, wish, number))
        if not os.path.exists(os.path.join(state, "pool.made")):
            assembly.init(mapper, state, wish, soon())
        pool, _ = assembly.assemble(mapper, state, soon())
        assert (pool.ids(soon()), pool.status().transaction > 0) == (set(), True)
        _apart(mapper, state)
        _run("lvremove", "-q", "-f", group)
        if status == 0:
            break
    else:
        pytest.fail("too many steps")
    assert number > 4


def test_making_a_pool_of_devices_is_finished_by_the_same_call(mapper: Mapper, tmp_path: Path) -> None:
    for number in range(1, 60):
        state = str(tmp_path / f"state{number}")
        with loop_device(tmp_path / "data", 128 * MIB) as data, loop_device(tmp_path / "meta", 4 * MIB) as metadata:
            wish = Wish(name="two", device=data, metadata_device="" if number % 2 else metadata)
            status = in_child(partial(_die_making, state, wish, number))
            if not os.path.exists(os.path.join(state, "pool.made")):
                assembly.init(mapper, state, wish, soon())
            pool, _ = assembly.assemble(mapper, state, soon())
            assert pool.ids(soon()) == set()
            _apart(mapper, state)
        if status == 0:
            break
    else:
        pytest.fail("too many steps")
    assert number > 4


def _die_making(state: str, wish: Wish, number: int) -> None:
    Steps(number).install()
    with Mapper() as mapper:
        assembly.init(mapper, state, wish, soon())


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["looped.data", "looped.metadata"])
@pytest.mark.parametrize("described", [False, True], ids=["by a first init", "by an init that goes on"])
def test_a_file_that_init_did_not_make_is_not_taken(
    mapper: Mapper, state: str, tmp_path: Path, name: str, described: bool
) -> None:
    wish = Wish(name="looped", directory=str(tmp_path / "pool"), size=64 * MIB, metadata_size=64 * MIB)
    if described:
        _killed_after_the_description(mapper, state, wish)
    file = tmp_path / "pool" / name
    file.parent.mkdir()
    file.write_bytes(b"\0" * MIB + b"somebody's" + b"\0" * (63 * MIB - 10))
    before = file.read_bytes()
    with pytest.raises((PoolRefused, NotBlank)):
        assembly.init(mapper, state, wish, soon())
    assert file.read_bytes() == before


def test_a_link_is_not_followed(mapper: Mapper, state: str, tmp_path: Path) -> None:
    wish = Wish(name="looped", directory=str(tmp_path / "pool"), size=64 * MIB, metadata_size=8 * MIB)
    _killed_after_the_description(mapper, state, wish)
    (tmp_path / "pool").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "pool" / "looped.data").symlink_to(tmp_path / "empty")
    with pytest.raises(PoolRefused, match="exists already"):
        assembly.init(mapper, state, wish, soon())
    assert (tmp_path / "empty").stat().st_size == 0


# -- a lost mark ------------------------------------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize("how", ["the server", "the same init"])
def test_a_pool_whose_mark_is_lost_is_recognised_by_its_superblock(
    lab: Lab, mapper: Mapper, how: str, tmp_path: Path
) -> None:
    with mounted(lab.prepare("a")) as root:
        (root / "f").write_bytes(b"precious")
    lab.stop()
    _apart(mapper, lab.state)
    os.unlink(os.path.join(lab.state, "pool.made"))
    if how == "the same init":
        with pytest.raises(PoolRefused, match="already has pool"):
            assembly.init(mapper, lab.state, Wish(name="x", directory=str(tmp_path / "x"), size=64 * MIB), soon())
        os.unlink(os.path.join(lab.state, "pool.made"))
        Lab.make_pool(lab.directory)
    lab.start()
    with mounted(lab.mounts("a")) as root:
        assert (root / "f").read_bytes() == b"precious"
    assert os.path.exists(os.path.join(lab.state, "pool.made"))
    assert not lab.leaks()


def test_a_mark_that_is_lost_while_the_pool_is_mapped(lab: Lab) -> None:
    lab.prepare("a")
    os.unlink(os.path.join(lab.state, "pool.made"))
    lab.restart()
    assert lab.mounts("a")


def test_a_making_that_did_not_end_is_called_so(mapper: Mapper, state: str, tmp_path: Path) -> None:
    wish = Wish(name="looped", directory=str(tmp_path / "pool"), size=64 * MIB)
    _killed_after_the_description(mapper, state, wish)
    description = backing.load(state)
    assert description is not None
    making.Maker(backing.Backing(mapper, state, description), wish, soon()).make(fresh=True)
    with pytest.raises(PoolRefused, match="did not end: repeat `runvol pool init`"):
        assembly.assemble(mapper, state, soon())
    assert mapper.find("looped") is None
    assert not loops.find(description.metadata)


def test_a_thin_pool_of_somebody_elses_is_not_taken_over(mapper: Mapper, state: str, tmp_path: Path) -> None:
    """With a transaction id of 0, as one that was made by hand has."""
    wish = Wish(name="looped", directory=str(tmp_path / "pool"), size=64 * MIB, metadata_size=8 * MIB)
    _killed_after_the_description(mapper, state, wish)
    description = backing.load(state)
    assert description is not None
    below = backing.Backing(mapper, state, description)
    making.Maker(below, wish, soon()).make(fresh=True)
    metadata, data = below.attach(soon())
    mapper.establish("byhand", [below.table(metadata, data)])
    mapper.message("byhand", "create_thin 1")
    number = mapper.find("byhand").number  # type: ignore[union-attr]
    mapper.establish("byhand-1", [Thin(length=8 * MIB // SECTOR, pool=number, thin_id=1)])
    with open("/dev/mapper/byhand-1", "r+b") as opened:
        opened.write(b"data")
    mapper.remove("byhand-1")
    mapper.remove("byhand")
    below.detach(soon())
    with pytest.raises(PoolRefused, match="is not what `runvol pool init` makes"):
        assembly.init(mapper, state, wish, soon())
    assert mapper.find("looped") is None
