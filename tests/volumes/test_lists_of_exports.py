"""Lists over the exports of many servers: one that is hostile, dead or slow costs its own entries and no others."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev import nfs
from blockdev.errors import MountFailed
from tests.nas_of_directories import below, serve
from volumes import InvalidParameter, SizeRange, exports
from volumes.exports import Exports, Said
from volumes.nfs import NfsBackend


@pytest.fixture
def nas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every path of the server `nas` is below."""
    top = tmp_path / "nas"
    for name in ("e", "f"):
        (top / name).mkdir(parents=True)
    serve(monkeypatch, below(top))
    return top


@pytest.fixture
def fresh(nas: Path, tmp_path: Path) -> Callable[..., NfsBackend]:
    del nas
    numbers = itertools.count()

    def made(*said: Said, **more) -> NfsBackend:
        state = tmp_path / f"state-{next(numbers)}"
        state.mkdir()
        return NfsBackend(str(state), cluster=lambda: said, **more)

    return made


def make(backend: NfsBackend, name: str = "one", **more: str):
    parameters = {"backend": "nfs", "server": "nas", "path": "/e"} | more
    return backend.create(name, SizeRange(required=1 << 20), parameters, [])


def listed(backend: NfsBackend, told: list[str]) -> list[str]:
    return [one.volume_id for _place, one in backend.list(trouble=told.append)]


NAS = Said(parameters={"server": "nas", "path": "/e"})
HOSTILE = [
    Said(parameters={"server": "other", "path": "/x"}, mount_options=(f"port={'9' * 5000}",)),
    Said(parameters={"server": "other", "path": "/x", "options": f"port={'9' * 5000}"}),
    Said(parameters={"server": "nas", "path": "/e"}, mount_options=(f"port={'9' * 5000}",)),
    Said(parameters={"server": "fe80::1%\udc80", "path": "/x"}),
    Said(parameters={"server": "nas", "path": "/x", "recordsPath": "/\udc80"}),
    Said(parameters={"server": "nas", "path": "/x", "recordsPath": "no path"}),
    Said(parameters={"server": "fe80::1%\0", "path": "/x"}),
    Said(handle="\udc80", parameters={"server": "fe80::1%\udc80", "path": "/x"}),
]


@pytest.mark.parametrize("hostile", range(len(HOSTILE)))
def test_a_hostile_class_costs_nobody_elses_list(fresh, hostile):
    volume, told = make(fresh()), []
    backend = fresh(HOSTILE[hostile], NAS)
    assert listed(backend, told) == [volume.volume_id]
    assert backend.snapshots(trouble=told.append) == []
    assert all("nas:/e:" not in one for one in told)


def test_what_one_export_does_to_whoever_looks_is_its_own_trouble(fresh, monkeypatch):
    """What no system call takes is refused by Python itself, by ValueError."""
    volume, told = make(fresh()), []
    before = exports.opened

    def opened(export: nfs.Export):
        if export.server == "other":
            raise ValueError("embedded null byte")
        return before(export)

    monkeypatch.setattr(exports, "opened", opened)
    other = Said(parameters={"server": "other", "path": "/x"})
    assert listed(fresh(other, NAS), told) == [volume.volume_id]
    assert told == ["what lies on the export other:/x: embedded null byte"]


def test_words_that_cannot_be_mounted_keep_no_other_way_to_the_share_from_being_tried(monkeypatch, tmp_path):
    good, bad = nfs.Export(server="nas", path="/e"), nfs.Export(server="nas", path="/e", options=("sec=\0",))

    @contextlib.contextmanager
    def mounted(export: nfs.Export, _deadline):
        if export.options:
            raise ValueError("embedded null byte")
        yield 7

    monkeypatch.setattr(nfs, "opened", mounted)
    with exports.opened_any([bad, good]) as (root, export):
        assert (root, export) == (7, good)
    with pytest.raises(MountFailed, match="embedded null byte"), exports.opened_any([bad]):
        pass


@pytest.mark.parametrize("value", ["9" * 5000, "65536", "-1", "", "x", "٣", "2049 ", "02049"])
@pytest.mark.parametrize("key", ["port", "mountport"])
def test_a_port_that_is_none_is_refused_in_words(key, value):
    option = f"{key}={value}"
    for parameters, flags in (({"options": option}, []), ({}, [option])):
        with pytest.raises(InvalidParameter, match="from 0 to 65535") as refused:
            exports.of_class({"server": "nas", "path": "/e"} | parameters, flags)
        assert len(str(refused.value)) < 200
    assert nfs.Export(server="nas", path="/e", options=(option,)).port == nfs.PORT


def test_a_port_is_what_its_last_option_says():
    assert exports.of_class({"server": "nas", "path": "/e"}, ["port=1", "port=65535"]).port == 65535
    assert exports.of_class({"server": "nas", "path": "/e"}, ["port=0"]).port == nfs.PORT, "the portmapper is asked"


# -- servers that do not answer


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(exports, "_LONGEST_LIST", 1.0)
    monkeypatch.setattr(exports, "_FAIR", 0.3)


class Dead:
    """Servers that take a while to be found silent. `asked`: all servers, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.asked: list[str] = []
        before = exports.opened

        def opened(export: nfs.Export):
            self.asked.append(export.server)
            if export.server == "nas":
                return before(export)
            time.sleep(seconds)
            raise nfs.ServerSilent(export.server, "nobody")

        monkeypatch.setattr(exports, "opened", opened)


def dead(count: int) -> list[Said]:
    return [Said(parameters={"server": f"dead{number}", "path": "/x"}) for number in range(count)]


def test_however_many_servers_are_dead_a_list_ends_and_says_what_it_has_not_reached(fresh, monkeypatch, quick):
    backend, told = fresh(*dead(128)), []
    volume = make(backend)
    Dead(monkeypatch, 0.2)
    began = time.monotonic()
    assert listed(backend, told) == [volume.volume_id], "one that has worked here is asked first"
    assert time.monotonic() - began < 2.0
    missed = [one for one in told if "not reached within 1 s" in one]
    assert len(missed) == 1
    assert len(missed[0]) < 300
    assert len(told) - 1 < 128
    assert all("nobody" in one for one in told if one not in missed)


def test_servers_that_were_silent_are_asked_last_by_the_next_list(fresh, monkeypatch, quick):
    """So the living ones are found, however many others the cluster names before them."""
    volume, told = make(fresh()), []
    backend, servers = fresh(*dead(60), NAS), Dead(monkeypatch, 0.2)
    for _list in range(3):
        if found := listed(backend, told):
            break
    assert found == [volume.volume_id]
    servers.asked.clear()
    assert listed(backend, told) == found
    assert "nas" in servers.asked[:16]


def test_a_server_that_answers_again_is_not_asked_last_any_more(fresh):
    backend = fresh()
    one = [nfs.Export(server="one", path="/")], [nfs.Export(server="two", path="/")]
    silent = backend._exports._silent
    silent.note(("one", nfs.PORT))
    assert silent.last([*one]) == [one[1], one[0]]
    silent.forget(("one", nfs.PORT))
    assert silent.last([*one]) == [*one]
    silent.note(("gone", nfs.PORT))
    silent.last([*one])
    assert not silent._servers, "nobody names it any more"


def test_a_share_that_hangs_is_left_behind_once(fresh, monkeypatch, quick):
    """Its server takes the connection, and its files answer never."""
    volume, told, go, looks = make(fresh()), [], threading.Event(), []
    before = exports.opened

    def opened(export: nfs.Export):
        if export.server != "nas":
            looks.append(export.server)
            go.wait(20)
            raise nfs.ServerSilent(export.server, "at last")
        return before(export)

    monkeypatch.setattr(exports, "opened", opened)
    backend = fresh(Said(parameters={"server": "hangs", "path": "/x"}), NAS)
    try:
        for _list in range(3):
            began = time.monotonic()
            assert listed(backend, told) == [volume.volume_id]
            assert time.monotonic() - began < 2.0
        assert looks == ["hangs"], "each list left another thread behind"
        assert {*told} == {"what lies on the export hangs:/x: looking at the export hangs:/x did not end within 1.0 s"}
    finally:
        go.set()


def test_a_share_that_had_no_time_is_no_silent_one(fresh, monkeypatch, quick):
    monkeypatch.setattr(exports, "_AT_ONCE", 1)
    monkeypatch.setattr(exports, "_LONGEST_LIST", 0.5)
    told: list[str] = []
    backend, _servers = fresh(*dead(3)), Dead(monkeypatch, 0.4)
    assert listed(backend, told) == []
    assert backend._exports._silent._servers == {("dead0", nfs.PORT)}
    assert sum("not reached" in one for one in told) == 1


def test_exports_without_any_trouble_tell_none(tmp_path, nas):
    told: list[str] = []
    known = Exports(str(tmp_path), ["nas:/e", "nas:/f"])
    found = known.on_each(lambda _root, export: [export.path], told.append)
    assert sorted(found) == ["/e", "/f"]
    assert told == []
