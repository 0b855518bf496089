"""Work that outlasts its call: it ends when what it makes is deleted, and a deletion goes on behind."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time

import pytest

from blockdev import Deadline, trees
from volumes import AccessMode, Capability, Catalog, ContentSource, SizeRange, VolumeUnfinished, copies, directory
from volumes.directory import DirectoryBackend

pytestmark = pytest.mark.kernel
RAW = [Capability(mode=AccessMode.SINGLE_NODE_WRITER, raw=True)]


@pytest.fixture
def slow_copies(monkeypatch):
    """Copies without reflinks, in small steps that take a while."""
    real = os.copy_file_range

    def slow(*arguments):
        time.sleep(0.02)
        return real(*arguments)

    monkeypatch.setattr(copies, "_reflink", lambda _source, _writer: False)
    monkeypatch.setattr(copies, "_CHUNK", 65536)
    monkeypatch.setattr(os, "copy_file_range", slow)


def full(catalog, name="v", mebibytes=16):
    volume = catalog.loop.create(name, SizeRange(required=mebibytes << 20), {}, RAW)
    with open(catalog.loop.attach(volume.volume_id).path, "r+b") as file:
        file.write(os.urandom(mebibytes << 20))
    return volume.volume_id


@pytest.mark.parametrize("kind", ["snapshot", "group", "volume"])
def test_a_copy_ends_when_what_it_makes_is_deleted(tmp_path, slow_copies, kind):
    """And the next one of that name is none of its business."""
    catalog = Catalog.open(str(tmp_path))
    volume = full(catalog)

    def begin():
        if kind == "snapshot":
            return catalog.loop.take_snapshot("s", volume, Deadline.after(0.8)).snapshot_id
        if kind == "group":
            return catalog.grouping.create_group("g", [volume], Deadline.after(0.8)).group_id
        source = ContentSource(kind="volume", source_id=volume)
        return catalog.loop.create("c", SizeRange(required=16 << 20), {}, RAW, source).volume_id

    def rows():
        with contextlib.closing(sqlite3.connect(tmp_path / "volumes.db")) as store:
            asked = {
                "group": "SELECT in_group FROM snapshots WHERE state='creating'",
                "snapshot": "SELECT id FROM snapshots WHERE state='creating'",
                "volume": "SELECT id FROM volumes WHERE state='creating'",
            }
            return [one for (one,) in store.execute(asked[kind])]

    if kind == "volume":

        def waits() -> None:
            with pytest.raises(VolumeUnfinished, match="deleted"):
                begin()

        caller = threading.Thread(target=waits)
        caller.start()
        Deadline.after(5).poll("its row", lambda: bool(rows()))
    else:
        with pytest.raises(VolumeUnfinished, match="under way"):
            begin()
    (made,) = rows()
    started = time.monotonic()
    {"snapshot": catalog.loop.delete_snapshot, "group": catalog.grouping.delete_group,
     "volume": catalog.loop.delete}[kind](made)  # fmt: skip
    assert time.monotonic() - started < 2
    if kind == "volume":
        caller.join()
    assert not rows()
    assert len(os.listdir(tmp_path / "volumes")) == 1
    if kind != "volume":
        again = [VolumeUnfinished]
        until = time.monotonic() + 30
        while again == [VolumeUnfinished] and time.monotonic() < until:
            with contextlib.suppress(VolumeUnfinished):
                again = [begin()]
        assert again[0] not in (made, VolumeUnfinished) or kind == "group"
    catalog.close()


def test_a_deletion_of_many_files_goes_on_behind(tmp_path, monkeypatch):
    one = DirectoryBackend(str(tmp_path))
    use = [Capability(mode=AccessMode.SINGLE_NODE_WRITER)]
    made = one.create("v", SizeRange(required=1 << 20), {"quota": "none"}, use).volume_id
    os.makedirs(tmp_path / "directories" / made / "inner")
    go, real = threading.Event(), trees.remove

    def slow(parent, name, deadline):
        assert go.wait(20)
        real(parent, name, deadline)

    monkeypatch.setattr(trees, "remove", slow)
    monkeypatch.setattr(directory, "PATIENCE", 0.1)
    for _ in range(2):
        with pytest.raises(VolumeUnfinished, match="removing the files of volume .* is under way"):
            one.delete(made)
        assert one.get(made) is None
    with pytest.raises(VolumeUnfinished, match="at work on"):
        one.create("v", SizeRange(required=1 << 20), {"quota": "none"}, use)
    go.set()
    monkeypatch.setattr(directory, "PATIENCE", 10)
    one.delete(made)
    assert os.listdir(tmp_path / "directories") == []
    again = one.create("v", SizeRange(required=1 << 20), {"quota": "none"}, use).volume_id
    assert again != made
    one.delete(again)
    one.close()
