"""Trees of files copied by tar, with progress: into an archive, out of one, or from one directory to another.

tar keeps owners, modes, times, links, sparse files and extended attributes, and is a process of its own: what hangs on
a dead server is not this one. Directories come as descriptors, so that nobody can put a link in their place. Below them
tar goes by names, and somebody may put a link where it has just made a directory: the one that writes is confined to
its directory, and the one that reads follows none.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

from blockdev import Deadline, confined, trees
from blockdev.errors import PathTooLong
from volumes.errors import NoSpace, StoreFailed
from volumes.jobs import Progress

_OPTIONS = ("--numeric-owner", "--xattrs", "--sparse", "--one-file-system", "-f", "-")
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_PART = 1 << 20
# Bytes of a directory's path, so that each file in it still has a path that the kernel takes: 4096 with the end, less
# the longest name. It bounds what an archive may spend on names, too.
_LONGEST = 4096 - 256 - len("./")


def pack(source: int, archive: IO[bytes], progress: Progress, *, without: Sequence[str] = ()) -> None:
    """All that is in the directory `source`, as an archive. Files that change meanwhile are as they were when read.

    `without` are names at the top that are left out. PathTooLong for what could not be unpacked again.
    """
    _check_paths(source, progress)
    progress.total = _size(source)
    with _reading(source, without) as tar:
        _pump(tar.pipe, archive, progress)


def unpack(archive: IO[bytes], target: int, progress: Progress) -> None:
    """An archive's content into the empty directory `target`."""
    progress.total = os.fstat(archive.fileno()).st_size
    with _writing(target) as tar:
        _pump(archive, tar.pipe, progress)


def copy(source: int, target: int, progress: Progress, *, without: Sequence[str] = ()) -> None:
    """All that is in the directory `source`, into the empty directory `target`. PathTooLong."""
    _check_paths(source, progress)
    progress.total = _size(source)
    with _writing(target) as writing, _reading(source, without) as reading:
        _pump(reading.pipe, writing.pipe, progress)


def _reading(directory: int, without: Sequence[str]) -> _Tar:
    place = ("-C", f"/proc/self/fd/{directory}")
    excluded = [f"--exclude=./{name}" for name in without]
    command = ["tar", *_OPTIONS, *place, "-c", "--anchored", "--no-wildcards", *excluded, "."]
    return _Tar(command, directory, stdout=subprocess.PIPE, tolerated=1)


def _writing(directory: int) -> _Tar:
    tar = shutil.which("tar", path=_ENVIRONMENT["PATH"])
    if tar is None:
        raise StoreFailed("the program tar is not installed on this node; install the package that has it")
    return _Tar(confined.command(tar, directory, *_OPTIONS, "-x", "-p"), directory, stdin=subprocess.PIPE)


class _Tar:
    """One tar in a directory; StoreFailed or NoSpace with its words at the end unless it ended well."""

    def __init__(
        self, command: Sequence[str], directory: int, *, stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL, tolerated: int = 0,
    ) -> None:  # fmt: skip
        self._tolerated = tolerated
        with ExitStack() as stack:
            self._said = stack.enter_context(tempfile.TemporaryFile())
            self.process = subprocess.Popen(
                command, pass_fds=[directory], env=_ENVIRONMENT, stdin=stdin, stdout=stdout, stderr=self._said,
                start_new_session=True,
            )  # fmt: skip
            stack.pop_all()

    @property
    def pipe(self) -> IO[bytes]:
        """Where its archive comes out, or goes in."""
        pipe = self.process.stdin or self.process.stdout
        if pipe is None:
            raise StoreFailed("tar has no pipe")
        return pipe

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """The tar that is written to tells why it took no more; one that is read from is only ended."""
        with self._said:
            broken = isinstance(error, BrokenPipeError) and self.process.stdin is not None
            if error is not None and not broken:
                self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            status = self.process.wait()
            if error is not None and not broken:
                return
            if not 0 <= status <= self._tolerated or broken:
                self._said.seek(0)
                words = self._said.read(2000).decode("utf-8", "replace").strip()
                if status == confined.FAILED:
                    raise StoreFailed(f"tar: {words}")
                if "No space left" in words or "quota exceeded" in words:
                    raise NoSpace(f"tar: {words}")
                if "File name too long" in words:  # in an archive that an earlier release has made
                    raise PathTooLong("unpacking", words, _LONGEST)
                raise StoreFailed(f"tar ended with status {status}: {words}")


def _pump(source: IO[bytes], target: IO[bytes], progress: Progress) -> None:
    while data := source.read(_PART):
        target.write(data)
        progress.add(len(data))
    target.flush()


def _check_paths(directory: int, progress: Progress) -> None:
    # It ends with whoever wants it, not after some time: the work goes on behind the calls.
    for _part in trees.walk(directory, progress.what, Deadline.after(math.inf), longest=_LONGEST):
        progress.add(0)


def _size(directory: int) -> int:
    done = subprocess.run(
        ["du", "-s", "-x", "-B1", "--apparent-size", f"/proc/self/fd/{directory}/."], env=_ENVIRONMENT,
        pass_fds=[directory], capture_output=True, check=False,
    )  # fmt: skip
    words = done.stdout.split()
    return int(words[0]) if words and words[0].isdigit() else 0
