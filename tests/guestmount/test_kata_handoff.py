"""The `kata` dialect: vectors, limits and traps of both shims."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmount import BadRequest, KataDialect, Rund3Dialect, Unsupported
from guestmount.handoff import Delivery, Dialects
from guestmount.handoff.kata import key_of, target_of

LONG = "/var/lib/kubelet/pods/6dad7281-57ff-49e4-b844-c588ceabec16/volumes/kubernetes.io~csi/pvc-0f3c2a5e-7f0e-4b0c-9d3e-2b1b7a1c9e55/mount"


@pytest.fixture
def dialect(tmp_path):
    return KataDialect(str(tmp_path / "direct-volumes"))


def a_delivery(target="/kubelet/t", **changes):
    return Delivery(**({"volume_id": "loop-1", "target": target, "device": "/dev/loop7", "fstype": "ext4"} | changes))


def written(dialect, target="/kubelet/t"):
    with open(os.path.join(dialect._root, key_of(target), "mountInfo.json")) as file:
        return json.load(file)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("abcdddd", "YWJjZGRkZA=="),
        ("../../etc/passwd", "Li4vLi4vZXRjL3Bhc3N3ZA=="),
        ("/kubelet/kata-test-vol-001/volume001", "L2t1YmVsZXQva2F0YS10ZXN0LXZvbC0wMDEvdm9sdW1lMDAx"),
        ("/a?b>c", "L2E_Yj5j"),
        (LONG, "L3Zhci9saWIva3ViZWxldC9wb2RzLzZkYWQ3MjgxLTU3ZmYtNDllNC1iODQ0LWM1ODhjZWFiZWMxNi92b2x1bWVzL2t1YmVybmV0ZXMuaW9-Y3NpL3B2Yy0wZjNjMmE1ZS03ZjBlLTRiMGMtOWQzZS0yYjFiN2ExYzllNTUvbW91bnQ="),
    ],
)  # fmt: skip
def test_keys_are_katas(path, key):
    assert key_of(path) == key
    assert target_of(key) == path


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_every_path_comes_back_from_its_key(path):
    assert target_of(key_of(path)) == path


def test_the_file_has_katas_keys_and_modes(dialect):
    dialect.deliver(a_delivery(options=("noatime",)))
    place = os.path.join(dialect._root, key_of("/kubelet/t"))
    assert written(dialect) == {
        "volume-type": "directvol",
        "device": "/dev/loop7",
        "fstype": "ext4",
        "metadata": {},
        "options": ["rw", "noatime"],
    }
    assert os.listdir(place) == ["mountInfo.json"]
    assert stat.S_IMODE(os.stat(place).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(os.path.join(place, "mountInfo.json")).st_mode) == 0o600


def test_read_only_is_an_option_that_both_shims_understand(dialect):
    dialect.deliver(a_delivery(read_only=True, options=("rw", "discard")))
    assert written(dialect)["options"] == ["ro", "discard"]


@pytest.mark.parametrize("option", ["bind", "rbind", "loop"])
def test_options_that_break_the_guests_mount_are_refused_by_name(dialect, option):
    with pytest.raises(Unsupported, match=option):
        dialect.deliver(a_delivery(options=(option,)))
    assert dialect.delivered() == []


def test_options_of_the_host_alone_stay_there(dialect):
    dialect.deliver(a_delivery(options=("_netdev", "nofail", "noatime")))
    assert written(dialect)["options"] == ["rw", "noatime"]


def test_189_bytes_are_the_longest_path_that_kata_finds(dialect):
    dialect.deliver(a_delivery("/" + "t" * 188))
    for target in ("/" + "t" * 189, "/" + "ä" * 95):
        with pytest.raises(BadRequest, match="target_path"):
            dialect.check(a_delivery(target))


def test_delivering_again_replaces_the_file_and_keeps_a_sandboxs_id(dialect):
    dialect.deliver(a_delivery())
    place = os.path.join(dialect._root, key_of("/kubelet/t"))
    inode = os.stat(place).st_ino
    open(os.path.join(place, "sandbox1"), "w").close()
    dialect.deliver(a_delivery(device="/dev/loop8"))
    assert written(dialect)["device"] == "/dev/loop8"
    assert sorted(os.listdir(place)) == ["mountInfo.json", "sandbox1"]
    assert os.stat(place).st_ino == inode
    assert [one.sandboxes for one in dialect.delivered()] == [("sandbox1",)]


def test_withdrawing_takes_the_sandbox_ids_that_kata_leaves_for_ever(dialect):
    dialect.deliver(a_delivery())
    open(os.path.join(dialect._root, key_of("/kubelet/t"), "sandbox1"), "w").close()
    dialect.withdraw("/kubelet/t")
    dialect.withdraw("/kubelet/t")
    assert os.listdir(dialect._root) == []


def test_no_reader_ever_sees_a_directory_without_its_file(dialect):
    """runtime-rs fails a container whose directory lacks the file, and takes every other name for a sandbox's id."""
    stop, wrong = threading.Event(), []
    place = os.path.join(dialect._root, key_of("/kubelet/t"))

    def watch():
        while not stop.is_set():
            try:
                fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            try:
                names = os.listdir(fd)
                if names != ["mountInfo.json"]:
                    # The directory may be on its way out, under another name, when it is read.
                    if os.path.exists(place) and os.path.samestat(os.fstat(fd), os.stat(place)):
                        wrong.append(names)
                else:
                    with open(os.open("mountInfo.json", os.O_RDONLY, dir_fd=fd)) as file:
                        json.loads(file.read())
            except FileNotFoundError:
                pass
            finally:
                os.close(fd)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(150):
        dialect.deliver(a_delivery(device=f"/dev/loop{number % 3}"))
        if number % 5 == 4:
            dialect.withdraw("/kubelet/t")
    stop.set()
    watcher.join()
    assert not wrong


def test_other_peoples_entries_are_listed_with_what_is_wrong_and_never_touched(dialect):
    dialect.deliver(a_delivery())
    os.mkdir(os.path.join(dialect._root, key_of("/stale")))
    os.mkdir(os.path.join(dialect._root, key_of("/broken")))
    with open(os.path.join(dialect._root, key_of("/broken"), "mountInfo.json"), "w") as file:
        file.write('{"volume-type": "blk"')
    os.mkdir(os.path.join(dialect._root, "not a key!"))
    os.mkdir(os.path.join(dialect._root, ".runvol-killed"))
    dialect.sweep()
    found = {one.target: one.problem for one in dialect.delivered()}
    assert found["/kubelet/t"] == ""
    assert "no mountInfo.json" in found["/stale"] and "cannot be read" in found["/broken"]
    assert len(os.listdir(dialect._root)) == 4


def test_listing_where_kata_never_ran_is_empty(dialect):
    assert dialect.delivered() == []
    dialect.withdraw("/anything")
    dialect.sweep()


def test_one_target_is_looked_at_alone_among_many(tmp_path, monkeypatch):
    """A volume's health is asked each minute; the hand-offs of a thousand others are no part of it."""
    dialect, looked = KataDialect(str(tmp_path)), []
    for number in range(30):
        dialect.deliver(Delivery(volume_id="v", target=f"/t/{number}", device=f"/dev/{number}", fstype="ext4"))
    real = dialect._look
    monkeypatch.setattr(
        dialect, "_look", lambda name, target, **more: looked.append(target) or real(name, target, **more)
    )
    both = Dialects([dialect, Rund3Dialect(["/nowhere"])])
    assert both.at("/t/7").device == "/dev/7" and both.at("/t/x") is None and both.at("/" + "x" * 300) is None
    assert looked == ["/t/7"]
