"""Programs that write to one directory: whatever links are there, nothing else changes, and they hold nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from blockdev import Deadline, confined, exclusivity, filesystems, loops, mountinfo, mounts, syscalls
from blockdev.detached import PRIVATE, filesystem

ROOT = Path(__file__).resolve().parents[2]
NO_LINKS = syscalls.MOUNT_ATTR_NOSYMFOLLOW
# Another mount namespace than the descriptors are of: there no kernel mounts a part of theirs, as none before 6.15 does of
# a mount that hangs nowhere.
ELSEWHERE = ("unshare", "--mount", "--propagation", "unchanged")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/theirs").write_text("theirs")
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def shell(directory: int, script: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *confined.command("/bin/sh", directory, "-c", script)], pass_fds=[directory], capture_output=True,
        text=True, check=False, timeout=20,
    )  # fmt: skip


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def names(directory: int) -> list[str]:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        return sorted(os.listdir(fd))
    finally:
        os.close(fd)


def test_it_writes_in_its_directory_and_nowhere_else(place):
    outside = place.parent / "outside"
    (place / "link").symlink_to(outside)
    (place / "up").symlink_to("../outside")
    script = f"""
    echo x > mine && chown 12:13 mine && chmod 4755 mine || exit 1
    for way in {outside} link up ../outside ../../../../../..{outside}; do
        for done in "echo x > $way/new" "echo x > $way/theirs" "chmod 4777 $way/theirs" "chown 1 $way/theirs" \\
                    "rm $way/theirs" "ln $way/theirs $way/again" "ln $way/theirs taken" "mkdir $way/d" "chmod 0 $way"; do
            sh -c "$done" 2>&- && echo "$done"
        done
    done
    exit 0
    """
    before = (outside / "theirs").stat(), outside.stat()
    done = shell(opened(place), script)
    assert (done.returncode, done.stdout) == (0, ""), done
    assert ((outside / "theirs").stat(), outside.stat()) == before
    assert (outside / "theirs").read_text() == "theirs"
    assert (place / "mine").stat().st_mode & 0o7777 == 0o4755
    assert sorted(os.listdir(place)) == ["link", "mine", "up"]


def test_it_sees_neither_mounts_nor_descriptors_of_the_host(place):
    script = """
    echo /sys/* /dev/shm/* /proc/* /proc/self/*
    for fd in 0 1 2 3 4 5 6 7 8 9; do [ -e /proc/self/fd/$fd ] && echo $fd; done
    mkdir /proc/here /proc/self/here 2>&- || echo no
    """
    done = shell(opened(place), script)
    seen = done.stdout.split()
    assert seen == ["/sys/*", "/dev/shm/*", "/proc/self", "/proc/self/fd", "0", "1", "2", "no"], done


@pytest.fixture
def nowhere(mount_point: str, soon: Deadline) -> Iterator[Callable[[int], int]]:
    """`nowhere(attributes)`: a filesystem in memory on a mount that hangs nowhere."""
    made: list[int] = []

    def make(attributes: int) -> int:
        mounts.mount("none", mount_point, "tmpfs", [], soon)
        made.append(syscalls.open_tree_clone(mount_point))
        syscalls.mount_setattr(made[0], attributes)
        mounts.be_unmounted(mount_point, soon)
        return made[0]

    yield make
    for fd in made:
        os.close(fd)


@pytest.mark.parametrize("prefix", [(), ELSEWHERE], ids=["", "as before 6.15"])
def test_a_directory_on_a_mount_that_hangs_nowhere(place, prefix, nowhere):
    outside, root = place.parent / "outside", nowhere(PRIVATE)
    for name in ("beside", "dir", "dir/deep"):
        os.mkdir(name, dir_fd=root)
    os.symlink(outside, "dir/deep/link", dir_fd=root)
    os.symlink("../../beside", "dir/deep/up", dir_fd=root)
    directory = os.open("dir/deep", os.O_RDONLY, dir_fd=root)
    done = shell(directory, "echo x > mine; echo x > link/new; echo x > up/new; ls /", prefix)
    assert done.returncode == 0, done
    assert names(directory) == ["link", "mine", "up"]
    assert (os.listdir(outside), names(root)) == (["theirs"], ["beside", "dir"])
    beside = os.open("beside", os.O_RDONLY, dir_fd=root)
    assert names(beside) == []
    for fd in (directory, beside):
        os.close(fd)


def test_a_filesystem_of_this_processs_own(place, soon):
    with filesystem("tmpfs", {}, attributes=PRIVATE, deadline=soon) as root:
        os.mkdir("dir", dir_fd=root)
        directory = os.open("dir", os.O_RDONLY, dir_fd=root)
        assert shell(directory, "echo x > mine").returncode == 0
        assert names(directory) == ["mine"]
        os.close(directory)


@pytest.mark.parametrize("attributes", [0, NO_LINKS])
def test_what_the_kernel_mounts_no_part_of_has_to_hang_nowhere_and_to_follow_no_link(place, nowhere, attributes):
    root = nowhere(attributes)
    done = shell(root, "touch mine", ELSEWHERE)
    assert (done.returncode, names(root)) == ((0, ["mine"]) if attributes else (confined.FAILED, [])), done
    (place / "deep").mkdir()
    syscalls.move_mount(root, str(place / "deep"))
    os.mkdir("dir", dir_fd=root)
    for path in (place / "deep", place / "deep/dir"):
        done = shell(opened(path), "touch other", ELSEWHERE)
        assert (done.returncode, (path / "other").exists()) == (confined.FAILED, False)
        assert "cannot be confined" in done.stderr
    syscalls.umount(str(place / "deep"), syscalls.MNT_DETACH)


def test_a_program_on_a_mount_of_its_own_is_found(place, mount_point, soon):
    mounts.mount("none", mount_point, "tmpfs", [], soon)
    (Path(mount_point) / "bin").mkdir()
    shutil.copy("/bin/touch", f"{mount_point}/bin/touch")
    directory = opened(place)
    for argument, status in (("mine", 0), (f"{mount_point}/theirs", 1)):
        done = subprocess.run(confined.command(f"{mount_point}/bin/touch", directory, argument), pass_fds=[directory],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == status, done
    assert (os.listdir(place), os.listdir(mount_point)) == (["mine"], ["bin"])


def test_what_cannot_be_confined_is_not_run(place):
    for prefix in (["setpriv", "--bounding-set=-sys_admin"], ["prlimit", "--nofile=4"]):
        done = shell(opened(place), "touch run; echo run", prefix)
        assert (done.returncode, done.stdout, os.listdir(place)) == (confined.FAILED, "", [])
        assert done.stderr.startswith("it cannot be confined to its directory, and is not run: ")
        assert shell(opened(place), "touch run", prefix).stderr == done.stderr
    directory = opened(place)
    done = subprocess.run(
        confined.command("/bin/none", directory), pass_fds=[directory], capture_output=True, text=True
    )
    assert (done.returncode, "/bin/none: No such file" in done.stderr) == (confined.FAILED, True)


@pytest.mark.kernel
def test_a_volume_that_is_unmounted_while_it_runs_is_free_at_once(place, image, mount_point, soon):
    path = image()
    filesystems.make(path, "ext4", soon)
    directory = opened(place)
    for _ in range(5):
        device = loops.attach(path, deadline=soon)
        mounts.mount(device, mount_point, "ext4", [], soon)
        process = subprocess.Popen(confined.command("/bin/sh", directory, "-c", "echo begun; exec sleep 60"),
                                   pass_fds=[directory], stdout=subprocess.PIPE)  # fmt: skip
        try:
            assert process.stdout.readline() == b"begun\n"
            seen = [mount.target for mount in mountinfo.table(process.pid)]
            assert len(seen) < 10 and mount_point not in seen, seen
            mounts.be_unmounted(mount_point, Deadline.after(1))
            loops.detach(device, path, Deadline.after(1))
            Deadline.after(1).poll("letting go", lambda: exclusivity.is_free(path), every=0.01)
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()


def test_it_dies_with_who_started_it(place):
    starting = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from blockdev import confined
directory = os.open({str(place)!r}, os.O_RDONLY)
subprocess.Popen(confined.command("/bin/sh", directory, "-c", "exec sleep 60"), pass_fds=[directory])
time.sleep(60)
"""
    starter = subprocess.Popen([sys.executable, "-c", starting])
    children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
    until = time.monotonic() + 10
    while not (found := children.read_text().split()) or Path(f"/proc/{found[0]}/comm").read_text() != "sleep\n":
        assert time.monotonic() < until
        time.sleep(0.02)
    starter.kill()
    starter.wait()
    while Path(f"/proc/{found[0]}/comm").exists() and "Z" not in Path(f"/proc/{found[0]}/stat").read_text().split():
        assert time.monotonic() < until, "it outlives who started it"
        time.sleep(0.02)
