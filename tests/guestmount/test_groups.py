"""A pod's group, given while another pod of the volume changes every name under the walk."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, syscalls, trees
from guestmount import groups

pytestmark = pytest.mark.kernel
GROUP = 4321
_RENAMEAT2, _EXCHANGE, _AT_FDCWD = 316, 2, -100


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "volume"
    root.mkdir()
    yield root
    # Deeper than what pytest removes by itself.
    subprocess.run(["rm", "-rf", root], check=True)


@pytest.fixture
def root(tree: Path):
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def facts(path: Path) -> tuple[int, str]:
    found = os.lstat(path)
    return found.st_gid, oct(stat.S_IMODE(found.st_mode))


def test_files_and_directories_get_the_group_and_its_bits(tree: Path, root: int):
    (tree / "d").mkdir(mode=0o700)
    (tree / "d" / "f").touch(mode=0o600)
    assert groups.apply(root, GROUP, Deadline.after(10))
    assert facts(tree) == facts(tree / "d") == (GROUP, "0o2770") or facts(tree)[0] == GROUP
    assert facts(tree / "d") == (GROUP, "0o2770") and facts(tree / "d" / "f") == (GROUP, "0o660")
    assert not groups.apply(root, GROUP, Deadline.after(10))


def test_links_fifos_sockets_and_devices_are_given_and_never_opened_or_followed(tree: Path, root: int):
    outside = tree.parent / "outside"
    outside.mkdir(mode=0o700)
    (outside / "secret").touch(mode=0o600)
    (tree / "link").symlink_to(outside / "secret")
    (tree / "directory").symlink_to(outside)
    (tree / "dangling").symlink_to("/nowhere")
    os.mkfifo(tree / "fifo", 0o600)
    os.mknod(tree / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
    before = os.listdir(f"/proc/{os.getpid()}/fd")
    groups.apply(root, GROUP, Deadline.after(5))
    assert len(os.listdir(f"/proc/{os.getpid()}/fd")) == len(before)
    assert {facts(tree / name)[0] for name in os.listdir(tree)} == {GROUP}
    assert facts(outside) == (0, "0o700") and facts(outside / "secret") == (0, "0o600")
    assert facts(tree / "fifo")[1] == "0o660" and facts(tree / "null")[1] == "0o600"


def test_a_tree_may_be_deeper_than_python_recurses_or_a_process_may_open(tree: Path, root: int):
    deep = 5000
    here = os.open(tree, os.O_RDONLY)
    for _ in range(deep):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("last", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here))
    groups.apply(root, GROUP, Deadline.after(60))
    assert os.stat("last", dir_fd=here).st_gid == GROUP
    os.close(here)
    assert sum(1 for _ in trees.walk(root, "counting", Deadline.after(60))) == deep + 1


def test_what_is_right_already_is_left_alone(tree: Path, root: int):
    (tree / "f").touch()
    groups.apply(root, GROUP, Deadline.after(5))
    os.chown(tree, 0, 0)
    before = os.stat(tree / "f").st_ctime_ns
    groups.apply(root, GROUP, Deadline.after(5))
    assert os.stat(tree / "f").st_ctime_ns == before


def _swapper(directory: Path, target: Path) -> int:
    """A process that exchanges files and directories with links to `target`, for ever."""
    for number in range(32):
        (directory / f"f{number}").touch()
        os.chmod(directory / f"f{number}", 0o6777)
        (directory / f"l{number}").symlink_to(target / "secret")
        (directory / f"d{number}").mkdir()
        (directory / f"d{number}" / "secret").touch()
        (directory / f"e{number}").symlink_to(target)
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None)
        os.chdir(directory)
        while True:
            for number in range(32):
                for one, other in (("f", "l"), ("d", "e")):
                    libc.syscall(_RENAMEAT2, _AT_FDCWD, f"{one}{number}".encode(), _AT_FDCWD, f"{other}{number}".encode(),
                                 _EXCHANGE)  # fmt: skip
                    name = f"t{number}".encode()
                    os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
                    os.unlink(name)
    return pid


def test_names_that_are_swapped_for_links_lead_nowhere(tree: Path, root: int):
    outside = tree.parent / "outside"
    outside.mkdir(mode=0o700)
    (outside / "secret").touch(mode=0o600)
    pid = _swapper(tree, outside)
    try:
        until, rounds = time.monotonic() + 4, 0
        while time.monotonic() < until:
            groups.apply(root, GROUP + rounds % 2, Deadline.after(10))
            rounds += 1
        assert rounds > 3
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert facts(outside) == (0, "0o700") and facts(outside / "secret") == (0, "0o600")


def test_a_directory_that_moves_away_under_the_walk_does_not_lead_out(tree: Path, root: int):
    """`..` of a directory that was moved is another one; the walk comes back by the names that it knows."""
    for name in ("a", "a/b", "a/b/c", "z"):
        (tree / name).mkdir()
    seen = []
    for fd, _directories, _others in trees.walk(root, "looking", Deadline.after(10)):
        here = os.readlink(f"/proc/self/fd/{fd}")
        seen.append(os.path.relpath(here, tree))
        if here.endswith("a/b/c"):
            os.rename(tree / "a" / "b", tree.parent / "moved")
    assert seen.count("z") == 1 and not any(name.startswith("..") for name in seen[:-1])


def test_what_even_root_may_not_change_or_look_into_keeps_its_group(tree: Path, root: int, monkeypatch):
    """As on a share that squashes root: an entry that refuses, and a directory that is not entered; kubelet goes on."""
    for name in ("closed", "open"):
        (tree / name).mkdir()
        (tree / name / "inside").touch()
    (tree / "theirs").touch()
    real_chown, real_openat2 = os.chown, syscalls.openat2

    def chown(path, uid, gid):
        if os.readlink(path) == str(tree / "theirs"):
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        real_chown(path, uid, gid)

    def openat2(directory, path, flags, resolve):
        if path == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real_openat2(directory, path, flags, resolve)

    monkeypatch.setattr(os, "chown", chown)
    monkeypatch.setattr(syscalls, "openat2", openat2)
    assert groups.apply(root, GROUP, Deadline.after(5))
    got = {name: facts(tree / name)[0] for name in ("theirs", "closed/inside", "open", "open/inside", "closed", ".")}
    assert got == {"theirs": 0, "closed/inside": 0, "open": GROUP, "open/inside": GROUP, "closed": GROUP, ".": GROUP}
