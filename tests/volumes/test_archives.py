"""Trees copied by tar: everything that a tree has, never through a link, with progress, and long work that is joined."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdev import confined, syscalls
from blockdev.errors import PathTooLong
from volumes import NoSpace, StoreFailed, VolumeUnfinished, archives
from volumes.archives import copy, pack, unpack
from volumes.jobs import Jobs, Progress


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep/er").mkdir(parents=True)
    (root / "deep/er/file").write_bytes(os.urandom(3 << 20))
    (root / "owned").write_text("x")
    os.chown(root / "owned", 1234, 5678)
    (root / "owned").chmod(0o640)
    os.link(root / "owned", root / "again")
    (root / "link").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("../nowhere")
    os.mkfifo(root / "pipe")
    with (root / "sparse").open("wb") as file:
        file.truncate(256 << 20)
    (root / "-odd\nname*?").write_text("odd")
    (root / "readonly").mkdir(0o555)
    os.utime(root / "owned", (1, 1))
    return root


def facts(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        seen = path.lstat()
        content: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (stat.filemode(seen.st_mode), seen.st_uid, seen.st_gid, content,
                                              int(seen.st_mtime) if path.is_file() else None)  # fmt: skip
    return found


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def test_an_archive_gives_back_what_was_packed(tree, tmp_path):
    new, progress = tmp_path / "new", Progress("p")
    new.mkdir()
    with (tmp_path / "a.tar").open("wb") as archive:
        pack(opened(tree), archive, progress)
    assert (tmp_path / "a.tar").stat().st_size < 10 << 20, "a hole is not written out"
    assert progress.done == (tmp_path / "a.tar").stat().st_size
    with (tmp_path / "a.tar").open("rb") as archive:
        unpack(archive, opened(new), Progress("u"))
    assert facts(new) == facts(tree)
    assert (new / "owned").samefile(new / "again")
    assert (new / "sparse").stat().st_blocks * 512 < 1 << 20


def test_a_copy_is_the_same_without_an_archive(tree, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    copy(opened(tree), opened(new), Progress("c"), without=("deep",))
    expected = {name: what for name, what in facts(tree).items() if not name.startswith("deep")}
    assert facts(new) == expected


def test_only_the_name_at_the_top_is_left_out(tree, tmp_path):
    (tree / "deep/deep").mkdir()
    new = tmp_path / "new"
    new.mkdir()
    copy(opened(tree), opened(new), Progress("c"), without=("er",))
    assert (new / "deep/er/file").exists()


def deep(root: Path, levels: int, name: str) -> None:
    """Directories in one another, deeper than a path can say."""
    here = os.open(root, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("f" * 255, os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


@pytest.mark.parametrize("how", ["archive", "copy"])
def test_what_cannot_be_unpacked_again_is_not_packed(tmp_path, how):
    source, new = tmp_path / "source", tmp_path / "new"
    source.mkdir()
    new.mkdir()
    deep(source, 20, "d" * 200)
    try:
        with (
            (tmp_path / "a.tar").open("wb") as archive,
            pytest.raises(PathTooLong, match="'dddd.*longer than 3838 bytes"),
        ):
            (pack if how == "archive" else copy)(
                opened(source), archive if how == "archive" else opened(new), Progress("p")
            )
        assert (tmp_path / "a.tar").stat().st_size == 0
        assert os.listdir(new) == []
    finally:
        subprocess.run(["rm", "-rf", source], check=True)


def test_the_longest_path_that_is_packed_comes_out_again(tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    source.mkdir()
    new.mkdir()
    deep(source, 19, "d" * 201)  # 3838 bytes, and a file with the longest of names in it
    with (tmp_path / "a.tar").open("w+b") as archive:
        pack(opened(source), archive, Progress("p"))
        archive.seek(0)
        unpack(archive, opened(new), Progress("u"))
    found = subprocess.run(["find", new, "-type", "f", "-printf", "%P"], check=True, capture_output=True).stdout
    assert len(found) == 19 * 202 + 255


def test_an_archive_that_was_tampered_with_writes_nothing_outside(tmp_path):
    outside, new = tmp_path / "outside", tmp_path / "new"
    outside.mkdir()
    new.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as bad:
        for name, link in (("../escaped", ""), (f"{outside}/absolute", ""), ("way", str(outside)), ("way/through", ""),
                           ("up", ".."), ("up/through", "")):  # fmt: skip
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
                bad.addfile(member)
            else:
                member.size = 1
                bad.addfile(member, io.BytesIO(b"x"))
    with (tmp_path / "a.tar").open("rb") as archive, pytest.raises(StoreFailed):
        unpack(archive, opened(new), Progress("u"))
    assert os.listdir(outside) == []
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "new", "outside"]


HOSTILE = {
    "a link, and what lies behind it": [("way", "{outside}"), ("way/new", None), ("way/theirs", None)],
    "a link upwards": [("up", "../outside"), ("up/new", None), ("up/theirs", None)],
    "a link in two steps": [("one", ".."), ("one/two", None), ("three", "one/outside"), ("three/theirs", None)],
    "a directory that becomes a link": [("d", ...), ("d/f", None), ("d", "{outside}"), ("d/theirs", None)],
    "a hard link": [("hard", "={outside}/theirs"), ("hard", None)],
    "a hard link upwards": [("hard", "=../outside/theirs"), ("hard", None)],
    "a hard link behind a link": [("way", "{outside}"), ("hard", "=way/theirs"), ("hard", None)],
    "upwards": [("../outside/theirs", None), ("d/../../outside/new", None), ("../outside", ...), ("..", ...)],
    "absolute": [("{outside}/theirs", None), ("{outside}/new", None), ("{outside}", ...), ("/", ...)],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_changes_nothing_outside(tmp_path, victim, members):
    new, before = tmp_path / "new", whole(victim)
    new.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as bad:
        for name, what in members:
            member = tarfile.TarInfo(name.format(outside=victim))
            member.mode, member.uid, member.gid = 0o4777, 12, 13
            if what is None:
                member.size = 1
            elif what is ...:
                member.type = tarfile.DIRTYPE
            else:
                member.type = tarfile.LNKTYPE if what.startswith("=") else tarfile.SYMTYPE
                member.linkname = what.format(outside=victim).lstrip("=")
            bad.addfile(member, io.BytesIO(b"x") if what is None else None)
    with (tmp_path / "a.tar").open("rb") as archive, contextlib.suppress(StoreFailed):
        unpack(archive, opened(new), Progress("u"))
    assert whole(victim) == before
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "new", "outside"]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the host, with the names that a share's volume has too."""
    outside = tmp_path / "outside"
    (outside / "in/deep").mkdir(parents=True)
    for name in ("theirs", "in/theirs", "in/deep/theirs", "in/deep/7"):
        (outside / name).write_text("theirs")
        (outside / name).chmod(0o600)
    return outside


def whole(root: Path) -> list[object]:
    """All that can be seen of a tree from outside; the time of the last change tells of any other."""
    return [(path, seen.st_ino, seen.st_mode, seen.st_nlink, seen.st_uid, seen.st_gid, seen.st_size, seen.st_ctime_ns)
            for path in sorted((root, *root.rglob("*"))) for seen in [path.lstat()]]  # fmt: skip


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    root = tmp_path / "nested"
    for top in range(8):
        (root / f"d{top}/in/deep").mkdir(parents=True)
        for place in ("", "in", "in/deep"):
            for number in range(60):
                file = root / f"d{top}" / place / str(number)
                file.write_text("* * * * * root id\n")
                os.chown(file, 12, 13)
                file.chmod(0o4755)
            os.chown(root / f"d{top}" / place, 12, 13)
    return root


@contextlib.contextmanager
def swapped(new: Path, victim: Path) -> Iterator[list[int]]:
    """Each directory at the top of `new` is a link to the victim half of the time; how often they were exchanged."""
    stop, count = threading.Event(), [0]
    links = new.parent / "links"
    links.mkdir()
    for top in range(8):
        (links / f"d{top}").symlink_to(victim)

    def swap() -> None:
        while not stop.is_set():
            for top in range(8):
                with contextlib.suppress(FileNotFoundError):
                    syscalls.exchange(str(new / f"d{top}"), str(links / f"d{top}"))
                    count[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()
        shutil.rmtree(links)


@pytest.mark.parametrize("how", ["unpack", "copy"])
@pytest.mark.parametrize("links", ["followed", "not followed"])
def test_a_directory_that_becomes_a_link_meanwhile_leads_nowhere(tmp_path, nested, victim, how, links):
    before, exchanged = whole(victim), 0
    with (tmp_path / "a.tar").open("wb") as archive:
        pack(opened(nested), archive, Progress("p"))
    until = time.monotonic() + 2
    while time.monotonic() < until:
        new = tmp_path / "new"
        new.mkdir()
        target = opened(new)
        if links == "not followed":
            target = syscalls.open_tree_clone(str(new))
            syscalls.mount_setattr(target, syscalls.MOUNT_ATTR_NOSYMFOLLOW)
        with swapped(new, victim) as count, contextlib.suppress(StoreFailed):
            if how == "copy":
                copy(opened(nested), target, Progress("c"))
            else:
                with (tmp_path / "a.tar").open("rb") as archive:
                    unpack(archive, target, Progress("u"))
        exchanged += count[0]
        os.close(target)
        shutil.rmtree(new)
        assert whole(victim) == before
    assert exchanged > 100


def test_a_tar_that_cannot_be_confined_is_not_run(tmp_path, tree, monkeypatch):
    new, confined_ = tmp_path / "new", confined.command
    new.mkdir()

    def without_the_right(*arguments: Any) -> list[str]:
        return ["setpriv", "--bounding-set=-sys_admin", *confined_(*arguments)]

    assert confined.doubt("/") == ""
    monkeypatch.setattr(confined, "command", without_the_right)
    assert "Operation not permitted" in confined.doubt("/")
    with (tmp_path / "a.tar").open("wb") as archive:
        pack(opened(tree), archive, Progress("p"))
    with pytest.raises(StoreFailed, match="tar: it cannot be confined.*Operation not permitted"):
        copy(opened(tree), opened(new), Progress("c"))
    with (tmp_path / "a.tar").open("rb") as archive, pytest.raises(StoreFailed, match="tar: it cannot be confined"):
        unpack(archive, opened(new), Progress("u"))
    assert os.listdir(new) == []
    monkeypatch.setitem(archives._ENVIRONMENT, "PATH", str(new))
    with (tmp_path / "a.tar").open("rb") as archive, pytest.raises(StoreFailed, match="tar is not installed"):
        unpack(archive, opened(new), Progress("u"))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 1000])
def test_what_is_no_archive_is_an_error(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "new").mkdir()
    with (tmp_path / "a.tar").open("rb") as archive, pytest.raises(StoreFailed, match="tar"):
        unpack(archive, opened(tmp_path / "new"), Progress("u"))


def test_a_full_disk_is_told_as_one(tree):
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None: ...

    with pytest.raises(OSError, match="No space"):
        pack(opened(tree), Full(), Progress("p"))  # type: ignore[arg-type]
    assert NoSpace is not StoreFailed


def test_who_asks_again_joins_the_work():
    jobs, go, began = Jobs(), threading.Event(), []

    def work(progress: Progress) -> None:
        began.append(1)
        progress.total, progress.done = 100, 40
        go.wait(10)

    with pytest.raises(VolumeUnfinished, match="a copy is under way"):
        jobs.finished("k", "a copy", work, 0.1)
    with pytest.raises(VolumeUnfinished):
        jobs.finished("k", "a copy", work, 0.0)
    assert jobs.progress("k").percent == 40
    go.set()
    jobs.finished("k", "a copy", work, 10)
    assert began == [1]
    assert jobs.progress("k") is None
    jobs.finished("k", "a copy", work, 10)
    assert began == [1, 1]


def test_a_failure_is_told_once_and_then_tried_again():
    jobs, tries = Jobs(), []

    def work(progress: Progress) -> None:
        tries.append(time.monotonic())
        if len(tries) == 1:
            raise StoreFailed("tar ended")

    with pytest.raises(StoreFailed):
        jobs.finished("k", "a copy", work, 10)
    jobs.finished("k", "a copy", work, 10)
    assert len(tries) == 2


def test_few_works_go_on_and_few_callers_wait():
    jobs, go = Jobs(running=1, waiting=1), threading.Event()

    def work(_progress: Progress) -> None:
        go.wait(10)

    first = threading.Thread(target=lambda: jobs.finished("a", "the first", work, 10))
    first.start()
    while jobs.progress("a") is None:
        time.sleep(0.01)
    started = time.monotonic()
    with pytest.raises(VolumeUnfinished, match="the first is under way"):
        jobs.finished("a", "the first", work, 10)
    with pytest.raises(VolumeUnfinished, match="other copies go first"):
        jobs.finished("b", "another", work, 10)
    assert time.monotonic() - started < 5
    go.set()
    first.join()
    jobs.finished("b", "another", work, 10)


def test_a_failure_that_nobody_heard_of_is_no_later_callers(monkeypatch):
    jobs, tries = Jobs(), []

    def work(_progress: Progress) -> None:
        tries.append(1)
        time.sleep(0.2)
        if len(tries) == 1:
            raise StoreFailed("tar ended")

    with pytest.raises(VolumeUnfinished):
        jobs.finished("k", "a copy", work, 0.0)
    time.sleep(0.4)
    monkeypatch.setattr("volumes.jobs._STALE", 0.1)
    jobs.finished("k", "a copy", work, 10)
    assert len(tries) == 2
