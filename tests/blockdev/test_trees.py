"""Trees that a pod has written are removed and walked whatever is in them, and nothing outside of them is touched."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline, NotRemoved, WaitExpired, syscalls, trees
from blockdev.errors import TooDeep


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """A walk that keeps a descriptor a level ends at once."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def nested(root: Path, depth: int) -> None:
    """`root/a/a/a…`, by a program of its own: a path of that length has no name."""
    root.mkdir(exist_ok=True)
    script = "import os, sys\nos.chdir(sys.argv[1])\nfor _ in range(int(sys.argv[2])):\n os.mkdir('a'); os.chdir('a')"
    subprocess.run(["python3", "-c", script, str(root), str(depth)], check=True)


def at_the_end_of(root: Path, make: str) -> None:
    script = "import os, sys\nos.chdir(sys.argv[1])\nwhile os.path.isdir('a'): os.chdir('a')\n" + make
    subprocess.run(["python3", "-c", script, str(root)], check=True)


def test_a_tree_of_three_thousand_levels_goes(tmp_path, soon, few_descriptors):
    root = tmp_path / "root"
    nested(root, 3000)
    at_the_end_of(root, "open('f', 'w').close(); os.symlink('/etc', 'link'); os.mkfifo('pipe')")
    trees.remove(str(tmp_path), "root", soon)
    assert list(tmp_path.iterdir()) == []


def test_a_wide_tree_goes(tmp_path, soon, few_descriptors):
    root = tmp_path / "root"
    for number in range(2500):  # more than are kept in mind at once
        (root / f"d{number}" / "in").mkdir(parents=True)
        (root / f"d{number}" / "f").touch()
    trees.remove(str(tmp_path), "root", soon)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_followed_opened_or_missing(tmp_path, soon):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep/to-directory").symlink_to(outside)
    (root / "deep/to-file").symlink_to(outside / "kept")
    os.mkfifo(root / "deep/pipe")
    os.mknod(root / "deep/node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    trees.remove(str(tmp_path), "root", soon)
    trees.remove(str(tmp_path), "root", soon)
    (tmp_path / "link").symlink_to(outside)
    trees.remove(str(tmp_path), "link", soon)
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "kept").read_text() == "x"


def test_a_name_that_is_swapped_with_a_link_meanwhile_leads_nowhere(tmp_path, soon):
    """As a running pod does it with renameat2(RENAME_EXCHANGE), here by two renames, as fast as it can."""
    outside = tmp_path / "outside"
    for number in range(50):
        (outside / f"d{number}").mkdir(parents=True)
        (outside / f"d{number}" / "kept").write_text("x")
    end = threading.Event()

    def swap(root: Path) -> None:
        (root / "spare").symlink_to(outside)
        while not end.is_set():
            for one, other in (("a", "b"), ("spare", "a"), ("b", "spare"), ("a", "b"), ("spare", "a"), ("b", "spare")):
                try:
                    os.rename(root / one, root / other)
                except OSError:
                    break

    for life in range(30):
        root = tmp_path / "root"
        for number in range(20):
            (root / "a" / f"d{number}").mkdir(parents=True)
            (root / "a" / f"d{number}" / "f").touch()
        end.clear()
        swapping = threading.Thread(target=swap, args=(root,))
        swapping.start()
        trees.remove(str(tmp_path), "root", soon)
        end.set()
        swapping.join()
        assert not root.exists(), life
    assert len(list(outside.glob("*/kept"))) == 50


def test_a_directory_that_is_moved_away_meanwhile_takes_nothing_else_with_it(tmp_path, soon, monkeypatch):
    """The pod has moved the directory in which we are to another place: `..` then leads there."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    (elsewhere / "kept").mkdir(parents=True)
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/f").touch()
    real, moved = trees._unlinked, []

    def unlinked(directory: int, name: str, *, ours: bool) -> None:
        if name == "f" and not moved:
            moved.append(os.rename(root / "a/b", elsewhere / "b"))
        real(directory, name, ours=ours)

    monkeypatch.setattr(trees, "_unlinked", unlinked)
    trees.remove(str(tmp_path), "root", soon)
    assert not root.exists()
    assert moved == [None]
    assert (elsewhere / "kept").is_dir()


def test_a_mount_in_the_tree_is_not_emptied(tmp_path, soon):
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "in").mkdir(parents=True)
    (outside / "kept").write_text("x")
    (root / "mounted").mkdir(parents=True)
    subprocess.run(["mount", "--bind", outside, root / "mounted"], check=True)
    try:
        with pytest.raises(NotRemoved, match="'mounted' cannot be removed: .*mounted there"):
            trees.remove(str(tmp_path), "root", soon)
        assert sorted(os.listdir(outside)) == ["in", "kept"]
        fd = os.open(root, os.O_RDONLY)
        assert [directories for _fd, directories, _others in trees.walk(fd, "walking", soon)] == [["mounted"]]
        os.close(fd)
    finally:
        subprocess.run(["umount", root / "mounted"], check=True)
    trees.remove(str(tmp_path), "root", soon)
    assert (outside / "kept").read_text() == "x"


def test_directories_that_deny_their_owner_go_too(tmp_path):
    """Without CAP_DAC_OVERRIDE, as on a share that makes root somebody else."""
    root = tmp_path / "root"
    (root / "closed/within").mkdir(parents=True)
    (root / "closed/within/f").touch()
    (root / "unwritable/within").mkdir(parents=True)
    subprocess.run(["chown", "-R", "65534:65534", tmp_path], check=True)
    (root / "closed").chmod(0)
    (root / "unwritable").chmod(0o555)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            trees.remove(fd, "root", Deadline.after(10))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not root.exists()


def test_what_cannot_be_removed_is_named(tmp_path, soon):
    root = tmp_path / "root"
    root.mkdir()
    (root / "f").touch()
    subprocess.run(["chattr", "+i", root / "f"], check=True)
    try:
        with pytest.raises(NotRemoved, match="'f' cannot be removed: Operation not permitted"):
            trees.remove(str(tmp_path), "root", soon)
    finally:
        subprocess.run(["chattr", "-i", root / "f"], check=True)


def test_it_ends_with_its_time_and_goes_on_where_it_was(tmp_path, soon):
    root = tmp_path / "root"
    nested(root, 500)
    with pytest.raises(WaitExpired, match="removing root"):
        trees.remove(str(tmp_path), "root", Deadline.after(0))
    trees.remove(str(tmp_path), "root", soon)
    assert not root.exists()


def test_every_directory_is_walked_once_however_deep(tmp_path, soon, few_descriptors):
    root = tmp_path / "root"
    nested(root, 2500)
    (root / "beside").mkdir()
    (root / "beside/f").touch()
    (root / "link").symlink_to("/etc")
    fd = os.open(root, os.O_RDONLY)
    seen = [(sorted(directories), sorted(others)) for _fd, directories, others in trees.walk(fd, "walking", soon)]
    os.close(fd)
    assert seen[0] == (["a", "beside"], ["link"])
    assert ([], ["f"]) in seen
    assert len(seen) == 2502
    trees.remove(str(tmp_path), "root", soon)


def test_a_directory_of_very_many_entries_is_walked_in_parts(tmp_path, soon, monkeypatch):
    """Directories among them; nothing is met twice, nothing is left out, and few names are held."""
    monkeypatch.setattr(trees, "_PART", 10)
    wanted = set()
    for number in range(35):
        (tmp_path / f"f{number}").touch()
        (tmp_path / f"d{number}").mkdir()
        for inner in range(12):
            (tmp_path / f"d{number}" / f"i{inner}").touch()
            wanted.add(f"d{number}/i{inner}")
        wanted |= {f"f{number}", f"d{number}"}
    met: list[str] = []
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for here, directories, others in trees.walk(fd, "walking", soon):
            assert len(directories) + len(others) <= 10
            where = os.path.relpath(os.readlink(f"/proc/self/fd/{here}"), tmp_path)
            met += [os.path.normpath(f"{where}/{name}") for name in (*directories, *others)]
    finally:
        os.close(fd)
    assert sorted(met) == sorted(wanted)


def test_names_of_directories_are_held_for_all_levels_together(tmp_path, soon, monkeypatch):
    monkeypatch.setattr(trees, "_AHEAD_IN_ALL", 8)
    monkeypatch.setattr(trees, "_FEWEST", 1)
    for one in range(6):
        for two in range(6):
            for three in range(6):
                (tmp_path / str(one) / str(two) / str(three)).mkdir(parents=True)
    fd, met, most = os.open(tmp_path, os.O_RDONLY), 0, 0
    real = trees._part
    levels: list[trees._Level] = []

    def counted(directory: int, level: trees._Level, limit: int) -> tuple[list[str], list[str]]:
        nonlocal most
        levels.append(level)
        found = real(directory, level, limit)
        most = max(most, len(found[0]) + sum(len(one.ahead) for one in {id(x): x for x in levels}.values()))
        return found

    monkeypatch.setattr(trees, "_part", counted)
    try:
        for _here, directories, _others in trees.walk(fd, "walking", soon):
            met += len(directories)
    finally:
        os.close(fd)
    assert met == 6 + 36 + 216 and most <= 8 + 2


def test_a_tree_that_nests_too_deep_is_not_walked_but_goes(tmp_path, soon, monkeypatch):
    monkeypatch.setattr(trees, "_DEEPEST", 100)
    root = tmp_path / "root"
    nested(root, 950)
    at_the_end_of(root, "open('f', 'w').close()")
    fd = os.open(root, os.O_RDONLY)
    with pytest.raises(TooDeep, match="more than 100"):
        list(trees.walk(fd, "walking", soon))
    os.close(fd)
    trees.remove(str(tmp_path), "root", soon)
    assert list(tmp_path.iterdir()) == []


def test_types_that_a_filesystem_does_not_tell_are_looked_up(tmp_path, soon, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "f").touch()
    (tmp_path / "l").symlink_to("d")
    real = syscalls.entries
    monkeypatch.setattr(
        syscalls, "entries", lambda fd, size: [(name, syscalls.DT_UNKNOWN, at) for name, _kind, at in real(fd, size)]
    )
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        (_, directories, others), *_ = trees.walk(fd, "walking", soon)
    finally:
        os.close(fd)
    assert directories == ["d"] and sorted(others) == ["f", "l"]
