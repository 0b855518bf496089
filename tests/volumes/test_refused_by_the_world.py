"""What a disk refuses to a backend's call, at whatever step: never a mistake of ours, told in one sentence, and of one
file nobody else's trouble."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockdev import Deadline
from csi.errors import code_of, sentence_of
from volumes import AccessMode, Capability, ContentSource, SizeRange
from volumes.directory import DirectoryBackend
from volumes.loop import LoopBackend

MIB = 1 << 20
REFUSALS = ("EPERM", "EACCES", "EROFS", "ENOENT", "ENOTEMPTY", "ENODEV", "ESTALE", "EIO", "ENOSPC", "EDQUOT", "EUCLEAN",
            "ESHUTDOWN", "ELOOP")  # fmt: skip
CALLS = ("open", "mkdir", "rename", "unlink", "rmdir", "scandir", "listdir", "stat", "lstat", "statvfs", "fsync",
         "ftruncate", "posix_fallocate", "copy_file_range", "getxattr", "setxattr", "chmod")  # fmt: skip
RAW = [Capability(mode=AccessMode.SINGLE_NODE_WRITER, raw=True)]
FILES = [Capability(mode=AccessMode.SINGLE_NODE_WRITER)]
# Verbs after which everything is as it was.
READING = ("get", "list", "snapshots", "capacity", "attach")
SIZE, LARGER = SizeRange(required=MIB), SizeRange(required=4 * MIB)
NONE = {"quota": "none"}

LOOP: dict[str, Callable[[LoopBackend, str, str], object]] = {
    "create": lambda b, _v, _s: b.create("other", SIZE, {}, RAW),
    "create preallocated": lambda b, _v, _s: b.create("other", SIZE, {"preallocate": "true"}, RAW),
    "restore": lambda b, _v, s: b.create("other", SIZE, {}, RAW, ContentSource(kind="snapshot", source_id=s)),
    "clone": lambda b, v, _s: b.create("other", SIZE, {}, RAW, ContentSource(kind="volume", source_id=v)),
    "delete": lambda b, v, _s: b.delete(v),
    "expand": lambda b, v, _s: b.expand(v, LARGER),
    "promise": lambda b, v, _s: b.promise(v, LARGER),
    "take snapshot": lambda b, v, _s: b.take_snapshot("another", v, Deadline.after(20)),
    "delete snapshot": lambda b, _v, s: b.delete_snapshot(s),
    "create group": lambda b, v, _s: b.create_group("another", [v], Deadline.after(20)),
    "get": lambda b, v, _s: b.get(v),
    "list": lambda b, _v, _s: b.list(),
    "snapshots": lambda b, _v, _s: b.snapshots(),
    "capacity": lambda b, _v, _s: b.available_bytes(),
    "attach": lambda b, v, _s: b.attach(v),
}
DIRECTORY: dict[str, Callable[[DirectoryBackend, str], object]] = {
    "create": lambda b, _v: b.create("other", SIZE, NONE, FILES),
    "delete": lambda b, v: b.delete(v),
    "expand": lambda b, v: b.expand(v, LARGER),
    "promise": lambda b, v: b.promise(v, LARGER),
    "get": lambda b, v: b.get(v),
    "list": lambda b, _v: b.list(),
    "capacity": lambda b, _v: b.available_bytes(),
    "attach": lambda b, v: b.attach(v),
}


@contextlib.contextmanager
def refusing(call: str, number: int, concerns: Callable[[str], bool]) -> Iterator[None]:
    """The call of `os` fails for such paths, and for descriptors of them."""
    real = getattr(os, call)

    def refused(*arguments: Any, **more: Any) -> Any:
        one = arguments[0] if arguments else ""
        if isinstance(one, int):
            with contextlib.suppress(OSError):
                one = os.readlink(f"/proc/self/fd/{one}")
        if isinstance(one, str) and concerns(one):
            given = arguments[0]
            raise OSError(number, os.strerror(number), *([given] if isinstance(given, str) else []))
        return real(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, refused)
        yield


def told(ask: Callable[[], object]) -> str | None:
    """What a caller reads; None where it went well."""
    try:
        ask()
    except Exception as error:
        assert code_of(error) is not grpc.StatusCode.INTERNAL, repr(error)
        return f"{code_of(error).name}: {sentence_of(error)}"
    return None


def each(ask: Callable[[], object], directory: str) -> Iterator[tuple[str, list[str | None]]]:
    """What is told of the call, several times, for each thing that can be refused."""
    for call in CALLS:
        for name in REFUSALS:
            with refusing(call, getattr(errno, name), lambda path: f"{path}/".startswith(f"{directory}/")):
                said = [told(ask) for _ in range(3)]
            yield f"{call} {name}", said


@pytest.mark.parametrize("verb", LOOP)
def test_no_refusal_of_the_disk_is_a_mistake_of_the_backend_loop(tmp_path: Path, verb: str) -> None:
    with contextlib.closing(LoopBackend(str(tmp_path / "state"))) as backend:
        made = {"volume": "", "snapshot": ""}

        def again() -> None:
            for _place, old in backend.list():
                backend.delete(old.volume_id)
            for _place, taken in backend.snapshots():
                backend.delete_snapshot(taken.snapshot_id)
            backend.recover()
            made["volume"] = backend.create("one", SIZE, {}, RAW).volume_id
            with open(backend.attach(made["volume"]).path, "r+b") as file:
                file.write(os.urandom(64 << 10))
            made["snapshot"] = backend.take_snapshot("s", made["volume"], Deadline.after(20)).snapshot_id

        again()
        for what, said in each(lambda: LOOP[verb](backend, made["volume"], made["snapshot"]), backend.directory):
            check(what, said, backend.directory, made.values())
            assert backend.create("beside", SIZE, {}, RAW)
            if verb not in READING:
                again()
            check_nothing_left(backend, what)


@pytest.mark.parametrize("verb", DIRECTORY)
def test_no_refusal_of_the_disk_is_a_mistake_of_the_backend_directory(tmp_path: Path, verb: str) -> None:
    with contextlib.closing(DirectoryBackend(str(tmp_path / "state"))) as backend:
        made = {"volume": ""}

        def again() -> None:
            for _place, old in backend.list():
                backend.delete(old.volume_id)
            backend.recover()
            made["volume"] = backend.create("one", SIZE, NONE, FILES).volume_id
            Path(backend.directory, made["volume"], "a file").touch()

        again()
        for what, said in each(lambda: DIRECTORY[verb](backend, made["volume"]), backend.directory):
            check(what, said, backend.directory, made.values())
            assert backend.create("beside", SIZE, NONE, FILES)
            if verb not in READING:
                again()
            check_nothing_left(backend, what)


def check(what: str, said: list[str | None], directory: str, made: Iterable[str]) -> None:
    """The same trouble is the same sentence, and names what the caller knows, or the directory."""
    assert said[1] == said[2], (what, said)
    for sentence in filter(None, said):
        named = directory in sentence or any(one in sentence for one in made)
        assert named or "the disk cannot take" in sentence or sentence.startswith("ABORTED: the volume was"), sentence
        assert not re.search(r"\.(new|snap-new)\b", sentence), (what, sentence)


def check_nothing_left(backend: LoopBackend | DirectoryBackend, what: str) -> None:
    """Where the kernel says that a file is not there, it is believed."""
    if not what.endswith("ENOENT"):
        assert not backend.unknown_files() and not backend.unfinished(), what
    for path in backend.unknown_files():
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


@pytest.mark.parametrize("name", ["EPERM", "EIO", "ENOENT", "ELOOP"])
def test_what_is_refused_of_one_file_is_no_other_volumes_trouble(tmp_path: Path, name: str, soon: Deadline) -> None:
    with contextlib.closing(LoopBackend(str(tmp_path / "state"))) as backend:
        bad, other = (backend.create(one, SIZE, {}, RAW).volume_id for one in ("bad", "other"))
        taken = backend.take_snapshot("of the bad one", bad, soon).snapshot_id
        backend.create("clone", SIZE, {}, RAW, ContentSource(kind="volume", source_id=bad))
        bad_files = (backend.attach(bad).path, backend.image_snapshots.path(taken))
        for call in CALLS:
            with refusing(call, getattr(errno, name), lambda path: path in bad_files):
                backend._room.forget()
                assert backend.available_bytes() > 0 and len(backend.list()) == 3
                made = backend.create("more", SIZE, {}, RAW).volume_id
                backend.expand(made, LARGER)
                snapshot = backend.take_snapshot("of it", made, soon).snapshot_id
                restored = backend.create("r", LARGER, {}, RAW, ContentSource(kind="snapshot", source_id=snapshot))
                assert backend.attach(other) and len(backend.snapshots()) == 2 and not backend.unfinished()
                backend.delete_snapshot(snapshot)
                backend.delete(restored.volume_id)
                backend.delete(made)


@pytest.mark.parametrize("name", ["EPERM", "EIO", "ENOENT", "ELOOP"])
def test_what_is_refused_of_one_directory_is_no_other_volumes_trouble(tmp_path: Path, name: str) -> None:
    with contextlib.closing(DirectoryBackend(str(tmp_path / "state"))) as backend:
        bad, stranger = backend.create("bad", SIZE, NONE, FILES).volume_id, Path(backend.directory, "somebody's")
        stranger.mkdir()
        backend._store._execute("UPDATE volumes SET parameters = '{}'", ())  # one with a quota
        bad_files = (os.path.join(backend.directory, bad), str(stranger))
        for call in CALLS:
            with refusing(call, getattr(errno, name), lambda path: path in bad_files):
                assert backend.available_bytes() > 0 and len(backend.list()) == 1
                made = backend.create("more", SIZE, NONE, FILES).volume_id
                backend.expand(made, LARGER)
                assert backend.attach(made)
                backend.delete(made)


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "link to itself", "directory"])
def test_what_lies_in_a_files_place_is_told_to_who_asks_for_it(tmp_path: Path, kind: str, soon: Deadline) -> None:
    with contextlib.closing(LoopBackend(str(tmp_path / "state"))) as backend:
        volume = backend.create("v", SIZE, {}, RAW).volume_id
        snapshot = backend.take_snapshot("s", volume, soon).snapshot_id
        for path in map(Path, (backend.attach(volume).path, backend.image_snapshots.path(snapshot))):
            path.unlink()
            if kind.endswith("fifo"):
                os.mkfifo(path if kind == "fifo" else tmp_path / path.name)
            if kind.startswith("link"):
                path.symlink_to(path if kind == "link to itself" else tmp_path / path.name)
            if kind == "directory":
                path.mkdir()
        of_snapshot, of_volume = (
            ContentSource(kind="snapshot", source_id=snapshot),
            ContentSource(kind="volume", source_id=volume),
        )
        for ask in (
            lambda: backend.attach(volume),
            lambda: backend.take_snapshot("t", volume, soon),
            lambda: backend.expand(volume, LARGER),
            lambda: backend.create("r", SIZE, {}, RAW, of_snapshot),
            lambda: backend.create("c", SIZE, {}, RAW, of_volume),
        ):
            said = told(ask)
            assert said is not None and said.startswith("FAILED_PRECONDITION") and backend.directory in said, said
        assert not backend.unknown_files() and backend.available_bytes() > 0
        for deleted, delete in ((volume, backend.delete), (snapshot, backend.delete_snapshot)):
            said = told(lambda: delete(deleted))  # noqa: B023
            assert (said is None) == (kind != "directory"), said


def test_a_file_that_cannot_be_looked_at_is_not_deleted_for_gone(tmp_path: Path) -> None:
    with contextlib.closing(LoopBackend(str(tmp_path / "state"))) as backend:
        volume = backend.create("v", SIZE, {}, RAW).volume_id
        path = backend.attach(volume).path
        with open(path, "r+b"), refusing("stat", errno.EIO, lambda one: one == path):
            said = told(lambda: backend.delete(volume))
        assert said is not None and said.startswith("UNAVAILABLE") and os.path.exists(path)
        backend._store._execute("UPDATE volumes SET state = 'creating'", ())  # as an older store has it
        with refusing("stat", errno.EIO, lambda one: one == path):
            assert backend.recover() == []
        assert backend.recover() == [f"finished creating volume {volume}"]


def test_a_disk_that_gives_errors_is_told_by_who_locks_on_it(tmp_path: Path) -> None:
    with contextlib.closing(LoopBackend(str(tmp_path / "state"))) as backend:
        backend.create("v", SIZE, {}, RAW)
        state = str(tmp_path / "state")
        with refusing("stat", errno.EIO, lambda one: one == state), refusing("listdir", errno.EIO, state.__eq__):
            said = told(lambda: backend.create("w", SIZE, {}, RAW))
        assert said == f"UNAVAILABLE: {state}/volumes.lock cannot be locked: Input/output error"
