"""The kernel's mount table, for those who must name what is mounted; the only parser of it.

Format: proc(5), /proc/[pid]/mountinfo. Who only asks whether one path is a mount point uses
`syscalls.statx`, whose cost does not grow with the table.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One line of the table."""

    mount_id: int
    device: tuple[int, int]
    root: str
    target: str
    options: tuple[str, ...]
    fstype: str
    source: str
    super_options: tuple[str, ...]
    # The peer group that mounts made here propagate to; 0 for none.
    peers: int = 0

    @property
    def read_only(self) -> bool:
        """Of the mount or of its filesystem."""
        return "ro" in self.options or "ro" in self.super_options


def parse(line: str) -> Mount:
    """One line; optional fields end at a lone dash, and octal escapes are undone."""
    fields = line.rstrip("\n").split(" ")
    dash = fields.index("-", 6)
    major, minor = fields[2].split(":")
    fstype, source, super_options = fields[dash + 1 : dash + 4]
    return Mount(
        mount_id=int(fields[0]),
        device=(int(major), int(minor)),
        root=_unescape(fields[3]),
        target=_unescape(fields[4]),
        options=tuple(fields[5].split(",")),
        fstype=fstype,
        source=_unescape(source),
        super_options=tuple(super_options.split(",")),
        peers=next((int(word[7:]) for word in fields[6:dash] if word.startswith("shared:")), 0),
    )


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    head, *rest = os.fsencode(text).split(b"\\")
    return os.fsdecode(head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest))


def table(pid: int | str = "self") -> list[Mount]:
    """What the process sees, in the order of mounting."""
    with open(f"/proc/{pid}/mountinfo", errors="surrogateescape") as lines:
        return [parse(line) for line in lines]


def at(target: str) -> Mount | None:
    """What is mounted on `target`, the last of several; nothing there is touched."""
    return next((mount for mount in reversed(table()) if mount.target == target), None)


def covering(path: str, mounts: list[Mount]) -> Mount | None:
    """The mount of a table that `path` lies on: the last one made at the longest path above it."""
    found = None
    for mount in mounts:
        place = mount.target.rstrip("/")
        if (path == place or path.startswith(f"{place}/")) and (
            found is None or len(mount.target) >= len(found.target)
        ):
            found = mount
    return found


def other_namespaces() -> Iterator[tuple[int, list[Mount]]]:
    """One process and its table for every mount namespace that this process may look at, its own left out.

    A filesystem that hangs in a namespace of somebody's own is invisible in ours and keeps the device all the same.
    """
    seen = {os.readlink("/proc/self/ns/mnt")}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            yield int(name), table(name)
        except OSError:
            continue


def node_targets(device: str, mounts: Sequence[Mount] | None = None) -> list[str]:
    """Where the node of a block device is bound as a file, in this namespace, under whatever name it had. `mounts`: the
    table, where the caller has read it."""
    try:
        wanted = os.stat(device).st_rdev
    except FileNotFoundError:
        return []
    found = []
    for mount in table() if mounts is None else mounts:
        if mount.root != "/" and mount.fstype in ("devtmpfs", "tmpfs"):
            with contextlib.suppress(OSError):
                facts = os.stat(mount.target)
                if stat.S_ISBLK(facts.st_mode) and facts.st_rdev == wanted:
                    found.append(mount.target)
    return found


def may_be_bound(device: str) -> bool:
    """Whether a node of the device's name may be bound somewhere in this namespace: quickly, among any number of
    mounts. `node_targets` says where."""
    with open("/proc/self/mountinfo", "rb") as table_:
        return f"/{os.path.basename(device)} /".encode() in table_.read()


def mounts_of(device: tuple[int, int]) -> list[Mount]:
    """Where the block device is mounted, in this namespace."""
    return [mount for mount in table() if mount.device == device]


def mounted_elsewhere(device: tuple[int, int]) -> list[tuple[int, Mount]]:
    """The same in the other namespaces, each with a process that sees it."""
    return [(pid, mount) for pid, mounts in other_namespaces() for mount in mounts if mount.device == device]
