"""What is done on its server for a volume that its context describes, before a mount: its directory, its modes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from blockdev import Deadline, nfs, trees
from blockdev.errors import MountFailed
from volumes import share
from volumes.errors import InvalidParameter
from volumes.model import NfsSource

# Directories above a path that are looked for on the server.
_MOST_ABOVE = 64


def make_path(source: NfsSource, deadline: Deadline) -> None:
    """The directory is on its server: what is missing of the path is made in the lowest one above that can be mounted.
    Links on the way are none. The last is for everybody, as a volume's directory is. ServerSilent, MountFailed,
    InvalidParameter."""
    path, missing = source.path, list[str]()
    first: MountFailed | None = None
    while len(missing) <= _MOST_ABOVE:
        export = _export(source, path)
        try:
            with nfs.opened(export, deadline) as root:
                if missing:
                    with _refused(export, "makePath", "true", "make the path first, or leave `makePath` out"):
                        _make(root, "/".join(missing))
                return
        except MountFailed as error:
            first = first or error
            if path == "/":
                break
            path, _, name = path.rpartition("/")
            path, missing = path or "/", [name, *missing] if name else missing
    raise first or MountFailed(_export(source, source.path).source, "nowhere", "the path is too deep to be made")


def _make(root: int, below: str) -> None:
    with share.parent(root, below, made=True) as (fd, name):
        try:
            os.mkdir(name, 0o777, dir_fd=fd)
        except FileExistsError:
            return  # it is there, and was not let in; the mount says why
        share.chmod(fd, name, 0o777)


def set_mode(source: NfsSource, mode: int, deadline: Deadline, *, recursive: bool) -> None:
    """Give an export's directory these permissions, and with `recursive` what it holds: directories the same, files
    without the bits for execution. Links are left alone. ServerSilent, MountFailed, InvalidParameter, OSError."""
    export = _export(source, source.path)
    with (
        nfs.opened(export, deadline) as root,
        _refused(export, "mode", f"{mode:04o}", "leave `mode` out"),
    ):
        os.chmod(f"/proc/self/fd/{root}", mode)
        if not recursive:
            return
        for fd, directories, files in trees.walk(root, f"setting mode {mode:o} below {export.source}", deadline):
            for name, wanted in [*((name, mode) for name in directories), *((name, mode & 0o666) for name in files)]:
                with contextlib.suppress(FileNotFoundError):
                    share.chmod(fd, name, wanted)


def _export(source: NfsSource, path: str) -> nfs.Export:
    return nfs.Export(server=source.server, path=path, version=source.version, options=source.options)


@contextlib.contextmanager
def _refused(export: nfs.Export, parameter: str, value: str, remedy: str) -> Iterator[None]:
    """InvalidParameter where the server does not let this node do it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EROFS):
            raise
        why = f"{export.source} does not let this node do it ({error.strerror}; root_squash?); {remedy}"
        raise InvalidParameter(parameter, value, why) from None
