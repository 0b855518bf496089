"""What can go wrong with a device, in the sentences that a person reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass


class BlockdevError(Exception):
    """Root of this room's errors. `str()` is the sentence for the user."""


class WaitExpired(BlockdevError):
    """Something did not end in the time that the call had."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what} did not end within {seconds:.1f} s")


_LONGEST = 1500


def shortened(text: str) -> str:
    """What a program has said, for a sentence: its beginning and its end, where there is very much of it."""
    text = text.strip()
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2].rstrip()} … {text[-_LONGEST // 2 :].lstrip()}"


class CommandFailed(BlockdevError):
    """A program of the system refused; `code` is its exit status."""

    def __init__(self, program: str, code: int, output: str) -> None:
        self.program, self.code, self.output = program, code, output
        super().__init__(f"{program} ended with status {code}: {shortened(output) or 'no message'}")


class CommandMissing(BlockdevError):
    """A program of the system is not installed."""

    def __init__(self, program: str) -> None:
        super().__init__(f"the program {program} is not installed on this node; install the package that has it")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that has a device or its backing file open."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class DeviceBusy(BlockdevError):
    """Somebody else uses the device, or may use it."""

    def __init__(self, path: str, why: str, holders: Sequence[Holder] = ()) -> None:
        self.path, self.why, self.holders = path, why, tuple(holders)
        by = f"; held by {', '.join(map(str, holders))}" if holders else ""
        super().__init__(f"{path} is in use: {why}{by}")


class NotBlank(BlockdevError):
    """A device that was to be formatted holds something."""

    def __init__(self, path: str, found: str) -> None:
        super().__init__(f"{path} is not blank ({found}); it is not formatted over. Wipe it, or use another volume")


class WrongFilesystem(BlockdevError):
    """The filesystem on the device is not the one that was asked for."""

    def __init__(self, path: str, found: str, wanted: str) -> None:
        super().__init__(f"{path} holds {found}, but {wanted} was asked for; ask for fsType {found}, or another volume")


class FilesystemDamaged(BlockdevError):
    """fsck could not put it right by itself."""

    def __init__(self, path: str, report: str) -> None:
        super().__init__(f"the filesystem on {path} needs a person: {shortened(report)}. Run fsck on it by hand")


class MountFailed(BlockdevError):
    """mount(2), or one of its newer relatives, refused."""

    def __init__(self, source: str, target: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"mounting {source} on {target}: {reason}")


class FilesystemUnknown(MountFailed):
    """The kernel has no such filesystem, or not loaded its module."""

    def __init__(self, source: str, fstype: str, reason: str) -> None:
        super().__init__(source, "nowhere", f"this kernel has no {fstype} ({reason}); load its module")


class NoFile(BlockdevError):
    """Something lies in the place of a file: a FIFO, a directory, a node."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is no regular file; put the file back that belongs there, or remove what lies there")


class TooDeep(BlockdevError):
    """Directories are nested deeper than anything is looked for."""

    def __init__(self, what: str, deepest: int) -> None:
        super().__init__(f"{what}: it nests more than {deepest} directories in one another")


class PathTooLong(BlockdevError):
    """A directory's path is longer than programs can take that go by names."""

    def __init__(self, what: str, path: str, most: int) -> None:
        super().__init__(
            f"{what}: the path of the directory {path[:100]!r}... in it is longer than {most} bytes, which tar cannot "
            "unpack again; move what lies there to a shorter path, or remove it"
        )


class NotRemoved(BlockdevError):
    """Something in a directory tree that is to go does not."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name[:200]!r} cannot be removed: {why}")


class CapabilityMissing(BlockdevError):
    """The kernel wants a capability that this process was not given."""

    def __init__(self, what: str, capability: str) -> None:
        super().__init__(f"{what} needs {capability}, which the node plugin was started without; add it")


def of_system(error: OSError) -> str:
    """An answer of the kernel's in words: the path, and why."""
    # Some are raised with a text alone.
    why = "exists already" if error.errno == errno.EEXIST else (error.strerror or str(error) or type(error).__name__)
    why = why[:1].lower() + why[1:] if why[1:2].islower() else why
    places = " to ".join(os.fsdecode(one) for one in (error.filename, error.filename2) if isinstance(one, str | bytes))
    return f"{places}: {why}" if places else why
