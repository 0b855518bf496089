"""Device-mapper by ioctl, against the kernel itself."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, loops
from blockdev.devicemapper import DIRECTORY, Events, Mapper, MapperError, make_node, node
from blockdev.dm_targets import Delay, Error, Flakey, Linear, PoolStatus, Thin, ThinPool, ThinStatus, Verity

pytestmark = pytest.mark.short

_SECTORS = 8192


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A loop device of 4 MiB."""
    path = tmp_path / "disk"
    with open(path, "wb") as opened:
        opened.truncate(_SECTORS * 512)
    device = loops.attach(str(path), deadline=Deadline.after(20))
    yield device
    loops.detach(device, str(path), Deadline.after(20))


def _make(mapper: Mapper, name: str, *targets: object, read_only: bool = False) -> str:
    mapper.create(name, f"TEST-{name}")
    mapper.load(name, targets, read_only=read_only)  # type: ignore[arg-type]
    mapper.resume(name)
    return node(name)


def test_versions_and_targets_are_told(mapper: Mapper) -> None:
    assert mapper.version() >= (4, 40, 0)
    assert {"thin-pool", "thin", "linear", "error"} <= mapper.targets().keys()


def test_a_device_is_made_found_listed_renamed_and_removed(mapper: Mapper, disk: str) -> None:
    path = _make(mapper, "rv-one", Linear(length=_SECTORS, device=disk))
    found = mapper.find("rv-one")
    assert found is not None
    assert (found.uuid, found.active, found.suspended, found.open_count) == ("TEST-rv-one", True, False, 0)
    assert os.stat(path).st_rdev == os.makedev(found.major, found.minor)
    assert "rv-one" in {entry.name for entry in mapper.devices()}
    number = os.stat(disk).st_rdev
    assert mapper.dependencies("rv-one") == [f"{os.major(number)}:{os.minor(number)}"]
    kind, line = mapper.lines("rv-one", table=True)[0]
    assert (kind, line.split()[1]) == ("linear", "0")
    mapper.rename("rv-one", "rv-two")
    assert mapper.find("rv-one") is None
    assert not os.path.exists(path)
    mapper.remove("rv-two")
    assert not os.path.exists(node("rv-two"))


@pytest.mark.parametrize("name", ["", "a/b", "n" * 128])
def test_a_name_that_the_kernel_would_change_is_refused(mapper: Mapper, name: str) -> None:
    with pytest.raises(MapperError) as refused:
        mapper.create(name)
    assert refused.value.errno == errno.ENAMETOOLONG


def test_errors_have_the_kernels_errno(mapper: Mapper, disk: str) -> None:
    assert mapper.find("rv-none") is None
    for call, number in (
        (lambda: mapper.resume("rv-none"), errno.ENXIO),
        (lambda: mapper.remove("rv-none"), errno.ENXIO),
        (lambda: mapper.pool_status("rv-none"), errno.ENXIO),
    ):
        with pytest.raises(MapperError) as refused:
            call()
        assert refused.value.errno == number
        assert "rv-none" in str(refused.value)
    _make(mapper, "rv-one", Linear(length=_SECTORS, device=disk))
    with pytest.raises(MapperError) as refused:
        mapper.create("rv-one")
    assert refused.value.errno == errno.EBUSY
    with pytest.raises(MapperError) as refused:
        mapper.load("rv-one", [Linear(length=_SECTORS, device="/dev/nothing-there")])
    assert refused.value.errno in (errno.ENOENT, errno.EINVAL, errno.ENODEV)
    with open(node("rv-one"), "rb"):
        with pytest.raises(MapperError) as refused:
            mapper.remove("rv-one")
        assert refused.value.errno == errno.EBUSY
        mapper.remove("rv-one", deferred=True)
        assert mapper.find("rv-one").removal_waits  # type: ignore[union-attr]
    # The kernel removes it behind its last close.
    Deadline.after(10).poll("the removal", lambda: mapper.find("rv-one") is None)


def test_several_targets_and_their_lines(mapper: Mapper, disk: str) -> None:
    _make(mapper, "rv-two", Linear(length=100, device=disk, offset=8), Error(length=28))
    assert [kind for kind, _ in mapper.lines("rv-two", table=True)] == ["linear", "error"]
    with open(node("rv-two"), "rb", buffering=0) as opened:
        assert len(os.pread(opened.fileno(), 4096, 0)) == 4096
        with pytest.raises(OSError, match="Input/output"):
            os.pread(opened.fileno(), 4096, 13 * 4096)
    mapper.remove("rv-two")


def test_a_read_only_table_refuses_writes(mapper: Mapper, disk: str) -> None:
    path = _make(mapper, "rv-ro", Linear(length=_SECTORS, device=disk), read_only=True)
    assert mapper.find("rv-ro").read_only  # type: ignore[union-attr]
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x" * 512, 0)
    finally:
        os.close(fd)
    mapper.remove("rv-ro")


def test_an_old_node_of_another_device_is_replaced(mapper: Mapper, disk: str) -> None:
    os.mknod(node("rv-one"), 0o600 | 0o060000, os.makedev(1, 0))
    _make(mapper, "rv-one", Linear(length=_SECTORS, device=disk))
    device = mapper.find("rv-one")
    assert device is not None
    assert os.stat(node("rv-one")).st_rdev == os.makedev(device.major, device.minor)
    make_node(device)
    mapper.remove("rv-one")
    assert not [name for name in os.listdir(DIRECTORY) if name.startswith("rv-")]


def test_a_slow_suspend_does_not_stop_the_other_threads(mapper: Mapper, disk: str) -> None:
    below = _make(mapper, "rv-delay", Delay(length=_SECTORS, device=disk, milliseconds=1500))
    path = _make(mapper, "rv-slow", Linear(length=_SECTORS, device=below))
    writer = threading.Thread(target=_write, args=(path,))
    writer.start()
    time.sleep(0.2)
    started = time.monotonic()
    suspender = threading.Thread(target=mapper.suspend, args=("rv-slow",))
    suspender.start()
    turns = 0
    while suspender.is_alive():
        time.sleep(0.01)
        turns += 1
    assert time.monotonic() - started > 0.5
    assert turns > 20, "the interpreter stood still while the kernel waited"
    mapper.resume("rv-slow")
    writer.join()
    mapper.remove("rv-slow")
    mapper.remove("rv-delay")


def _write(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_SYNC)
    os.pwrite(fd, b"x" * 4096, 0)
    os.close(fd)


def test_flakey_and_delay_tables_load(mapper: Mapper, disk: str) -> None:
    _make(mapper, "rv-flakey", Flakey(length=_SECTORS, device=disk, up=1, down=1, features=("error_writes",)))
    assert "error_writes" in mapper.lines("rv-flakey", table=True)[0][1]
    mapper.remove("rv-flakey")


def test_verity_reads_what_is_right_and_refuses_what_is_not(mapper: Mapper, tmp_path: Path) -> None:
    """One data block and its hash block: the smallest tree."""
    data, hashes = os.urandom(4096) + os.urandom(4096), b""
    digests = [hashlib.sha256(data[at : at + 4096]).digest() for at in (0, 4096)]
    hashes = b"".join(digests).ljust(4096, b"\0")
    root = hashlib.sha256(hashes).hexdigest()
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "hashes").write_bytes(hashes)
    loop = {part: loops.attach(str(tmp_path / part), deadline=Deadline.after(20)) for part in ("data", "hashes")}
    table = Verity(length=16, data=loop["data"], hashes=loop["hashes"], data_blocks=2, hash_start=0, root=root, salt="")
    path = _make(mapper, "rv-verity", table, read_only=True)
    fd = os.open(path, os.O_RDONLY)
    assert os.pread(fd, 8192, 0) == data
    os.close(fd)
    mapper.remove("rv-verity")
    with open(loop["data"], "r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), b"changed", 4096)
        os.fsync(opened.fileno())
    path = _make(mapper, "rv-verity", table, read_only=True)
    fd = os.open(path, os.O_RDONLY)
    assert os.pread(fd, 4096, 0) == data[:4096]
    with pytest.raises(OSError, match="Input/output"):
        os.pread(fd, 4096, 4096)
    os.close(fd)
    mapper.remove("rv-verity")
    for part, device in loop.items():
        loops.detach(device, str(tmp_path / part), Deadline.after(20))


@pytest.fixture
def pool(mapper: Mapper, tmp_path: Path) -> Iterator[str]:
    devices = {}
    for part, size in (("meta", 4 << 20), ("data", 64 << 20)):
        with open(tmp_path / part, "wb") as opened:
            opened.truncate(size)
        devices[part] = loops.attach(str(tmp_path / part), deadline=Deadline.after(20))
    _make(mapper, "rv-pool",
          ThinPool(length=131072, metadata=devices["meta"], data=devices["data"], block=128, low_water=512))  # fmt: skip
    yield "rv-pool"
    mapper.remove("rv-pool")
    for part, device in devices.items():
        loops.detach(device, str(tmp_path / part), Deadline.after(20))


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("create_thin 1", errno.EEXIST),
        ("create_thin 16777216", errno.EINVAL),
        ("create_snap 2 77", errno.ENODATA),
        ("delete 77", errno.ENODATA),
        ("set_transaction_id 5 6", errno.EINVAL),
        ("release_metadata_snap", errno.EINVAL),
        ("what is this", errno.EINVAL),
    ],
)
def test_messages_are_refused_with_their_errno(mapper: Mapper, pool: str, message: str, number: int) -> None:
    mapper.message(pool, "create_thin 1")
    with pytest.raises(MapperError) as refused:
        mapper.message(pool, message)
    assert refused.value.errno == number


def test_a_pool_event_wakes_a_waiter(mapper: Mapper, pool: str) -> None:
    """Free data falls to the low water mark once."""
    events = Events()
    while events.wait(0):
        pass
    mapper.message(pool, "create_thin 1")
    path = _make(mapper, "rv-thin", Thin(length=131072, pool=node(pool), thin_id=1))
    before = mapper.find(pool).event  # type: ignore[union-attr]
    with open(path, "r+b", buffering=0) as opened:
        opened.write(b"x" * (40 << 20))
        os.fsync(opened.fileno())
    assert events.wait(10)
    assert mapper.find(pool).event > before  # type: ignore[union-attr]
    assert mapper.thin_status("rv-thin") == ThinStatus(mapped=81920, highest=81919)
    assert mapper.pool_status(pool).data_used == 640
    mapper.remove("rv-thin")
    events.close()


def test_status_lines_are_parsed_as_the_kernel_writes_them() -> None:
    line = "7 214/2048 4/1024 - rw no_discard_passdown queue_if_no_space - 512"
    assert PoolStatus.parse(line) == PoolStatus(
        mode="rw", transaction=7, metadata_used=214, metadata_total=2048, data_used=4, data_total=1024,
        queues=True, discard="no_discard_passdown",
    )  # fmt: skip
    held = PoolStatus.parse("0 1/2 3/4 77 out_of_data_space discard_passdown error_if_no_space needs_check 9")
    assert held.held_root
    assert held.needs_check
    assert not held.queues
    assert PoolStatus.parse("Fail").mode == "fail"
    assert ThinStatus.parse("0 -").highest is None
    for bad in ("", "1 2 3"):
        with pytest.raises(ValueError, match="no status"):
            PoolStatus.parse(bad)
