"""The plugin is known to kubelet whatever of the two goes and comes, and never beside another socket for its name."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from csi import kubelet
from csi.kubelet import Registration
from tests.driver import Driver
from tests.plugin_watcher import PluginWatcher

NAME = "csi.runvol.io"


def wait(ready: Callable[[], bool], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.02)


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
        wait(lambda: one.names == both)
        told = driver.run / f"registration-{NAME}.json"
        wait(lambda: json.loads(told.read_text())["state"] == "registered")
        driver.process.send_signal(signal.SIGKILL)
        driver.stop()
        driver.start()
        wait(lambda: one.asked == 4 and one.names == both)
        driver.stop()
        wait(lambda: one.names == {} and [*registry.iterdir()] == [])
        assert json.loads(told.read_text())["state"] == "not registered: the plugin has ended"
        one.stop()


def test_kubelet_that_comes_later_finds_it(registered, registry):
    registered()
    wait(lambda: bool([*registry.iterdir()]))
    for _restart in range(2):
        one = PluginWatcher(registry).start()
        wait(lambda one=one: NAME in one.names)
        one.stop()


def test_a_directory_that_comes_later_is_waited_for(registered, registry, tmp_path):
    registry.rmdir()
    registered()
    wait(lambda: "is not there; kubelet makes it" in state(tmp_path))
    registry.mkdir()
    one = PluginWatcher(registry).start()
    wait(lambda: state(tmp_path) == "registered")
    one.stop()


def test_a_socket_that_somebody_removes_is_made_again(registered, registry, watcher):
    registered()
    for turn in range(1, 4):
        wait(lambda turn=turn: watcher.asked == turn and NAME in watcher.names)
        (registry / f"{NAME}-reg.sock").unlink()


def test_what_kubelet_refuses_is_asked_again(registered, registry, monkeypatch, tmp_path):
    monkeypatch.setattr(kubelet, "_FIRST_WAIT", 0.1)
    refusals = iter(["no such node", "no such node"])
    one = PluginWatcher(registry, refuse=lambda _info: next(refusals, "")).start()
    registered()
    wait(lambda: NAME in one.names and one.asked == 3)
    wait(lambda: state(tmp_path) == "registered")
    one.stop()


def test_kubelet_that_never_answers_is_asked_again(registered, registry, monkeypatch):
    monkeypatch.setattr(kubelet, "_FIRST_WAIT", 0.1)
    registered()
    path, seen = registry / f"{NAME}-reg.sock", set()
    wait(lambda: (seen.add(path.lstat().st_ino) if path.exists() else None) or len(seen) > 2)


def test_it_is_registered_as_long_as_it_answers(registered, registry, watcher, monkeypatch):
    monkeypatch.setattr(kubelet, "_SILENT", 3)
    answers = iter([False, False, True, False, False, True, *[False] * 4])
    registered(alive=lambda: next(answers, True))
    wait(lambda: NAME in watcher.names)
    wait(lambda: watcher.names == {})
    wait(lambda: NAME in watcher.names)
    assert watcher.asked == 2


def other(registry: Path, name: str = NAME) -> Registration:
    """As a node-driver-registrar beside runvol would be."""
    (registry / "more").mkdir(exist_ok=True)
    one = Registration(name, endpoint="/run/other.sock", registry=str(registry / "more"), alive=lambda: True)
    one._others.found = lambda *_: ""
    one.start()
    wait(lambda: one._inode != 0)
    return one


def test_there_is_no_second_socket_for_a_name(registered, registry, watcher, tmp_path):
    first = other(registry)
    wait(lambda: NAME in watcher.names)
    registered()
    wait(lambda: "registers csi.runvol.io already" in state(tmp_path))
    assert not (registry / f"{NAME}-reg.sock").exists()
    first.stop()
    wait(lambda: watcher.names == {NAME: "/run/csi.sock"})


def test_a_second_socket_that_comes_later_is_told_and_takes_nothing_away_for_long(
    registered, registry, watcher, tmp_path
):  # fmt: skip
    registered()
    wait(lambda: watcher.names == {NAME: "/run/csi.sock"})
    second = other(registry)
    wait(lambda: "registers csi.runvol.io as well" in state(tmp_path))
    second.stop()
    wait(lambda: watcher.names == {NAME: "/run/csi.sock"} and state(tmp_path) == "registered")


def test_other_drivers_and_dead_sockets_are_none(registered, registry, watcher):
    first = other(registry, "another.driver")
    dead = other(registry, NAME)
    dead._server.stop(None).wait()
    dead._server = None
    registered()
    wait(lambda: watcher.names.get(NAME) == "/run/csi.sock")
    first.stop()
    dead.stop()


def test_doctor_says_who_is_registered(registry):
    with Driver() as driver:

        def lines() -> dict[str, tuple[str, str]]:
            flags = {
                "RUNVOL_CSI_ENDPOINT": f"unix://{driver.socket}",
                "RUNVOL_CSI_NFS_ENDPOINT": f"unix://{driver.nfs_socket}",
            }
            driver.environment |= flags
            found = json.loads(driver.cli("doctor", "--json", check=False).stdout)
            return {row["subject"]: (row["state"], row["finding"]) for row in found if NAME in row["subject"]}

        assert lines()[f"driver {NAME}"][0] == "ok"
        assert "plugins_registry is not there" in lines()[f"registration {NAME}"][1]
        directory = driver.kubelet / "plugins_registry"
        directory.mkdir()
        one = PluginWatcher(directory).start()
        wait(lambda: len(one.names) == 2)
        assert [state for state, _ in lines().values()] == ["ok"] * 4
        second = other(directory)
        assert lines()[f"registration {NAME}"][0] == "broken"
        second.stop()
        one.stop()
        driver.stop()
        assert {state for state, _ in lines().values()} == {"warning"}
        assert "is `runvol csi` running" in lines()["driver nfs.csi.runvol.io"][1]
