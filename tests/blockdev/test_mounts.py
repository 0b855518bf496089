"""Mounts on the real kernel, and the mount table's parser."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev import Deadline, DeviceBusy, MountFailed, WaitExpired, commands, mountinfo, mounts
from blockdev.commands import run
from blockdev.deadlines import bounded
from blockdev.errors import CommandFailed, CommandMissing
from tests.until import until

pytestmark = pytest.mark.kernel


def tmpfs(target, soon, options=()):
    mounts.mount("none", target, "tmpfs", list(options), soon)


def test_mount_and_unmount_can_be_repeated(mount_point, soon):
    tmpfs(mount_point, soon)
    tmpfs(mount_point, soon)
    assert mounts.is_mount_point(mount_point)
    mounts.be_unmounted(mount_point, soon)
    assert not mounts.is_mount_point(mount_point)
    mounts.be_unmounted(mount_point, soon)


def test_what_is_absent_is_no_mount_point():
    assert not mounts.is_mount_point("/nowhere/at/all")


def test_a_bind_in_the_same_filesystem_is_a_mount_point_too(tmp_path, mount_point):
    mounts.bind(str(tmp_path), mount_point, read_only=False)
    assert mounts.is_mount_point(mount_point)


def test_a_read_only_bind_refuses_writes_and_its_source_does_not(tmp_path, mount_point):
    source = tmp_path / "source"
    source.mkdir()
    mounts.bind(str(source), mount_point, read_only=True)
    assert mounts.is_read_only(mount_point)
    with pytest.raises(OSError):
        open(f"{mount_point}/x", "w").close()
    (source / "x").touch()


def test_a_busy_mount_is_refused_in_its_deadline_with_the_process(mount_point, soon):
    tmpfs(mount_point, soon)
    holder = subprocess.Popen(["sleep", "60"], cwd=mount_point)
    try:
        started = time.monotonic()
        with pytest.raises(DeviceBusy, match=rf"sleep \(pid {holder.pid}\)"):
            mounts.be_unmounted(mount_point, Deadline.after(1))
        assert time.monotonic() - started < 3
    finally:
        holder.kill()
        holder.wait()


def test_a_target_with_content_is_not_removed(tmp_path, soon):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "data").write_text("precious")
    with pytest.raises(MountFailed, match="not empty"):
        mounts.be_absent(str(tmp_path / "target"), soon)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(MountFailed, match="content"):
        mounts.be_absent(str(tmp_path / "file"), soon)
    assert (tmp_path / "target" / "data").read_text() == (tmp_path / "file").read_text() == "precious"


def test_an_unknown_option_is_the_kernels_to_refuse(mount_point, soon):
    with pytest.raises(MountFailed):
        tmpfs(mount_point, soon, ["nonsense"])


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        (["ro"], 1, ""),
        (["ro", "rw"], 0, ""),
        (["noatime", "nodev", "size=1m"], 1024 | 4, "size=1m"),
        (["_netdev", "nofail", "data=ordered", "commit=5"], 0, "data=ordered,commit=5"),
    ],
)
def test_options_become_flags_and_data(options, flags, data):
    assert mounts.parse_options(options) == (flags, data)


def test_a_call_that_never_returns_costs_its_deadline_only():
    started = time.monotonic()
    with pytest.raises(WaitExpired, match="sleeping"):
        bounded("sleeping", Deadline.after(0.2), lambda: time.sleep(5))
    assert time.monotonic() - started < 1


def test_a_call_that_has_not_come_back_is_not_begun_again():
    """A kubelet asks for a dead server's statistics every minute, for weeks."""
    go, began = threading.Event(), []

    def hang() -> None:
        began.append(1)
        go.wait(20)

    for _ in range(50):
        with pytest.raises(WaitExpired, match="measuring /dead"):
            bounded("measuring /dead", Deadline.after(0.1 if not began else 5), hang)
    assert began == [1]
    go.set()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(WaitExpired):
            assert bounded("measuring /dead", Deadline.after(5), lambda: 7) == 7
            return
        time.sleep(0.01)
    raise AssertionError("a server that is back is not asked again")


def test_programs_end_with_the_deadline_and_report_what_they_said(soon):
    with pytest.raises(WaitExpired, match="sleep"):
        run("sleep", "30", deadline=Deadline.after(0.2))
    with pytest.raises(CommandFailed, match="No such file"):
        run("ls", "/nowhere/at/all", deadline=soon)
    with pytest.raises(CommandMissing, match="no-such-program"):
        run("no-such-program", deadline=soon)


@pytest.mark.parametrize("how", ["spawned", "forked"])
def test_a_program_ends_with_who_began_it(tmp_path, how):
    """Whatever ends that, and a program that has not begun by then never does."""
    more = ", outlive=None" if how == "spawned" else ", limits=Limits(memory=1 << 30, cpu=60)"
    code = ("import os; from blockdev import Deadline; from blockdev.commands import Limits, run; print(os.getpid(), flush=True); "
            f"run('sleep', '4711.{os.getpid()}', deadline=Deadline.after(60){more})")  # fmt: skip
    began = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    began.stdout.readline()

    def sleeps() -> bool:
        return (
            subprocess.run(["pgrep", "-f", f"sleep 4711.{os.getpid()}"], capture_output=True, check=False).returncode
            == 0
        )

    until(sleeps)
    began.kill()
    began.wait()
    until(lambda: not sleeps())


def test_a_program_that_was_begun_for_somebody_who_is_gone_does_nothing(tmp_path):
    words = [*commands._begun_by(), "1", "touch", str(tmp_path / "made")]
    assert subprocess.run(words, check=False).returncode == 1 and os.listdir(tmp_path) == []


def test_what_a_program_says_and_how_it_ends_is_the_same_either_way(soon, monkeypatch):
    for begun_by in (commands._begun_by, tuple):
        monkeypatch.setattr(commands, "_begun_by", begun_by)
        assert run("printf", "%s", "a $(b) '\"`", deadline=soon) == (0, "a $(b) '\"`")
        assert run("false", deadline=soon, ok=(1,)) == (1, "")
        with pytest.raises(CommandFailed) as failed:
            run("sh", "-c", "echo said; kill -9 $$", deadline=soon)
        assert failed.value.code == -9 and "said" in str(failed.value)


def test_no_shell_sees_an_argument(soon, tmp_path):
    nasty = f"$(touch {tmp_path}/pwned); `touch {tmp_path}/pwned` | & > {tmp_path}/pwned"
    assert run("echo", nasty, deadline=soon)[1].strip() == nasty
    assert not (tmp_path / "pwned").exists()


def test_a_program_dies_with_the_process_that_ordered_it(tmp_path):
    code = (
        "from blockdev.commands import run; from blockdev import Deadline; import threading;"
        "threading.Thread(target=lambda: run('sleep', '61.7', deadline=Deadline.after(100))).start();"
        "import time; time.sleep(0.5); print('up', flush=True); time.sleep(60)"
    )
    import sys

    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    parent.stdout.readline()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 5
    while subprocess.run(["pgrep", "-f", "^sleep 61.7"], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < until, "the program outlived its parent"
        time.sleep(0.05)


def test_the_table_of_this_machine_parses():
    assert any(mount.target == "/" for mount in mountinfo.table())


_text = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(
    target=_text,
    source=_text,
    optional=st.lists(st.sampled_from(["shared:1", "master:2", "propagate_from:3"]), max_size=3),
)
def test_every_path_survives_the_kernels_escapes(target, source, optional):
    def escape(text):
        return "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in text)

    if "\r" in target + source:
        return
    line = f"36 35 98:0 /root {escape(target)} rw,noatime {' '.join(optional)}{' ' if optional else ''}- ext4 {escape(source)} rw,errors=continue\n"
    mount = mountinfo.parse(line)
    assert (mount.target, mount.source, mount.device) == (target, source, (98, 0))
    assert not mount.read_only


def test_waiting_for_a_device_works_without_a_udev_daemon(image, soon):
    import threading

    from blockdev import loops, udev

    path = image()
    timer = threading.Timer(0.3, lambda: loops.attach(path, deadline=soon))
    timer.start()
    udev.wait_for("a loop device", lambda: bool(loops.find(path)), soon)
    timer.join()
    with pytest.raises(WaitExpired, match="nothing"):
        udev.wait_for("nothing", lambda: False, Deadline.after(0.3))


def test_a_missing_node_is_made_from_sysfs(image, soon):
    from blockdev import loops, udev

    device = loops.attach(image(), deadline=soon)
    os.rename(device, device + ".away")
    try:
        udev.ensure_node(device)
        assert os.stat(device).st_rdev == os.stat(device + ".away").st_rdev
    finally:
        os.rename(device + ".away", device)
