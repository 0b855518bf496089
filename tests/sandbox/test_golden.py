"""The double against what a running Kata 4.1.0 was seen to do, field by field."""

from __future__ import annotations

import base64
import re
import shutil

import pytest

from blockdev import Deadline, loops
from tests.sandbox.shim import GO, RUST, ContainerFailed, Sandbox, SandboxFailed, Settings, volume_mount

pytestmark = [pytest.mark.guest, pytest.mark.kernel]

BLK = {"block_device_driver": "virtio-blk"}
STORAGE = "/run/kata-containers/sandbox/storage"


def normal(commands):
    """QMP commands with the 16 random hexadecimal digits taken out."""
    kept = [
        (name, arguments)
        for name, arguments in commands
        if name in ("blockdev-add", "device_add", "device_del", "blockdev-del")
    ]
    return [
        (
            name,
            {
                key: re.sub(r"[0-9a-f]{16}", "<…>", value) if isinstance(value, str) else value
                for key, value in arguments.items()
            },
        )
        for name, arguments in kept
    ]


def storage_of(bench):
    (storage,) = bench.sandbox.storages
    assert list(storage.driver_options) == [] and not storage.shared
    group = (storage.fs_group.group_id, storage.fs_group.group_change_policy) if storage.HasField("fs_group") else None
    return storage.driver, storage.source, storage.fstype, list(storage.options), storage.mount_point, group


def run(bench, name, script):
    code, output = bench.sandbox.run(name, "sh", "-c", script)
    assert code == 0, output
    return output


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_loop_device_by_virtio_scsi(bench, fstype):
    image = bench.image(fstype)
    device = loops.attach(str(image), deadline=Deadline.after(10))
    try:
        name = bench.with_volume(bench.hand_over(device, fstype))
        assert storage_of(bench) == ("scsi", "0:0", fstype, ["rw"], f"{STORAGE}/MDow", None)
        bench.sandbox.remove_container(name)
    finally:
        loops.detach(device, str(image), Deadline.after(10))
    assert normal(bench.sandbox.vm.commands) == [
        ("blockdev-add", {"driver": "raw", "file": {"aio": "threads", "driver": "host_device", "filename": device}, "node-name": "drive-<…>", "read-only": False}),
        ("device_add", {"driver": "scsi-hd", "bus": "scsi0.0", "drive": "drive-<…>", "id": "virtio-drive-<…>", "scsi-id": 0, "lun": 0, "share-rw": True}),
        ("device_del", {"id": "virtio-drive-<…>"}),
        ("blockdev-del", {"node-name": "drive-<…>"}),
    ]  # fmt: skip


@pytest.mark.parametrize("bench", [BLK], indirect=True)
def test_virtio_blk_behind_the_bridge(bench):
    image = bench.image()
    name = bench.with_volume(bench.hand_over(image))
    assert storage_of(bench) == ("blk", "02/01", "ext4", ["rw"], f"{STORAGE}/MDIvMDE=", None)
    (_, add) = normal(bench.sandbox.vm.commands)[:2]
    assert add == ("device_add", {"driver": "virtio-blk-pci", "bus": "pci-bridge-0", "addr": "01", "drive": "drive-<…>", "id": "virtio-drive-<…>",
                                  "num-queues": 1, "romfile": "", "share-rw": True})  # fmt: skip
    assert "/dev/vda" in run(bench, name, "grep /mnt/data /proc/self/mountinfo")


def test_a_plain_file_has_the_file_driver(bench):
    bench.with_volume(bench.hand_over(bench.image()))
    assert normal(bench.sandbox.vm.commands)[0][1]["file"]["driver"] == "file"
    assert storage_of(bench)[:4] == ("scsi", "0:0", "ext4", ["rw"])


def test_mount_info_ro_is_a_read_only_disk_and_mount(bench):
    name = bench.with_volume(bench.hand_over(bench.image(), read_only=True))
    assert storage_of(bench) == ("scsi", "0:0", "ext4", ["ro"], f"{STORAGE}/MDow", None)
    assert normal(bench.sandbox.vm.commands)[0][1]["read-only"] is True
    code, output = bench.sandbox.run(name, "touch", "/mnt/data/x")
    assert code != 0 and "Read-only" in output


def test_metadata_fs_group_reaches_the_agent(bench):
    """Ours never writes it (the Rust shim would drop it), but the double must do with it what Kata does."""
    target = bench.hand_over(bench.image())
    (place,) = (bench.place / "direct-volumes").iterdir()
    text = (place / "mountInfo.json").read_text()
    (place / "mountInfo.json").write_text(
        text.replace('"metadata":{}', '"metadata":{"fsGroup":"2000","fsGroupChangePolicy":"Always"}')
    )
    name = bench.with_volume(target)
    assert storage_of(bench)[5] == (2000, 0)
    assert run(bench, name, "stat -c '%g %a' /mnt/data").split()[0] == "2000"


@pytest.mark.parametrize("bench", [{"disable_block_device_use": True}], indirect=True)
def test_a_go_shim_without_block_devices_shares_what_is_at_the_target(bench, soon):
    """With the placeholder there, the pod fails to write; nothing reaches the host's disk or the volume."""
    from blockdev import mounts
    from guestmount import placeholder

    image = bench.image()
    before = image.read_bytes()
    target = bench.hand_over(image)
    placeholder.be_placed(target, soon)
    name = bench.with_volume(target)
    assert bench.sandbox.storages == [] and "Block device not supported" in bench.sandbox.log
    code, output = bench.sandbox.run(name, "touch", "/mnt/data/x")
    assert code != 0 and "Read-only" in output
    assert "runvol doctor" in run(bench, name, "cat /mnt/data/RUNVOL-PLACEHOLDER")
    bench.sandbox.remove_container(name)
    bench.sandbox.destroy()
    mounts.be_unmounted(target, soon)
    assert image.read_bytes() == before


@pytest.mark.parametrize("bench", [{"disable_block_device_use": True}], indirect=True)
def test_without_the_placeholder_the_data_would_land_on_the_host(bench):
    """The trap that the placeholder is for, as it was observed."""
    target = bench.hand_over(bench.image())
    name = bench.with_volume(target)
    run(bench, name, "echo lost > /mnt/data/file")
    assert (bench.target() / "file").read_text() == "lost\n"


@pytest.mark.parametrize("change", ["trailing slash", "subdirectory", "link"])
def test_a_source_that_is_not_the_key_byte_for_byte_falls_back_to_sharing(bench, change):
    target = bench.hand_over(bench.image())
    (bench.target() / "sub").mkdir()
    (bench.place / "link").symlink_to(target)
    source = {"trailing slash": f"{target}/", "subdirectory": f"{target}/sub", "link": str(bench.place / "link")}[
        change
    ]
    bench.with_volume(source)
    assert bench.sandbox.storages == []


def test_malformed_json_starts_the_container_on_a_share_with_go_and_fails_with_rust(bench):
    target = bench.hand_over(bench.image())
    (place,) = (bench.place / "direct-volumes").iterdir()
    (place / "mountInfo.json").write_text('{"volume-type": "directvol", ')
    bench.with_volume(target)
    assert bench.sandbox.storages == [] and any("could not read mountInfo" in line for line in bench.sandbox.log)


def test_a_missing_device_fails_the_container(bench):
    target = bench.hand_over("/nowhere/volume.img")
    with pytest.raises(ContainerFailed, match="No such file or directory"):
        bench.with_volume(target)


def test_a_wrong_fstype_fails_the_container_and_the_device_is_unplugged(bench):
    image = bench.image("ext4")
    target = bench.hand_over(image, "xfs")
    with pytest.raises(ContainerFailed, match="Invalid argument|failed to mount"):
        bench.with_volume(target)
    assert bench.sandbox.drives == {}
    from blockdev import exclusivity

    assert exclusivity.is_free(str(image))


def test_two_containers_of_a_pod_share_the_guests_mount_with_go(bench):
    target = bench.hand_over(bench.image())
    first, second = bench.with_volume(target), bench.with_volume(target)
    run(bench, first, "echo shared > /mnt/data/file && sync")
    assert run(bench, second, "cat /mnt/data/file") == "shared\n"
    assert [name for name, _ in normal(bench.sandbox.vm.commands)].count("device_add") == 1
    bench.sandbox.remove_container(first)
    assert run(bench, second, "cat /mnt/data/file") == "shared\n"


def test_after_the_container_kata_leaves_its_files_and_our_withdrawal_takes_them(bench):
    target = bench.hand_over(bench.image())
    bench.sandbox.remove_container(bench.with_volume(target))
    (place,) = (bench.place / "direct-volumes").iterdir()
    assert sorted(path.name for path in place.iterdir()) == sorted(["mountInfo.json", bench.sandbox.sandbox_id])
    bench.dialect.withdraw(target)
    assert list((bench.place / "direct-volumes").iterdir()) == []


def test_statistics_and_resize_are_as_katas_agent_answers(bench):
    from guestmount import ttrpc
    from google.protobuf.empty_pb2 import Empty
    from runvol_proto import kata_agent_pb2

    bench.with_volume(bench.hand_over(bench.image()))
    answer = bench.sandbox.volume_stats(bench.sandbox.storages[0].mount_point)
    assert answer.volume_condition.message == "OK" and [one.unit for one in answer.usage] == [1, 2]
    assert answer.usage[0].available + answer.usage[0].used == answer.usage[0].total
    with pytest.raises(ttrpc.RpcError, match="resize_volume is not implemented in kata-agent") as caught:
        bench.sandbox.call("ResizeVolume", kata_agent_pb2.ResizeVolumeRequest(volume_guest_path="/x", size=1), Empty)
    assert caught.value.code == ttrpc.UNIMPLEMENTED


# -- the Rust shim, where it differs

RUST_SHIM = {"shim": RUST}


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_rust_mounts_once_a_container_and_leaves_no_id(bench):
    target = bench.hand_over(bench.image(), options=("noatime",))
    first = bench.with_volume(target)
    one = bench.sandbox.storages[0].mount_point
    second = bench.with_volume(target)
    two = bench.sandbox.storages[0].mount_point
    assert one != two and re.search(r"/passthrough/[0-9a-f]{10}-[0-9a-f]{8}-data$", one)
    run(bench, first, "echo both > /mnt/data/file && sync")
    assert "both" in run(bench, second, "cat /mnt/data/file")
    assert "noatime" in run(bench, second, "grep /mnt/data /proc/self/mountinfo")
    (place,) = (bench.place / "direct-volumes").iterdir()
    assert [path.name for path in place.iterdir()] == ["mountInfo.json"]


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_rust_makes_the_disk_read_only_for_a_read_only_container(bench):
    name = bench.with_volume(bench.hand_over(bench.image()), read_only=True)
    assert normal(bench.sandbox.vm.commands)[0][1]["read-only"] is True
    assert storage_of(bench)[3] == ["rw", "ro"]
    code, output = bench.sandbox.run(name, "touch", "/mnt/data/x")
    assert code != 0 and "Read-only" in output


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_rust_fails_read_only_after_read_write_which_preflight_refuses(bench):
    target = bench.hand_over(bench.image())
    bench.with_volume(target)
    with pytest.raises(ContainerFailed, match="busy"):
        bench.with_volume(target, read_only=True)


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
@pytest.mark.parametrize("damage", ["no file", "malformed", "wrong type", "missing device", "metadata is text"])
def test_rust_fails_where_go_would_share(bench, damage):
    target = bench.hand_over("/nowhere" if damage == "missing device" else bench.image())
    (place,) = (bench.place / "direct-volumes").iterdir()
    file = place / "mountInfo.json"
    if damage == "no file":
        file.unlink()
    elif damage == "malformed":
        file.write_text("{")
    elif damage == "wrong type":
        file.write_text(file.read_text().replace("directvol", "blk"))
    elif damage == "metadata is text":
        file.write_text(file.read_text().replace('"metadata":{}', '"metadata":"{}"'))
    with pytest.raises(ContainerFailed):
        bench.with_volume(target)


@pytest.mark.parametrize("bench", [RUST_SHIM | {"disable_block_device_use": True}], indirect=True)
def test_rust_without_block_devices_fails_instead_of_sharing(bench):
    with pytest.raises(ContainerFailed, match="block device driver is empty"):
        bench.with_volume(bench.hand_over(bench.image()))


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_a_path_of_190_bytes_is_shared_in_silence_which_is_why_it_is_refused(bench):
    long = bench.place / ("x" * (190 - len(str(bench.place)) - 1))
    assert len(str(long)) == 190
    long.mkdir()
    assert len(base64.urlsafe_b64encode(str(long).encode())) == 256
    bench.with_volume(str(long))
    assert bench.sandbox.storages == []
    bench.sandbox.destroy()
    shutil.rmtree(long, ignore_errors=True)


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_rust_plugs_a_volume_again_after_one_of_its_containers_has_gone(bench):
    """The hazard behind "one pod a volume": the shim forgets a device that is still plugged in."""
    target = bench.hand_over(bench.image())
    first, second = bench.with_volume(target), bench.with_volume(target)
    bench.sandbox.remove_container(first)
    third = bench.with_volume(target)
    assert [name for name, _ in bench.sandbox.vm.commands].count("blockdev-add") == 2
    for name in (third, second):
        bench.sandbox.remove_container(name)
    (left,) = bench.sandbox.forgotten
    assert left.device == "drive-0", "what is forgotten stays plugged in until the sandbox ends"
    bench.sandbox.destroy()


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_rust_forgets_a_siblings_disk_when_a_creation_fails(bench):
    """Which is why no hand-off is closed where two containers may share a volume."""
    target = bench.hand_over(bench.image())
    running = bench.with_volume(target)
    broken = bench.hand_over_another("/nowhere/volume.img")
    with pytest.raises(ContainerFailed, match="No such file"):
        bench.container(volume_mount(target), volume_mount(broken, "/mnt/other"))
    again = bench.with_volume(target)
    assert len(bench.sandbox.forgotten) == 1
    assert [name for name, _ in bench.sandbox.vm.commands].count("blockdev-add") == 2
    for name in (again, running):
        bench.sandbox.remove_container(name)


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_rust_leaks_a_disk_each_life_of_a_container_with_two_mounts_of_a_volume(bench):
    target = bench.hand_over(bench.image())
    for life in (1, 2):
        bench.sandbox.remove_container(bench.container(volume_mount(target), volume_mount(target, "/mnt/again")))
        assert len(bench.sandbox.forgotten) == life


GOLDEN_RUST = RUST_SHIM | {"aio": "threads"}


@pytest.mark.parametrize("bench", [GOLDEN_RUST], indirect=True)
@pytest.mark.parametrize("kind", ["file", "loop device", "read-only"])
def test_what_the_rust_shim_says_to_qemu(bench, kind):
    image = bench.image()
    device = loops.attach(str(image), deadline=Deadline.after(10)) if kind == "loop device" else str(image)
    read_only = kind == "read-only"
    try:
        bench.sandbox.remove_container(bench.with_volume(bench.hand_over(device), read_only=read_only))
    finally:
        if kind == "loop device":
            loops.detach(device, str(image), Deadline.after(10))
    kept = ("add-fd", "blockdev-add", "device_add", "device_del", "blockdev-del", "remove-fd")
    said = [(name, arguments) for name, arguments in bench.sandbox.vm.commands if name in kept]
    fdset = said[1][1]["file"]["filename"]
    assert re.fullmatch(r"/dev/fdset/\d+", fdset)
    share, shared = ({}, {"force-share": True}) if read_only else ({"share-rw": True}, {})
    driver = "host_device" if kind == "loop device" else "file"
    assert said == [
        ("add-fd", {"opaque": "kata-block:drive-0:block-source"}),
        ("blockdev-add", {"node-name": "drive-0", "driver": "raw", "read-only": read_only, **shared, "file": {"driver": driver, "filename": fdset, "read-only": read_only, "aio": "threads", "cache": {"direct": False}}}),
        ("device_add", {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": 0, "lun": 0, "drive": "drive-0", "id": "drive-0", **share}),
        ("device_del", {"id": "drive-0"}),
        ("blockdev-del", {"node-name": "drive-0"}),
        ("remove-fd", {"fdset-id": int(fdset.rpartition("/")[2])}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "bench", [RUST_SHIM | {"block_device_driver": "virtio-blk-pci", "indep_iothreads": True}], indirect=True
)
def test_rust_with_virtio_blk_pci(bench):
    bench.with_volume(bench.hand_over(bench.image()))
    assert storage_of(bench)[:2] == ("blk", "02/01")
    (added,) = [arguments for name, arguments in bench.sandbox.vm.commands if name == "device_add"]
    assert added == {"driver": "virtio-blk-pci", "bus": "pci-bridge-0", "addr": "01", "drive": "drive-0", "id": "drive-0", "share-rw": True,
                     "iothread": "indep_iothread_0"}  # fmt: skip


FAST = {"aio": "native", "cache_direct": True}


@pytest.mark.parametrize(
    ("bench", "words"),
    [
        (RUST_SHIM | FAST | {"block_device_driver": "virtio-blk-pci"}, ""),
        (RUST_SHIM | {"aio": "native", "cache_set": True}, "cache.direct=on"),
        (RUST_SHIM | {"block_device_driver": "virtio-pmem"}, "unsupported driver type"),
        (BLK | FAST | {"cache_set": True}, "'host_device' driver requires"),
        (BLK | FAST, "cache.direct=on"),
        ({"cache_set": True}, "'host_device' driver requires"),
        (BLK, ""),
    ],
    indirect=["bench"],
)
def test_a_file_and_the_settings_that_each_shim_takes(bench, words):
    target = bench.hand_over(bench.image())
    if words:
        with pytest.raises(ContainerFailed, match=words):
            bench.with_volume(target)
    else:
        bench.with_volume(target)


@pytest.mark.parametrize("bench", [BLK | FAST | {"cache_set": True, "indep_iothreads": True}], indirect=True)
def test_go_takes_all_fast_settings_with_a_loop_device(bench):
    image = bench.image()
    device = loops.attach(str(image), deadline=Deadline.after(10))
    try:
        name = bench.with_volume(bench.hand_over(device))
        run(bench, name, "echo fast > /mnt/data/file && sync")
        bench.sandbox.remove_container(name)
    finally:
        loops.detach(device, str(image), Deadline.after(10))


@pytest.mark.parametrize(("shim", "driver"), [(RUST, "virtio-blk"), (RUST, "virtio-blk-mmio"), (GO, "virtio-blk-pci")])
def test_a_driver_name_that_stops_every_sandbox(vm, tmp_path, shim, driver):
    sandbox = Sandbox(vm=vm, settings=Settings(shim=shim, block_device_driver=driver, direct_volumes=tmp_path))
    with pytest.raises(SandboxFailed, match=driver):
        sandbox.start()


@pytest.mark.parametrize("bench", [RUST_SHIM], indirect=True)
def test_rust_cannot_mount_below_dev_which_preflight_refuses(bench):
    target = bench.hand_over(bench.image())
    with pytest.raises(ContainerFailed):
        bench.container(volume_mount(target, "/dev/data"))


@pytest.mark.parametrize(("bench", "plugs"), [({}, 1), (RUST_SHIM, 2)], indirect=["bench"])
def test_a_raw_volume_of_two_containers_is_plugged_once_by_go_and_twice_by_rust(bench, plugs):
    import os

    image = bench.image()
    device = loops.attach(str(image), deadline=Deadline.after(10))
    number = os.stat(device).st_rdev
    devices = [{"path": "/dev/xvdb", "type": "b", "major": os.major(number), "minor": os.minor(number)}]
    names = [bench.container(devices=devices) for _ in range(2)]
    assert [name for name, _ in bench.sandbox.vm.commands].count("device_add") == plugs
    for name in names:
        bench.sandbox.remove_container(name)
    assert len(bench.sandbox.forgotten) == plugs * (bench.sandbox.settings.shim == RUST), "Rust's stay with the sandbox"
    bench.sandbox.destroy()
    loops.detach(device, str(image), Deadline.after(10))


# -- other kinds of mounts


def test_a_raw_volume_is_a_device_in_the_container(bench):
    import os

    image = bench.image()
    device = loops.attach(str(image), deadline=Deadline.after(10))
    try:
        number = os.stat(device).st_rdev
        name = bench.container(
            devices=[{"path": "/dev/xvda", "type": "b", "major": os.major(number), "minor": os.minor(number)}]
        )
        run(bench, name, "echo raw-data | dd of=/dev/xvda bs=512 count=1 conv=sync,fsync 2>/dev/null")
        bench.sandbox.remove_container(name)
        assert image.read_bytes()[:8] == b"raw-data"
    finally:
        loops.detach(device, str(image), Deadline.after(10))


def test_a_directory_without_a_hand_off_is_a_virtio_fs_share(bench):
    directory = bench.place / "plain"
    directory.mkdir()
    (directory / "hello").write_text("from the host")
    name = bench.with_volume(str(directory))
    assert run(bench, name, "cat /mnt/data/hello") == "from the host"
    assert "virtiofs" in run(bench, name, "grep /mnt/data /proc/self/mountinfo")


def test_the_agents_own_rules(bench):
    """Unknown drivers, the option `loop`, and a spec without a process are refused as Kata's agent refuses them."""
    from guestmount import ttrpc
    from runvol_proto import kata_agent_pb2

    def create(**fields):
        bench.sandbox.call("CreateContainer", kata_agent_pb2.CreateContainerRequest(container_id="bad", **fields))

    with pytest.raises(ttrpc.RpcError, match="EINVAL"):
        create()
    oci = {"Process": {"Args": ["true"]}, "Root": {"Path": ""}}
    with pytest.raises(ttrpc.RpcError, match="storage handler nfs"):
        create(OCI=oci, storages=[{"driver": "nfs", "mount_point": "/x"}])
    with pytest.raises(ttrpc.RpcError, match="loop option"):
        create(
            OCI=oci,
            storages=[
                {"driver": "virtio-fs", "source": "x", "fstype": "ext4", "options": ["loop"], "mount_point": "/x"}
            ],
        )
