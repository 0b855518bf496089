"""Broken installations: the snapshotter's files on a node without device-mapper. Pools are in the kernel tier."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Callable

import pytest

from snapshotter.model import Kind
from snapshotter.store import STORE, Store
from tests.installation import Installation
from tests.runvol.test_broken import Broken, found_and_put_right, snapshotter

MIB = 1 << 20


def _store(it: Installation) -> Store:
    return Store(str(it.state / "snapshotter" / STORE))


def _fact(name: str, value: str) -> Callable[[Installation], None]:
    def write(it: Installation) -> None:
        store = _store(it)
        with store.transaction():
            store.set_fact(name, value)
        store.close()

    return write


def _quarantined(it: Installation) -> None:
    store = _store(it)
    with store.transaction():
        store.quarantine([4000], 1)
    store.close()


def _released(it: Installation) -> None:
    store = _store(it)
    with store.transaction():
        store.release([4000])
    store.close()


def _damaged(name: str) -> Callable[[Installation], None]:
    def damage(it: Installation) -> None:
        path = it.state / "snapshotter" / name
        path.rename(path.with_suffix(".backup"))
        path.write_bytes(b"nothing that anybody reads" * 100)

    return damage


def _back(name: str) -> Callable[[Installation], object]:
    return lambda it: (it.state / "snapshotter" / name).with_suffix(".backup").rename(it.state / "snapshotter" / name)


def _large(it: Installation) -> None:
    """The pool's file has 1 GiB, and its disk 50 MiB."""
    with (it.state / "snapshotter" / "data").open("wb") as file:
        file.truncate(1 << 30)
    (it.state / "snapshotter" / "metadata").write_bytes(b"\0" * MIB)


def _more_room(it: Installation) -> None:
    subprocess.run(["mount", "-o", "remount,size=2g", it.state / "snapshotter"], check=True)


FILES = (
    Broken(id="pool.description-damaged", breaks=_damaged("pool.json"), words="pool.json", by_hand=_back("pool.json")),
    Broken(id="pool.missing", words="`runvol pool init`",
           breaks=lambda it: (it.state / "snapshotter/pool.json").rename(it.state / "snapshotter/kept"),
           by_hand=lambda it: (it.state / "snapshotter/kept").rename(it.state / "snapshotter/pool.json")),
    Broken(id="pool.over-promised", breaks=_large, words="more room", by_hand=_more_room),
    Broken(id="snapshotter.store-missing", words="`systemctl start runvol-snapshotter`",
           breaks=lambda it: (it.state / "snapshotter" / STORE).unlink(), by_hand=lambda it: _store(it).close()),
    Broken(id="snapshotter.store-damaged", breaks=_damaged(STORE), words="`runvol pool repair-store`", by_hand=_back(STORE)),
    Broken(id="snapshotter.other-past", breaks=_fact("past", "the store is older than the pool"), words="its message",
           by_hand=_fact("past", "")),
    Broken(id="snapshotter.ids-running-out", breaks=_fact("next_device", str(15 << 20)), words="a new epoch begins",
           by_hand=_fact("next_device", "1")),
    Broken(id="snapshotter.quarantine", breaks=_quarantined, words="`runvol pool quarantine`", by_hand=_released),
    Broken(id="snapshotter.disk-refuses", words="mount the filesystem anew",
           breaks=lambda it: subprocess.run(["mount", "-o", "remount,ro", it.state / "snapshotter"], check=True),
           by_hand=lambda it: subprocess.run(["mount", "-o", "remount,rw", it.state / "snapshotter"], check=True)),
)  # fmt: skip


KEYS = ("k8s.io/1/sha256:aa", "k8s.io/2/the container", "by hand")


def _rows(it: Installation, kind: str) -> None:
    with contextlib.closing(sqlite3.connect(it.state / "snapshotter" / STORE)) as store, store:
        for key in KEYS:
            store.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, '', ?, 2, 0, 4096, 'ext4', 0, 0, '', '')", (key, kind)
            )


def _forgotten(it: Installation, key: str) -> None:
    """What the service does for `ctr snapshots rm`."""
    store = _store(it)
    with store.transaction():
        store.remove_damaged(key, 1)
    store.close()


def test_rows_that_are_damaged_are_counted_and_the_first_is_named_until_all_are_gone() -> None:
    with Installation() as it:
        (it.state / "snapshotter").mkdir(parents=True)
        snapshotter()(it)
        _store(it).close()
        _rows(it, str(int(Kind.ACTIVE)))
        assert not it.ill("snapshotter.rows-damaged")
        _rows(it, "9")
        (found,) = it.ill("snapshotter.rows-damaged")
        assert found.state == "warning" and "of 3 snapshots is damaged" in found.finding
        assert "'by hand', and 2 more" in found.finding and "remove it in containerd, and the others alike" in found.fix
        _forgotten(it, "by hand")
        for key, typed in zip(KEYS, ("sha256:aa", "'the container'"), strict=False):
            (found,) = it.ill("snapshotter.rows-damaged")
            assert f"`ctr -n k8s.io snapshots --snapshotter runvol rm {typed}`" in found.fix
            _forgotten(it, key)
        assert not it.ill("snapshotter.rows-damaged")


@pytest.mark.parametrize("one", FILES, ids=[one.id for one in FILES])
def test_files(one: Broken) -> None:
    with Installation() as it:
        (it.state / "snapshotter").mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", it.state / "snapshotter"], check=True)
        snapshotter()(it)
        _store(it).close()
        found_and_put_right(it, one)


def test_without_device_mapper_a_pool_that_is_described_is_broken() -> None:
    with Installation() as it:
        snapshotter()(it)
        (found,) = it.ill("devicemapper.missing")
        assert found.state == "broken" and found.fix.startswith("`modprobe -a dm_mod dm_thin_pool`")
