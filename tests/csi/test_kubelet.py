"""The plugin is known to kubelet whatever of the two goes and comes, and never beside another socket for its name."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdev import daemon
from csi import kubelet
from csi.kubelet import Registration
from tests.driver import Driver
from tests.plugin_watcher import PluginWatcher
from tests.until import until

NAME = "csi.runvol.io"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    (tmp_path / "reg").mkdir()
    return tmp_path / "reg"


@pytest.fixture
def watcher(registry: Path) -> Iterator[PluginWatcher]:
    one = PluginWatcher(registry).start()
    yield one
    one.stop()


@pytest.fixture
def registered(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(kubelet, "_SOON", 0.05)
    monkeypatch.setattr(kubelet, "_LATER", 0.05)
    with contextlib.ExitStack() as stack:

        def begun(**more: Any) -> Registration:
            facts = {"endpoint": "/run/csi.sock", "registry": str(registry), "alive": lambda: True,
                     "told": str(tmp_path / "told.json")}  # fmt: skip
            one = Registration(NAME, **{**facts, **more})
            one.start()
            stack.callback(one.stop)
            return one

        yield begun


def state(tmp_path: Path) -> str:
    try:
        return str(json.loads((tmp_path / "told.json").read_text())["state"])
    except FileNotFoundError:
        return ""


def test_both_drivers_of_a_plugin_are_registered_until_it_ends():
    with Driver() as driver:
        registry = driver.kubelet / "plugins_registry"
        registry.mkdir()
        one = PluginWatcher(registry).start()
        both = {NAME: str(driver.socket), "nfs.csi.runvol.io": str(driver.nfs_socket)}
        until(lambda: one.names == both, 15)
        told = [driver.run / f"registration-{name}.json" for name in both]

        def states() -> set[str]:
            return {json.loads(path.read_text())["state"] for path in told}

        until(lambda: states() == {"registered"}, 15)
        driver.process.send_signal(signal.SIGKILL)
        driver.stop()
        driver.start()
        until(lambda: one.asked == 4 and one.names == both and states() == {"registered"}, 15)
        driver.stop()
        # A plugin that is stopped comes again; the node may be rebooting, with the API away.
        assert one.names == both
        assert states() == {"the plugin has ended; kubelet keeps its name for the next one"}
        one.stop()


def test_kubelet_that_comes_later_finds_it(registered, registry):
    registered()
    until(lambda: bool([*registry.iterdir()]))
    for _restart in range(2):
        one = PluginWatcher(registry).start()
        until(lambda one=one: NAME in one.names)
        one.stop()


def test_a_directory_that_comes_later_is_waited_for(registered, registry, tmp_path):
    registry.rmdir()
    registered()
    until(lambda: "is not there; kubelet makes it" in state(tmp_path))
    registry.mkdir()
    one = PluginWatcher(registry).start()
    until(lambda: state(tmp_path) == "registered")
    one.stop()


def test_a_socket_that_somebody_removes_is_made_again(registered, registry, watcher):
    registered()
    for _ in range(3):
        until(lambda: NAME in watcher.names)
        before = watcher.asked
        (registry / f"{NAME}-reg.sock").unlink()
        until(lambda before=before: watcher.asked > before)


def test_what_kubelet_refuses_is_asked_again(registered, registry, monkeypatch, tmp_path):
    monkeypatch.setattr(kubelet, "_FIRST_WAIT", 0.1)
    refusals = iter(["no such node", "no such node"])
    one = PluginWatcher(registry, refuse=lambda _info: next(refusals, "")).start()
    registered()
    until(lambda: NAME in one.names and one.asked == 3)
    until(lambda: state(tmp_path) == "registered")
    one.stop()


def test_kubelet_that_never_answers_is_asked_again(registered, registry, monkeypatch):
    monkeypatch.setattr(kubelet, "_FIRST_WAIT", 0.1)
    registered()
    path, seen = registry / f"{NAME}-reg.sock", set()
    until(lambda: (seen.add(path.lstat().st_ino) if path.exists() else None) or len(seen) > 2)


def test_it_is_registered_as_long_as_it_answers(registered, registry, watcher, monkeypatch):
    monkeypatch.setattr(kubelet, "_SILENT", 3)
    answers = iter([False, False, True, False, False, True, *[False] * 4])
    registered(alive=lambda: next(answers, True))
    until(lambda: NAME in watcher.names)
    until(lambda: watcher.names == {})
    until(lambda: NAME in watcher.names)
    assert watcher.asked == 2


def other(registry: Path, name: str = NAME) -> Registration:
    """As a node-driver-registrar beside runvol would be."""
    (registry / "more").mkdir(exist_ok=True)
    one = Registration(name, endpoint="/run/other.sock", registry=str(registry / "more"), alive=lambda: True)
    one._others.found = lambda *_: ""
    one.start()
    until(lambda: one._inode != 0)
    return one


def test_there_is_no_second_socket_for_a_name(registered, registry, watcher, tmp_path):
    first = other(registry)
    until(lambda: NAME in watcher.names)
    registered()
    until(lambda: "registers csi.runvol.io already" in state(tmp_path))
    assert not (registry / f"{NAME}-reg.sock").exists()
    first.stop()
    until(lambda: watcher.names == {NAME: "/run/csi.sock"})


def test_a_second_socket_that_comes_later_is_told_and_takes_nothing_away_for_long(
    registered, registry, watcher, tmp_path
):  # fmt: skip
    registered()
    until(lambda: watcher.names == {NAME: "/run/csi.sock"})
    second = other(registry)
    until(lambda: "registers csi.runvol.io as well" in state(tmp_path))
    second.stop()
    until(lambda: watcher.names == {NAME: "/run/csi.sock"} and state(tmp_path) == "registered")


def test_other_drivers_and_dead_sockets_are_none(registered, registry, watcher):
    first = other(registry, "another.driver")
    dead = other(registry, NAME)
    dead._server.stop(None).wait()
    dead._server = None
    registered()
    until(lambda: watcher.names.get(NAME) == "/run/csi.sock")
    first.stop()
    dead.stop()


class Hung:
    """Another driver's socket, of a process that accepts nothing."""

    def __init__(self, registry: Path, *, full: bool) -> None:
        self._all = [socket.socket(socket.AF_UNIX)]
        self._all[0].bind(str(registry / "other-reg.sock"))
        self._all[0].listen(1 if full else 100)
        for _ in range(2 if full else 0):
            self._all.append(socket.socket(socket.AF_UNIX))
            self._all[-1].connect(str(registry / "other-reg.sock"))

    def connections(self) -> int:
        """Of which it has heard."""
        self._all[0].setblocking(False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self._all.append(self._all[0].accept()[0])
                count += 1
        return count

    def close(self) -> None:
        for one in self._all:
            one.close()


@pytest.mark.parametrize("full", [True, False])
def test_another_driver_that_hangs_keeps_nobody_from_kubelet_nor_from_an_end(registered, registry, watcher, full):
    hung = Hung(registry, full=full)
    one = registered()
    until(lambda: NAME in watcher.names)
    (registry / f"{NAME}-reg.sock").unlink()
    until((registry / f"{NAME}-reg.sock").exists)
    began = time.monotonic()
    one.stop()
    assert time.monotonic() - began < 4
    assert not one._thread.is_alive()
    hung.close()


def test_sockets_of_others_that_do_not_answer_are_asked_ever_more_rarely_and_all_at_once(registry, monkeypatch):
    monkeypatch.setattr(kubelet, "_ASKING", 0.3)
    for number in range(8):
        (registry / f"{number}").mkdir()
    all_of_them = [Hung(registry / f"{number}", full=False) for number in range(8)]
    others, began = kubelet._Others(NAME), time.monotonic()
    assert others.found(str(registry), 0) == ""
    assert time.monotonic() - began < 2
    before = [hung.connections() for hung in all_of_them]
    for _ in range(20):
        others.found(str(registry), 0)
    assert [hung.connections() for hung in all_of_them] == [0] * 8, before
    pauses = []
    for one in others._known.values():
        for _ in range(12):
            one.again = 0.0
            others._ask()
            pauses.append(one.pause)
        break
    assert pauses[:3] == [4, 8, 16]
    assert pauses[-1] == 300
    for hung in all_of_them:
        hung.close()


def test_a_socket_of_another_driver_is_asked_who_it_is_once(registry):
    names: list[str] = []

    class Counted(Registration):
        def _info(self, request: Any, context: Any) -> Any:
            names.append(self._name)
            return super()._info(request, context)

    one = Counted("another.driver", endpoint="/run/o.sock", registry=str(registry), alive=lambda: True)
    one._others.found = lambda *_: ""
    one.start()
    until(lambda: one._inode != 0)
    others = kubelet._Others(NAME)
    for _ in range(10):
        assert others.found(str(registry), 0) == ""
    assert names == ["another.driver"]
    one.stop()


def test_a_name_that_another_has_is_free_once_its_process_has_gone(registry):
    """The socket's file is left, as by a process that was killed."""
    second = other(registry)
    others = kubelet._Others(NAME)
    assert others.found(str(registry), 0).endswith(f"more/{NAME}-reg.sock")
    second._server.stop(None).wait()
    assert (registry / f"more/{NAME}-reg.sock").is_socket()
    assert others.found(str(registry), 0) == ""
    second.stop()


def test_a_registry_whose_path_is_too_long_is_told_once_in_words(registered, tmp_path, caplog):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with caplog.at_level("INFO"):
        registered(registry=str(long))
        until(lambda: "more than the 107 bytes" in state(tmp_path))
        time.sleep(0.5)
    assert [record.exc_info for record in caplog.records if record.name == "runvol.registration"] == [None]


def test_a_trouble_that_lasts_is_told_once_and_leaves_nothing_open(registered, registry, tmp_path, caplog, monkeypatch):
    real = os.rename

    def refused(source: str, target: str, **more: Any) -> None:
        if target.endswith("-reg.sock"):
            raise OSError(errno.EROFS, "Read-only file system", source)
        real(source, target, **more)

    with caplog.at_level("INFO"), monkeypatch.context() as patch:
        patch.setattr(kubelet.os, "rename", refused)
        registered()
        until(lambda: "Read-only" in state(tmp_path))
        before = len(os.listdir("/proc/self/fd"))
        time.sleep(1)
        assert len(os.listdir("/proc/self/fd")) < before + 20
    assert len([one for one in caplog.records if "fails" in one.message]) == 1
    until((registry / f"{NAME}-reg.sock").exists)


def test_a_registration_that_hangs_is_left_behind(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(kubelet, "_END", 0.2)
    go, asked = threading.Event(), threading.Event()

    def hang() -> bool:
        asked.set()
        return go.wait(20)

    one = Registration(NAME, endpoint="/run/csi.sock", registry=str(registry), alive=hang)
    one.start()
    assert asked.wait(5)
    began = time.monotonic()
    one.stop()
    assert time.monotonic() - began < 2
    go.set()
    one._thread.join(5)
    assert [*registry.iterdir()] == []


def test_a_socket_of_a_process_that_hangs_is_somebodys(tmp_path):
    hung = Hung(tmp_path, full=True)
    assert daemon.answers(str(tmp_path / "other-reg.sock"))
    hung.close()
    assert not daemon.answers(str(tmp_path / "other-reg.sock"))
    assert not daemon.answers(str(tmp_path / "none.sock"))
    (tmp_path / "file").touch()
    assert not daemon.answers(str(tmp_path / "file"))


def test_doctor_says_who_is_registered(registry):
    with Driver() as driver:

        def lines() -> dict[str, tuple[str, str]]:
            flags = {
                "RUNVOL_CSI_ENDPOINT": f"unix://{driver.socket}",
                "RUNVOL_CSI_NFS_ENDPOINT": f"unix://{driver.nfs_socket}",
            }
            driver.environment |= flags
            found = json.loads(driver.cli("doctor", "--json", check=False).stdout)["items"]
            return {row["subject"]: (row["state"], row["finding"]) for row in found if NAME in row["subject"]}

        assert lines()[f"driver {NAME}"][0] == "ok"
        assert "plugins_registry is not there" in lines()[f"registration {NAME}"][1]
        directory = driver.kubelet / "plugins_registry"
        directory.mkdir()
        one = PluginWatcher(directory).start()
        until(lambda: len(one.names) == 2)
        assert [state for state, _ in lines().values()] == ["ok"] * 4
        second = other(directory)
        assert lines()[f"registration {NAME}"][0] == "broken"
        second.stop()
        one.stop()
        driver.stop()
        assert {state for state, _ in lines().values()} == {"warning"}
        assert "nobody answers at" in lines()["driver nfs.csi.runvol.io"][1]
