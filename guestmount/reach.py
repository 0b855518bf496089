"""Whether what is mounted under kubelet's directory is mounted for kubelet too.

A plugin in a mount namespace of its own whose copy of that directory propagates nothing back answers OK, and every pod
of the node then writes to the host's disk (a DaemonSet without `mountPropagation: Bidirectional`, a unit with private
mounts). In kubelet's own namespace there is nothing to prove. Elsewhere the mount that covers the directory must be of
the same peer group there, and show the same part of the same filesystem (mount_namespaces(7), proc(5) on mountinfo).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockdev import mountinfo, syscalls
from blockdev.mountinfo import Mount
from guestmount.errors import Refused

# include/uapi/linux/nsfs.h
_PIDS_OF_ALL, _FIRST_MOUNT_NAMESPACE = f"pid:[{0xEFFFFFFC}]", 0xEFFFFFF8
# Seconds for which a proof counts.
_VALID = 10.0
_SETTING = "node.kubelet_process"


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Why mounts may not reach kubelet. `certain`: they do not; else it cannot be found out from here."""

    why: str
    certain: bool


@dataclass(kw_only=True)
class Reach:
    """The proof for kubelet's directories, made anew when a namespace or a mount is another one.

    `process`: one in kubelet's mount namespace, as a process id or a program's name. `unproved`: what cannot be found
    out is allowed.
    """

    roots: Sequence[str]
    process: str = "1"
    unproved: bool = False
    _proved: tuple[object, ...] = field(default=(), init=False)
    _until: float = field(default=0.0, init=False)

    def check(self) -> None:
        """Refused, naming what to change, unless mounts reach kubelet."""
        doubt = self.doubt()
        if doubt is None or (self.unproved and not doubt.certain):
            return
        advice = (
            "give the plugin's container mountPropagation: Bidirectional on that directory, and a systemd unit no "
            "mounts of its own"
        )
        if not doubt.certain:
            advice += (
                f"; or let it see kubelet's process (hostPID; setting {_SETTING}), or set node.unproved_mounts = allow"
            )
        raise Refused(f"what is mounted here may not reach kubelet, and pods would write to the host's disk: "
                      f"{doubt.why}; {advice}")  # fmt: skip

    def doubt(self) -> Doubt | None:
        """What stands against it; None if mounts reach kubelet."""
        pid = self._pid()
        own = os.readlink("/proc/self/ns/mnt")
        theirs = _namespace(pid)
        if own == theirs:
            return None
        state = (own, theirs, *(_mount_id(root) for root in self.roots))
        if theirs and state == self._proved and time.monotonic() < self._until:
            return None
        found = self._look(pid if theirs else 0)
        self._proved = state if found is None else ()
        self._until = time.monotonic() + _VALID  # propagation may be changed at any time, and no number tells
        return found

    def is_beside(self, pid: int) -> bool:
        """Whether the process is root's, outside of every container, and in kubelet's mount namespace."""
        theirs = _namespace(self._pid())
        return bool(theirs) and _namespace(pid) == theirs and _is_of_node(pid)

    def _pid(self) -> int:
        """The process that stands for kubelet's namespace; 0 if there is none."""
        if self.process.isdecimal():
            return int(self.process)
        named = [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_named(int(name), self.process)]
        # Any container may have a process of that name; kubelet is root's, outside of every container.
        return min((pid for pid in named if _is_of_node(pid)), default=0)

    def _look(self, pid: int) -> Doubt | None:
        own, theirs = mountinfo.table(), None
        with contextlib.suppress(OSError):
            theirs = mountinfo.table(pid) if pid else None
        if theirs is None:
            why = f"the mounts of kubelet's process ({_SETTING} = {self.process}) cannot be read"
            return Doubt(why=why, certain=False)
        for root in self.roots:
            path = os.path.realpath(root)
            here, there = mountinfo.covering(path, own), mountinfo.covering(path, theirs)
            if here is None or not here.peers:
                why = f"the mount that covers {root} propagates nothing out of this mount namespace"
                return Doubt(why=why, certain=True)
            if there is None or there.peers != here.peers or _part(path, here) != _part(path, there):
                why = f"{root} lies on another mount here than for kubelet ({_SETTING} = {self.process})"
                return Doubt(why=why, certain=True)
        return None


def _is_named(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as comm:
        return comm.read().strip() == name
    return False


def _is_of_node(pid: int) -> bool:
    """Whether the process is root's and sees all processes that the node's first one sees."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == 0 and os.readlink(f"/proc/{pid}/ns/pid") == _pids_of_first()
    except OSError:
        return False


def _pids_of_first() -> str:
    """The process namespace of the first process, which may not be looked at by everyone."""
    try:
        return os.readlink("/proc/1/ns/pid")
    except OSError:
        return _PIDS_OF_ALL if os.readlink("/proc/self/ns/pid") == _PIDS_OF_ALL else ""


def _namespace(pid: int) -> str:
    """The mount namespace of a process; empty if it cannot be found out.

    The first process of a container sees nobody else, kubelet least of all, so it proves nothing about itself. The
    first of all may not be looked at by everyone, but its namespace has a number of its own since Linux 6.17.
    """
    if pid in (0, os.getpid()):
        return ""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        pass
    first = pid == 1 and os.readlink("/proc/self/ns/pid") == _PIDS_OF_ALL
    return f"mnt:[{_FIRST_MOUNT_NAMESPACE}]" if first else ""


def _part(path: str, mount: Mount) -> tuple[tuple[int, int], str]:
    """Which directory of which filesystem a path is, by the mount that covers it."""
    inside = os.path.relpath(path, mount.target)
    return mount.device, os.path.normpath(os.path.join(mount.root, inside))


def _mount_id(path: str) -> int:
    try:
        return syscalls.statx(os.path.realpath(path)).mount_id
    except FileNotFoundError:
        return 0
