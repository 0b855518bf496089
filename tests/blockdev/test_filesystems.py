"""mkfs, fsck, growth and the blank check on real filesystems."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from pathlib import Path

import pytest

from blockdev import (
    CommandFailed,
    Deadline,
    FilesystemDamaged,
    NotBlank,
    WaitExpired,
    WrongFilesystem,
    blankness,
    commands,
    filesystems,
    loops,
    mounts,
    superblocks,
)
from blockdev.detached import private_mount

pytestmark = pytest.mark.kernel

SIZES = {"ext4": 64, "xfs": 320}


@pytest.fixture(params=["ext4", "xfs"])
def fstype(request):
    return request.param


def test_a_blank_file_is_formatted_and_mountable(image, fstype, soon):
    path = image(SIZES[fstype])
    filesystems.make(path, fstype, soon)
    block = superblocks.read(path)
    assert block is not None and block.fstype == fstype and block.clean
    with private_mount(path, fstype, deadline=soon) as root:
        fd = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=root)
        os.write(fd, b"x" * 4096)
        os.close(fd)
    filesystems.check(path, fstype, soon)


def test_the_superblock_reader_agrees_with_blkid_and_statvfs(image, fstype, soon):
    path = image(SIZES[fstype])
    filesystems.make(path, fstype, soon)
    block = superblocks.read(path)
    told = subprocess.run(
        ["blkid", "-p", "-s", "UUID", "-o", "value", path], capture_output=True, text=True, check=True
    )
    assert block.uuid == told.stdout.strip()
    with private_mount(path, fstype, deadline=soon) as root:
        facts = os.fstatvfs(root)
    assert block.block_bytes == facts.f_bsize
    assert as_told(superblocks.space(path)) == as_mounted(facts)


def as_mounted(facts):
    one = facts.f_frsize
    return facts.f_blocks * one, facts.f_bfree * one, facts.f_bavail * one, facts.f_files, facts.f_ffree


def as_told(space):
    return space.total_bytes, space.free_bytes, space.available_bytes, space.inodes, space.free_inodes


@pytest.mark.parametrize(
    ("fstype", "options"),
    [("ext4", []), ("ext4", ["-m", "5"]), ("ext4", ["-O", "^has_journal"]), ("ext4", ["-b", "1024"]),
     ("ext4", ["-O", "^64bit"]), ("ext4", ["-O", "bigalloc"]), ("ext3", []), ("ext2", []), ("xfs", []),
     ("xfs", ["-m", "reflink=0"]), ("xfs", ["-m", "rmapbt=1"]), ("xfs", ["-m", "finobt=0,reflink=0,inobtcount=0"]),
     ("xfs", ["-b", "size=1024"]), ("xfs", ["-i", "size=1024"]), ("xfs", ["-d", "agcount=7"])],
    ids=str,
)  # fmt: skip
def test_space_is_what_a_mount_says(image, fstype, options, soon):
    """So that a volume's figures are the same under runc and in a sandbox, however it was made."""
    path = image(513)
    force = "-f" if fstype == "xfs" else "-F"
    subprocess.run([f"mkfs.{fstype}", "-q", force, *options, path], check=True, capture_output=True)
    with private_mount(path, fstype, deadline=soon) as root:
        os.mkdir("d", dir_fd=root)
        for number in range(200):
            with open(os.open(f"d/{number}", os.O_WRONLY | os.O_CREAT, dir_fd=root), "wb") as file:
                file.write(b"x" * 70_000)
                os.fsync(file.fileno())
        facts = os.fstatvfs(root)
    assert as_told(superblocks.space(path)) == as_mounted(facts)


@pytest.mark.parametrize("other", ["ext4", "xfs", "swap", "luks", "lvm", "gpt"])
def test_nothing_is_ever_formatted_over_a_signature(image, other, soon):
    path = image(320)
    if other in SIZES:
        filesystems.make(path, other, soon)
    elif other == "swap":
        subprocess.run(["mkswap", "-q", path], check=True)
    elif other == "luks":
        with open(path, "r+b") as file:
            file.write(b"LUKS\xba\xbe\x00\x01" + bytes(32) + b"aes")
    elif other == "lvm":
        with open(path, "r+b") as file:
            file.seek(512)
            file.write(b"LABELONE" + (1).to_bytes(8, "little") + bytes(8) + b"LVM2 001")
    else:
        subprocess.run(["sfdisk", "-q", path], input="label: gpt\n,,\n", text=True, check=True)
    before = os.stat(path).st_blocks
    with pytest.raises(NotBlank):
        filesystems.make(path, "ext4", soon)
    assert os.stat(path).st_blocks == before


@pytest.mark.parametrize("where", [0, 4097, 10 << 20, (64 << 20) - 512])
def test_a_single_byte_anywhere_in_a_file_makes_it_not_blank(image, where, soon):
    path = image(64)
    with open(path, "r+b") as file:
        file.seek(where)
        file.write(b"\x01")
    with pytest.raises(NotBlank, match="data near byte"):
        blankness.prove_blank(path, soon)


def test_written_zeros_are_blank(image, soon):
    path = image(8)
    with open(path, "r+b") as file:
        file.write(bytes(8 << 20))
    assert blankness.prove_blank(path, soon)


def test_an_ext4_whose_head_was_wiped_is_still_not_blank_on_a_block_node(image, soon):
    path = image(256)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", path], check=True)
    with open(path, "r+b") as file:
        file.write(bytes(8 << 20))
    device = loops.attach(path, deadline=soon)
    with pytest.raises(NotBlank):
        blankness.prove_blank(device, soon)


def test_wiping_takes_back_an_interrupted_mkfs(image, soon):
    path = image(64)
    filesystems.make(path, "ext4", soon)
    blankness.wipe(path, soon)
    assert blankness.prove_blank(path, soon)
    assert os.stat(path).st_blocks == 0


def test_a_filesystem_takes_the_rest_of_its_device(image, fstype, soon):
    path = image(SIZES[fstype])
    filesystems.make(path, fstype, soon)
    assert not filesystems.lags(path)
    os.truncate(path, 2 * SIZES[fstype] << 20)
    assert filesystems.grow(path, soon)
    assert not filesystems.lags(path)
    assert superblocks.read(path).total_bytes == 2 * SIZES[fstype] << 20
    assert not filesystems.grow(path, soon)
    filesystems.check(path, fstype, soon)


def test_a_mounted_xfs_grows_online(image, mount_point, soon):
    path = image(320)
    filesystems.make(path, "xfs", soon)
    device = loops.attach(path, deadline=soon)
    mounts.mount(device, mount_point, "xfs", [], soon)
    os.truncate(path, 640 << 20)
    loops.resize(device)
    filesystems.grow_mounted(mount_point, 640 << 20, device)
    assert os.statvfs(mount_point).f_blocks * 4096 > 500 << 20


def test_another_filesystem_than_asked_for_is_refused_by_name(image, soon):
    path = image(320)
    filesystems.make(path, "xfs", soon)
    with pytest.raises(WrongFilesystem, match="holds xfs, but ext4"):
        filesystems.check(path, "ext4", soon)


def test_a_journal_that_waits_is_replayed(image, soon):
    path = image(64)
    filesystems.make(path, "ext4", soon)
    # What a killed guest leaves: the flag that the journal must be replayed.
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", path], check=True, capture_output=True)
    assert not superblocks.read(path).clean
    filesystems.check(path, "ext4", soon)
    assert superblocks.read(path).clean


def test_damage_that_needs_a_person_is_reported_and_not_mounted(image, soon):
    path = image(64)
    filesystems.make(path, "ext4", soon)
    with open(path, "r+b") as file:
        file.seek(1024 + 0x3A)
        file.write((2).to_bytes(2, "little"))  # errors recorded
        file.seek(8192)
        file.write(b"\xff" * 300_000)  # group descriptors, bitmaps and inodes
    with pytest.raises(FilesystemDamaged, match="needs a person"):
        filesystems.check(path, "ext4", soon)


@pytest.fixture
def used_xfs(image, mount_point, soon):
    """An XFS whose log holds changes, as of a guest that was killed, and the same once it was unmounted."""
    path = image(320)
    filesystems.make(path, "xfs", soon)
    device = loops.attach(path, deadline=soon)
    mounts.mount(device, mount_point, "xfs", (), soon)
    for number in range(200):
        with open(f"{mount_point}/{number}", "w") as file:
            file.write("x")
    for number in range(20):  # each is a record of the log
        with open(f"{mount_point}/last{number}", "w") as file:
            os.fsync(file.fileno())
    dirty = f"{path}.dirty"
    subprocess.run(["cp", "--sparse=always", path, dirty], check=True)
    mounts.be_unmounted(mount_point, soon)
    loops.detach(device, path, soon)
    return path, dirty


def test_an_xfs_is_mounted_before_its_check_only_for_its_log(used_xfs, monkeypatch):
    clean, dirty = used_xfs
    mounted: list[str] = []

    @contextlib.contextmanager
    def noted(path, *arguments, **named):
        mounted.append(path)
        with private_mount(path, *arguments, **named) as root:
            yield root

    monkeypatch.setattr(filesystems, "private_mount", noted)
    filesystems.verify(clean, "xfs")
    assert mounted == []
    filesystems.verify(dirty, "xfs")
    assert mounted == [dirty]
    filesystems.verify(dirty, "xfs")
    assert mounted == [dirty]


def test_an_xfs_whose_log_is_no_log_is_damaged(used_xfs):
    path, _ = used_xfs
    said = subprocess.run(["xfs_db", "-r", "-c", "sb 0", "-c", "p logstart blocksize agblocks agblklog", path],
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    facts = {key: int(value) for key, value in (line.split(" = ") for line in said.splitlines())}
    group, block = divmod(facts["logstart"], 1 << facts["agblklog"])
    with open(path, "r+b") as file:
        file.seek((group * facts["agblocks"] + block) * facts["blocksize"])
        file.write(b"\xff" * (1 << 20))
    with pytest.raises(FilesystemDamaged, match="the kernel does not mount it") as caught:
        filesystems.verify(path, "xfs")
    assert "/dev/loop" not in str(caught.value), "the same sentence each time"


def test_an_xfs_log_that_a_program_calls_clean_and_the_kernel_replays_is_replayed_before_the_check(
    used_xfs, monkeypatch
):
    """Its last record says that nothing is left, in bytes whose sum is wrong: for the kernel it is no record."""
    _, path = used_xfs
    content = bytearray(Path(path).read_bytes())
    block, log, groups, bits = (struct.unpack_from(kind, content, at)[0] for kind, at in
                                ((">I", 4), (">Q", 48), (">I", 84), ("B", 124)))  # fmt: skip
    start = ((log >> bits) * groups + (log & ((1 << bits) - 1))) * block
    said = subprocess.run(["xfs_logprint", "-t", path], capture_output=True, text=True, check=False).stdout
    head = int(said.split("head: ")[1].split()[0])
    records = [at for at in range(start, start + head * 512, 512) if content[at : at + 4] == b"\xfe\xed\xba\xbe"]
    struct.pack_into(">II", content, records[-1] + 24, struct.unpack_from(">I", content, records[-1] + 4)[0], head)
    Path(path).write_bytes(content)
    said = subprocess.run(["xfs_logprint", "-t", path], capture_output=True, text=True, check=False).stdout
    assert "state: <CLEAN>" in said
    done: list[str] = []
    for name in ("private_mount", "would_be_replayed", "_checked"):
        real = getattr(filesystems, name)
        monkeypatch.setattr(filesystems, name, lambda *one, _name=name, _real=real, **more: (
            done.append(one[0] if _name == "_checked" else _name), _real(*one, **more))[1])  # fmt: skip
    filesystems.verify(path, "xfs")
    assert done == ["xfs_logprint", "xfs_repair", "would_be_replayed", "private_mount", "xfs_repair"]


def test_what_a_checker_says_has_an_end(soon):
    """A guest may have made as many faults as it likes."""
    _code, said = commands.run(
        "seq", "1000000", deadline=soon, limits=commands.Limits(memory=1 << 30, cpu=30, output=1 << 15)
    )
    assert 1000 < len(said) <= 1 << 15 and said.endswith("\n999999\n1000000\n")
    with pytest.raises(CommandFailed, match="no good"):
        commands.run("sh", "-c", "echo no good; exit 3", deadline=soon, limits=commands.Limits(memory=1 << 30, cpu=30))


def test_mkfs_ends_with_the_calls_deadline(image):
    with pytest.raises(WaitExpired):
        filesystems.make(image(64), "ext4", Deadline.after(0))


@pytest.mark.parametrize("where", [5 << 20, 3 << 30, (8 << 30) - (20 << 20)])
def test_data_that_lies_between_the_ends_of_a_disk_is_found(image, where, soon):
    path = image(8 << 10)
    blankness.prove_unused(path, soon)
    with open(path, "r+b") as file:
        file.seek(where)
        file.write(b"\x01" * (1 << 20))
    with pytest.raises(NotBlank, match="data near byte"):
        blankness.prove_unused(path, soon)


def test_a_small_disk_is_read_whole_as_far_as_is_asked(image, soon):
    path = image(256)
    with open(path, "r+b") as file:
        file.seek((256 << 20) - 4096)
        file.write(b"a mark")
    blankness.prove_unused(path, soon, end=(256 << 20) - 4096)
    with open(path, "r+b") as file:
        file.seek(77_777_777)
        file.write(b"\x01")
    with pytest.raises(NotBlank, match="data near byte"):
        blankness.prove_unused(path, soon, end=(256 << 20) - 4096)


def test_a_private_mount_does_not_do_as_the_superblock_says(tmp_path, soon):
    """A guest may have written `panic` there."""
    path = str(tmp_path / "image")
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    filesystems.make(path, "ext4", soon)
    subprocess.run(["tune2fs", "-e", "panic", path], check=True, capture_output=True)
    with private_mount(path, "ext4", deadline=soon):
        (device,) = loops.find(path)
        with open(f"/proc/fs/ext4/{os.path.basename(device)}/options") as options:
            assert "errors=remount-ro\n" in options.readlines()
