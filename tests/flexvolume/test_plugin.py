"""Calls that the node plugin does over its socket, and that go on alone when it is not there, or not any more."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import pytest

from tests.driver import Driver
from tests.flexvolume.test_driver import POD, Flex


@pytest.fixture
def flex() -> Iterator[Flex]:
    with Driver() as driver:
        one = Flex(driver)
        yield one
        left = [*driver.mounts(), *driver.loop_devices(), *os.listdir(driver.run / "claims")]
        assert not left, left


def done_by_plugin(flex: Flex) -> int:
    return flex.driver.log.read_text().count("call done")


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


def test_only_its_own_user_is_answered(flex):
    path = flex.driver.run / "flexvolume.sock"
    assert path.stat().st_mode & 0o777 == 0o600


def test_twenty_at_once_are_all_right(flex):
    volumes = [flex.create(f"v{number}", size=16 << 20) for number in range(20)]
    with futures.ThreadPoolExecutor(20) as callers:
        targets = list(
            callers.map(lambda pair: flex.mount(pair[1], pod=10 + pair[0], runtime="kata"), enumerate(volumes))
        )
    handed = json.loads(flex.driver.cli("handoffs", "--json").stdout)
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
