"""Mounting in a process of its own: the errno comes back, its time is bounded, and it never outlives anybody."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockdev import Deadline, WaitExpired, isolated, mounts, syscalls

ROOT = Path(__file__).resolve().parents[2]
HANGS = "import os, sys, time\nopen(sys.argv[-1], 'w').write(str(os.getpid()))\ntime.sleep(60)\n"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_mount_is_made_here_and_not_in_the_other_process(tmp_path):
    isolated.mount("mine", str(tmp_path), "tmpfs", syscalls.MS_NODEV, "size=1M", what="it", deadline=Deadline.after(10))
    assert mounts.is_mount_point(str(tmp_path))
    assert os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize == 1 << 20
    syscalls.umount(str(tmp_path))


@pytest.mark.parametrize(
    ("target", "fstype", "data", "number"),
    [
        ("none", "tmpfs", "", errno.ENOENT),
        ("", "nosuchfs", "", errno.ENODEV),
        ("", "tmpfs", "size=nonsense", errno.EINVAL),
    ],
)
def test_the_kernels_word_comes_back(tmp_path, target, fstype, data, number):
    with pytest.raises(OSError) as told:  # noqa: PT011 - the number is what is looked at
        isolated.mount("x", str(tmp_path / target), fstype, 0, data, what="it", deadline=Deadline.after(10))
    assert told.value.errno == number


def test_a_filesystem_context_is_finished_by_it(tmp_path):
    context = syscalls.fsopen("tmpfs")
    syscalls.fsconfig_set(context, "source", "mine")
    isolated.create(context, "it", Deadline.after(10))
    root = syscalls.fsmount(context, 0)
    os.close(context)
    os.mkdir("d", dir_fd=root)
    os.close(root)
    context = syscalls.fsopen("tmpfs")
    isolated.create(context, "it", Deadline.after(10))
    with pytest.raises(OSError, match="busy"):
        isolated.create(context, "it", Deadline.after(10))
    os.close(context)


def test_one_that_hangs_is_ended_with_its_time(tmp_path, monkeypatch):
    program = tmp_path / "hangs.py"
    program.write_text(HANGS)
    monkeypatch.setattr(isolated, "_PROGRAM", str(program))
    started = time.monotonic()
    with pytest.raises(WaitExpired, match="mounting nas:/e"):
        isolated.mount("s", "t", "f", 0, str(tmp_path / "pid"), what="mounting nas:/e", deadline=Deadline.after(1))
    assert time.monotonic() - started < 5
    assert not alive(int((tmp_path / "pid").read_text()))


def test_it_dies_with_who_asked_for_it(tmp_path):
    program = tmp_path / "hangs.py"
    source = (ROOT / "blockdev/one_syscall.py").read_text()
    program.write_text(
        source.replace(
            "    if call ==",
            "    open(words[-1], 'w').write(str(os.getpid()))\n    import time\n    time.sleep(60)\n    if call ==",
            1,
        )
    )
    asking = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from blockdev import Deadline, isolated
isolated._PROGRAM = {str(program)!r}
isolated.mount("s", "t", "f", 0, {str(tmp_path / "pid")!r}, what="it", deadline=Deadline.after(50))
"""
    process = subprocess.Popen([sys.executable, "-c", asking])
    until = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    assert alive(child)
    process.kill()
    process.wait()
    until = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < until, "it outlives who asked"
        time.sleep(0.02)
