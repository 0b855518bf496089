"""Calls that the node plugin does over its socket, and that go on alone when it is not there, or not any more."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import pytest

from flexvolume.service import Service
from tests.driver import Driver, mount_capability
from tests.flexvolume.test_driver import POD, Flex


@pytest.fixture
def flex() -> Iterator[Flex]:
    with Driver() as driver:
        one = Flex(driver)
        yield one
        left = [*driver.mounts(), *driver.loop_devices(), *driver.left_over()["claims and locks"]]
        assert not left, left


def done_by_plugin(flex: Flex) -> int:
    return flex.driver.log.read_text().count("call done")


def test_a_plugin_in_a_container_is_entered_from_the_node(flex):
    """What kubelet executes is a shell's: the node may have no Python."""
    plugins = flex.driver.directory / "exec"
    flex.driver.cli("flexvolume", "install", "--through-plugin", "--plugin-dir", str(plugins), "--log",
                    flex.environment["RUNVOL_FLEXVOLUME_LOG"])  # fmt: skip
    flex.program = plugins / "runvol~runvol/runvol"
    node = {name: "" for name in flex.environment if name.startswith("RUNVOL_")}
    flex.ok("init")
    volume = flex.create("one")
    before = done_by_plugin(flex)
    target = flex.target(volume)
    status, reply = flex.run(
        "mount", target, json.dumps({"volume": volume, "runtime": "runc", "kubernetes.io/fsType": "ext4"}), **node
    )
    assert status == 0 and reply["status"] == "Success", reply
    assert os.path.ismount(target)
    status, reply = flex.run("mount", target, "{", **node)
    assert status == 1 and reply["status"] == "Failure", reply
    os.unlink(flex.driver.run / "plugin")
    status, reply = flex.run("unmount", target, **node)
    assert status == 1 and "does not run on this node" in str(reply["message"])
    assert os.path.ismount(target)
    (flex.driver.run / "plugin").write_text(f"{os.getpid()} 1\n")  # another process has the pid
    assert flex.run("unmount", target, **node)[0] == 1
    flex.driver.stop()
    flex.driver.start()
    assert flex.run("unmount", target, **node)[0] == 0
    assert not os.path.ismount(target) and done_by_plugin(flex) > before


def test_what_keeps_the_node_from_its_plugins_container_is_said(flex, tmp_path):
    """One JSON object each time, whatever is missing; and values that are no text are kept as they are."""
    plugins, told, begun = flex.driver.directory / "exec", flex.driver.run / "plugin", "/proc/self/stat"
    odd = os.fsencode(flex.driver.directory) + b"/\xff"
    flex.driver.environment["RUNVOL_NRI_SOCKET"] = os.fsdecode(odd)
    flex.driver.cli("flexvolume", "install", "--through-plugin", "--plugin-dir", str(plugins))
    flex.program = plugins / "runvol~runvol/runvol"
    assert odd in flex.program.read_bytes()
    for content in (b"", b"\n", b"1", b"1 \n", b"gone \n", b"0 0\n", b"../1 1\n", b"\xff\n"):
        told.write_bytes(content)
        status, reply = flex.run("unmount", "/x")
        assert status == 1 and "does not run on this node" in str(reply["message"]), content
    began = Path(begun).read_text().rpartition(")")[2].split()[19]
    told.write_text(f"{os.getpid()} {began}\n")
    for name in ("sh", "cat", "env"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    status, reply = flex.run("unmount", "/x", PATH=str(tmp_path))
    assert status == 1 and "the program nsenter is not installed" in str(reply["message"])
    (tmp_path / "nsenter").symlink_to("/bin/false")
    status, reply = flex.run("unmount", "/x", PATH=str(tmp_path))
    assert status == 1 and "cannot be entered" in str(reply["message"])
    assert flex.run("init", PATH=str(tmp_path))[0] == 0


@pytest.mark.parametrize("name", ["a b", "a) S 0 0", "a\nb (", ") 1 2 3 4 5 6"])
def test_a_process_that_names_itself_as_it_likes_is_not_taken_for_the_plugin(flex, name):
    """A pod's, which got the number of a plugin that has ended: kubelet would enter its container, as root."""
    plugins = flex.driver.directory / "exec"
    flex.driver.cli("flexvolume", "install", "--through-plugin", "--plugin-dir", str(plugins))
    flex.program = plugins / "runvol~runvol/runvol"
    named = (
        "import ctypes, sys, time; ctypes.CDLL(None).prctl(15, sys.argv[1].encode()); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", named, name], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            said = Path(f"/proc/{process.pid}/stat").read_text()
            assert name in said
            began = said.rpartition(")")[2].split()[19]
            for word in {*said.split(" "), *said.split()} - {began, ""}:
                (flex.driver.run / "plugin").write_text(f"{process.pid} {word}\n")
                status, reply = flex.run("unmount", "/x")
                assert status == 1 and "does not run on this node" in str(reply["message"]), word
            (flex.driver.run / "plugin").write_text(f"{process.pid} {began}\n")
            assert "does not run" not in str(flex.run("unmount", "/x")[1]["message"])
        finally:
            process.kill()


def test_the_plugin_does_the_work(flex):
    volume = flex.create("one")
    before = done_by_plugin(flex)
    target = flex.mount(volume, runtime="kata")
    assert os.listdir(target) == ["RUNVOL-PLACEHOLDER"]
    flex.ok("unmount", target)
    assert done_by_plugin(flex) == before + 2
    assert "secret" not in flex.driver.log.read_text()


def test_a_failure_is_the_same_sentence(flex):
    volume = flex.create("one")
    with_plugin = flex.fails("mount", flex.target(volume), flex.options(volume))
    flex.driver.stop()
    assert flex.fails("mount", flex.target(volume), flex.options(volume)) == with_plugin
    assert "which runtime will run" in with_plugin


def test_what_one_began_the_other_ends(flex):
    volume = flex.create("one")
    target = flex.mount(volume, runtime="runc")
    (Path(target) / "f").write_text("x")
    flex.driver.kill()
    flex.ok("unmount", target)
    target = flex.mount(volume, pod=11, runtime="runc")
    flex.driver.start()
    assert (Path(target) / "f").read_text() == "x"
    flex.ok("unmount", target)


def test_a_plugin_that_is_killed_in_the_middle_is_made_good(flex):
    volume = flex.create("one")
    for round_ in range(8):
        ending = threading.Timer(0.04 + round_ * 0.01, lambda: os.kill(flex.driver.process.pid, signal.SIGKILL))
        ending.start()
        target = flex.mount(volume, runtime="kata" if round_ % 2 else "runc")
        ending.join()
        flex.ok("unmount", target)
        flex.driver.process.wait()
        flex.driver.start()


@pytest.mark.parametrize("answer", [b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_nonsense_on_the_socket_is_not_believed(flex, answer):
    volume = flex.create("one")
    flex.driver.stop()
    path = flex.driver.run / "flexvolume.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    one, _ = listener.accept()
                except OSError:
                    return
                while one.recv(65536):
                    pass
                one.sendall(answer)
                one.close()

        threading.Thread(target=serve, daemon=True).start()
        target = flex.mount(volume, runtime="kata")
        flex.ok("unmount", target)
        listener.shutdown(socket.SHUT_RDWR)
    path.unlink()
    flex.driver.start()


@pytest.mark.parametrize(
    "request_",
    [b"", b"{", b"[]", b'{"version":2,"words":["mount"]}', b'{"version":1,"words":[]}', b'{"version":1,"words":[1]}',
     b'{"version":1,"words":["init"],"name":1,"seconds":1}', b"x" * (2 << 20)],
)  # fmt: skip
def test_the_plugin_answers_no_nonsense(flex, request_):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(flex.driver.run / "flexvolume.sock"))
        one.settimeout(10)
        try:
            one.sendall(request_)
            one.shutdown(socket.SHUT_WR)
            assert one.recv(100) == b""
        except OSError:
            pass  # closed before it was all sent
    assert flex.run("getvolumename", flex.options("loop-1"))[1]["volumeName"] == "loop-1"


def test_a_caller_that_says_nothing_holds_nobody_up(flex):
    silent = []
    for _ in range(10):
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(flex.driver.run / "flexvolume.sock"))
        silent.append(one)
    started = time.monotonic()
    flex.ok("getvolumename", flex.options("loop-1"))
    assert time.monotonic() - started < 4
    for one in silent:
        one.close()


def test_a_volume_that_csi_has_staged_stays_staged_when_a_flexvolume_names_it(flex):
    capability = mount_capability()
    volume = flex.driver.create("one", capability=capability)
    flex.driver.stage(volume, capability)
    target = flex.target("v")
    assert "is staged at" in flex.fails("mount", target, flex.options(volume.volume_id, runtime="runc"))
    flex.ok("unmount", target)
    published = flex.driver.publish(volume, POD.format(11), runtime="runc", capability=capability)
    assert os.path.ismount(published)
    flex.driver.unpublish(volume, POD.format(11))
    flex.driver.unstage(volume)


def test_a_plugin_without_descriptors_for_a_moment_takes_calls_again(flex):
    pid = flex.driver.process.pid
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in range(len(taken) + 1) if number not in taken)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(flex.driver.run / "flexvolume.sock"))
            until = time.monotonic() + 10
            while "a call could not be taken" not in flex.driver.log.read_text():
                assert time.monotonic() < until
                time.sleep(0.05)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    done = done_by_plugin(flex)
    flex.ok("getvolumename", flex.options("loop-1"))
    assert done_by_plugin(flex) == done + 1
    assert flex.driver.log.read_text().count("a call could not be taken") == 1


class Failing:
    """A listener whose accept fails now and then."""

    def __init__(self, listener: socket.socket, errors: list[Exception]) -> None:
        self._listener, self._errors = listener, errors

    def accept(self) -> tuple[socket.socket, object]:
        if self._errors:
            raise self._errors.pop(0)
        return self._listener.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._listener, name)


def test_whatever_accept_raises_the_next_call_is_taken(tmp_path, monkeypatch):
    numbers = (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EPERM)
    errors: list[Exception] = [*(OSError(number, os.strerror(number)) for number in numbers), MemoryError()]
    service = Service(None, str(tmp_path), str(tmp_path))
    monkeypatch.setattr(service, "_answer", lambda *_: "{}")
    bound = socket.socket

    class Socket(bound):
        def listen(self, *_) -> None:
            super().listen()
            service._listener = Failing(self, errors)

    monkeypatch.setattr("flexvolume.service.socket.socket", Socket)
    service.start()
    monkeypatch.undo()
    monkeypatch.setattr(service, "_answer", lambda *_: "{}")
    assert asked_of(tmp_path) == b"{}"
    assert not errors
    service.stop()
    with pytest.raises(OSError, match="No such file"):
        asked_of(tmp_path)
    until = time.monotonic() + 5
    while any(thread.name == "flexvolume" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_call_that_no_thread_can_serve_leaves_room_for_the_next(tmp_path, monkeypatch):
    service = Service(None, str(tmp_path), str(tmp_path))
    monkeypatch.setattr(service, "_answer", lambda *_: "{}")
    service.start()
    start, failing = threading.Thread.start, [True] * 65

    def fails(thread: threading.Thread) -> None:
        if failing:
            failing.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails)
    monkeypatch.setattr("flexvolume.service._SHORTEST_PAUSE", 0.0)
    answers = [asked_of(tmp_path) for _ in range(66)]
    assert answers == [b""] * 65 + [b"{}"]
    service.stop()


def test_a_call_that_fails_in_an_unknown_way_is_one_call(tmp_path, monkeypatch, caplog):
    service = Service(None, str(tmp_path), str(tmp_path))
    monkeypatch.setattr(service, "_answer", lambda *_: {}["no such key"])
    service.start()
    assert [asked_of(tmp_path) for _ in range(70)] == [b""] * 70
    assert "KeyError" in caplog.text
    service.stop()


def asked_of(run_dir: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(10)
        one.connect(str(run_dir / "flexvolume.sock"))
        try:
            one.sendall(json.dumps({"version": 1, "words": ["init"], "name": "runvol", "seconds": 5}).encode())
            one.shutdown(socket.SHUT_WR)
            return one.recv(100)
        except (ConnectionError, BrokenPipeError):
            return b""


def test_only_its_own_user_is_answered(flex):
    path = flex.driver.run / "flexvolume.sock"
    assert path.stat().st_mode & 0o777 == 0o600


def test_twenty_at_once_are_all_right(flex):
    volumes = [flex.create(f"v{number}", size=16 << 20) for number in range(20)]
    with futures.ThreadPoolExecutor(20) as callers:
        targets = list(
            callers.map(lambda pair: flex.mount(pair[1], pod=10 + pair[0], runtime="kata"), enumerate(volumes))
        )
    handed = json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"]
    assert {one["target"] for one in handed} == set(targets)
    assert all(POD.format(10 + number) in target for number, target in enumerate(targets))
    with futures.ThreadPoolExecutor(20) as callers:
        list(callers.map(lambda target: flex.ok("unmount", target), targets))


def test_the_caller_itself_is_cheap(flex):
    """What makes it cheap is that it loads nothing: counted in modules, not in time."""
    volume = flex.create("one")
    flex.program.write_text(flex.program.read_text().replace(
        "main()\n", "import atexit, os, sys\n_exit = os._exit\n"
        "def told(code):\n    open(os.environ['MODULES'], 'a').write(' '.join(sys.modules) + '\\n')\n    _exit(code)\n"
        "os._exit = told\nmain()\n"))  # fmt: skip
    seen = flex.driver.directory / "modules"
    flex.environment["MODULES"] = str(seen)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    target = flex.mount(volume, runtime="kata")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime >= before.ru_utime
    loaded = set(seen.read_text().split())
    assert not loaded & {"grpc", "google", "msgspec", "sqlite3", "volumes", "guestmount", "kubernetes", "click"}
    flex.ok("unmount", target)
