"""One process has a node: the lock, the socket, and those that hang in the kernel after their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import daemon
from tests.until import until

# Listens and holds a lock; writes to a file, in another thread, once it is told.
_PROCESS = """
import socket, sys, threading
from blockdev import daemon
lock, path, file = sys.argv[1:]
held = daemon.hold(lock)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(path)
listener.listen(8)
print("held", flush=True)
sys.stdin.readline()
def write():
    with open(file, "w") as out:
        out.write("x")
threading.Thread(target=write).start()
threading.Event().wait()
"""


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that takes no writes, until the test has ended."""
    image, place = tmp_path / "image", tmp_path / "frozen"
    place.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        subprocess.run(["fsfreeze", "-f", place], check=True)
        yield place
    finally:
        subprocess.run(["fsfreeze", "-u", place], check=False)
        subprocess.run(["umount", place], check=True)


def begun(tmp_path: Path, file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROCESS, str(tmp_path / "plugin.lock"), str(tmp_path / "it.sock"), str(file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[2])  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def hangs(process: subprocess.Popen[str]) -> bool:
    states = (Path(f"/proc/{process.pid}/task/{task}/stat") for task in os.listdir(f"/proc/{process.pid}/task"))
    return any(state.read_text().rpartition(")")[2].split()[0] == "D" for state in states)


@pytest.mark.kernel
def test_a_process_that_was_killed_and_hangs_in_the_kernel_keeps_nobody_out(tmp_path, frozen):
    lock, path = str(tmp_path / "plugin.lock"), str(tmp_path / "it.sock")
    process = begun(tmp_path, frozen / "x")
    try:
        print(file=process.stdin, flush=True)
        until(lambda: hangs(process))
        with pytest.raises(daemon.Held) as held:  # it may come back
            daemon.hold(lock)
        assert held.value.pid == process.pid and daemon.is_taken(path)
        process.send_signal(signal.SIGKILL)
        until(lambda: not daemon.is_taken(path))
        assert process.poll() is None and daemon.answers(path)
        fd = daemon.hold(lock)
        third = [sys.executable, "-c", f"from blockdev import daemon; daemon.hold({lock!r})"]
        refused = subprocess.run(third, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert f"Held: process {os.getpid()} holds {lock}" in refused.stderr
    finally:
        subprocess.run(["fsfreeze", "-u", frozen], check=True)
        process.kill()
        process.wait(10)
        subprocess.run(["fsfreeze", "-f", frozen], check=True)
    refused = subprocess.run(third, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert f"Held: process {os.getpid()} holds {lock}" in refused.stderr  # whose byte is not the first
    os.close(fd)


def test_a_lock_goes_with_its_process(tmp_path):
    lock, process = str(tmp_path / "plugin.lock"), begun(tmp_path, tmp_path / "x")
    with pytest.raises(daemon.Held, match=f"process {process.pid} holds"):
        daemon.hold(lock)
    process.kill()
    process.wait(10)
    os.close(daemon.hold(lock))
    assert not daemon.is_taken(str(tmp_path / "it.sock"))


def test_of_those_that_begin_at_once_one_holds_at_most(tmp_path):
    code = ("import sys, time; from blockdev import daemon\n"
            "try:\n    daemon.hold(sys.argv[1])\nexcept daemon.Held:\n    sys.exit(1)\nprint('held', flush=True); sys.stdin.read()")  # fmt: skip
    for _ in range(3):
        began = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE) for _ in range(4)]  # fmt: skip
        until(lambda began=began: sum(one.poll() is None for one in began) <= 1, 20)
        for one in began:
            one.communicate()
