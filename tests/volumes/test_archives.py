"""Trees copied by tar: everything that a tree has, never through a link, with progress, and long work that is joined."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from volumes import NoSpace, StoreFailed, VolumeUnfinished
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


def test_an_archive_that_was_tampered_with_writes_nothing_outside(tmp_path):
    import io
    import tarfile

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
